package kernelpath

import (
	"math/rand/v2"
	"net/netip"
	"testing"
)

// What is known of an address is known of all that the kernel treats alike, and
// is what the kernel says of each.
func TestRouteClasses(t *testing.T) {
	s, cached := newTestRoutes(t)
	s.sh(`ip route add 198.51.110.0/24 dev a0; ip route add 198.51.110.128/25 via 203.0.113.7; ip route add 198.51.110.200 via 10.0.0.9
		ip route add unreachable 198.51.111.0/24
		ip rule add to 198.51.112.0/28 lookup 77; ip route add 198.51.112.8/30 dev a0 table 77; ip route add throw 198.51.112.4/30 table 77
		ip rule add to 198.51.113.77/25 lookup 78; ip route add default dev a0 table 78`)
	plain := made(s, NewRoutes)
	defer plain.Close()
	await(t, cached.Run)
	ready := func() bool { c := cached.routes.Load(); return c != nil && c.classes.Load() != nil }
	eventually(t, "classes", ready)
	rng := rand.New(rand.NewPCG(1, 2))
	compare := func() {
		t.Helper()
		for i := range 4000 {
			to := netip.AddrFrom4([4]byte{198, 51, byte(110 + rng.IntN(4)), byte(rng.IntN(256))})
			if i%4 == 0 {
				to = netip.AddrFrom4([4]byte{byte(rng.IntN(256)), byte(rng.IntN(256)), byte(rng.IntN(256)), byte(rng.IntN(256))})
			}
			iface, source, local, err := cached.Lookup(to)
			iface2, source2, local2, err2 := plain.Lookup(to)
			if iface != iface2 || source != source2 || local != local2 || (err == nil) != (err2 == nil) || err != nil && err.Error() != err2.Error() {
				t.Fatalf("%s: %s %s %v %v, the kernel says %s %s %v %v", to, iface, source, local, err, iface2, source2, local2, err2)
			}
		}
	}
	compare()
	checkRoutes(t, cached)
	// A late word of the kernel's, about its links, may empty the cache meanwhile.
	eventually(t, "answer for an address that nobody asked about", func() bool {
		cached.Lookup(netip.MustParseAddr("100.64.0.1"))
		iface, _, ok := cached.Known(netip.MustParseAddr("100.64.1.2"))
		return ok && iface == "b0"
	})
	c := cached.routes.Load()
	if n := len(c.byClass); n > 30 {
		t.Errorf("%d classes have answers", n)
	}
	// Where a route has two ways they depend on more than the route.
	s.sh("ip route add 198.18.0.0/15 nexthop via 10.0.0.9 nexthop via 203.0.113.7")
	eventually(t, "another cache", func() bool { return cached.routes.Load() != c })
	compare()
	if ready() {
		t.Error("a route has two ways, and there are classes")
	}
	s.sh("ip route del 198.18.0.0/15")
	eventually(t, "classes again", ready)
	compare()
}

func BenchmarkKnownByClass(b *testing.B) {
	_, r := newTestRoutes(b)
	await(b, r.Run)
	to := netip.MustParseAddr("100.64.0.2")
	known := func() bool {
		_, _, ok := r.Known(to)
		return ok
	}
	eventually(b, "answer", func() bool { r.Lookup(netip.MustParseAddr("100.64.0.1")); return known() })
	b.ReportAllocs()
	for b.Loop() {
		known()
	}
}
