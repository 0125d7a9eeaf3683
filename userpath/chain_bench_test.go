package userpath

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
)

// The lengths of chain that are compared with the first.
var benchChains = []int{0, 1, 3, 7}

const (
	benchRounds = 7
	benchTurn   = 400 * time.Millisecond
)

// BenchmarkChain is what pass-through filters cost: a stream through each
// length of chain in turns that change their order, in the medians of what the
// rounds say. The two ends are in a process of their own, so that the processor
// time is the gateway's.
func BenchmarkChain(b *testing.B) {
	const env = "SLUICE_CHAIN_LOAD"
	if at := os.Getenv(env); at != "" {
		chainLoad(b, at)
		return
	}
	t := runTCP(b, nil)
	var rates, costs, ratios [8][]float64
	for round := range benchRounds {
		var rate [8]float64
		for i := range benchChains {
			n := benchChains[(i+round)%len(benchChains)]
			bytes, cpu := chainTurn(b, t, n, env)
			rate[n] = bytes / benchTurn.Seconds()
			rates[n] = append(rates[n], rate[n]*8e-9)
			costs[n] = append(costs[n], cpu.Seconds()/bytes*(1<<30))
		}
		for _, n := range benchChains {
			ratios[n] = append(ratios[n], rate[n]/rate[0])
		}
	}
	for _, n := range benchChains {
		b.ReportMetric(middle(rates[n]), fmt.Sprintf("Gbit/s-%d", n))
		b.ReportMetric(middle(costs[n]), fmt.Sprintf("CPU-s/GiB-%d", n))
		b.ReportMetric(middle(ratios[n]), fmt.Sprintf("ratio-%d", n))
	}
}

func middle(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// chainTurn measures one stream through n filters.
func chainTurn(b *testing.B, t *TCP, n int, env string) (bytes float64, cpu time.Duration) {
	b.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	load := exec.Command("/proc/self/exe", "-test.run=^$", "-test.bench=^BenchmarkChain$", "-test.benchtime=1x", "-test.timeout=60s")
	load.Env = append(os.Environ(), env+"="+l.Addr().String())
	var out strings.Builder
	load.Stdout, load.Stderr = &out, &out
	if err := load.Start(); err != nil {
		b.Fatal(err)
	}
	client, server := bareAccept(b, l), bareAccept(b, l)
	var job tcpJob
	for i := range n {
		job.chain = append(job.chain, engine.Link{Filter: filterapi.DataFilter(passer{}), Name: fmt.Sprint(i)})
	}
	before := cpuTime(b)
	job.dialled = make(chan error, 1)
	rec := newRecorder(b)
	job.takeover = rec
	f, err := t.begin(job, -1, server)
	if err != nil {
		b.Fatal(err)
	}
	if err := f.watchFar(); err != nil {
		b.Fatal(err)
	}
	if err := <-job.dialled; err != nil || !f.arrived(client) {
		b.Fatal("the flow is over before it began")
	}
	if err := load.Wait(); err != nil {
		b.Fatalf("%v\n%s", err, out.String())
	}
	rec.wait()
	return float64(f.sent.Load()), cpuTime(b) - before
}

// chainLoad is both ends of the stream: it writes for a while to the first
// connection and reads from the second what has passed.
func chainLoad(b *testing.B, at string) {
	dial := func() *net.TCPConn {
		c, err := net.Dial("tcp4", at)
		if err != nil {
			b.Fatal(err)
		}
		return c.(*net.TCPConn)
	}
	client := dial()
	server := dial()
	passed := make(chan error, 1)
	go func() {
		_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{server}, make([]byte, 256<<10))
		passed <- err
	}()
	piece := make([]byte, 256<<10)
	for end := time.Now().Add(benchTurn); time.Now().Before(end); {
		if _, err := client.Write(piece); err != nil {
			b.Fatal(err)
		}
	}
	client.CloseWrite()
	if err := <-passed; err != nil {
		b.Fatal(err)
	}
	server.Close()
	_, _ = io.Copy(io.Discard, client)
}

// bareAccept gives a connection as a non-blocking descriptor.
func bareAccept(b *testing.B, l net.Listener) int {
	b.Helper()
	c, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	file, err := c.(*net.TCPConn).File()
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		b.Fatal(err)
	}
	return fd
}

// cpuTime is this process's processor time.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
