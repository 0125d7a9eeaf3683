package nat

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
)

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
