package nat

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/sluicegw/sluice/flow"
)

// portModel is the allocator as a plain list of what every port does. All its
// questions are answered by looking at every port.
type portModel struct {
	AllocatorConfig
	now   time.Time
	ports map[Endpoint]portState // those that are not free
}

type portState struct {
	holder netip.Addr
	leased bool
	until  time.Time // it rests until then, or rested before it was leased
}

func (m *portModel) expire() {
	for e, p := range m.ports {
		if !p.leased && !m.now.Before(p.until) {
			delete(m.ports, e)
		}
	}
}

// count is how many ports a holder has of a protocol.
func (m *portModel) count(h netip.Addr, p flow.Proto) (leased, resting int) {
	for e, s := range m.ports {
		switch {
		case s.holder != h || e.Proto != p:
		case s.leased:
			leased++
		default:
			resting++
		}
	}
	return leased, resting
}

// owners are the blocks of an address that somebody has.
func (m *portModel) owners(addr netip.Addr) map[Range]netip.Addr {
	out := map[Range]netip.Addr{}
	for _, b := range m.allBlocks() {
		for e, s := range m.ports {
			if e.Addr.Addr() == addr && b.Lo <= e.Addr.Port() && e.Addr.Port() <= b.Hi {
				out[b] = s.holder
			}
		}
	}
	return out
}

func (m *portModel) allBlocks() (list []Range) {
	if m.Block == 0 {
		return nil
	}
	for _, r := range m.Leases {
		for lo := int(r.Lo); lo+m.Block-1 <= int(r.Hi); lo += m.Block {
			list = append(list, Range{uint16(lo), uint16(lo + m.Block - 1)})
		}
	}
	return list
}

// fits gives the runs of a request that begin in one of the ranges, all of
// whose ports are free, or all of which rest after the holder.
func (m *portModel) fits(r Request, addr netip.Addr, spans []Range, p parity, own bool) map[netip.AddrPort]bool {
	out := map[netip.AddrPort]bool{}
	for _, span := range spans {
		for port := int(span.Lo); port+r.N-1 <= int(span.Hi); port++ {
			ok := p == anyParity || (port%2 == 0) == (p == even)
			for i := range r.N {
				e := Endpoint{r.Proto, netip.AddrPortFrom(addr, uint16(port+i))}
				s, taken := m.ports[e]
				ok = ok && !m.Busy(e) && taken == own && (!own || !s.leased && s.holder == r.Holder && r.Holder.IsValid())
			}
			if ok {
				out[netip.AddrPortFrom(addr, uint16(port))] = true
			}
		}
	}
	return out
}

// first gives the runs of the best sort that there is.
func (m *portModel) first(r Request, addr netip.Addr, classes [][]Range, own bool) map[netip.AddrPort]bool {
	for _, spans := range classes {
		parities := []parity{anyParity}
		switch {
		case r.Even:
			parities = []parity{even}
		case r.Like != 0 && r.N == 1:
			parities = []parity{[]parity{even, odd}[r.Like%2], anyParity}
		}
		for _, p := range parities {
			if found := m.fits(r, addr, spans, p, own); len(found) > 0 {
				return found
			}
		}
	}
	return nil
}

// at gives what would be right at one address.
func (m *portModel) at(r Request, addr netip.Addr) (map[netip.AddrPort]bool, error) {
	leased, resting := m.count(r.Holder, r.Proto)
	limited := r.Holder.IsValid()
	if m.Block > 0 {
		return m.atInBlocks(r, addr)
	}
	classes := [][]Range{m.Leases}
	if r.Like != 0 && r.Like < 1024 && m.WellKnown != (Range{}) {
		classes = [][]Range{{m.WellKnown}, m.Leases}
	}
	fresh, mine := m.first(r, addr, classes, false), m.first(r, addr, classes, true)
	switch sum := leased + resting + r.N; {
	case len(fresh) > 0 && (!limited || sum <= m.Quota):
		return fresh, nil
	case len(mine) > 0 && sum > m.Quota && limited:
		return mine, nil
	case limited && sum > 2*m.Quota:
		return nil, ErrQuota
	case len(fresh) > 0:
		return fresh, nil
	}
	return nil, ErrExhausted
}

func (m *portModel) atInBlocks(r Request, addr netip.Addr) (map[netip.AddrPort]bool, error) {
	owners := m.owners(addr)
	var mine, free []Range
	for _, b := range m.allBlocks() {
		switch h, owned := owners[b]; {
		case !owned:
			free = append(free, b)
		case h == r.Holder:
			mine = append(mine, b)
		}
	}
	if r.N > m.Block {
		return nil, ErrExhausted
	}
	for _, own := range []bool{false, true} {
		if found := m.first(r, addr, [][]Range{mine}, own); len(found) > 0 {
			return found, nil
		}
	}
	if r.Holder.IsValid() && (len(mine)+1)*m.Block > m.Quota {
		return nil, ErrQuota
	}
	found := map[netip.AddrPort]bool{}
	for _, b := range free { // each is looked at by itself
		maps.Copy(found, m.first(r, addr, [][]Range{{b}}, false))
	}
	if len(found) == 0 {
		return nil, ErrExhausted
	}
	return found, nil
}

// preferred says whether the ports that a request prefers can be had.
func (m *portModel) preferred(r Request, addr netip.Addr) bool {
	spans := m.Leases
	if m.Block == 0 && m.WellKnown != (Range{}) && r.Preferred < 1024 {
		spans = []Range{m.WellKnown}
	}
	owners := m.owners(addr)
	if m.Block > 0 {
		spans = nil
		mine := 0
		for _, h := range owners {
			if h == r.Holder {
				mine++
			}
		}
		for _, b := range m.allBlocks() {
			if h, owned := owners[b]; owned && h == r.Holder || !owned && (!r.Holder.IsValid() || (mine+1)*m.Block <= m.Quota) {
				spans = append(spans, b)
			}
		}
	}
	at := netip.AddrPortFrom(addr, r.Preferred)
	ok, fresh := r.Preferred%2 == 0 || !r.Even, false
	within := slices.ContainsFunc(spans, func(x Range) bool {
		return x.Lo <= r.Preferred && int(r.Preferred)+r.N-1 <= int(x.Hi)
	})
	for i := range r.N {
		e := Endpoint{r.Proto, netip.AddrPortFrom(addr, at.Port()+uint16(i))}
		s, taken := m.ports[e]
		ok = ok && !m.Busy(e) && (!taken || !s.leased && r.Holder.IsValid() && s.holder == r.Holder)
		fresh = fresh || !taken
	}
	if leased, resting := m.count(r.Holder, r.Proto); r.Holder.IsValid() && fresh && m.Block == 0 && leased+resting+r.N > 2*m.Quota {
		ok = false
	}
	return ok && within
}

// take gives what would be right for a request: one of these, or this error.
func (m *portModel) take(r Request) (map[netip.AddrPort]bool, error) {
	if leased, _ := m.count(r.Holder, r.Proto); r.Holder.IsValid() && leased+r.N > m.Quota {
		return nil, ErrQuota
	}
	use := func(a netip.Addr, p flow.Proto, h netip.Addr) (n int) {
		for e, s := range m.ports {
			if e.Addr.Addr() == a && (p == 0 || e.Proto == p) && (!h.IsValid() || s.holder == h) {
				n++
			}
		}
		return n
	}
	groups := map[int][]netip.Addr{}
	for _, a := range r.Addrs {
		if r.Holder.IsValid() && use(a, 0, r.Holder) > 0 {
			groups = map[int][]netip.Addr{0: {a}} // it has this one
			break
		}
		n := use(a, r.Proto, netip.Addr{})
		groups[n] = append(groups[n], a)
	}
	var err error
	for _, n := range slices.Sorted(maps.Keys(groups)) {
		all := map[netip.AddrPort]bool{}
		for _, a := range groups[n] {
			var found map[netip.AddrPort]bool
			switch {
			case r.Preferred != 0 && m.preferred(r, a):
				found = map[netip.AddrPort]bool{netip.AddrPortFrom(a, r.Preferred): true}
			case r.Strict:
				err = ErrUnavailable // or ErrLeased, or ErrQuota
			default:
				var e error
				if found, e = m.at(r, a); e != nil {
					err = e
				}
			}
			maps.Copy(all, found)
		}
		if len(all) > 0 {
			return all, nil
		}
	}
	return nil, err
}

// exact says whether ports can be leased by their numbers.
func (m *portModel) exact(h netip.Addr, p flow.Proto, at netip.AddrPort, n int) bool {
	leased, _ := m.count(h, p)
	ok := !h.IsValid() || leased+n <= m.Quota
	owners := map[Range]netip.Addr{}
	if m.Block > 0 {
		owners = m.owners(at.Addr())
	}
	for i := range n {
		e := Endpoint{p, netip.AddrPortFrom(at.Addr(), at.Port()+uint16(i))}
		s, taken := m.ports[e]
		ok = ok && !m.Busy(e) && (!taken || !s.leased && h.IsValid() && s.holder == h)
		for b, owner := range owners {
			ok = ok && (owner == h || b.Lo > e.Addr.Port() || b.Hi < e.Addr.Port())
		}
	}
	return ok
}

// giveBack returns a port, or gives it back unused.
func (m *portModel) giveBack(e Endpoint, unused bool) {
	s := m.ports[e]
	s.leased = false
	if !unused {
		s.until = m.now.Add(m.Quarantine)
	}
	m.ports[e] = s
	m.expire()
}
