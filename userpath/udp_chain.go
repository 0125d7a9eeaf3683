package userpath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// udpFilterGrace is how long the end of a flow waits for its data filters,
// which learn of it by their context.
const udpFilterGrace = 2 * time.Second

// udpChain is the data filters of one flow. Filter 0 is next to the client;
// outward[i] holds what filter i receives from the client's side, inward[i]
// what it receives from the external side:
//
//	client -> outward[0] -> filter 0 -> outward[1] -> filter 1 -> external
//	client <- filter 0 <- inward[0] <- filter 1 <- inward[1] <- external
//
// Buffers change hands along the chain. A datagram is copied once, out of the
// batch that its socket was read with: whose it is, is known only then.
type udpChain struct {
	u       *UDP
	links   []engine.Link
	conn    func() filterapi.Connection // of the flow
	tuple   flow.Tuple
	far     netip.AddrPort  // the external side's address
	buffer  int             // bytes of one datagram
	ctx     context.Context // over with the flow
	kill    <-chan struct{}
	end     func(flow.Result, string) // ends the flow
	empty   func()                    // all filters have dropped out
	last    *udpFlow                  // where the last filter emulates the external side; nil: nobody counts
	outward []*udpLink
	inward  []*udpLink
	client  udpHop // the network on the client's side
	network udpHop // the network on the external side; nil: the last filter emulates it

	small, medium, large *bufferPool

	holding atomic.Int32 // filters that have not dropped out
	done    sync.WaitGroup
}

func newUDPChain(u *UDP, f *udpFlow) *udpChain {
	c := &udpChain{
		u: u, links: f.udpRequest.chain, conn: f.control.Conn, tuple: f.tuple, far: f.far(), buffer: f.udpRequest.buffer,
		ctx: f.ctx, kill: f.kill, last: f,
		end:   func(r flow.Result, reason string) { u.end(f, r, reason) },
		empty: func() { f.chain.Store(nil) },
	}
	c.connect(f.burst)
	client, network := &udpNetwork{u: u, f: f, dir: udpInward}, &udpNetwork{u: u, f: f, dir: udpOutward}
	if f.external {
		client.dir, network.dir = udpOutward, udpInward
	}
	c.client = client
	client.feedBy(c.inward[0])
	if !f.emulated {
		c.network = network
		network.feedBy(c.outward[len(c.outward)-1])
	}
	return c
}

// connect makes what is between the filters.
func (c *udpChain) connect(burst bool) {
	c.small, c.medium, c.large = c.u.buffers.of(udpSmall), c.u.buffers.of(udpMedium), c.u.buffers.of(c.buffer)
	for range c.links {
		c.outward = append(c.outward, newUDPLink(c.u, c.buffer, burst))
		c.inward = append(c.inward, newUDPLink(c.u, c.buffer, burst))
	}
	c.holding.Store(int32(len(c.outward)))
}

// The sizes of the buffers that smaller datagrams wait in: a burst of tiny ones
// shall not cost a full buffer each.
const (
	udpSmall  = 256
	udpMedium = 2048
)

// copied is a datagram in a buffer of its own.
func (c *udpChain) copied(data []byte) *filterapi.Buffer {
	var b *filterapi.Buffer
	switch n := len(data); {
	case n > c.buffer: // filters have let go of the flow, and one is about to
		b = filterapi.NewBuffer(make([]byte, n), nil)
	case n <= udpSmall && udpSmall < c.buffer:
		b = c.small.get()
	case n <= udpMedium && udpMedium < c.buffer:
		b = c.medium.get()
	default:
		b = c.large.get()
	}
	b.Data = b.Data[:copy(b.Data, data)]
	b.Addr = c.far
	return b
}

// enter takes a datagram from the network into the chain. data is copied.
func (c *udpChain) enter(fromClient bool, data []byte) {
	first := c.outward[0]
	if !fromClient {
		first = c.inward[len(c.inward)-1]
	}
	if len(data) > first.max && c.holding.Load() > 0 {
		c.u.stats.oversize.Add(1)
		return
	}
	first.push(c.copied(data))
}

func (c *udpChain) start() {
	c.done.Add(len(c.outward)) // all at once: the first may return before the second begins
	for i := range c.outward {
		go func() {
			defer c.done.Done()
			c.run(i)
		}()
	}
	// A kill ends the flow at once, not with the next sweep.
	c.u.background(func() {
		select {
		case <-c.kill:
			c.end(flow.CutByPolicy, "")
		case <-c.ctx.Done():
		}
	})
}

// wait returns when all filters have, or after udpFilterGrace.
func (c *udpChain) wait() {
	returned := make(chan struct{})
	go func() {
		c.done.Wait()
		close(returned)
	}()
	grace := time.NewTimer(udpFilterGrace)
	defer grace.Stop()
	select {
	case <-returned:
	case <-grace.C:
		c.u.log.Warn("data filter goes on after the end of its flow", zap.Stringer("flow", c.tuple))
	}
}

// run is one data filter's goroutine.
func (c *udpChain) run(i int) {
	name := c.links[i].Name
	toClient, toNetwork := c.around(i)
	internal, external := &udpEnd{ctx: c.ctx, far: c.far, in: c.outward[i], out: toClient}, revocable(nil)
	if toNetwork != nil {
		external = &udpEnd{ctx: c.ctx, far: c.far, in: c.inward[i], out: toNetwork}
	} else {
		internal.last = c.last // what is received here goes no further
	}
	in, out := newFilterSockets(internal, external, &c.u.buffers)
	err := c.pump(i, in, out.external())
	c.inward[i].flush()
	c.outward[i].flush()
	if toNetwork == nil && errors.Is(err, filterapi.ErrReleased) {
		err = errNothingToRelease
	}
	switch {
	case c.ctx.Err() != nil:
	case err == nil:
		c.end(flow.Closed, "")
	case errors.Is(err, filterapi.ErrReleased):
		c.dropOut(i, in, out)
	default:
		c.u.log.Warn("data filter ended its flow", zap.String("filter", name),
			zap.Stringer("flow", c.tuple), zap.Error(err))
		c.end(flow.Failed, fmt.Sprintf("filter %s: %v", name, err))
	}
}

func (c *udpChain) pump(i int, internal, external filterapi.Socket) (err error) {
	link := c.links[i]
	defer func() {
		if r := recover(); r != nil {
			c.u.log.Error("panic in data filter", zap.String("filter", link.Name), zap.Any("panic", r),
				zap.ByteString("stack", debug.Stack()))
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	return link.Filter.Pump(c.ctx, c.conn(), internal, external)
}

// around gives what filter i sends to, on the client's side and on the
// external side.
func (c *udpChain) around(i int) (toClient, toNetwork udpHop) {
	toClient, toNetwork = c.client, c.network
	if i > 0 {
		toClient = c.inward[i-1]
	}
	if i < len(c.outward)-1 {
		toNetwork = c.outward[i+1]
	}
	return toClient, toNetwork
}

// dropOut joins the neighbours of a filter that gave the flow back, behind
// what it still has in its hands. After the last one the flow is carried
// directly, without copies.
func (c *udpChain) dropOut(i int, in, out *filterSocket) {
	in.revoked.close()
	toClient, toNetwork := c.around(i)
	var back sync.WaitGroup
	back.Go(func() {
		out.quiet(c.ctx.Done(), c.u.log)
		c.inward[i].passTo(toClient)
	})
	in.quiet(c.ctx.Done(), c.u.log)
	c.outward[i].passTo(toNetwork)
	back.Wait()
	if c.holding.Add(-1) == 0 {
		c.empty()
	}
}

// udpEnd is one side of a data filter. It implements filterapi.Socket.
type udpEnd struct {
	ctx context.Context
	far netip.AddrPort
	in  *udpLink
	out udpHop
	// last is the flow, where the receiver emulates the external side.
	last *udpFlow
	// closed: nothing is sent any more.
	closed atomic.Bool
}

// Recv gives the next datagram. filterapi.ErrTerminating: the flow is over.
func (e *udpEnd) Recv() (*filterapi.Buffer, error) { return e.recv(nil) }

func (e *udpEnd) recv(stop <-chan struct{}) (*filterapi.Buffer, error) {
	b, err := e.in.recv(e.ctx, stop)
	if err == nil && e.last != nil {
		e.last.count(e.last.fromClient(), 1, uint64(len(b.Data)))
		e.last.established()
	}
	return b, err
}

// Send passes a datagram on, or loses it where the next hop is full. An
// address other than the flow's far one is filterapi.ErrInvalidArgument.
func (e *udpEnd) Send(b *filterapi.Buffer) error {
	switch {
	case e.ctx.Err() != nil || e.closed.Load():
		b.Release()
		return filterapi.ErrTerminating
	case b.Addr.IsValid() && b.Addr != e.far:
		b.Release()
		return fmt.Errorf("send datagram to %s: %w", b.Addr, filterapi.ErrInvalidArgument)
	}
	b.Addr = e.far
	e.out.push(b)
	return nil
}

// Shutdown tells the neighbour that no more will come; the network is not
// told, for UDP has no word for it, abortive or not.
func (e *udpEnd) Shutdown(bool) error {
	if !e.closed.Swap(true) {
		e.out.shut()
	}
	return nil
}

// Close also drops what comes.
func (e *udpEnd) Close(abortive bool) error {
	e.in.discard()
	return e.Shutdown(abortive)
}
