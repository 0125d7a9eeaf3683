package kernelpath

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"
)

func newTestRoutes(t testing.TB) (space, *Routes) {
	t.Helper()
	s := newSpace(t)
	s.sh(`sysctl -qw net.ipv6.conf.all.forwarding=1
		ip link add a0 type veth peer name a1; ip link add b0 type veth peer name b1
		for x in a0 a1 b0 b1; do ip link set $x up; done
		ip addr add 10.0.0.1/24 dev a0; ip addr add 203.0.113.1/24 dev b0
		ip -6 addr add fd00:a::1/64 dev a0 nodad; ip -6 addr add 2001:db8:b::1/64 dev b0 nodad
		ip route add default via 203.0.113.254; ip -6 route add default via 2001:db8:b::fe
		for kind in unreachable prohibit blackhole; do
			case $kind in unreachable) n=1;; prohibit) n=2;; blackhole) n=3;; esac
			ip route add $kind 192.0.2.$n; ip -6 route add $kind 2001:db8:dead::$n
		done`)
	r := made(s, NewRoutes)
	t.Cleanup(func() { r.Close() })
	return s, r
}

func checkRoutes(t *testing.T, r *Routes) {
	t.Helper()
	for _, c := range []struct {
		dst, want string
		err       error
	}{
		{"10.0.0.7", "a0 10.0.0.1 false", nil},
		{"198.51.100.1", "b0 203.0.113.1 false", nil},
		{"203.0.113.1", "lo 203.0.113.1 true", nil},
		{"::ffff:10.0.0.7", "a0 10.0.0.1 false", nil},
		{"fd00:a::7", "a0 fd00:a::1 false", nil},
		{"2001:db8:77::1", "b0 2001:db8:b::1 false", nil},
		{"fd00:a::1", "lo fd00:a::1 true", nil},
		{"192.0.2.1", "", ErrUnreachable},
		{"192.0.2.2", "", ErrProhibited},
		{"192.0.2.3", "", ErrBlackhole},
		{"2001:db8:dead::1", "", ErrUnreachable},
		{"2001:db8:dead::2", "", ErrProhibited},
		{"2001:db8:dead::3", "", ErrBlackhole},
		{"203.0.113.255", "", ErrNoHost},
		{"fd00:a::", "", ErrNoHost}, // the routers of a link (RFC 4291, 2.6.1)
	} {
		iface, source, local, err := r.Lookup(netip.MustParseAddr(c.dst))
		got := fmt.Sprint(iface, " ", source, " ", local)
		if c.err != nil && !errors.Is(err, c.err) || c.err == nil && (err != nil || got != c.want) {
			t.Errorf("%s: %s, %v; want %s, %v", c.dst, got, err, c.want, c.err)
		}
	}
}

func TestRoutesWithAndWithoutCache(t *testing.T) {
	_, r := newTestRoutes(t)
	checkRoutes(t, r)
	await(t, r.Run)
	eventually(t, "a cache", func() bool { return r.routes.Load() != nil })
	checkRoutes(t, r) // fills
	checkRoutes(t, r) // hits
	if n := len(r.routes.Load().byAddr) + len(r.routes.Load().byClass); n < 10 {
		t.Errorf("%d answers are cached", n)
	}
	if _, _, _, err := r.Lookup(netip.Addr{}); !errors.Is(err, ErrNoRoute) {
		t.Errorf("no address: %v", err)
	}
}

// eventually polls for what no event tells.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(5 * time.Second); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("no %s", what)
		}
	}
}

func TestRoutesFollowChanges(t *testing.T) {
	s, r := newTestRoutes(t)
	await(t, r.Run)
	eventually(t, "a cache", func() bool { return r.routes.Load() != nil })
	to := netip.MustParseAddr("198.51.100.1")
	to6 := netip.MustParseAddr("2001:db8:77::1")
	for _, c := range []struct{ change, want4, want6 string }{
		{"true", "b0", "b0"},
		{"ip route add 198.51.100.0/24 dev a0; ip -6 route add 2001:db8:77::/64 dev a0", "a0", "a0"},
		{"ip link set a0 down; ip link set a0 name c0; ip link set c0 up", "b0", "b0"},
		{"ip rule add to 198.51.100.1 lookup 77; ip route add default dev c0 table 77", "c0", "b0"},
		{"ip -6 rule add to 2001:db8:77::1 lookup 77; ip -6 route add default dev c0 table 77", "c0", "c0"},
		{"ip rule del lookup 77", "b0", "c0"},
		{"ip addr del 203.0.113.1/24 dev b0; ip -6 rule del lookup 77", "error", "b0"},
	} {
		s.sh(c.change)
		var got4, got6 string
		eventually(t, fmt.Sprintf("change after %q", c.change), func() bool {
			got4, got6 = lookupName(r, to), lookupName(r, to6)
			return got4 == c.want4 && got6 == c.want6
		})
	}
}

func lookupName(r *Routes, dst netip.Addr) string {
	iface, _, _, err := r.Lookup(dst)
	if err != nil {
		return "error"
	}
	return iface
}

func TestRoutesCacheIsBounded(t *testing.T) {
	_, r := newTestRoutes(t)
	r.forget(true)
	for i := range maxRoutes + 100 {
		r.Lookup(netip.AddrFrom4([4]byte{100, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	if n := len(r.routes.Load().byAddr); n > maxRoutes || n == 0 {
		t.Errorf("%d answers in the cache", n)
	}
}

func TestInterfaceName(t *testing.T) {
	s, r := newTestRoutes(t)
	await(t, r.Run)
	eventually(t, "a cache", func() bool { return r.names.Load() != nil })
	if name, err := r.InterfaceName(1); name != "lo" || err != nil {
		t.Errorf("interface 1 is %q, %v", name, err)
	}
	if name, err := r.InterfaceName(4711); err == nil {
		t.Errorf("interface 4711 is %q", name)
	}
	a0, err := r.handle.LinkByName("a0")
	if err != nil {
		t.Fatal(err)
	}
	index := a0.Attrs().Index
	if name, err := r.InterfaceName(index); name != "a0" || err != nil {
		t.Errorf("interface %d is %q, %v", index, name, err)
	}
	s.sh("ip link set a0 down; ip link set a0 name c0")
	eventually(t, "new name", func() bool { name, _ := r.InterfaceName(index); return name == "c0" })
}

func BenchmarkLookup(b *testing.B) {
	_, r := newTestRoutes(b)
	to := netip.MustParseAddr("198.51.100.1")
	b.Run("miss", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			r.Lookup(to)
		}
	})
	r.forget(true)
	b.Run("hit", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			r.Lookup(to)
		}
	})
}
