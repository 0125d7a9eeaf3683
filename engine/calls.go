package engine

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

const (
	bindFlags = filterapi.AllowMultiple | filterapi.Timeout | filterapi.NoKernelMode |
		filterapi.ToSameNet | filterapi.ToSameNetwork | filterapi.ToAll
	connectFlags = bindFlags | filterapi.AddressBased
)

// AllowFutureConnect implements filterapi.Session.
func (s *session) AllowFutureConnect(f filterapi.FutureConnect) (filterapi.Action, error) {
	primary, err := s.checkCall(f.Negotiated, connectFlags)
	if err != nil {
		return nil, fmt.Errorf("allow future connect: %w", err)
	}
	if !f.Target.IsValid() || f.Target.Port() == 0 || f.Target.Addr().Is4() != s.addr.Is4() {
		return nil, fmt.Errorf("allow future connect to %v: %w", f.Target, filterapi.ErrInvalidArgument)
	}
	if !s.e.within(f.Flags, f.Target.Addr(), primary.tuple.Dst.Addr()) {
		return nil, fmt.Errorf("allow future connect to %v, not the peer of the primary connection: %w", f.Target, filterapi.ErrPolicyDenied)
	}
	p := s.newPermission(primary, f.Negotiated)
	p.Direction, p.Target = nat.Outbound, f.Target
	p.Client = netip.AddrPortFrom(s.addr, 0)
	if err := s.e.grant(p); err != nil {
		_ = s.e.void(p) // it logs
		return nil, fmt.Errorf("allow future connect to %v: %w", f.Target, err)
	}
	return action{s.e, p}, nil
}

// BindForClient implements filterapi.Session.
func (s *session) BindForClient(b filterapi.Bind) ([]*connection, error) {
	if len(b.Clients) != 1 {
		return nil, filterapi.ErrNotSupported
	}
	client := b.Clients[0]
	primary, err := s.checkCall(b.Negotiated, bindFlags)
	if err != nil {
		return nil, fmt.Errorf("bind for client: %w", err)
	}
	if !client.IsValid() || client.Port() == 0 || client.Addr().Is4() != s.addr.Is4() {
		return nil, fmt.Errorf("bind for client %v: %w", client, filterapi.ErrInvalidArgument)
	}
	if !s.e.within(b.Flags, client.Addr(), s.addr) {
		return nil, fmt.Errorf("bind for client %v, not the session's own address: %w", client, filterapi.ErrPolicyDenied)
	}
	if !suits(b.IPFilter, s.addr) {
		return nil, fmt.Errorf("bind for client %v: IP filter: %w", client, filterapi.ErrInvalidArgument)
	}
	// The filters' handlers run in the session.
	if !s.ref() {
		return nil, fmt.Errorf("bind for client: %w", filterapi.ErrTerminating)
	}
	defer s.e.release(s)
	p := s.newPermission(primary, b.Negotiated)
	p.Direction, p.Client, p.External = nat.Inbound, client, client
	p.filter = b.IPFilter.Clone()
	p.setSources(p.filter)
	if addr, hidden := s.e.external(primary); hidden {
		var ok bool
		if p.External, ok = s.e.ports.Lease(b.Proto, addr); !ok {
			return nil, fmt.Errorf("bind for client %v: %w", client, filterapi.ErrNoPorts)
		}
		p.leased = true
	}
	p.object = &connection{
		e: s.e, session: s, tuple: flow.Tuple{Proto: b.Proto, Dst: p.External}, start: s.e.now(), bind: p,
		name: p.External,
	}
	p.object.inherit(primary, nil)
	if err := s.e.openBind(p); err != nil {
		_ = s.e.void(p) // it logs
		return nil, fmt.Errorf("bind for client %v: %w", client, err)
	}
	return []*connection{p.object}, nil
}

// external is the gateway's address that a connection's client is hidden
// behind; false: it is not hidden.
func (e *Engine) external(c *connection) (addr netip.Addr, hidden bool) {
	if name, err := c.ExternalName(); err == nil {
		return name.Addr(), name.Addr() != c.tuple.Src.Addr()
	}
	d := e.upstream(c)
	if d.Transparent {
		return netip.Addr{}, false
	}
	if d.Source.IsValid() {
		return d.Source.Addr(), true
	}
	_, source, _, err := e.routes.Lookup(c.tuple.Dst.Addr())
	return source, err == nil && source.IsValid()
}

// openBind asks the filters that watch binds and then grants it.
func (e *Engine) openBind(p *permission) error {
	ctx, cancel := context.WithTimeout(context.Background(), bindDeadline)
	defer cancel()
	kind := filterapi.BindUDP
	if p.Proto == flow.TCP {
		kind = filterapi.BindTCP
	}
	c := p.object
	if err := e.notify(ctx, c, kind, func(_ *registered, a filterapi.About) filterapi.Event {
		return &filterapi.BindEvent{About: a, TCP: p.Proto == flow.TCP, External: p.External}
	}); err != nil {
		return fmt.Errorf("%w: %w", filterapi.ErrPolicyDenied, err)
	}
	if err := e.grant(p); err != nil {
		return err
	}
	if p.Proto == flow.TCP {
		// A listen cannot be refused any more; its handlers' errors are in the
		// log.
		_ = e.notify(ctx, c, filterapi.Listen, func(_ *registered, a filterapi.About) filterapi.Event {
			return &filterapi.ListenEvent{About: a, External: p.External}
		})
	}
	return nil
}

// bindDeadline bounds the handlers of a bind.
const bindDeadline = 800 * time.Millisecond

// checkCall holds what the permission calls have in common. The access rules
// are asked at the call; use is not checked again.
func (s *session) checkCall(n filterapi.Negotiated, allowed filterapi.Flags) (*connection, error) {
	primary, p, flags, expiry := n.Primary, n.Proto, n.Flags, n.Expiry
	c, ok := unwrap(primary)
	switch {
	case !ok || c.session != s || c.bind != nil:
		return nil, fmt.Errorf("primary connection: %w", filterapi.ErrInvalidArgument)
	case !p.HasPorts():
		return nil, fmt.Errorf("protocol %v: %w", p, filterapi.ErrInvalidArgument)
	case flags&^allowed != 0:
		return nil, fmt.Errorf("flags 0x%x: %w", flags&^allowed, filterapi.ErrInvalidArgument)
	case expiry < 0:
		return nil, fmt.Errorf("expiry %v: %w", expiry, filterapi.ErrInvalidArgument)
	}
	c.mu.Lock()
	ended := c.ended
	c.mu.Unlock()
	if ended {
		return nil, filterapi.ErrTerminating
	}
	if !s.e.stillAllowed(c) {
		return nil, filterapi.ErrPolicyDenied
	}
	return c, nil
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

func (s *session) newPermission(primary *connection, n filterapi.Negotiated) *permission {
	p, flags, expiry := n.Proto, n.Flags, n.Expiry
	out := &permission{session: s, primary: primary}
	out.ID = s.e.nextID()
	out.Proto = p
	out.addressBased = flags&filterapi.AddressBased != 0
	out.Multiple = flags&filterapi.AllowMultiple != 0
	out.ToUser = flags&filterapi.NoKernelMode != 0 || primary.rule.NoKernelMode || s.watchesSecondary(primary.uses)
	if flags&filterapi.Timeout != 0 {
		out.Timeout = filterapi.DefaultTimeout
		if expiry > 0 {
			out.Timeout = expiry
		}
	}
	return out
}

// watchesSecondary says whether a filter of the rule wants to hear of
// secondary connections, which must then come to user space.
func (s *session) watchesSecondary(uses []policy.FilterUse) bool {
	const flows = filterapi.ConnectTCP | filterapi.UDPDestination | filterapi.Accepted
	for _, r := range s.e.filters {
		ev := s.wants(r)
		if _, ok := bound(ev, ev.Types&flows, r.filter.Name(), uses, true); ok {
			return true
		}
	}
	return false
}

// suits says whether the addresses of an IP filter are of the client's family,
// and plain.
func suits(f *filterapi.IPFilter, client netip.Addr) bool {
	return f == nil || !slices.ContainsFunc(f.Prefixes(), func(p netip.Prefix) bool { return p.Addr().Is4() != client.Is4() })
}

func (p *permission) setSources(f *filterapi.IPFilter) {
	p.AnySource, p.Sources = f == nil, nil
	p.Sources = f.Prefixes()
}
