package nat

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
)

// portModel is a plain list of what every port does.
type portModel struct {
	lo, hi, occupied uint16
	held             map[uint16]bool
	rest             map[uint16]time.Time
}

// free says whether n ports from one on can be leased.
func (m *portModel) free(port uint16, n int, now time.Time) bool {
	for i := range n {
		p := port + uint16(i)
		if p == m.occupied || m.held[p] || now.Before(m.rest[p]) {
			return false
		}
	}
	return true
}

// has says whether the range has a run.
func (m *portModel) has(n int, even bool, now time.Time) bool {
	for p := m.lo; int(p)+n-1 <= int(m.hi); p++ {
		if (!even || p%2 == 0) && m.free(p, n, now) {
			return true
		}
	}
	return false
}

// TestAllocatorAgainstModel runs random leases and returns against the model.
func TestAllocatorAgainstModel(t *testing.T) {
	now := time.Unix(1000, 0)
	m := &portModel{lo: 1001, hi: 1016, occupied: 1006, held: map[uint16]bool{}, rest: map[uint16]time.Time{}}
	a := NewAllocator(Range{m.lo, m.hi}, func(e Endpoint) bool { return e.Addr.Port() == m.occupied }, func() time.Time { return now })
	addr := netip.MustParseAddr("203.0.113.1")
	r := rand.New(rand.NewPCG(1, 2))
	starts := map[uint16]int{}
	for step := range 20000 {
		n := 1 + r.IntN(4)
		switch r.IntN(4) {
		case 0, 1:
			even, has := r.IntN(2) == 0, false
			has = m.has(n, even, now)
			got, ok := a.LeaseRun(flow.TCP, addr, n, even)
			if ok != has {
				t.Fatalf("step %d: %d ports, even %v: got %v %v, model %v", step, n, even, got, ok, has)
			}
			if !ok {
				break
			}
			if got.Port() < m.lo || int(got.Port())+n-1 > int(m.hi) || even && got.Port()%2 != 0 || !m.free(got.Port(), n, now) {
				t.Fatalf("step %d: %v and %d more, even %v, are not free", step, got, n-1, even)
			}
			starts[got.Port()]++
			for i := range n {
				m.held[got.Port()+uint16(i)] = true
			}
		case 2:
			port := uint16(990 + r.IntN(40)) // also outside of the range
			err := a.LeaseExact(flow.TCP, netip.AddrPortFrom(addr, port), n)
			if (err == nil) != m.free(port, n, now) {
				t.Fatalf("step %d: %d ports from %d on: %v", step, n, port, err)
			}
			if err == nil {
				for i := range n {
					m.held[port+uint16(i)] = true
				}
			}
		case 3:
			for p := range m.held {
				delete(m.held, p)
				if r.IntN(4) == 0 {
					a.Unlease(flow.TCP, netip.AddrPortFrom(addr, p))
				} else {
					a.Return(flow.TCP, netip.AddrPortFrom(addr, p))
					m.rest[p] = now.Add(Quarantine)
				}
				if r.IntN(3) == 0 {
					break
				}
			}
		}
		if a.Leased() != len(m.held) {
			t.Fatalf("step %d: %d leased, model %d", step, a.Leased(), len(m.held))
		}
		now = now.Add(time.Duration(r.IntN(40)) * time.Second)
	}
	if len(starts) < 10 {
		t.Errorf("runs began at %v: not at random", starts)
	}
}

func TestLeaseExactSaysWhy(t *testing.T) {
	now := time.Unix(1000, 0)
	a := NewAllocator(Range{1000, 1007}, func(e Endpoint) bool { return e.Addr.Port() == 1005 }, func() time.Time { return now })
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), port) }
	for _, c := range []struct {
		port uint16
		n    int
		want error
	}{
		{1000, 2, nil}, {1001, 1, ErrLeased}, {999, 2, ErrLeased}, {999, 1, nil},
		{1004, 2, ErrUnavailable}, {1004, 1, nil}, {65535, 2, ErrUnavailable}, {0, 1, ErrUnavailable},
	} {
		if err := a.LeaseExact(flow.UDP, at(c.port), c.n); !errors.Is(err, c.want) {
			t.Errorf("%d ports from %d on: %v, want %v", c.n, c.port, err, c.want)
		}
	}
	a.Return(flow.UDP, at(1000))
	if err := a.LeaseExact(flow.UDP, at(1000), 1); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a port that rests: %v", err)
	}
	now = now.Add(Quarantine + time.Second)
	if err := a.LeaseExact(flow.UDP, at(1000), 1); err != nil {
		t.Errorf("after its rest: %v", err)
	}
}

func TestAllocatorKeepsProtocolsApart(t *testing.T) {
	a := NewAllocator(Range{1000, 1000}, func(Endpoint) bool { return false }, time.Now)
	addr := netip.MustParseAddr("203.0.113.1")
	if _, ok := a.Lease(flow.TCP, addr); !ok {
		t.Fatal("no TCP lease")
	}
	if _, ok := a.Lease(flow.UDP, addr); !ok {
		t.Fatal("a TCP lease took the UDP port")
	}
	if x, ok := a.Lease(flow.TCP, addr); ok {
		t.Fatalf("leased %v twice", x)
	}
}
