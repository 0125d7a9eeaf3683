package filtertest

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// ErrSilence is what the one sees who begins a flow that nothing lets through:
// no answer.
var ErrSilence = errors.New("no answer")

// Connect begins a TCP connection that the rules allow: the event is raised and,
// if the filter attached itself, its Pump starts. A refused one fails the test;
// see Offer.
func (g *Gateway) Connect(client, server netip.AddrPort) *Flow {
	g.tb.Helper()
	fl, err := g.Offer(client, server)
	if err != nil {
		g.tb.Fatalf("filtertest: connect %s > %s: %v", client, server, err)
	}
	return fl
}

// Offer is Connect that returns why the connection was refused: ErrPolicyDenied
// when the filter denied it, the error of its handler, or what Access said;
// then the filter has not heard of it.
func (g *Gateway) Offer(client, server netip.AddrPort) (*Flow, error) {
	return g.primary(flow.TCP, client, server)
}

// Associate begins a UDP flow that the rules allow. A segment is a datagram. A
// client's socket may have several peers: each is a flow of its own.
func (g *Gateway) Associate(client, peer netip.AddrPort) (*Flow, error) {
	return g.primary(flow.UDP, client, peer)
}

func (g *Gateway) primary(proto flow.Proto, client, server netip.AddrPort) (*Flow, error) {
	if err := g.access(client.Addr(), "", proto, server); err != nil {
		return nil, err
	}
	t := flow.Tuple{Proto: proto, Src: client, Dst: server}
	fl := g.newFlow(nil, t, client, server)
	return fl, fl.start(g.raise(fl.conn, fl.conn.connectEvent(server)))
}

// Outbound begins a secondary flow of a client, to the target of a future
// connect or to the inside address of a redirection. The connect event is
// raised if the filter is registered for secondary connections, and
// EstablishedEvent if the call asked for it. The server of the flow is the
// target. ErrSilence: nothing lets it through; ErrReset: it went to an inside
// address that is another client's, or a redirection's no more; or the filter
// refused it.
func (g *Gateway) Outbound(proto flow.Proto, client, to netip.AddrPort) (*Flow, error) {
	p, err := g.use(proto, func(p *permission) bool {
		return p.client.Addr() == client.Addr() &&
			(p.kind == outbound && p.target == to && (!p.session.private || p.ask.Flags&filterapi.AddressBased != 0) ||
				p.kind == redirected && p.via == to)
	}, to)
	if err != nil {
		return nil, err
	}
	t := flow.Tuple{Proto: proto, Src: client, Dst: to}
	fl := g.newFlow(p.session, t, client, p.target)
	fl.Client.far = to
	fl.conn.inherit(p)
	return fl, fl.start(g.raise(fl.conn, fl.conn.connectEvent(p.target)))
}

// Inbound begins a flow from a remote address to the external address of a
// bind. The accept event, or that of a UDP destination, is raised if the filter
// is registered for secondary connections. The flow's client is where the bind
// leads to, its server is the remote address. ErrSilence: no bind lets it in;
// or the filter refused it.
func (g *Gateway) Inbound(proto flow.Proto, remote, external netip.AddrPort) (*Flow, error) {
	p, err := g.use(proto, func(p *permission) bool {
		return p.kind == inbound && p.external == external && !p.discarding && !p.waiting && !p.emulated && p.sources.Includes(remote.Addr())
	}, external)
	if err != nil {
		return nil, err
	}
	t := flow.Tuple{Proto: proto, Src: remote, Dst: external}
	fl := g.newFlow(p.session, t, p.client, remote)
	fl.deaf = p.oneWay
	c := fl.conn
	c.inherit(p)
	var ev filterapi.Event = &filterapi.AcceptEvent{About: c.about(), Listener: p.object, Remote: remote, Local: external}
	if proto == flow.UDP {
		ev = c.connectEvent(remote)
	}
	return fl, fl.start(g.raise(c, ev))
}

// Dial is Outbound for a test that only wants to know whether a flow is let
// through. It comes from a port of its own.
func (g *Gateway) Dial(proto flow.Proto, client netip.Addr, target netip.AddrPort) bool {
	g.mu.Lock()
	g.nextClient++
	from := netip.AddrPortFrom(client, 20000+g.nextClient%20000)
	g.mu.Unlock()
	_, err := g.Outbound(proto, from, target)
	return err == nil
}

// Arrive is Inbound for a test that only wants to know whether a flow is let
// in, and where it is sent.
func (g *Gateway) Arrive(proto flow.Proto, source netip.Addr, external netip.AddrPort) (client netip.AddrPort, in bool) {
	g.mu.Lock()
	g.nextClient++
	from := netip.AddrPortFrom(source, 20000+g.nextClient%20000)
	g.mu.Unlock()
	fl, err := g.Inbound(proto, from, external)
	if err != nil {
		return netip.AddrPort{}, false
	}
	return fl.Client.addr, true
}

// use finds a permission for a flow and uses it.
func (g *Gateway) use(proto flow.Proto, fits func(*permission) bool, to netip.AddrPort) (*permission, error) {
	g.mu.Lock()
	i := slices.IndexFunc(g.living, func(p *permission) bool { return p.live && p.ask.Proto == proto && fits(p) })
	if i < 0 {
		l := lease{proto, to}
		q := g.leases[l]
		refused := g.refuses(l) || q != nil && q.kind == redirected && q.opened
		g.mu.Unlock()
		if refused {
			return nil, fmt.Errorf("%s to %s: %w", proto, to, ErrReset)
		}
		return nil, fmt.Errorf("%s to %s: %w", proto, to, ErrSilence)
	}
	p := g.living[i]
	text := p.String()
	p.flows++
	if !p.multiple() {
		p.endLocked()
	}
	g.mu.Unlock()
	if !p.multiple() {
		p.ended(Used, text)
	}
	return p, nil
}
