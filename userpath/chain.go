package userpath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// chain is the data filters of one flow, joined by links:
//
//	internal socket -- filter -- link -- filter -- external socket
//
// Where the last filter emulates the external side there is no such socket.
//
// A filter that releases the flow is replaced by two relays. When all have
// released it, the relays next to the network stop reading; what is still in
// the links goes on in order, and behind it each direction passes to the loop.
// The directions do so independently: one may be blocked for as long as the
// other flows.
type chain struct {
	f        *tcpFlow
	cancel   context.CancelFunc
	ctx      context.Context
	links    []*link
	filters  sync.WaitGroup
	left     atomic.Int32  // filters that have not released
	released chan struct{} // closed when left is 0
}

// endWithin is how long the report of a flow's end waits for filters that do
// not return.
const endWithin = 10 * time.Second

// hop is a Socket as the gateway itself uses it.
type hop interface {
	revocable
	// handover says that nothing more is sent by this way, and that the
	// stream goes on by another.
	handover()
}

// errHandover ends a relay whose direction goes on without it.
var errHandover = errors.New("handed over")

func newChain(f *tcpFlow) *chain {
	c := &chain{f: f, released: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.left.Store(int32(len(f.job.chain)))
	return c
}

// start runs the filters. Both sockets are there.
func (c *chain) start() {
	f := c.f
	pool := f.tcp.buffers.of(f.job.buffer)
	internal, external := sideInit, sideFar
	if f.job.initiatorExternal {
		internal, external = sideFar, sideInit
	}
	var left hop = newNetSocket(f, internal, pool)
	for i, l := range f.job.chain {
		var right, next hop
		switch {
		case i < len(f.job.chain)-1:
			ln := newLink(f.done, f.tcp.cfg.Linger)
			c.links = append(c.links, ln)
			right, next = ln.internal(), ln.external()
		case !f.job.emulated:
			right = newNetSocket(f, external, pool)
		}
		c.filters.Add(1)
		go c.run(l, left, right)
		left = next
	}
}

// wait returns when the filters have returned, or did not in time. The links
// are emptied, so that their buffers are not lost to the pool.
func (c *chain) wait() {
	all := make(chan struct{})
	go func() { c.filters.Wait(); close(all) }()
	late := time.NewTimer(endWithin)
	defer late.Stop()
	select {
	case <-all:
	case <-late.C:
		c.f.tcp.log.Warn("data filters did not return after the end of their flow", zap.Stringer("flow", c.f.job.tuple))
	}
	for _, l := range c.links {
		l.toInternal.drain()
		l.toExternal.drain()
	}
}

// run is one filter's goroutine, and afterwards that of its relays.
func (c *chain) run(l engine.Link, left, right hop) {
	defer c.filters.Done()
	in, out := newFilterSockets(left, right, &c.f.tcp.buffers)
	err := c.pump(l, in, out.external())
	if right == nil && errors.Is(err, filterapi.ErrReleased) {
		err = errNothingToRelease
	}
	switch {
	case err == nil:
		left.Close(false)
		if right != nil {
			right.Close(false)
		}
	case errors.Is(err, filterapi.ErrReleased):
		in.revoked.close() // before the links carry the end of the relays
		if c.left.Add(-1) == 0 {
			close(c.released)
		}
		c.relay(in, out, left, right)
	default:
		c.failed(l, err)
	}
}

// failed resets the flow. An error that only says that the flow is over, or
// one of its ends, is not worth a line.
func (c *chain) failed(l engine.Link, err error) {
	f := c.f
	if side, cause := f.whyBroken(); cause != nil && cause != errCutByFilter {
		f.abort(resultOf(cause), f.sideName(side)+": "+cause.Error())
		return
	}
	select {
	case <-f.done:
		return
	default:
	}
	if errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) || errors.Is(err, errCutByFilter) {
		f.abort(flow.Reset, fmt.Sprintf("data filter %q: %v", l.Name, err)) // by another filter's doing
		return
	}
	f.tcp.stats.filterFailures.Add(1)
	if !errors.As(err, new(panicError)) {
		f.tcp.log.Warn("data filter failed", zap.String("filter", l.Name), zap.Stringer("flow", f.job.tuple), zap.Error(err))
	}
	f.abort(flow.Failed, fmt.Sprintf("data filter %q: %v", l.Name, err))
}

// panicError is what a filter threw. It is logged where it was caught.
type panicError struct{ value any }

func (e panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }

// pump calls the filter.
func (c *chain) pump(l engine.Link, internal, external filterapi.Socket) (err error) {
	defer func() {
		if p := recover(); p != nil {
			c.f.tcp.log.Error("data filter panicked", zap.String("filter", l.Name),
				zap.Stringer("flow", c.f.job.tuple), zap.Any("panic", p), zap.Stack("stack"))
			err = panicError{p}
		}
	}()
	return l.Filter.Pump(c.ctx, c.f.job.Conn(), internal, external)
}

// relay stands in for a filter that has released the flow.
func (c *chain) relay(in, out *filterSocket, left, right hop) {
	var back sync.WaitGroup
	back.Go(func() {
		out.quiet(c.f.done, c.f.tcp.log)
		c.relayTo(left, right)
	})
	in.quiet(c.f.done, c.f.tcp.log)
	c.relayTo(right, left)
	back.Wait()
}

// relayTo hands buffers on from one hop to the next, until the stream ends,
// breaks, or goes on another way.
func (c *chain) relayTo(dst, src hop) {
	var stop <-chan struct{}
	if _, ok := src.(*netSocket); ok {
		stop = c.released
	}
	for {
		b, err := src.recv(stop)
		if err == nil {
			err = dst.Send(b)
		}
		switch {
		case err == nil:
		case errors.Is(err, errHandover):
			dst.handover()
			return
		case err == io.EOF:
			dst.Shutdown(false)
			return
		default:
			src.Close(true)
			dst.Close(true)
			return
		}
	}
}
