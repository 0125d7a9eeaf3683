package userpath

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

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
	if p := tcp.takeOverNow(context.Background(), tcpJob{takeover: r, dial: engine.Dial{Target: netip.MustParseAddrPort("127.0.0.1:9")}}); p.Carries() {
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

// TestFirstFilterEndsBeforeTheLastHasSent: a filter that has closed both its
// sides does not keep the one behind it from sending the rest to a slow
// receiver.
func TestFirstFilterEndsBeforeTheLastHasSent(t *testing.T) {
	tcp := runTCP(t, nil)
	c := carry(t, tcp, false, passer{}, passer{})
	if err := unix.SetsockoptInt(c.farFD, unix.SOL_SOCKET, unix.SO_SNDBUF, 8<<10); err != nil {
		t.Fatal(err)
	}
	if err := c.server.SetReadBuffer(8 << 10); err != nil {
		t.Fatal(err)
	}
	c.server.CloseWrite()
	mustEnd(t, c.client, io.EOF)
	sent := strings.Repeat("0123456789abcdef", 150<<10/16)
	mustWrite(t, c.client, sent)
	c.client.CloseWrite()
	for end := time.Now().Add(patience); c.flow.dirs[sideInit].carrier.Load() != byNobody; {
		if time.Now().After(end) {
			t.Fatal("the first filter did not end")
		}
		runtime.Gosched()
	}
	c.server.SetReadDeadline(time.Now().Add(patience))
	if got, err := io.ReadAll(c.server); string(got) != sent || err != nil {
		t.Fatalf("received %d bytes, %v; want %d", len(got), err, len(sent))
	}
	if e := c.wait(); e.result != flow.Closed || e.counts.OutBytes != uint64(len(sent)) {
		t.Errorf("ended %+v", e)
	}
}

// TestStopWhileTheLoopIsBusy: a loop that learns of the end while it runs a
// task of before still ends its flows.
func TestStopWhileTheLoopIsBusy(t *testing.T) {
	tcp, err := newTCP(TCPConfig{Log: zap.NewNop(), Loops: 1})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- tcp.Run(ctx) }()
	c := carry(t, tcp, false)
	busy := make(chan struct{})
	tcp.loops[0].post(func() {
		close(busy)
		for !tcp.stopping.Load() {
			runtime.Gosched()
		}
	})
	<-busy
	cancel()
	if e := c.wait(); e.result != flow.CutByPolicy {
		t.Errorf("ended %+v", e)
	}
	if err := <-ran; err != nil {
		t.Error(err)
	}
}
