package filtertest

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// BindForClient implements filterapi.Session.
func (s *session) BindForClient(b filterapi.Bind) ([]filterapi.Connection, error) {
	g := s.gateway
	fail := func(err error) ([]filterapi.Connection, error) {
		return nil, fmt.Errorf("bind for client %v: %w", b.Clients, err)
	}
	c, err := s.check(b.Negotiated, bindFlags)
	if err != nil {
		return fail(err)
	}
	unknown := len(b.Clients) == 1 && (!b.Clients[0].IsValid() || b.Clients[0].Addr().IsUnspecified())
	switch {
	case len(b.Clients) == 0, !suits(b.IPFilter, s.addr), !g.goodBind(s, b.External, b.Flags):
		return fail(filterapi.ErrInvalidArgument)
	}
	var ps []*permission
	for _, client := range b.Clients {
		switch {
		case unknown:
			client = netip.AddrPort{}
		case !goodClient(s, client):
			return fail(filterapi.ErrInvalidArgument)
		case !reaches(g, b.Flags, client.Addr(), s.addr):
			return fail(filterapi.ErrPolicyDenied)
		}
		p := g.newPermission(s, inbound, b.Negotiated, c)
		p.client, p.waiting, p.sources = client, unknown, b.IPFilter.Clone()
		p.discarding = b.Flags&filterapi.Discarding != 0
		ps = append(ps, p)
	}
	// One that discards need not be allowed yet; nonsense it may not be.
	if err := s.allowed(c, b.Negotiated, netip.AddrPort{}); err != nil && (b.Flags&filterapi.Discarding == 0 || errors.Is(err, filterapi.ErrInvalidArgument)) {
		return fail(err)
	}
	if unknown && b.External == (netip.AddrPort{}) && !g.hidden(s.addr) {
		// Nothing says which address a pinhole would be for.
		return fail(filterapi.ErrInvalidArgument)
	}
	if err := g.open(b.External, ps...); err != nil {
		return fail(err)
	}
	var out []filterapi.Connection
	for _, p := range ps {
		out = append(out, p.object)
	}
	return out, nil
}

// goodBind says whether an external address may be asked for.
func (g *Gateway) goodBind(s *session, a netip.AddrPort, flags filterapi.Flags) bool {
	if a == (netip.AddrPort{}) {
		return true
	}
	odd := flags&filterapi.EvenPort != 0 && a.Port()%2 != 0 && flags&filterapi.Preferred == 0
	return a.Addr().Is4() == s.addr.Is4() && (g.owns(a.Addr()) || a.Addr().IsUnspecified()) && !odd
}

// open leases the addresses of binds, asks the filter, and has them opened.
func (g *Gateway) open(at netip.AddrPort, ps ...*permission) error {
	first := ps[0]
	how, text := Bound, fmt.Sprintf("%s bind for %s", first.ask.Proto, first.client)
	switch {
	case first.discarding:
		how = Discards
	case first.waiting, first.sources != nil && len(first.sources.Prefixes()) == 0:
		how = Reserved
	}
	g.journal.add(Entry{Asked, text})
	void := func(err error) error {
		g.mu.Lock()
		for _, p := range ps {
			p.endLocked()
		}
		g.mu.Unlock()
		for _, p := range ps {
			if p.object != nil {
				g.terminating(p.object)
			}
		}
		return err
	}
	if err := g.leaseBinds(at, ps); err != nil {
		return void(err)
	}
	for _, p := range ps {
		g.bindObject(p)
		if err := g.announce(p); err != nil {
			return void(err)
		}
		if p.object.isEmulated() {
			how, p.emulated = Emulates, true
		}
	}
	if err := g.grant(how, ps...); err != nil {
		return void(err)
	}
	for _, p := range ps {
		if p.ask.Proto == flow.TCP {
			// A listen cannot be refused any more.
			_ = g.raise(p.object, &filterapi.ListenEvent{About: p.object.about(), External: p.external})
		}
	}
	return nil
}

// bindObject makes the connection object of a bind.
func (g *Gateway) bindObject(p *permission) *connection {
	c := g.newConnection(p.session, flow.Tuple{Proto: p.ask.Proto, Dst: p.external})
	c.inherit(p)
	c.perm, c.bind, c.name, p.object = nil, p, p.external, c
	return c
}

// announce raises the event of a bind.
func (g *Gateway) announce(p *permission) error {
	c := p.object
	if err := g.raise(c, &filterapi.BindEvent{About: c.about(), TCP: p.ask.Proto == flow.TCP, External: p.external}); err != nil {
		return fmt.Errorf("%w: %w", filterapi.ErrPolicyDenied, err)
	}
	return nil
}

// leaseBinds gives binds their external addresses.
func (g *Gateway) leaseBinds(at netip.AddrPort, ps []*permission) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	first := ps[0]
	if err := g.admit(first.session, len(ps)); err != nil {
		return err
	}
	even, wish := first.ask.Flags&filterapi.EvenPort != 0, first.ask.Flags&filterapi.Preferred != 0
	anywhere := at == (netip.AddrPort{}) || at.Addr().IsUnspecified()
	switch {
	case anywhere && !g.hidden(first.session.addr): // pinholes
		if at.Port() != 0 && at.Port() != first.client.Port() && !wish {
			return filterapi.ErrNoPorts
		}
		for _, p := range ps {
			p.external = p.client
			if owner := g.opened(p); owner != nil && owner.session != p.session {
				return filterapi.ErrAlreadyExists
			}
		}
		return nil
	case first.primary != nil && at.IsValid() && at.Port() != 0 && at == first.primary.nameNow():
		// The translation of the living primary: it is held already, and each
		// of the session's binds to this client may have it.
		if len(ps) > 1 {
			return filterapi.ErrInvalidArgument
		}
		first.external = at
		if q := g.opened(first); q != nil && (q.session != first.session || q.client != first.client) {
			return filterapi.ErrAlreadyExists
		}
		return nil
	}
	addr, port := at.Addr(), at.Port()
	if anywhere {
		addr = g.external(first.session.addr)
	}
	if wish && even && port%2 != 0 {
		port = 0
	}
	low, err := g.leaseRun(ps, addr, port, even, firstPort, &g.nextPort)
	if err != nil && wish && port != 0 {
		low, err = g.leaseRun(ps, addr, 0, even, firstPort, &g.nextPort)
	}
	if err != nil {
		return err
	}
	for i, p := range ps {
		p.external, p.leased = netip.AddrPortFrom(addr, low+uint16(i)), true
	}
	return nil
}

// opened is the bind in force that has the address of another; nil: none.
// Gateway.mu is held.
func (g *Gateway) opened(p *permission) *permission {
	for _, q := range g.living {
		if q != p && q.kind == inbound && q.ask.Proto == p.ask.Proto && q.external == p.external {
			return q
		}
	}
	return nil
}

// nameNow is the external name, invalid while it is not known.
func (c *connection) nameNow() netip.AddrPort {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.name
}

// RetroactiveAllowBind implements filterapi.Session.
func (s *session) RetroactiveAllowBind(a filterapi.AllowBind) (already bool, err error) {
	g := s.gateway
	fail := func(err error) (bool, error) {
		return false, fmt.Errorf("allow bind %s %v: %w", a.Proto, a.Address, err)
	}
	switch {
	case !knownProto(a.Proto), !a.Address.IsValid(), a.Address.Port() == 0, a.Address.Addr().Is4() != s.addr.Is4(), a.Flags&^allowFlags != 0,
		a.Proto == flow.TCP && a.Flags&udpFlags != 0, !suits(a.IPFilter, s.addr):
		return fail(filterapi.ErrInvalidArgument)
	}
	p, closing := g.bindAt(s, a.Proto, a.Address)
	switch {
	case !s.lives(), p == nil && closing:
		return fail(filterapi.ErrTerminating)
	case p == nil:
		return fail(filterapi.ErrNotFound)
	}
	protocol := a.Protocol
	if protocol == "" {
		protocol = p.object.protocol
	}
	if err := g.access(s.addr, protocol, a.Proto, netip.AddrPort{}); err != nil {
		return fail(err)
	}
	g.mu.Lock()
	discarding := p.discarding
	g.mu.Unlock()
	if !discarding {
		return true, nil
	}
	g.journal.add(Entry{Asked, "allow of " + a.Address.String()})
	if g.Refuse != nil {
		return fail(g.Refuse)
	}
	g.acknowledge()
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.gone {
		return fail(filterapi.ErrTerminating)
	}
	p.discarding, p.sources = false, a.IPFilter.Clone()
	p.ask.Flags = p.ask.Flags&^(filterapi.Discarding|allowFlags) | a.Flags
	p.oneWay = a.Proto == flow.UDP && a.Flags&filterapi.Bidirectional == 0
	g.journal.add(Entry{Approved, p.String()})
	return false, nil
}

// bindAt finds a bind of a session; closing: there is one that is ending.
func (g *Gateway) bindAt(s *session, proto flow.Proto, a netip.AddrPort) (p *permission, closing bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	fits := func(q *permission) bool {
		return q.session == s && q.kind == inbound && q.ask.Proto == proto && q.external.Port() == a.Port() &&
			(a.Addr().IsUnspecified() || q.external.Addr() == a.Addr())
	}
	for _, q := range g.living {
		if q.live && fits(q) {
			return q, false
		}
	}
	for _, q := range g.leases {
		closing = closing || q.gone && fits(q)
	}
	return nil, closing
}

// ClientBind makes a bind as a client does that asks the gateway for one, by
// PCP or SOCKS for instance: nobody has approved of it, so it discards what
// comes until the filter allows it with RetroactiveAllowBind. The events are
// raised as for any other bind; ErrPolicyDenied: the filter denied it.
func (g *Gateway) ClientBind(proto flow.Proto, client netip.AddrPort) (filterapi.Connection, error) {
	s := g.session(client.Addr())
	p := g.newPermission(s, inbound, filterapi.Negotiated{Proto: proto, Flags: filterapi.Discarding | filterapi.AllowMultiple}, nil)
	p.client, p.explicit, p.discarding = client, true, true
	if err := g.open(netip.AddrPort{}, p); err != nil {
		return nil, err
	}
	return p.object, nil
}
