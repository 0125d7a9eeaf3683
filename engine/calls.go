package engine

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

const (
	widerFlags   = filterapi.ToSameNet | filterapi.ToSameNetwork | filterapi.ToAll
	commonFlags  = filterapi.AllowMultiple | filterapi.Timeout | filterapi.NoKernelMode
	connectFlags = commonFlags | widerFlags | filterapi.AddressBased
	udpFlags     = filterapi.Bidirectional // those that TCP does not take
)

// terms are what a permission call has found out about what it was given.
type terms struct {
	primary *connection // nil: there is none
	basis   basis
	standing
	verdict policy.Verdict // on the basis
	notify  *hearer        // nil: nobody
	context any
}

// AllowFutureConnect implements filterapi.Session.
func (s *session) AllowFutureConnect(f filterapi.FutureConnect) (filterapi.Action, error) {
	fail := func(err error) (filterapi.Action, error) {
		return nil, fmt.Errorf("allow future connect to %v: %w", f.Target, err)
	}
	if !s.reachable(f.Target) {
		return fail(filterapi.ErrInvalidArgument)
	}
	t, err := s.checkCall(f.Negotiated, connectFlags, f.Target)
	if err != nil {
		return fail(err)
	}
	if err := s.checkSource(f.External, f.Flags); err != nil {
		return fail(err)
	}
	// Without a primary connection the rules were asked about the target.
	switch {
	case t.primary == nil && f.Flags&widerFlags != 0:
		return fail(fmt.Errorf("a wider target without a primary connection: %w", filterapi.ErrInvalidArgument))
	case t.primary != nil && !s.e.within(f.Flags, f.Target.Addr(), t.primary.far().Addr()):
		return fail(fmt.Errorf("not the peer of the primary connection: %w", filterapi.ErrPolicyDenied))
	}
	p := s.newPermission(t, f.Negotiated, ground{
		direction: nat.Outbound, source: f.External, addressBased: f.Flags&filterapi.AddressBased != 0,
	})
	p.far = compactOf(f.Target)
	if err := s.e.grant(p); err != nil {
		s.e.abandon(p)
		return fail(err)
	}
	return (*action)(p), nil
}

// reachable says whether an address and port can be somebody that the client
// talks to.
func (s *session) reachable(a netip.AddrPort) bool {
	return a.Port() != 0 && s.plain(a.Addr())
}

// plain says whether an address is one host's, and of the client's family.
func (s *session) plain(a netip.Addr) bool {
	return a.IsValid() && a.Is4() == s.addr.Is4() && !a.Is4In6() && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast()
}

// checkSource checks the address that connections are to leave from.
func (s *session) checkSource(external netip.AddrPort, flags filterapi.Flags) error {
	if external == (netip.AddrPort{}) {
		return nil
	}
	if !s.own(external.Addr()) {
		return fmt.Errorf("external address %v is not the gateway's: %w", external, filterapi.ErrInvalidArgument)
	}
	if external.Port() != 0 && flags&filterapi.AllowMultiple != 0 {
		return fmt.Errorf("many connections from one external port: %w", filterapi.ErrInvalidArgument)
	}
	return nil
}

// own says whether an address is one of the gateway's.
func (s *session) own(a netip.Addr) bool {
	if !s.plain(a) {
		return false
	}
	_, _, local, err := s.e.routes.Lookup(a)
	return err == nil && local
}

// checkCall holds what the permission calls have in common. The access rules
// are asked at the call; use is not checked again. target, if valid, is what
// they are asked about where there is no primary connection.
func (s *session) checkCall(n filterapi.Negotiated, allowed filterapi.Flags, target netip.AddrPort) (terms, error) {
	var t terms
	if err := s.checkNegotiated(n, allowed, &t); err != nil {
		return t, err
	}
	if err := s.stand(&t, n, target); err != nil {
		return t, err
	}
	var err error
	if t.verdict, err = s.e.judge(t.basis); err != nil {
		// A bind that discards need not be allowed yet; nonsense it may not be.
		if n.Flags&filterapi.Discarding == 0 || t.verdict.Reason == policy.ReasonProtocol {
			return t, err
		}
	}
	if target.IsValid() && !t.primary.answers(target) && !s.joined(n.Proto, target) {
		return t, filterapi.ErrNetworkDenied
	}
	if t.primary == nil || t.protocol != t.primary.protocol {
		t.rule, t.uses = t.verdict.Rule, t.verdict.Filters
		if err != nil {
			t.rule, t.uses = nil, nil
		}
	}
	return t, nil
}

// checkNegotiated checks what the rules have no part in.
func (s *session) checkNegotiated(n filterapi.Negotiated, allowed filterapi.Flags, t *terms) error {
	t.context = n.Context
	switch {
	case !n.Proto.HasPorts():
		return fmt.Errorf("protocol %v: %w", n.Proto, filterapi.ErrInvalidArgument)
	case n.Flags&^allowed != 0:
		return fmt.Errorf("flags 0x%x: %w", n.Flags&^allowed, filterapi.ErrInvalidArgument)
	case n.Proto != flow.UDP && n.Flags&udpFlags != 0:
		return fmt.Errorf("flags 0x%x are for UDP: %w", n.Flags&udpFlags, filterapi.ErrInvalidArgument)
	case n.Expiry < 0:
		return fmt.Errorf("expiry %v: %w", n.Expiry, filterapi.ErrInvalidArgument)
	}
	if n.Notify != nil {
		h, ok := s.listener(n.Notify)
		if !ok {
			return fmt.Errorf("a session filter that is not attached to this session: %w", filterapi.ErrInvalidArgument)
		}
		t.notify = &h
	}
	return nil
}

// stand finds what the flows of a permission stand on.
func (s *session) stand(t *terms, n filterapi.Negotiated, target netip.AddrPort) error {
	if n.Primary == nil {
		if n.Protocol == "" {
			return fmt.Errorf("neither a primary connection nor a protocol: %w", filterapi.ErrInvalidArgument)
		}
		t.basis = basis{tuple: flow.Tuple{Proto: n.Proto, Src: netip.AddrPortFrom(s.addr, 0), Dst: target}, protocol: n.Protocol, user: s.user}
		t.protocol = n.Protocol
		return nil
	}
	c, ok := unwrap(n.Primary)
	if !ok || c.session != s || c.bind != nil {
		return fmt.Errorf("primary connection: %w", filterapi.ErrInvalidArgument)
	}
	c.mu.Lock()
	ended := c.ended
	c.mu.Unlock()
	if ended {
		return filterapi.ErrTerminating
	}
	t.primary, t.basis = c, c.basis()
	t.standing = standing{c.rule, c.protocol, c.uses}
	if n.Protocol != "" && n.Protocol != c.protocol {
		t.basis.protocol, t.protocol = n.Protocol, n.Protocol
	}
	return nil
}

// within compares an address with the only one that is allowed unless a flag
// widens that.
func (e *Engine) within(flags filterapi.Flags, a, base netip.Addr) bool {
	switch {
	case a == base || flags&filterapi.ToAll != 0:
		return true
	case flags&filterapi.ToSameNet != 0 && sameNet(a, base):
		return true
	case flags&filterapi.ToSameNetwork != 0:
		return e.sameNetwork(a, base)
	}
	return false
}

func sameNet(a, b netip.Addr) bool {
	bits := 64
	if a.Is4() {
		bits = 24
	}
	p, err := b.Prefix(bits)
	return err == nil && p.Contains(a)
}

// sameNetwork says whether some network of the configuration holds both.
func (e *Engine) sameNetwork(a, b netip.Addr) bool {
	ifaceA, _, _, errA := e.routes.Lookup(a)
	ifaceB, _, _, errB := e.routes.Lookup(b)
	if errA != nil || errB != nil {
		return false
	}
	p := e.Policy()
	theirs := p.NetworksOf(b, ifaceB)
	return slices.ContainsFunc(p.NetworksOf(a, ifaceA), func(n string) bool { return n != policy.Any && slices.Contains(theirs, n) })
}

// watches says whether a filter wants to hear of the flows of a permission,
// which must then come to user space.
func (s *session) watches(uses []policy.FilterUse, secondary bool) bool {
	const flows = filterapi.ConnectTCP | filterapi.UDPDestination | filterapi.Accepted
	return slices.ContainsFunc(s.e.filters, func(r *registered) bool {
		ev := s.wants(r)
		_, ok := bound(ev, ev.Types&flows, r.filter.Name(), uses, secondary)
		return ok
	})
}

// suits says whether the addresses of an IP filter are of the client's family,
// and plain.
func suits(f *filterapi.IPFilter, client netip.Addr) bool {
	return f == nil || !slices.ContainsFunc(f.Prefixes(), func(p netip.Prefix) bool { return p.Addr().Is4() != client.Is4() })
}
