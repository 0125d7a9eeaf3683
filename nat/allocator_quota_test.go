package nat

import (
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
)

// TestAHolderLeavesPortsToOthers: who leases and returns without an end gets
// its own ports again, and never has a port that rests after somebody else.
func TestAHolderLeavesPortsToOthers(t *testing.T) {
	now := time.Unix(1000, 0)
	const share = 125
	a := NewAllocator(Range{1000, 1999}, func(Endpoint) bool { return false }, func() time.Time { return now })
	addr := netip.MustParseAddr("203.0.113.1")
	greedy, modest := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	first := map[netip.AddrPort]bool{}
	for range 50 {
		at, ok := a.LeaseFor(modest, flow.UDP, addr, 2, true)
		if !ok {
			t.Fatal("no port for the first")
		}
		for i := range uint16(2) {
			x := netip.AddrPortFrom(addr, at.Port()+i)
			first[x] = true
			a.Return(flow.UDP, x)
		}
	}
	seen := map[netip.AddrPort]bool{}
	for i := range 5000 {
		at, ok := a.LeaseFor(greedy, flow.UDP, addr, 1, false)
		if !ok || first[at] {
			t.Fatalf("lease %d: %v %v", i, at, ok)
		}
		seen[at] = true
		a.Return(flow.UDP, at)
	}
	if len(seen) != share {
		t.Errorf("it had %d ports", len(seen))
	}
	// What it has out counts, too: without a return there is an end.
	for i := range share + 1 {
		if _, ok := a.LeaseFor(greedy, flow.UDP, addr, 1, false); ok != (i < share) {
			t.Fatalf("lease %d of those that stay out: %v", i, ok)
		}
	}
	if _, ok := a.LeaseFor(modest, flow.UDP, addr, 2, true); !ok {
		t.Error("nothing is left for the other")
	}
	for at := range seen {
		a.Return(flow.UDP, at)
	}
	now = now.Add(Quarantine)
	if at, ok := a.LeaseFor(greedy, flow.UDP, addr, 1, false); !ok {
		t.Errorf("after the rest: %v %v", at, ok)
	}
}

// TestWhatNeverOpenedIsNotCounted: a port that is given back unused counts for
// nobody, and one that rested for its holder goes on resting.
func TestWhatNeverOpenedIsNotCounted(t *testing.T) {
	now := time.Unix(1000, 0)
	a := NewAllocator(Range{1000, 1099}, func(Endpoint) bool { return false }, func() time.Time { return now })
	addr := netip.MustParseAddr("203.0.113.1")
	greedy, modest := netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	lease := func(holder netip.Addr, want bool) netip.AddrPort {
		t.Helper()
		at, ok := a.LeaseFor(holder, flow.TCP, addr, 1, false)
		if ok != want {
			t.Fatalf("lease: %v %v", at, ok)
		}
		return at
	}
	for range 1000 {
		a.Unlease(flow.TCP, lease(greedy, true))
	}
	used := map[netip.AddrPort]bool{}
	for range minQuota {
		used[lease(greedy, true)] = true
	}
	for at := range used {
		a.Return(flow.TCP, at)
	}
	for range 1000 {
		at := lease(greedy, true)
		if !used[at] {
			t.Fatalf("%v is not one of its own", at)
		}
		a.Unlease(flow.TCP, at)
	}
	for range 100 - minQuota {
		if at := lease(modest, true); used[at] {
			t.Fatalf("%v rests after somebody else", at)
		}
	}
	lease(modest, false)
	now = now.Add(Quarantine)
	lease(modest, true)
}
