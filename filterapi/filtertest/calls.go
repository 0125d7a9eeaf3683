package filtertest

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

const (
	reachFlags    = filterapi.ToSameNet | filterapi.ToSameNetwork | filterapi.ToAll
	connectFlags  = filterapi.AllowMultiple | filterapi.Timeout | filterapi.NoKernelMode | filterapi.AddressBased | reachFlags
	redirectFlags = filterapi.AllowMultiple | filterapi.Timeout | filterapi.NoKernelMode | filterapi.IncreaseReceiveBuffer
	bindFlags     = filterapi.AllowMultiple | filterapi.Timeout | filterapi.NoKernelMode | filterapi.Bidirectional |
		filterapi.IncreaseReceiveBuffer | filterapi.EvenPort | filterapi.Discarding | filterapi.Preferred |
		filterapi.SameSource | reachFlags
	allowFlags = filterapi.Bidirectional | filterapi.IncreaseReceiveBuffer
	udpFlags   = filterapi.Bidirectional // those that TCP does not take
)

// check holds what the permission calls have in common. It gives the primary
// connection, nil if there is none.
func (s *session) check(n filterapi.Negotiated, allowed filterapi.Flags) (*connection, error) {
	c, ok := n.Primary.(*connection)
	switch {
	case n.Primary == nil && n.Protocol == "":
		return nil, fmt.Errorf("neither a primary connection nor a protocol: %w", filterapi.ErrInvalidArgument)
	case n.Primary != nil && (!ok || c == nil || c.session != s || c.bind != nil):
		return nil, fmt.Errorf("primary connection: %w", filterapi.ErrInvalidArgument)
	case !knownProto(n.Proto):
		return nil, fmt.Errorf("protocol %v: %w", n.Proto, filterapi.ErrInvalidArgument)
	case n.Flags&^allowed != 0, n.Proto == flow.TCP && n.Flags&udpFlags != 0:
		return nil, fmt.Errorf("flags 0x%x: %w", n.Flags, filterapi.ErrInvalidArgument)
	case n.Expiry < 0:
		return nil, fmt.Errorf("expiry %v: %w", n.Expiry, filterapi.ErrInvalidArgument)
	case n.Notify != nil && !s.isPart(n.Notify):
		return nil, fmt.Errorf("notify: not the session filter of this session: %w", filterapi.ErrInvalidArgument)
	}
	if !s.lives() {
		return nil, filterapi.ErrTerminating
	}
	if c != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.ended {
			return nil, filterapi.ErrTerminating
		}
	}
	return c, nil
}

// isPart says whether f is the filter's part in this session. While the filter
// is being asked for that, nobody can know.
func (s *session) isPart(f filterapi.SessionFilter) bool {
	a := s.attached()
	return a != nil && reflect.TypeOf(f).Comparable() && a.filter == f
}

// allowed asks the access rules about a permission call.
func (s *session) allowed(c *connection, n filterapi.Negotiated, target netip.AddrPort) error {
	protocol := n.Protocol
	if protocol == "" && c != nil {
		protocol = c.protocol
	}
	return s.gateway.access(s.addr, protocol, n.Proto, target)
}

// remote is the far end of a primary connection.
func (c *connection) remote() netip.Addr {
	switch {
	case c == nil:
		return netip.Addr{}
	case c.perm != nil && c.perm.kind == inbound:
		return c.tuple.Src.Addr()
	case c.perm != nil && c.perm.kind == redirected:
		return c.perm.target.Addr()
	}
	return c.tuple.Dst.Addr()
}

// AllowFutureConnect implements filterapi.Session.
func (s *session) AllowFutureConnect(f filterapi.FutureConnect) (filterapi.Action, error) {
	g := s.gateway
	fail := func(err error) (filterapi.Action, error) {
		return nil, fmt.Errorf("allow future connect to %v: %w", f.Target, err)
	}
	c, err := s.check(f.Negotiated, connectFlags)
	switch {
	case err != nil:
		return fail(err)
	case !goodPeer(s, f.Target), !g.goodSource(s, f.External, f.Flags):
		return fail(filterapi.ErrInvalidArgument)
	case !reaches(g, f.Flags, f.Target.Addr(), c.remote()):
		return fail(filterapi.ErrPolicyDenied)
	}
	if err := s.allowed(c, f.Negotiated, f.Target); err != nil {
		return fail(err)
	}
	p := g.newPermission(s, outbound, f.Negotiated, c)
	p.client, p.target, p.source = netip.AddrPortFrom(s.addr, 0), f.Target, f.External
	if err := g.install(Allowed, p.String(), p); err != nil {
		return fail(err)
	}
	return action{p}, nil
}

// RedirectConnections implements filterapi.Session.
func (s *session) RedirectConnections(r filterapi.Redirect) (netip.AddrPort, []filterapi.Action, error) {
	g := s.gateway
	fail := func(err error) (netip.AddrPort, []filterapi.Action, error) {
		return netip.AddrPort{}, nil, fmt.Errorf("redirect connections to %v: %w", r.Targets, err)
	}
	c, err := s.check(r.Negotiated, redirectFlags)
	switch {
	case err != nil:
		return fail(err)
	case len(r.Targets) == 0, !g.goodSource(s, r.External, r.Flags),
		slices.ContainsFunc(r.Targets, func(t netip.AddrPort) bool { return !goodPeer(s, t) }):
		return fail(filterapi.ErrInvalidArgument)
	}
	var ps []*permission
	for _, t := range r.Targets {
		if err := s.allowed(c, r.Negotiated, t); err != nil {
			return fail(err)
		}
		p := g.newPermission(s, redirected, r.Negotiated, c)
		p.client, p.target, p.source, p.leased = netip.AddrPortFrom(s.addr, 0), t, r.External, true
		ps = append(ps, p)
	}
	if err := g.install(Redirected, fmt.Sprintf("%s redirection to %v", r.Proto, r.Targets), ps...); err != nil {
		return fail(err)
	}
	var out []filterapi.Action
	for _, p := range ps {
		out = append(out, action{p})
	}
	return ps[0].via, out, nil
}

// askFilter tells the filter of a redirection at the call. One that attaches a
// data filter then is asked again at each connection.
func (p *permission) askFilter() error {
	src := netip.AddrPortFrom(p.client.Addr(), 0)
	c := p.gateway.newConnection(p.session, flow.Tuple{Proto: p.ask.Proto, Src: src, Dst: p.via})
	c.inherit(p)
	defer p.gateway.terminating(c)
	if err := p.gateway.raise(c, c.connectEvent(p.target)); err != nil {
		return fmt.Errorf("%w: %w", filterapi.ErrPolicyDenied, err)
	}
	p.toUser = p.toUser || len(c.chain()) > 0
	return nil
}

// connectEvent is the event of an outbound connection.
func (c *connection) connectEvent(target netip.AddrPort) filterapi.Event {
	if c.tuple.Proto == flow.UDP {
		return &filterapi.UDPDestinationEvent{About: c.about(), Destination: c, Peer: target}
	}
	return &filterapi.ConnectEvent{About: c.about(), Target: target}
}

// inherit makes a connection one that a permission let in.
func (c *connection) inherit(p *permission) {
	c.perm, c.secondary = p, p.primary != nil
	if p.primary != nil {
		c.protocol = p.primary.protocol
	}
	if p.ask.Protocol != "" {
		c.protocol = p.ask.Protocol
	}
}

// goodPeer says whether an address can be the far end of a session's flow.
func goodPeer(s *session, a netip.AddrPort) bool {
	return a.IsValid() && a.Port() != 0 && !a.Addr().IsUnspecified() && a.Addr().Is4() == s.addr.Is4()
}

// goodClient says whether an address can be a client's in a session.
func goodClient(s *session, a netip.AddrPort) bool { return goodPeer(s, a) }

// goodSource says whether connections may leave from an address.
func (g *Gateway) goodSource(s *session, a netip.AddrPort, flags filterapi.Flags) bool {
	if a == (netip.AddrPort{}) {
		return true
	}
	return a.Addr().Is4() == s.addr.Is4() && g.owns(a.Addr()) && (a.Port() == 0 || flags&filterapi.AllowMultiple == 0)
}

// suits says whether the addresses of an IP filter are of the client's family.
func suits(f *filterapi.IPFilter, client netip.Addr) bool {
	return !slices.ContainsFunc(f.Prefixes(), func(p netip.Prefix) bool { return p.Addr().Is4() != client.Is4() })
}

// reaches says whether an address may be named: only the own one, unless a
// flag widens that.
func reaches(g *Gateway, f filterapi.Flags, a, own netip.Addr) bool {
	switch {
	case a == own, f&filterapi.ToAll != 0:
		return true
	case f&(filterapi.ToSameNet|filterapi.ToSameNetwork) == 0, !own.IsValid():
		return false
	case f&filterapi.ToSameNetwork != 0 && len(g.Networks) > 0:
		return slices.ContainsFunc(g.Networks, func(n netip.Prefix) bool { return n.Contains(a) && n.Contains(own) })
	}
	bits := 24
	if own.Is6() {
		bits = 64
	}
	near, err := own.Prefix(bits)
	return err == nil && near.Contains(a)
}
