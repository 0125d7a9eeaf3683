package userpath

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"sync"
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
	tb         testing.TB
	kill       chan struct{}
	ended      chan ending
	endings    atomic.Int32
	name, peer netip.AddrPort
}

func newRecorder(tb testing.TB) *recorder {
	return &recorder{tb: tb, kill: make(chan struct{}), ended: make(chan ending, 1)}
}

func (r *recorder) Conn() filterapi.Connection          { return nil }
func (r *recorder) Connected(name, peer netip.AddrPort) { r.name, r.peer = name, peer }
func (r *recorder) Killed() <-chan struct{}             { return r.kill }
func (r *recorder) Ended(c flow.Counts, res flow.Result, reason string) {
	if r.endings.Add(1) > 1 {
		r.tb.Errorf("Ended called again: %v %q", res, reason)
		return
	}
	r.ended <- ending{c, res, reason}
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
	f, err := t.begin(job, c.farFD)
	if err != nil {
		tb.Fatal(err)
	}
	t.stats.flows.Add(1)
	if err := f.loop.watch(f, sideFar); err != nil {
		tb.Fatal(err)
	}
	if err := <-f.dialled; err != nil {
		tb.Fatal(err)
	}
	if !f.arrived(c.initFD) {
		tb.Fatal("the flow is over before it began")
	}
	go f.follow()
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

func TestHalfCloseLeavesTheOtherDirection(t *testing.T) {
	eachChain(t, func(t *testing.T, c *carried) {
		mustWrite(t, c.client, "question")
		c.client.CloseWrite()
		mustRead(t, c.server, "question")
		mustEnd(t, c.server, io.EOF)
		mustWrite(t, c.server, "a late answer")
		mustRead(t, c.client, "a late answer")
		c.server.CloseWrite()
		mustEnd(t, c.client, io.EOF)
		if e := c.wait(); e.result != flow.Closed || e.counts.OutBytes != 8 || e.counts.InBytes != 13 {
			t.Errorf("ended %+v, want closed with 8 out and 13 in", e)
		}
	})
	eachChain(t, func(t *testing.T, c *carried) {
		mustWrite(t, c.server, "banner")
		c.server.CloseWrite()
		mustRead(t, c.client, "banner")
		mustEnd(t, c.client, io.EOF)
		mustWrite(t, c.client, "bye")
		c.client.Close()
		mustRead(t, c.server, "bye")
		mustEnd(t, c.server, io.EOF)
		if e := c.wait(); e.result != flow.Closed {
			t.Errorf("ended %+v, want closed", e)
		}
	})
}

func TestResetPassesWhenIdle(t *testing.T) {
	eachChain(t, func(t *testing.T, c *carried) {
		mustWrite(t, c.client, "x")
		mustRead(t, c.server, "x")
		c.client.SetLinger(0)
		c.client.Close()
		mustEnd(t, c.server, unix.ECONNRESET)
		if e := c.wait(); e.result != flow.Reset {
			t.Errorf("ended %+v, want reset", e)
		}
	})
	eachChain(t, func(t *testing.T, c *carried) {
		mustWrite(t, c.server, "x")
		mustRead(t, c.client, "x")
		c.server.SetLinger(0)
		c.server.Close()
		mustEnd(t, c.client, unix.ECONNRESET)
		if e := c.wait(); e.result != flow.Reset {
			t.Errorf("ended %+v, want reset", e)
		}
	})
}

// fill writes until nothing is taken any more.
func fill(t *testing.T, c *net.TCPConn) (sent int) {
	t.Helper()
	piece := make([]byte, 64<<10)
	for {
		c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		n, err := c.Write(piece)
		sent += n
		if err != nil {
			return sent
		}
	}
}

// drainToError reads what came before the end, and gives the end.
func drainToError(c *net.TCPConn) error {
	c.SetReadDeadline(time.Now().Add(patience))
	_, err := io.Copy(io.Discard, struct{ io.Reader }{c})
	return err
}

func TestResetPassesWhileBlockedInAWrite(t *testing.T) {
	eachChain(t, func(t *testing.T, c *carried) {
		// The client sends and the server does not read; then the server
		// resets, or the client does.
		fill(t, c.client)
		c.server.SetLinger(0)
		c.server.Close()
		if err := drainToError(c.client); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("client: %v, want a reset", err)
		}
		if e := c.wait(); e.result != flow.Reset {
			t.Errorf("ended %+v, want reset", e)
		}
	})
	eachChain(t, func(t *testing.T, c *carried) {
		fill(t, c.client)
		c.client.SetLinger(0)
		c.client.Close()
		if e := c.wait(); e.result != flow.Reset {
			t.Errorf("ended %+v, want reset", e)
		}
		if err := drainToError(c.server); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("server: %v, want a reset", err)
		}
	})
}

func TestKillResetsBothEnds(t *testing.T) {
	eachChain(t, func(t *testing.T, c *carried) {
		mustWrite(t, c.client, "x")
		mustRead(t, c.server, "x")
		close(c.kill)
		mustEnd(t, c.client, unix.ECONNRESET)
		mustEnd(t, c.server, unix.ECONNRESET)
		if e := c.wait(); e.result != flow.CutByPolicy || e.counts.OutBytes != 1 {
			t.Errorf("ended %+v, want cut with 1 byte out", e)
		}
	})
}

func TestStopResetsEveryone(t *testing.T) {
	tcp, err := newTCP(TCPConfig{Log: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- tcp.Run(ctx) }()
	flows := []*carried{carry(t, tcp, false), carry(t, tcp, false, passer{}, passer{})}
	cancel()
	if err := <-ran; err != nil {
		t.Fatal(err)
	}
	for _, c := range flows {
		mustEnd(t, c.client, unix.ECONNRESET)
		mustEnd(t, c.server, unix.ECONNRESET)
		if e := c.wait(); e.result != flow.CutByPolicy {
			t.Errorf("ended %+v, want cut", e)
		}
	}
	r := newRecorder(t)
	if p := tcp.takeOver(context.Background(), tcpJob{takeover: r, dial: engine.Dial{Target: netip.MustParseAddrPort("127.0.0.1:9")}}); p.Carries() {
		t.Errorf("a takeover after the end: %v", p)
	}
	r.wait()
}

// transfer sends n random bytes each way at the same time and compares.
func transfer(t *testing.T, c *carried, n int64) {
	t.Helper()
	var both sync.WaitGroup
	way := func(from, to *net.TCPConn, seed byte) {
		sent, got := sha256.New(), sha256.New()
		var inner sync.WaitGroup
		inner.Go(func() {
			src := io.LimitReader(rand.NewChaCha8([32]byte{seed}), n)
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.MultiWriter(from, sent)}, src, make([]byte, 100_000)); err != nil {
				t.Errorf("send: %v", err)
			}
			from.CloseWrite()
		})
		to.SetReadDeadline(time.Now().Add(6 * patience))
		if m, err := io.Copy(got, struct{ io.Reader }{to}); m != n || err != nil {
			t.Errorf("received %d bytes, %v; want %d", m, err, n)
		}
		inner.Wait()
		if string(sent.Sum(nil)) != string(got.Sum(nil)) {
			t.Error("what arrived is not what was sent")
		}
	}
	both.Go(func() { way(c.client, c.server, 1) })
	both.Go(func() { way(c.server, c.client, 2) })
	both.Wait()
	if e := c.wait(); e.result != flow.Closed || e.counts.OutBytes != uint64(n) || e.counts.InBytes != uint64(n) {
		t.Errorf("ended %+v, want closed with %d each way", e, n)
	}
}

func TestEveryByteArrives(t *testing.T) {
	for name, filters := range chains {
		t.Run(name, func(t *testing.T) { transfer(t, carry(t, runTCP(t, nil), false, filters()...), 100<<20) })
	}
}

func TestSlowReaderHoldsTheSenderBack(t *testing.T) {
	const total = 256 << 20
	for name, filters := range chains {
		t.Run(name, func(t *testing.T) {
			c := carry(t, runTCP(t, nil), false, filters()...)
			c.server.SetReadBuffer(64 << 10)
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			var sent atomic.Int64
			go func() {
				piece := make([]byte, 1<<20)
				for sent.Load() < total {
					n, err := c.client.Write(piece)
					sent.Add(int64(n))
					if err != nil {
						return
					}
				}
				c.client.CloseWrite()
			}()
			// Nothing is read until the sender stands still.
			for last := int64(-1); last != sent.Load(); time.Sleep(200 * time.Millisecond) {
				last = sent.Load()
			}
			if sent.Load() >= total {
				t.Error("the sender was not held back")
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 4<<20 {
				t.Errorf("the heap grew by %d bytes while the reader slept", grown)
			}
			if got, err := io.Copy(io.Discard, struct{ io.Reader }{c.server}); got != total || err != nil {
				t.Errorf("received %d, %v; want %d", got, err, total)
			}
		})
	}
}
