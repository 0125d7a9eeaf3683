package userpath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// leaver passes buffers both ways on two goroutines and releases the flow when
// it has seen some, without a word to those goroutines: one may wait in Recv
// then, or have a buffer in its hands.
type leaver struct{ after int }

func (l leaver) Pump(_ context.Context, _ filterapi.Connection, in, out filterapi.Socket) error {
	seen := make(chan error)
	gone := make(chan struct{})
	defer close(gone)
	tell := func(err error) {
		select {
		case seen <- err:
		case <-gone:
		}
	}
	way := func(dst, src filterapi.Socket) {
		for {
			b, err := src.Recv()
			if err == io.EOF {
				tell(dst.Shutdown(false))
				return
			}
			if err == nil {
				tell(nil) // the flow may be released before this is sent
				err = dst.Send(b)
			}
			if err != nil {
				in.Close(true)
				out.Close(true)
				tell(err)
				return
			}
		}
	}
	go way(out, in)
	go way(in, out)
	for range l.after {
		if err := <-seen; err != nil {
			return err
		}
	}
	return filterapi.ErrReleased
}

func TestReleaseLosesNothing(t *testing.T) {
	tcp := runTCP(t, nil)
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var filters []filterapi.DataFilter
		var what []string
		for range 1 + rng.IntN(3) {
			l := leaver{rng.IntN(60)}
			filters = append(filters, l)
			what = append(what, fmt.Sprint(l))
		}
		if rng.IntN(4) == 0 {
			filters = append(filters, passer{})
			what = append(what, "stays")
		}
		t.Run(fmt.Sprint(seed, what), func(t *testing.T) {
			c := carry(t, tcp, rng.IntN(2) == 0, filters...)
			transfer(t, c, 3<<20+int64(rng.IntN(1<<20)))
			stays := what[len(what)-1] == "stays"
			for i := range c.flow.dirs {
				if by := c.flow.dirs[i].carrier.Load(); stays && by == byLoop {
					t.Error("the loop took a direction from a filter that stays")
				}
			}
		})
	}
}

// A released direction must not wait for the other one, which may be blocked
// until it flows.
func TestReleasedDirectionsAreIndependent(t *testing.T) {
	c := carry(t, runTCP(t, nil), false, releaser{}, releaser{})
	fill(t, c.client) // nobody reads at the server: this direction is stuck
	mustWrite(t, c.server, "answer")
	mustRead(t, c.client, "answer")
	for c.flow.dirs[sideFar].carrier.Load() != byLoop {
		runtime.Gosched()
	}
	mustWrite(t, c.server, "spliced")
	mustRead(t, c.client, "spliced")
}

func TestFilterSeesClientAsInternal(t *testing.T) {
	for _, outside := range []bool{false, true} {
		c := carry(t, runTCP(t, nil), outside, pumpFunc(func(_ context.Context, in, out filterapi.Socket) error {
			in.Send(filterapi.NewBuffer([]byte("internal"), nil))
			out.Send(filterapi.NewBuffer([]byte("external"), nil))
			in.Close(false)
			out.Close(false)
			return nil
		}))
		inside, far := c.client, c.server
		if outside {
			inside, far = far, inside
		}
		mustRead(t, inside, "internal")
		mustRead(t, far, "external")
		mustEnd(t, inside, io.EOF)
		mustEnd(t, far, io.EOF)
	}
}

func TestChainOrder(t *testing.T) {
	tag := func(name string) filterapi.DataFilter {
		return pumpFunc(func(_ context.Context, in, out filterapi.Socket) error {
			return passBoth(in, out, func(_ bool, b *filterapi.Buffer) { b.Data = append(b.Data, name...) })
		})
	}
	c := carry(t, runTCP(t, nil), false, tag("1"), tag("2"), tag("3"))
	mustWrite(t, c.client, "out")
	mustRead(t, c.server, "out123")
	mustWrite(t, c.server, "in")
	mustRead(t, c.client, "in321")
}

// What a filter has sent arrives although the far side still talks, and the
// flow ends even if it never stops.
func TestFilterThatReturnsClosesGracefully(t *testing.T) {
	answer := strings.Repeat("sorry ", 100_000)
	sorry := pumpFunc(func(_ context.Context, in, out filterapi.Socket) error {
		b, err := in.Recv()
		b.Release()
		if err != nil {
			return err
		}
		return in.Send(filterapi.NewBuffer([]byte(answer), nil))
	})
	for _, talksOn := range []bool{false, true} {
		t.Run(fmt.Sprint(talksOn), func(t *testing.T) {
			filters := []filterapi.DataFilter{passer{}, sorry}
			tcp := runTCP(t, func(c *TCPConfig) {
				if talksOn {
					c.Linger, filters = 50*time.Millisecond, filters[1:]
				}
			})
			c := carry(t, tcp, false, filters...)
			stop := make(chan struct{})
			var talking sync.WaitGroup
			talking.Go(func() {
				for {
					select {
					case <-stop:
						c.client.Close()
						return
					default:
						if _, err := c.client.Write([]byte("and another thing")); err != nil {
							return
						}
					}
				}
			})
			mustRead(t, c.client, answer)
			mustEnd(t, c.client, io.EOF)
			mustEnd(t, c.server, io.EOF)
			if !talksOn {
				close(stop)
				c.server.Close()
			}
			if e := c.wait(); e.result != flow.Closed {
				t.Errorf("ended %+v, want closed", e)
			}
			talking.Wait()
		})
	}
}

func TestAbortsPassTheChain(t *testing.T) {
	for name, f := range map[string]pumpFunc{
		"shutdown": func(_ context.Context, in, out filterapi.Socket) error {
			in.Shutdown(true)
			out.Shutdown(true)
			return nil
		},
		"close": func(_ context.Context, in, out filterapi.Socket) error {
			in.Close(true)
			out.Close(true)
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := carry(t, runTCP(t, nil), false, passer{}, f, passer{})
			mustEnd(t, c.client, unix.ECONNRESET)
			mustEnd(t, c.server, unix.ECONNRESET)
			c.wait()
		})
	}
}

// A filter whose server is reset may still answer its client.
func TestFilterAnswersForABrokenServer(t *testing.T) {
	c := carry(t, runTCP(t, nil), false, pumpFunc(func(_ context.Context, in, out filterapi.Socket) error {
		if _, err := out.Recv(); !errors.Is(err, unix.ECONNRESET) {
			return fmt.Errorf("received from a broken server: %w", err)
		}
		return in.Send(filterapi.NewBuffer([]byte("bad gateway"), nil))
	}))
	c.server.SetLinger(0)
	c.server.Close()
	mustRead(t, c.client, "bad gateway")
	mustEnd(t, c.client, io.EOF)
	c.client.Close()
	if e := c.wait(); e.result != flow.Reset {
		t.Errorf("ended %+v, want reset", e)
	}
}

func TestFailingFilterResetsItsFlowAlone(t *testing.T) {
	for name, filter := range map[string]pumpFunc{
		"error": func(context.Context, filterapi.Socket, filterapi.Socket) error { return errors.New("no good") },
		"panic": func(context.Context, filterapi.Socket, filterapi.Socket) error { panic("no good") },
	} {
		t.Run(name, func(t *testing.T) {
			core, logs := observer.New(zap.DebugLevel)
			tcp := runTCP(t, func(c *TCPConfig) { c.Log = zap.New(core) })
			other := carry(t, tcp, false, passer{})
			c := carry(t, tcp, false, passer{}, filter, passer{})
			mustEnd(t, c.client, unix.ECONNRESET)
			mustEnd(t, c.server, unix.ECONNRESET)
			e := c.wait()
			if e.result != flow.Failed || !strings.Contains(e.reason, `"f1"`) || !strings.Contains(e.reason, "no good") {
				t.Errorf("ended %+v", e)
			}
			if n := logs.Len(); n != 1 {
				t.Errorf("%d log lines, want 1: %v", n, logs.All())
			} else if _, has := logs.All()[0].ContextMap()["stack"]; has != (name == "panic") {
				t.Errorf("a stack in the log: %v", has)
			}
			if n := tcp.Stats().FilterFailures; n != 1 {
				t.Errorf("%d filter failures, want 1", n)
			}
			mustWrite(t, other.client, "still here")
			mustRead(t, other.server, "still here")
		})
	}
}

func TestEndUnblocksEveryCall(t *testing.T) {
	stuck := make(chan string, 8)
	returned := make(chan error, 8)
	call := func(name string, fn func() error) {
		stuck <- name
		returned <- fn()
	}
	var first atomic.Bool
	keep := pumpFunc(func(ctx context.Context, in, out filterapi.Socket) error {
		if !first.Swap(true) { // one of the two does not receive: the other's sends block
			go call("recv", func() error {
				for {
					b, err := in.Recv()
					if err != nil {
						return err
					}
					b.Release()
				}
			})
		}
		call("send", func() error {
			for {
				if err := out.Send(filterapi.NewBuffer(make([]byte, 1<<20), nil)); err != nil {
					return err
				}
			}
		})
		<-ctx.Done()
		return ctx.Err()
	})
	c := carry(t, runTCP(t, nil), false, keep, keep)
	for range 3 {
		<-stuck
	}
	fill(t, c.server) // time for the sends to block, and bytes in all queues
	close(c.kill)
	for range 3 {
		select {
		case err := <-returned:
			if err == nil {
				t.Error("a call succeeded after the end")
			}
		case <-time.After(patience):
			t.Fatal("a call is still blocked")
		}
	}
	if e := c.wait(); e.result != flow.CutByPolicy {
		t.Errorf("ended %+v, want cut", e)
	}
}
