package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

const bindFlags = commonFlags | widerFlags | filterapi.Bidirectional | filterapi.IncreaseReceiveBuffer |
	filterapi.EvenPort | filterapi.Discarding | filterapi.Preferred | filterapi.SameSource

// place is where the binds of one call are opened.
type place struct {
	first   netip.AddrPort // the lowest address; invalid: each at its client's own
	leased  bool
	waiting bool     // for the client's address
	mapping *mapping // that has the address already; nil: none
}

// at is the external address of bind i.
func (x place) at(i int, client netip.AddrPort) netip.AddrPort {
	if !x.first.IsValid() {
		return client
	}
	return netip.AddrPortFrom(x.first.Addr(), x.first.Port()+uint16(i))
}

// bindForClient is BindForClient, called by the filter of a name.
func (s *session) bindForClient(by string, b filterapi.Bind) ([]*connection, error) {
	fail := func(err error) ([]*connection, error) {
		return nil, fmt.Errorf("bind for client %v: %w", b.Clients, err)
	}
	waiting, err := s.checkClients(b)
	if err != nil {
		return fail(err)
	}
	t, err := s.checkCall(b.Negotiated, bindFlags, netip.AddrPort{})
	if err != nil {
		return fail(err)
	}
	// The filters' handlers run in the session.
	if !s.ref() {
		return fail(filterapi.ErrTerminating)
	}
	defer s.e.release(s)
	if !s.e.perms.room(s.addr, len(b.Clients), s.e.quota) {
		return fail(filterapi.ErrQuota)
	}
	x, err := s.findPlace(b, t)
	if err != nil {
		return fail(err)
	}
	x.waiting = waiting
	perms := make([]*permission, len(b.Clients))
	out := make([]*connection, len(b.Clients))
	for i, client := range b.Clients {
		perms[i] = s.newBind(ground{direction: nat.Inbound, by: by}, b, t, x, i, client)
		out[i] = perms[i].object()
	}
	if err := s.e.openBinds(perms); err != nil {
		s.e.abandon(perms...)
		return fail(err)
	}
	return out, nil
}

// checkClients checks the addresses that a bind names. waiting: the client's
// is not known yet.
func (s *session) checkClients(b filterapi.Bind) (waiting bool, err error) {
	if !suits(b.IPFilter, s.addr) {
		return false, fmt.Errorf("IP filter: %w", filterapi.ErrInvalidArgument)
	}
	if len(b.Clients) == 1 {
		if a := b.Clients[0].Addr(); !a.IsValid() || a.IsUnspecified() && a.Is4() == s.addr.Is4() {
			return true, nil
		}
	}
	if len(b.Clients) == 0 {
		return false, filterapi.ErrInvalidArgument
	}
	for _, c := range b.Clients {
		if err := s.checkClient(c, b.Flags); err != nil {
			return false, err
		}
	}
	return false, nil
}

func (s *session) checkClient(c netip.AddrPort, flags filterapi.Flags) error {
	if !s.reachable(c) {
		return filterapi.ErrInvalidArgument
	}
	if !s.e.within(flags, c.Addr(), s.addr) {
		return fmt.Errorf("%v is not the session's own address: %w", c, filterapi.ErrPolicyDenied)
	}
	return nil
}

// findPlace leases external ports where some are needed.
func (s *session) findPlace(b filterapi.Bind, t terms) (place, error) {
	addr, port, wish := b.External.Addr(), b.External.Port(), b.Flags&filterapi.Preferred != 0
	if b.External == (netip.AddrPort{}) || addr.IsUnspecified() && addr.Is4() == s.addr.Is4() {
		var hidden bool
		var err error
		if addr, hidden, err = s.behind(b, t); err != nil {
			return place{}, err
		}
		if !hidden {
			return ownPlace(b)
		}
		if s.e.kernelPorts.Load().meets(port, len(b.Clients)) {
			if !wish {
				return place{}, fmt.Errorf("port %d is the kernel's: %w", port, filterapi.ErrNoPorts)
			}
			port = 0
		}
	} else {
		if port != 0 && t.primary != nil && t.primary.translated(b.Proto, b.External) {
			return s.lent(b)
		}
		if !s.own(addr) {
			return place{}, fmt.Errorf("external address %v is not the gateway's: %w", b.External, filterapi.ErrInvalidArgument)
		}
	}
	if r, ok := claimsMapping(b, t); ok {
		return s.claim(b, r, addr, port)
	}
	return s.leaseFor(b, addr, port)
}

// leaseFor leases the ports of a call at an address: from a certain one on, or
// with port 0 where there are some.
func (s *session) leaseFor(b filterapi.Bind, addr netip.Addr, port uint16) (place, error) {
	n, even, wish := len(b.Clients), b.Flags&filterapi.EvenPort != 0, b.Flags&filterapi.Preferred != 0
	if port != 0 && !(wish && even && port%2 != 0) {
		at := netip.AddrPortFrom(addr, port)
		if x, ok := s.reclaim(b, at); ok {
			return x, nil
		}
		x, err := s.leaseExact(b.Proto, at, n, even)
		if err == nil || !wish {
			return x, err
		}
	}
	r := nat.Request{Proto: b.Proto, Addrs: []netip.Addr{addr}, N: n, Even: even}
	if n == 1 && !even {
		r.Like = b.Clients[0].Port()
	}
	first, err := s.lease(r)
	if err != nil {
		return place{}, err
	}
	return place{first: first, leased: true}, nil
}

// lease takes ports for the session's client.
func (s *session) lease(r nat.Request) (netip.AddrPort, error) {
	r.Holder = s.addr
	at, err := s.e.ports.Take(r)
	return at, noLease(err)
}

// noLease says in filterapi's words why the allocator gave nothing.
func noLease(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, nat.ErrQuota):
		return fmt.Errorf("%w: %w", filterapi.ErrQuota, err)
	case errors.Is(err, nat.ErrLeased):
		return fmt.Errorf("%w: %w", filterapi.ErrAlreadyExists, err)
	}
	return fmt.Errorf("%w: %w", filterapi.ErrNoPorts, err)
}

// leaseExact leases ports from a certain one on.
func (s *session) leaseExact(proto flow.Proto, at netip.AddrPort, n int, even bool) (place, error) {
	if even && at.Port()%2 != 0 {
		return place{}, fmt.Errorf("external port %d is not even: %w", at.Port(), filterapi.ErrInvalidArgument)
	}
	if err := noLease(s.e.ports.LeaseExactFor(s.addr, proto, at, n)); err != nil {
		return place{}, err
	}
	return place{first: at, leased: true}, nil
}

// ownPlace is that of binds whose clients nothing translates: each at its own
// address and port.
func ownPlace(b filterapi.Bind) (place, error) {
	port := b.External.Port()
	if port != 0 && b.Flags&filterapi.Preferred == 0 && port != b.Clients[0].Port() {
		return place{}, fmt.Errorf("port %d of an address that is not translated: %w", port, filterapi.ErrNoPorts)
	}
	return place{}, nil
}

// translated says whether an address is what a flow is translated to.
func (c *connection) translated(proto flow.Proto, a netip.AddrPort) bool {
	name, err := c.ExternalName()
	return err == nil && name == a && c.tuple.Proto == proto
}

// lent is the place of a bind at the end of a living flow, which holds the
// address: nothing is leased.
func (s *session) lent(b filterapi.Bind) (place, error) {
	if len(b.Clients) > 1 {
		return place{}, fmt.Errorf("several binds at the end of one flow: %w", filterapi.ErrInvalidArgument)
	}
	if s.own(b.External.Addr()) {
		return place{first: b.External}, s.e.shareMapping(b.Proto, b.External)
	}
	// On a routed path it is the client's own.
	if b.Clients[0] != b.External {
		return place{}, fmt.Errorf("%v is the client's own address and leads nowhere else: %w", b.External, filterapi.ErrInvalidArgument)
	}
	return place{}, nil
}

// behind is the gateway's address that the client of a bind is hidden behind;
// false: it is not hidden.
func (s *session) behind(b filterapi.Bind, t terms) (netip.Addr, bool, error) {
	if t.primary != nil {
		addr, hidden := s.e.hidden(t.primary)
		return addr, hidden, nil
	}
	v := t.verdict
	if v.NetworkRule == nil || v.NetworkRule.Relation != policy.NAT || v.Reverse || !s.addr.Is4() {
		return netip.Addr{}, false, nil
	}
	if addrs := v.NetworkRule.Addresses(); len(addrs) > 0 {
		return s.e.ports.Pair(s.addr, addrs), true, nil
	}
	// The route to those who may come tells the address.
	if list := b.IPFilter.Prefixes(); len(list) > 0 {
		iface, source, _, err := s.e.routes.Lookup(list[0].Addr())
		if err == nil && source.IsValid() && slices.Contains(s.e.Policy().NetworksOf(list[0].Addr(), iface), v.NetworkRule.To) {
			return source, true, nil
		}
	}
	if source, ok := s.e.facing(v.NetworkRule.To, false); ok {
		return source, true, nil
	}
	return netip.Addr{}, false, fmt.Errorf("nothing tells the external address: %w", filterapi.ErrInvalidArgument)
}

// newBind makes bind i of a call, with its object. g has its direction, and who
// asks.
func (s *session) newBind(g ground, b filterapi.Bind, t terms, x place, i int, client netip.AddrPort) *permission {
	g.reach = b.Flags & widerFlags
	p := s.newPermission(t, b.Negotiated, g)
	p.bind = &bind{
		awaiting: x.waiting, discarding: b.Flags&filterapi.Discarding != 0,
		oneWay:      b.Proto == flow.UDP && b.Flags&filterapi.Bidirectional == 0,
		fromGateway: t.primary != nil && t.primary.inbound() && t.primary.perm.bind.fromGateway,
		mapping:     x.mapping, borrows: x.mapping != nil,
	}
	p.bind.setFilter(b.IPFilter.Clone())
	external := x.at(i, client)
	switch {
	case !x.waiting:
		p.near = compactOf(client)
	case !x.first.IsValid():
		external = netip.AddrPort{}
	}
	p.far, p.leased = compactOf(external), x.leased
	if r := t.verdict.NetworkRule; b.Flags&filterapi.SameSource != 0 && x.first.Addr().Is4() && r != nil && r.Relation == policy.NAT && !t.verdict.Reverse {
		p.bind.leaves = r.Name
	}
	p.makeObject(external)
	return p
}

// makeObject makes what filters know a bind as.
func (p *permission) makeObject(external netip.AddrPort) {
	p.bind.object = &connection{
		e: p.session.e, session: p.session, tuple: flow.Tuple{Proto: p.proto, Dst: external}, start: p.session.e.now(), bind: p, name: external,
	}
	p.bind.object.inherit(p)
}

// openBinds asks the filters that watch binds and then opens them all.
func (e *Engine) openBinds(perms []*permission) error {
	ctx, cancel := context.WithTimeout(context.Background(), e.answer)
	defer cancel()
	for _, p := range perms {
		kind := filterapi.BindUDP
		if p.proto == flow.TCP {
			kind = filterapi.BindTCP
		}
		if err := e.notify(ctx, p.object(), kind, func(_ *registered, a filterapi.About) filterapi.Event {
			return &filterapi.BindEvent{About: a, TCP: p.proto == flow.TCP, External: p.external()}
		}); err != nil {
			return fmt.Errorf("%w: %w", filterapi.ErrPolicyDenied, err)
		}
	}
	if err := e.grant(perms...); err != nil {
		return err
	}
	for _, p := range perms {
		if p.proto != flow.TCP {
			continue
		}
		// A listen cannot be refused any more; its handlers' errors are in the
		// log.
		_ = e.notify(ctx, p.object(), filterapi.Listen, func(_ *registered, a filterapi.About) filterapi.Event {
			return &filterapi.ListenEvent{About: a, External: p.object().opened()}
		})
	}
	return nil
}

// opened is the external address of a bind.
func (c *connection) opened() netip.AddrPort {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.name
}

// shown is the tuple as filters get it. The address of a bind may become known
// late.
func (c *connection) shown() flow.Tuple {
	t := c.tuple
	if c.bind != nil {
		t.Dst = c.opened()
	}
	return t
}

// SetClientAddress implements filterapi.Connection.
func (c *connection) SetClientAddress(a netip.AddrPort) error {
	fail := func(err error) error { return fmt.Errorf("set client address %v: %w", a, err) }
	p := c.bind
	if p == nil {
		return fail(filterapi.ErrInvalidArgument)
	}
	if err := c.session.checkClient(a, p.reach); err != nil {
		return fail(err)
	}
	before, err := c.e.perms.address(p, a)
	if err != nil {
		return fail(err)
	}
	if err := c.e.enforce(p); err != nil {
		c.e.perms.unaddress(p, before)
		c.e.tasks.run(func() { _ = c.e.enforce(p) }) // it logs and tries again
		return fail(err)
	}
	c.e.expireAfter(p, p.timeout)
	if !p.waits() {
		return fail(filterapi.ErrTerminating)
	}
	return nil
}
