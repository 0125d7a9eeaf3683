package filtertest

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// session is one client's.
type session struct {
	gateway *Gateway
	id      uint64
	addr    netip.Addr
	filter  filterapi.SessionFilter
	events  filterapi.Events
	ended   bool // guarded by Gateway.mu
}

func (s *session) ID() uint64             { return s.id }
func (s *session) ClientAddr() netip.Addr { return s.addr }

const (
	reachFlags   = filterapi.ToSameNet | filterapi.ToSameNetwork | filterapi.ToAll
	bindFlags    = filterapi.AllowMultiple | filterapi.Timeout | filterapi.NoKernelMode | reachFlags
	connectFlags = bindFlags
)

func (s *session) AllowFutureConnect(fc filterapi.FutureConnect) (filterapi.Action, error) {
	p := &permission{
		gateway: s.gateway, session: s, proto: fc.Proto,
		client: netip.AddrPortFrom(s.addr, 0), target: fc.Target,
		multiple: fc.Flags&filterapi.AllowMultiple != 0, expiry: expiry(fc.Flags, fc.Expiry),
	}
	switch {
	case fc.Flags&^connectFlags != 0, !knownProto(fc.Proto), !fc.Target.IsValid(), fc.Target.Port() == 0, fc.Expiry < 0:
		return nil, fmt.Errorf("future connect to %s: %w", fc.Target, filterapi.ErrInvalidArgument)
	case !reaches(fc.Flags, fc.Target.Addr(), peerOf(fc.Primary)):
		return nil, fmt.Errorf("future connect to %s: %w", fc.Target, filterapi.ErrPolicyDenied)
	}
	if err := s.gateway.install(p, Allowed); err != nil {
		return nil, fmt.Errorf("future connect to %s: %w", fc.Target, err)
	}
	return action{p}, nil
}

func (s *session) BindForClient(b filterapi.Bind) ([]filterapi.Connection, error) {
	client := b.Clients[0]
	p := &permission{
		gateway: s.gateway, session: s, proto: b.Proto, client: client,
		sources: b.IPFilter.Clone(), multiple: b.Flags&filterapi.AllowMultiple != 0,
		expiry: expiry(b.Flags, b.Expiry),
	}
	switch {
	case b.Flags&^bindFlags != 0, !knownProto(b.Proto), !client.IsValid(), client.Port() == 0, b.Expiry < 0:
		return nil, fmt.Errorf("bind for %s: %w", client, filterapi.ErrInvalidArgument)
	case !reaches(b.Flags, client.Addr(), s.addr):
		return nil, fmt.Errorf("bind for %s: %w", client, filterapi.ErrPolicyDenied)
	}
	how := Bound
	if b.IPFilter != nil && len(b.IPFilter.Prefixes()) == 0 {
		how = Reserved
	}
	if err := s.gateway.install(p, how); err != nil {
		return nil, fmt.Errorf("bind for %s: %w", client, err)
	}
	return []filterapi.Connection{&bound{p: p}}, nil
}

func knownProto(p flow.Proto) bool { return p == flow.TCP || p == flow.UDP }

func expiry(f filterapi.Flags, d time.Duration) time.Duration {
	switch {
	case f&filterapi.Timeout == 0:
		return 0
	case d == 0:
		return filterapi.DefaultTimeout
	}
	return d
}

func peerOf(c filterapi.Connection) netip.Addr {
	if c == nil {
		return netip.Addr{}
	}
	return c.Tuple().Dst.Addr()
}

// reaches says whether an address may be named: only the own one, unless a
// flag widens that. The machine knows no networks, so ToSameNetwork is the /24
// or /64 as well.
func reaches(f filterapi.Flags, a, own netip.Addr) bool {
	switch {
	case a == own, f&filterapi.ToAll != 0:
		return true
	case f&(filterapi.ToSameNet|filterapi.ToSameNetwork) == 0, !own.IsValid():
		return false
	}
	bits := 24
	if own.Is6() {
		bits = 64
	}
	near, err := own.Prefix(bits)
	return err == nil && near.Contains(a)
}

// install is the kernel: it checks what the real one checks, in the same
// order, waits for the acknowledgement, and only then is the permission in
// force.
func (g *Gateway) install(p *permission, how What) error {
	g.mu.Lock()
	text := p.String()
	if how != Allowed {
		text = fmt.Sprintf("%s bind for %s", p.proto, p.client)
	}
	g.journal.add(Entry{Asked, text})
	err := g.admit(p, how)
	g.mu.Unlock()
	if err != nil {
		return err
	}
	g.acknowledge()
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.session.ended || p.gone {
		p.endLocked()
		return filterapi.ErrTerminating
	}
	p.live = true
	p.startTimer()
	g.journal.add(Entry{how, p.String()})
	return nil
}

// admit checks and leases. Gateway.mu is held.
func (g *Gateway) admit(p *permission, how What) error {
	switch {
	case p.session.ended:
		return filterapi.ErrTerminating
	case g.Refuse != nil:
		return g.Refuse
	case g.Quota > 0 && g.held(p.session) >= g.Quota:
		return filterapi.ErrQuota
	}
	if how != Allowed {
		if g.Routed || p.client.Addr().Is6() {
			p.external = p.client
		} else {
			ext, err := g.leasePort()
			if err != nil {
				return err
			}
			p.external = ext
		}
	}
	g.living = append(g.living, p)
	return nil
}

func (g *Gateway) held(s *session) int {
	n := 0
	for _, p := range g.living {
		if p.session == s {
			n++
		}
	}
	return n
}

func (g *Gateway) leasePort() (netip.AddrPort, error) {
	for i := range g.Ports {
		ext := netip.AddrPortFrom(g.External, uint16(firstPort+(g.nextPort+i)%g.Ports))
		taken := false
		for _, p := range g.living {
			taken = taken || p.external == ext
		}
		if !taken {
			g.nextPort += i + 1
			return ext, nil
		}
	}
	return netip.AddrPort{}, filterapi.ErrNoPorts
}

// firstPort is the first external port that the machine leases.
const firstPort = 40000
