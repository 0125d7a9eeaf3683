package filtertest

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// patience is how long a test waits for what must happen.
const patience = 10 * time.Second

// Flow is one connection with its two ends in the test's hands.
type Flow struct {
	// Client and Server are the two ends.
	Client, Server *End
	// Filtered says whether the filter attached itself.
	Filtered bool

	gateway  *Gateway
	session  *session
	tuple    flow.Tuple
	conn     *connection
	internal *leg
	external *leg
	cancel   context.CancelFunc
	hands    *hands
	done     chan struct{}
	err      error // of Pump, after done

	carriers sync.WaitGroup
}

func (g *Gateway) newFlow(proto flow.Proto, client, server netip.AddrPort) *Flow {
	fl := &Flow{
		gateway: g, session: g.session(client.Addr()),
		tuple:    flow.Tuple{Proto: proto, Src: client, Dst: server},
		internal: newLeg(g.Window), external: newLeg(g.Window),
		cancel: func() {}, hands: newHands(), done: make(chan struct{}),
	}
	fl.conn = &connection{flow: fl, buffer: filterapi.DefaultStreamBuffer}
	if proto == flow.UDP {
		fl.conn.buffer = filterapi.DefaultDatagramBuffer
	}
	fl.Client = &End{flow: fl, name: "client", leg: fl.internal, far: server}
	fl.Server = &End{flow: fl, name: "server", leg: fl.external, far: client}
	return fl
}

func (c *connection) setHandling(on bool) {
	c.mu.Lock()
	c.handling = on
	c.mu.Unlock()
}

func (f *Flow) bufferSize() int {
	f.conn.mu.Lock()
	defer f.conn.mu.Unlock()
	return f.conn.buffer
}

// start does what follows a handler: refuse, pump, or pass. The machine runs
// one filter, so one data filter holds the flow.
func (f *Flow) start(handled error) error {
	c := f.conn
	c.mu.Lock()
	filters, denied := slices.Clone(c.filters), c.denied
	c.pumping = true
	c.mu.Unlock()
	switch {
	case handled != nil && !errors.Is(handled, filterapi.ErrNotSupported):
		f.refuse()
		return handled
	case denied:
		f.refuse()
		return filterapi.ErrPolicyDenied
	case len(filters) == 0:
		f.carry()
		close(f.done)
		return nil
	}
	f.Filtered = true
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel = cancel
	go f.pump(ctx, filters[0].filter)
	f.gateway.tb.Cleanup(f.end)
	return nil
}

func (f *Flow) refuse() {
	f.internal.reset(ErrReset)
	f.external.reset(ErrReset)
	close(f.done)
}

// pump runs the data filter and does what its result asks for.
func (f *Flow) pump(ctx context.Context, df filterapi.DataFilter) {
	datagram, h := f.tuple.Proto == flow.UDP, f.hands
	err := df.Pump(ctx, f.conn,
		&socket{flow: f, leg: f.internal, sent: ToClient, datagram: datagram, to: &h.inward, from: &h.out},
		&socket{flow: f, leg: f.external, sent: ToServer, datagram: datagram, to: &h.out, from: &h.inward})
	switch {
	case errors.Is(err, filterapi.ErrReleased):
		f.release()
	case err != nil:
		f.internal.reset(ErrReset)
		f.external.reset(ErrReset)
	}
	f.err = err
	close(f.done)
}

// carry joins the two legs without the filter.
func (f *Flow) carry() {
	for _, way := range [][2]*leg{{f.internal, f.external}, {f.external, f.internal}} {
		f.carriers.Go(func() { join(way[0].fromEnd, way[1].toEnd) })
	}
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
			to.fail(ErrReset)
			return
		}
	}
}

// kill is Connection.Kill: both ends are reset at once.
func (f *Flow) kill() {
	f.internal.reset(ErrReset)
	f.external.reset(ErrReset)
	f.cancel()
}

// end stops the flow and waits for everything that carries it.
func (f *Flow) end() {
	f.kill()
	<-f.done
	f.carriers.Wait()
}

// Cut ends the connection as a policy change does: the sockets fail, the
// context of Pump is cancelled.
func (f *Flow) Cut() { f.kill() }

// Wait is the result of Pump; nil also for a flow that the filter let pass.
func (f *Flow) Wait() error {
	f.gateway.tb.Helper()
	select {
	case <-f.done:
		return f.err
	case <-time.After(patience):
		f.gateway.tb.Fatalf("filtertest: Pump does not return\n%s", f.gateway.dump())
		return nil
	}
}

// End is the client or the server of a flow, played by the test. Its methods
// fail the test when the flow does not do its part in time.
type End struct {
	flow *Flow
	name string
	leg  *leg
	far  netip.AddrPort
	got  string // received and not yet expected
}

// Send sends each argument as one segment.
func (e *End) Send(segments ...string) {
	e.flow.gateway.tb.Helper()
	for _, s := range segments {
		if err := e.leg.fromEnd.put(segment{[]byte(s), e.far}); err != nil {
			e.flow.gateway.tb.Fatalf("filtertest: %s sends %q: %v", e.name, s, err)
		}
	}
}

// Offer sends one segment and returns the error that an end sees which was
// reset.
func (e *End) Offer(text string) error {
	return e.leg.fromEnd.put(segment{[]byte(text), e.far})
}

// Expect receives exactly this text, in any segments. More that comes with it
// waits for the next Expect.
func (e *End) Expect(want string) {
	e.flow.gateway.tb.Helper()
	for len(e.got) < len(want) && strings.HasPrefix(want, e.got) {
		text, err := e.receive()
		if err != nil {
			e.flow.gateway.tb.Fatalf("filtertest: %s waits for %q, has %q: %v", e.name, want, e.got, err)
		}
		e.got += text
	}
	if !strings.HasPrefix(e.got, want) {
		e.flow.gateway.tb.Fatalf("filtertest: %s\nhas  %q\nwant %q", e.name, e.got, want)
	}
	e.got = e.got[len(want):]
}

// Exchange sends one segment and expects an answer from the gateway or the far
// end.
func (e *End) Exchange(send, want string) {
	e.flow.gateway.tb.Helper()
	e.Send(send)
	e.Expect(want)
}

// ReadAll receives until the stream ends or is reset, and says which.
func (e *End) ReadAll() (string, error) {
	for {
		text, err := e.receive()
		if err != nil {
			all := e.got
			e.got = ""
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return all, err
		}
		e.got += text
	}
}

// ExpectEOF waits for an orderly end with nothing before it.
func (e *End) ExpectEOF() {
	e.flow.gateway.tb.Helper()
	if rest, err := e.ReadAll(); rest != "" || err != nil {
		e.flow.gateway.tb.Fatalf("filtertest: %s waits for the end, has %q, %v", e.name, rest, err)
	}
}

// ExpectReset waits for a reset.
func (e *End) ExpectReset() {
	e.flow.gateway.tb.Helper()
	if rest, err := e.ReadAll(); !errors.Is(err, ErrReset) {
		e.flow.gateway.tb.Fatalf("filtertest: %s waits for a reset, has %q, %v", e.name, rest, err)
	}
}

// Waiting is what has arrived and was not yet expected. It does not wait; in a
// synctest bubble, after synctest.Wait, it is all that will come.
func (e *End) Waiting() string {
	l := e.leg.toEnd
	l.mu.Lock()
	defer l.mu.Unlock()
	text := e.got
	for _, s := range l.segs {
		text += string(s.data)
	}
	return text
}

// Addr is the address of this end with another port.
func (e *End) Addr(port uint16) netip.AddrPort {
	if e == e.flow.Client {
		return netip.AddrPortFrom(e.flow.tuple.Src.Addr(), port)
	}
	return netip.AddrPortFrom(e.flow.tuple.Dst.Addr(), port)
}

// CloseWrite sends a FIN; the end can still receive.
func (e *End) CloseWrite() { e.leg.fromEnd.end() }

// Reset resets the connection.
func (e *End) Reset() { e.leg.reset(ErrReset) }

func (e *End) receive() (string, error) {
	late := errors.New("nothing came in time")
	timer := time.AfterFunc(patience, func() { e.leg.toEnd.fail(late) })
	defer timer.Stop()
	seg, err := e.leg.toEnd.take(1<<20, false, nil)
	return string(seg.data), err
}
