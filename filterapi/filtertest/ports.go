package filtertest

import (
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

const (
	// firstPort is the first external port that the machine leases.
	firstPort = 40000
	// firstVia is the first inside port that it gives a redirection.
	firstVia = 41000
)

// lease is an address of the gateway's that a permission has to itself.
type lease struct {
	proto flow.Proto
	at    netip.AddrPort
}

// leaseRun leases consecutive ports of an address and gives the lowest: the
// asked one, or with 0 one that is free. Gateway.mu is held.
func (g *Gateway) leaseRun(ps []*permission, addr netip.Addr, port uint16, even bool, from int, next *int) (uint16, error) {
	proto := ps[0].ask.Proto
	take := func(low uint16) bool {
		for i := range ps {
			if g.taken(lease{proto, netip.AddrPortFrom(addr, low+uint16(i))}) {
				return false
			}
		}
		for i, p := range ps {
			g.leases[lease{proto, netip.AddrPortFrom(addr, low+uint16(i))}] = p
		}
		return true
	}
	if port != 0 {
		switch {
		case int(port)+len(ps) > 1<<16:
			return 0, filterapi.ErrInvalidArgument
		case !take(port):
			return 0, filterapi.ErrAlreadyExists
		}
		return port, nil
	}
	for i := range g.Ports {
		at := (*next + i) % g.Ports
		low := uint16(from + at)
		if at+len(ps) > g.Ports || even && low%2 != 0 || !take(low) {
			continue
		}
		*next = at + len(ps)
		return low, nil
	}
	return 0, filterapi.ErrNoPorts
}

// taken says whether an address is leased, or refuses still. Gateway.mu is held.
func (g *Gateway) taken(l lease) bool {
	return g.leases[l] != nil || g.refuses(l)
}

// refuses says whether an inside address was a redirection's a short time ago.
// Gateway.mu is held.
func (g *Gateway) refuses(l lease) bool {
	since, ok := g.retired[l]
	if ok && time.Since(since) >= refusing {
		delete(g.retired, l)
		ok = false
	}
	return ok
}

// install has permissions that are no binds put in force.
func (g *Gateway) install(how What, text string, ps ...*permission) error {
	g.journal.add(Entry{Asked, text})
	err := g.leaseInside(ps)
	for _, p := range ps {
		if err == nil && p.kind == redirected {
			err = p.askFilter()
		}
	}
	if err == nil {
		err = g.grant(how, ps...)
	}
	if err != nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, p := range ps {
			p.endLocked()
		}
	}
	return err
}

// leaseInside gives redirections their addresses.
func (g *Gateway) leaseInside(ps []*permission) error {
	if ps[0].kind != redirected {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.admit(ps[0].session, len(ps)); err != nil {
		return err
	}
	inside := g.inside(ps[0].session.addr)
	low, err := g.leaseRun(ps, inside, 0, false, firstVia, &g.nextVia)
	if err != nil {
		return err
	}
	for i, p := range ps {
		p.via = netip.AddrPortFrom(inside, low+uint16(i))
	}
	return nil
}

// grant is the kernel: it checks what the real one checks, waits for the
// acknowledgement, and only then is anything in force. After an error the
// caller ends the permissions.
func (g *Gateway) grant(how What, ps ...*permission) error {
	s := ps[0].session
	g.mu.Lock()
	err := g.admit(s, len(ps))
	if err == nil {
		g.living = append(g.living, ps...)
	}
	g.mu.Unlock()
	if err != nil {
		return err
	}
	g.acknowledge()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, p := range ps {
		if s.ended || p.gone {
			return filterapi.ErrTerminating
		}
	}
	for _, p := range ps {
		p.live, p.opened = true, true
		p.startTimer()
		g.journal.add(Entry{how, p.String()})
	}
	return nil
}

// admit checks what holds for every permission. Gateway.mu is held.
func (g *Gateway) admit(s *session, n int) error {
	switch {
	case s.ended:
		return filterapi.ErrTerminating
	case g.Refuse != nil:
		return g.Refuse
	case g.Quota > 0 && g.held(s)+n > g.Quota:
		return filterapi.ErrQuota
	}
	return nil
}

// held is how many permissions and factories of a client wait. Gateway.mu is
// held.
func (g *Gateway) held(s *session) int {
	n := 0
	for _, p := range g.living {
		if p.session.addr == s.addr {
			n++
		}
	}
	for _, f := range g.factories {
		if f.session.addr == s.addr {
			n++
		}
	}
	return n
}
