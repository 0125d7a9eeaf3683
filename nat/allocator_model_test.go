package nat

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
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

var (
	modelAddrs   = []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2"), netip.MustParseAddr("203.0.113.3")}
	modelHolders = []netip.Addr{{}, netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("10.0.0.4")}
	modelProtos  = []flow.Proto{flow.TCP, flow.UDP, flow.ICMP}
)

// TestAllocatorAgainstModel runs random calls against the model: many clients
// with quotas, several addresses, runs, parity, classes, wishes, quarantine,
// and blocks.
func TestAllocatorAgainstModel(t *testing.T) {
	for _, block := range []int{0, 2, 4} {
		for seed := range uint64(4) {
			t.Run(fmt.Sprintf("blocks of %d, %d", block, seed), func(t *testing.T) {
				c := AllocatorConfig{
					Leases: []Range{{1101, 1116}, {1130, 1139}}, WellKnown: Range{600, 604},
					Quota: 8, Quarantine: Quarantine, Block: block,
					Busy: func(e Endpoint) bool { return e.Addr.Port()%11 == 3 },
				}
				if seed == 3 {
					c.Quarantine = 0
				}
				modelRun(t, c, rand.New(rand.NewPCG(seed, uint64(block))))
			})
		}
	}
}

func modelRun(t *testing.T, c AllocatorConfig, r *rand.Rand) {
	m := &portModel{AllocatorConfig: c, now: time.Unix(1000, 0), ports: map[Endpoint]portState{}}
	c.Now = func() time.Time { return m.now }
	owned := map[BlockEvent]bool{}
	c.OnBlock = func(e BlockEvent) {
		key := e
		key.Returned = false
		if owned[key] != e.Returned {
			t.Errorf("%+v, and it was owned: %v", e, owned[key])
		}
		owned[key] = !e.Returned
	}
	a := NewAllocatorWith(c)
	for step := range 6000 {
		n, h, p := 1+r.IntN(3), modelHolders[r.IntN(len(modelHolders))], modelProtos[r.IntN(len(modelProtos))]
		switch r.IntN(5) {
		case 0, 1:
			q := Request{Holder: h, Proto: p, Addrs: modelAddrs[:1+r.IntN(3)], N: n, Even: r.IntN(4) == 0}
			if r.IntN(2) == 0 {
				q.Like = uint16(1 + r.IntN(2047))
			}
			if r.IntN(4) == 0 {
				q.Preferred, q.Strict = uint16(1099+r.IntN(45)), r.IntN(2) == 0
			}
			modelTake(t, step, a, m, q)
		case 2:
			at := netip.AddrPortFrom(modelAddrs[r.IntN(3)], uint16(1090+r.IntN(60)))
			err := a.LeaseExactFor(h, p, at, n)
			if (err == nil) != m.exact(h, p, at, n) {
				t.Fatalf("step %d: %v %d ports from %v on for %v: %v", step, p, n, at, h, err)
			}
			if err == nil {
				m.lease(h, p, at, n)
			}
		default:
			for _, e := range m.someLeased(r) {
				unused := r.IntN(4) == 0
				if unused {
					a.Unlease(e.Proto, e.Addr)
				} else {
					a.Return(e.Proto, e.Addr)
				}
				m.giveBack(e, unused)
			}
		}
		m.now = m.now.Add(time.Duration(r.IntN(40)) * time.Second)
		m.expire()
		modelCompare(t, step, a, m, owned)
	}
}

func modelTake(t *testing.T, step int, a *Allocator, m *portModel, q Request) {
	t.Helper()
	right, why := m.take(q)
	got, err := a.Take(q)
	switch {
	case err == nil && !right[got], err != nil && len(right) > 0:
		t.Fatalf("step %d: %+v: got %v, %v; right would be %v %v", step, q, got, err, right, why)
	case err != nil && !q.Strict && !errors.Is(err, why):
		t.Fatalf("step %d: %+v: got %v, want %v", step, q, err, why)
	case err == nil:
		m.lease(q.Holder, q.Proto, got, q.N)
	}
}

func (m *portModel) lease(h netip.Addr, p flow.Proto, at netip.AddrPort, n int) {
	for i := range n {
		e := Endpoint{p, netip.AddrPortFrom(at.Addr(), at.Port()+uint16(i))}
		m.ports[e] = portState{h, true, m.ports[e].until}
	}
}

// someLeased are ports that are given back now.
func (m *portModel) someLeased(r *rand.Rand) (list []Endpoint) {
	for e, s := range m.ports {
		if s.leased {
			list = append(list, e)
		}
	}
	slices.SortFunc(list, func(x, y Endpoint) int {
		return int(x.Proto)*100_000 + int(x.Addr.Port()) - int(y.Proto)*100_000 - int(y.Addr.Port()) + x.Addr.Addr().Compare(y.Addr.Addr())*10_000_000
	})
	r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list[:min(len(list), r.IntN(8))]
}

// modelCompare compares the counts, and that nothing is kept of what is free.
func modelCompare(t *testing.T, step int, a *Allocator, m *portModel, owned map[BlockEvent]bool) {
	t.Helper()
	leased, holders, spaces := 0, map[netip.Addr]bool{}, map[spaceKey]bool{}
	for e, s := range m.ports {
		if s.leased {
			leased++
		}
		holders[s.holder], spaces[spaceKey{e.Proto, e.Addr.Addr()}] = true, true
	}
	blocks := 0
	if m.Block > 0 {
		for _, addr := range modelAddrs {
			for b, h := range m.owners(addr) {
				blocks++
				if !owned[BlockEvent{Holder: h, External: addr, Ports: b}] {
					t.Fatalf("step %d: nobody heard of block %v %v of %v", step, addr, b, h)
				}
			}
		}
	}
	s := a.Stats()
	if s.Leased != leased || s.Resting != len(m.ports)-leased || s.Holders != len(holders) || s.Blocks != blocks || len(a.spaces) != len(spaces) {
		t.Fatalf("step %d: %+v and %d spaces; model: %d leased of %d, %d holders, %d blocks, %d spaces",
			step, s, len(a.spaces), leased, len(m.ports), len(holders), blocks, len(spaces))
	}
}
