package nat

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
)

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
