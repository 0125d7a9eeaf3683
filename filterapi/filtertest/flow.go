package filtertest

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"sync"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// patience is how long a test waits for what must happen.
const patience = 10 * time.Second

// Flow is one connection with its two ends in the test's hands. Its context in
// the test is that of the client: Client is inside, also when the other end
// began it.
type Flow struct {
	// Client and Server are the two ends. The Server of an emulated flow is
	// nobody: what is sent there fails.
	Client, Server *End
	// Conn is the connection as the filter gets it.
	Conn filterapi.Connection
	// Filtered says whether data filters hold the flow, User whether it goes
	// through user space, with data filters or without.
	Filtered, User bool
	// Emulated: a data filter plays the server.
	Emulated bool

	gateway  *Gateway
	session  *session
	tuple    flow.Tuple
	conn     *connection
	internal *leg
	external *leg
	deaf     bool // what the client sends is lost: a bind without Bidirectional
	cancel   context.CancelFunc
	ctx      context.Context

	work  sync.WaitGroup // pumps and carriers
	pumps sync.WaitGroup
	done  chan struct{} // the pumps have returned
	over  chan struct{} // nothing carries the flow any more, and the filter was told
	stood sync.Once

	gone   bool // guarded by Gateway.mu
	mu     sync.Mutex
	killed bool
	links  []*leg  // between data filters
	errs   []error // of each Pump, after done
}

// newFlow makes a flow whose client is inside and whose server is outside, of a
// session, or with nil of the client's transparent one. t is what the one that
// begins it sends.
func (g *Gateway) newFlow(s *session, t flow.Tuple, client, server netip.AddrPort) *Flow {
	f := &Flow{
		gateway: g, tuple: t,
		internal: newLeg(g.Window), external: newLeg(g.Window),
		done: make(chan struct{}), over: make(chan struct{}),
	}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.Client = &End{flow: f, name: "client", leg: f.internal, addr: client, far: server}
	f.Server = &End{flow: f, name: "server", leg: f.external, addr: server, far: client}
	g.mu.Lock()
	if s == nil {
		s = g.sessionOf(client.Addr())
	}
	f.session = s
	f.conn = g.newConnection(s, t)
	f.conn.flow, f.Conn = f, f.conn
	g.flows = append(g.flows, f)
	f.killed = s.ended
	g.mu.Unlock()
	return f
}

// Flows are all flows so far, in order, refused ones and those that filters
// made with EmulateConnection included.
func (g *Gateway) Flows() []*Flow {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]*Flow(nil), g.flows...)
}

func (f *Flow) bufferSize() int {
	f.conn.mu.Lock()
	defer f.conn.mu.Unlock()
	return f.conn.buffer
}

// start does what follows the handlers: refuse, pump, or pass.
func (f *Flow) start(refusal error) error {
	c := f.conn
	var chain []attached
	if refusal == nil {
		chain, refusal = f.gather()
	}
	f.mu.Lock()
	if f.killed && refusal == nil {
		refusal = filterapi.ErrPolicyDenied
	}
	f.mu.Unlock()
	if refusal != nil {
		f.refuse()
		return refusal
	}
	c.connect(f.gateway.names(c, f.Server.addr))
	f.Filtered = len(chain) > 0
	f.User = f.Filtered || c.perm != nil && c.perm.toUser
	f.carry(chain)
	if c.tuple.Proto == flow.TCP || !f.Filtered {
		f.stand()
	}
	go f.finish()
	return nil
}

// gather are the data filters of a flow: those of its handler, of its bind, of
// its peer, and of the factories.
func (f *Flow) gather() ([]attached, error) {
	c, g := f.conn, f.gateway
	var others []attached
	if c.perm != nil && c.perm.object != nil && c.tuple.Proto == flow.UDP {
		others = c.perm.object.chain()
	}
	if c.tuple.Proto == flow.UDP {
		others = append(others, g.destinationFilters(c, f.Server.addr)...)
	}
	made, err := g.fromFactories(f)
	if err != nil {
		return nil, err
	}
	return c.chain(append(others, made...)...), nil
}

// names are the addresses of the external side.
func (g *Gateway) names(c *connection, remote netip.AddrPort) (name, peer netip.AddrPort) {
	p, src := c.perm, c.tuple.Src
	switch {
	case p != nil && p.kind == inbound:
		return c.tuple.Dst, c.tuple.Src
	case p != nil && p.source.IsValid():
		if p.source.Port() != 0 {
			return p.source, remote
		}
		return netip.AddrPortFrom(p.source.Addr(), src.Port()), remote
	case !g.hidden(src.Addr()):
		return src, remote
	}
	return netip.AddrPortFrom(g.External, src.Port()), remote
}

// refuse ends a flow that never began.
func (f *Flow) refuse() {
	f.reset()
	f.cancel()
	close(f.done)
	f.gateway.flowOver(f)
	close(f.over)
}

// carry runs the data filters, or joins the two legs without one.
func (f *Flow) carry(chain []attached) {
	internal := f.internal
	f.errs = make([]error, len(chain))
	for i, a := range chain {
		external, next := f.external, (*leg)(nil)
		last := i == len(chain)-1
		if !last {
			external, next = f.link()
		}
		if a.emulates {
			f.Emulated = true
			f.external.reset(errNobody)
			external = nil
		}
		f.pumps.Add(1)
		near, first := internal, i == 0
		f.work.Go(func() {
			f.errs[i] = f.pump(a, near, external, first, last)
			f.pumps.Done()
		})
		internal = next
	}
	if len(chain) == 0 {
		f.work.Go(func() { join(f.internal.fromEnd, f.external.toEnd) })
		f.work.Go(func() { join(f.external.fromEnd, f.internal.toEnd) })
	}
}

// link joins two data filters; one of a flow that was killed is broken.
func (f *Flow) link() (near, far *leg) {
	near, far = newLink(f.gateway.Window)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.links = append(f.links, near)
	if f.killed {
		near.reset(ErrReset)
	}
	return near, far
}

// finish follows the flow to its end.
func (f *Flow) finish() {
	f.pumps.Wait()
	close(f.done)
	f.work.Wait()
	f.cancel()
	f.gateway.flowOver(f)
	close(f.over)
}

// flowOver tells the filter, gives back what the flow held, and ends the
// session with its last flow.
func (g *Gateway) flowOver(f *Flow) {
	g.terminating(f.conn)
	g.mu.Lock()
	f.gone = true
	if p := f.conn.perm; p != nil {
		p.flows--
		p.freeLocked()
	}
	g.mu.Unlock()
	g.endIdle(f.session)
}

// pump runs one data filter and does what its result asks for.
func (f *Flow) pump(a attached, internal, external *leg, first, last bool) error {
	h, datagram := newHands(), f.tuple.Proto == flow.UDP
	in := &socket{flow: f, hands: h, leg: internal, datagram: datagram, to: &h.inward, from: &h.out}
	if first {
		in.sent = ToClient
	}
	var out filterapi.Socket
	if external != nil {
		s := &socket{flow: f, hands: h, leg: external, datagram: datagram, to: &h.out, from: &h.inward}
		if last {
			s.sent = ToServer
		}
		out = s
	}
	err := f.call(a.filter, in, out)
	switch {
	case err == nil:
		_ = in.Close(false) // it may be closed already
		if out != nil {
			_ = out.Close(false)
		}
	case errors.Is(err, filterapi.ErrReleased) && external != nil:
		f.release(h, internal, external)
	default:
		f.reset()
	}
	return err
}

func (f *Flow) call(df filterapi.DataFilter, in, out filterapi.Socket) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = panicked{p}
		}
	}()
	return df.Pump(f.ctx, f.conn, in, out)
}

func join(from, to *lane) {
	for {
		seg, err := from.take(1<<20, false, nil)
		if errors.Is(err, io.EOF) {
			to.end()
			return
		}
		if err == nil {
			err = to.put(seg)
		}
		if err != nil {
			from.fail(ErrReset)
			to.fail(ErrReset)
			return
		}
	}
}

// stand says once that the flow stands from end to end.
func (f *Flow) stand() { f.stood.Do(func() { f.gateway.established(f.conn) }) }

// reset breaks every leg: all sockets fail from then on.
func (f *Flow) reset() {
	f.mu.Lock()
	all := append([]*leg{f.internal, f.external}, f.links...)
	f.mu.Unlock()
	for _, l := range all {
		l.reset(ErrReset)
	}
}

// kill is Connection.Kill: both ends are reset at once.
func (f *Flow) kill() {
	f.mu.Lock()
	f.killed = true
	f.mu.Unlock()
	f.reset()
	f.cancel()
}

// Cut ends the flow as a policy change does: the sockets fail, the context of
// Pump is cancelled. So does the gateway when a UDP peer was silent for too
// long.
func (f *Flow) Cut() { f.kill() }

// Wait is the result of Pump, of all of them if there are several; nil also for
// a flow that the filter let pass.
func (f *Flow) Wait() error {
	f.gateway.tb.Helper()
	f.await(f.done, "Pump does not return")
	if len(f.errs) == 1 {
		return f.errs[0]
	}
	return errors.Join(f.errs...)
}

// End waits until the flow is over and the filter has been told.
func (f *Flow) End() {
	f.gateway.tb.Helper()
	f.await(f.over, "the flow does not end")
}

func (f *Flow) await(ch <-chan struct{}, what string) {
	f.gateway.tb.Helper()
	select {
	case <-ch:
	case <-time.After(patience):
		f.gateway.tb.Fatalf("filtertest: %s: %s\n%s", f.tuple, what, f.gateway.dump())
	}
}
