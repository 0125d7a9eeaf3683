package userpath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// patience bounds every wait of these tests.
const patience = 20 * time.Second

// ending is what a recorder was told at the end.
type ending struct {
	counts flow.Counts
	result flow.Result
	reason string
}

// recorder stands in for the engine's takeover.
type recorder struct {
	tb          testing.TB
	kill, over  chan struct{}
	ended       chan ending
	endings     atomic.Int32
	established atomic.Int32
	name, peer  netip.AddrPort
}

func newRecorder(tb testing.TB) *recorder {
	return &recorder{tb: tb, kill: make(chan struct{}), over: make(chan struct{}), ended: make(chan ending, 1)}
}

func (r *recorder) Conn() filterapi.Connection          { return nil }
func (r *recorder) Connected(name, peer netip.AddrPort) { r.name, r.peer = name, peer }
func (r *recorder) Established()                        { r.established.Add(1) }
func (r *recorder) Ended(c flow.Counts, res flow.Result, reason string) {
	if r.endings.Add(1) > 1 {
		r.tb.Errorf("Ended called again: %v %q", res, reason)
		return
	}
	r.ended <- ending{c, res, reason}
	close(r.over)
}

// CarriedBy has the flow end when kill is closed.
func (r *recorder) CarriedBy(c engine.Carrier) {
	go func() {
		select {
		case <-r.kill:
			c.Cut()
		case <-r.over:
		}
	}()
}

func (r *recorder) wait() ending {
	r.tb.Helper()
	select {
	case e := <-r.ended:
		return e
	case <-time.After(patience):
		r.tb.Fatal("the flow did not end")
		return ending{}
	}
}

// runTCP runs a TCP without listeners until the test's end.
func runTCP(tb testing.TB, change func(*TCPConfig)) *TCP {
	tb.Helper()
	cfg := TCPConfig{Log: zap.NewNop(), Loops: 2}
	if change != nil {
		change(&cfg)
	}
	t, err := newTCP(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	start(tb, t)
	return t
}

func start(tb testing.TB, t *TCP) {
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- t.Run(ctx) }()
	tb.Cleanup(func() {
		cancel()
		select {
		case err := <-ran:
			if err != nil {
				tb.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			tb.Error("Run did not return")
		}
	})
}

// tcpPair gives the two ends of a connection on loopback. The second is a
// bare non-blocking descriptor.
func tcpPair(tb testing.TB) (*net.TCPConn, int) {
	tb.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	s, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	defer s.Close()
	file, err := s.(*net.TCPConn).File()
	if err != nil {
		tb.Fatal(err)
	}
	defer file.Close()
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn), fd
}

// heldSYN is a first packet whose answer somebody waits for.
type heldSYN chan flow.Path

func (h heldSYN) Answer(p flow.Path) { h <- p }
func (h heldSYN) Release()           {}

// takeOverNow begins a flow and waits for its answer; the packet is lost with
// ctx, or, at its deadline, the dial has taken too long.
func (t *TCP) takeOverNow(ctx context.Context, job tcpJob) flow.Path {
	held := make(heldSYN, 1)
	job.held = held
	if at, ok := ctx.Deadline(); ok {
		job.within = time.Until(at)
	}
	d := t.takeOver(job)
	for done := ctx.Done(); ; {
		select {
		case p := <-held:
			return p
		case <-done:
			done = nil
			if ctx.Err() == context.Canceled && d != nil {
				d.Lost()
			}
		}
	}
}

// carried is a flow between two sockets of the test.
type carried struct {
	*recorder
	flow           *tcpFlow
	client, server *net.TCPConn
	initFD, farFD  int
}

// carry begins a flow on connected sockets, as if it had been dialled.
func carry(tb testing.TB, t *TCP, outside bool, filters ...filterapi.DataFilter) *carried {
	tb.Helper()
	c := &carried{recorder: newRecorder(tb)}
	c.client, c.initFD = tcpPair(tb)
	c.server, c.farFD = tcpPair(tb)
	job := tcpJob{takeover: c.recorder, initiatorExternal: outside}
	for i, f := range filters {
		job.chain = append(job.chain, engine.Link{Filter: f, Name: fmt.Sprintf("f%d", i)})
	}
	job.dialled = make(chan error, 1)
	f, err := t.begin(job, -1, c.farFD)
	if err != nil {
		tb.Fatal(err)
	}
	f.job.CarriedBy(f)
	if err := f.loop.watch(f, sideFar); err != nil {
		tb.Fatal(err)
	}
	if err := <-job.dialled; err != nil {
		tb.Fatal(err)
	}
	if !f.arrived(c.initFD) {
		tb.Fatal("the flow is over before it began")
	}
	c.flow = f
	return c
}

// passer is a filter that hands every buffer on.
type passer struct{}

func (passer) Pump(ctx context.Context, _ filterapi.Connection, in, out filterapi.Socket) error {
	return passBoth(in, out, nil)
}

// passBoth hands buffers on both ways until both ends are done. change, if not
// nil, may change each of them.
func passBoth(in, out filterapi.Socket, change func(outwards bool, b *filterapi.Buffer)) error {
	errs := make(chan error, 2)
	way := func(dst, src filterapi.Socket, outwards bool) {
		for {
			b, err := src.Recv()
			if err == io.EOF {
				errs <- dst.Shutdown(false)
				return
			}
			if err == nil {
				if change != nil {
					change(outwards, b)
				}
				err = dst.Send(b)
			}
			if err != nil {
				errs <- err
				in.Close(true)
				out.Close(true)
				return
			}
		}
	}
	go way(out, in, true)
	go way(in, out, false)
	return errors.Join(<-errs, <-errs)
}

type pumpFunc func(ctx context.Context, in, out filterapi.Socket) error

func (p pumpFunc) Pump(ctx context.Context, _ filterapi.Connection, in, out filterapi.Socket) error {
	return p(ctx, in, out)
}

// chains are the ways to carry that most tests go through.
var chains = map[string]func() []filterapi.DataFilter{
	"spliced":      func() []filterapi.DataFilter { return nil },
	"one filter":   func() []filterapi.DataFilter { return []filterapi.DataFilter{passer{}} },
	"three":        func() []filterapi.DataFilter { return []filterapi.DataFilter{passer{}, passer{}, passer{}} },
	"all released": func() []filterapi.DataFilter { return []filterapi.DataFilter{releaser{}, releaser{}} },
	"one released": func() []filterapi.DataFilter { return []filterapi.DataFilter{passer{}, releaser{}, passer{}} },
}

type releaser struct{}

func (releaser) Pump(context.Context, filterapi.Connection, filterapi.Socket, filterapi.Socket) error {
	return filterapi.ErrReleased
}

// eachChain runs a test with every kind of chain, in both directions.
func eachChain(t *testing.T, test func(t *testing.T, c *carried)) {
	for name, filters := range chains {
		for _, outside := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, inbound %v", name, outside), func(t *testing.T) {
				t.Parallel()
				test(t, carry(t, runTCP(t, nil), outside, filters()...))
			})
		}
	}
}

func mustWrite(t *testing.T, w io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t *testing.T, c *net.TCPConn, want string) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got, err, want)
	}
}

func mustEnd(t *testing.T, c *net.TCPConn, want error) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, want) {
		t.Fatalf("read %d bytes, %v; want %v", n, err, want)
	}
}
