package nat

import (
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
)

// TestAllocatorAgainstModel runs random leases and returns against a plain
// list of what every port does.
func TestAllocatorAgainstModel(t *testing.T) {
	now := time.Unix(1000, 0)
	occupied := uint16(1003)
	a := NewAllocator(Range{1000, 1007}, func(e Endpoint) bool { return e.Addr.Port() == occupied }, func() time.Time { return now })
	addr := netip.MustParseAddr("203.0.113.1")
	held := map[netip.AddrPort]bool{}
	rest := map[netip.AddrPort]time.Time{}
	for step := range 5000 {
		switch step % 3 {
		case 0, 1:
			free := 0
			for p := uint16(1000); p <= 1007; p++ {
				x := netip.AddrPortFrom(addr, p)
				if p != occupied && !held[x] && !now.Before(rest[x]) {
					free++
				}
			}
			got, ok := a.Lease(flow.TCP, addr)
			if ok != (free > 0) {
				t.Fatalf("step %d: lease %v %v, %d ports are free", step, got, ok, free)
			}
			if !ok {
				break
			}
			if held[got] || now.Before(rest[got]) || got.Port() == occupied {
				t.Fatalf("step %d: %v is not free", step, got)
			}
			held[got] = true
		case 2:
			for x := range held {
				a.Return(flow.TCP, x)
				delete(held, x)
				rest[x] = now.Add(Quarantine)
				break
			}
		}
		now = now.Add(17 * time.Second)
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
