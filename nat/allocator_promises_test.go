package nat

import (
	"errors"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
)

func testAllocator(c AllocatorConfig) (*Allocator, *time.Time) {
	now := time.Unix(1000, 0)
	c.Busy, c.Now = func(Endpoint) bool { return false }, func() time.Time { return now }
	return NewAllocatorWith(c), &now
}

var (
	outside  = []netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")}
	insideA  = netip.MustParseAddr("10.0.0.2")
	insideB  = netip.MustParseAddr("10.0.0.3")
	tenPorts = []Range{{2000, 2009}}
)

// A port keeps its class and its parity while there are such ports, and gets
// another one then. (RFC 4787, REQ-3a and REQ-4)
func TestAPortGetsItsLike(t *testing.T) {
	a, _ := testAllocator(AllocatorConfig{Leases: tenPorts, WellKnown: Range{600, 603}, Quota: 100})
	take := func(like uint16) int {
		t.Helper()
		at, err := a.Take(Request{Holder: insideA, Proto: flow.UDP, Addrs: outside[:1], Like: like})
		if err != nil {
			t.Fatal(err)
		}
		return int(at.Port())
	}
	for i, like := range []uint16{53, 123, 500, 68} {
		if got := take(like); got > 1023 || i < 3 && got%2 != int(like)%2 && like != 500 {
			t.Errorf("port %d became %d", like, got)
		}
	}
	if got := take(500); got < 2000 || got%2 != 0 {
		t.Errorf("port 500 became %d, when all below 1024 are leased", got)
	}
	for range 5 {
		if got := take(40001); got%2 == 0 {
			t.Errorf("an odd port became %d", got)
		}
	}
	if got := take(40001); got%2 != 0 {
		t.Errorf("%d is leased already", got)
	}
}

// A client with ports of one address gets no others, and others are spread.
// (RFC 4787, REQ-2)
func TestAClientKeepsOneAddress(t *testing.T) {
	a, now := testAllocator(AllocatorConfig{Leases: tenPorts, Quota: 20, Quarantine: Quarantine})
	var all []netip.AddrPort
	for range 10 {
		at, err := a.Take(Request{Holder: insideA, Proto: flow.UDP, Addrs: outside})
		if err != nil || len(all) > 0 && at.Addr() != all[0].Addr() {
			t.Fatalf("%v, %v after %v", at, err, all)
		}
		all = append(all, at)
	}
	if at, err := a.Take(Request{Holder: insideA, Proto: flow.UDP, Addrs: outside}); !errors.Is(err, ErrExhausted) {
		t.Errorf("it got %v, %v when its address had none left", at, err)
	}
	other, err := a.Take(Request{Holder: insideB, Proto: flow.UDP, Addrs: outside})
	if err != nil || other.Addr() == all[0].Addr() {
		t.Errorf("the other client got %v, %v", other, err)
	}
	for _, x := range all {
		a.Return(flow.UDP, x)
	}
	*now = now.Add(Quarantine)
	seen := map[netip.Addr]bool{}
	for range 50 {
		at, err := a.Take(Request{Holder: insideA, Proto: flow.UDP, Addrs: []netip.Addr{netip.MustParseAddr("203.0.113.3"), netip.MustParseAddr("203.0.113.4")}})
		if err != nil {
			t.Fatal(err)
		}
		seen[at.Addr()] = true
		a.Unlease(flow.UDP, at)
	}
	if len(seen) != 2 {
		t.Errorf("without ports it came to %v only", seen)
	}
}

// The quota is exact, counts each protocol by itself, and hurts nobody else.
func TestAQuotaIsExact(t *testing.T) {
	a, _ := testAllocator(AllocatorConfig{Leases: []Range{{2000, 2999}}, Quota: 7})
	for _, p := range []flow.Proto{flow.TCP, flow.UDP, flow.ICMP} {
		for _, client := range []netip.Addr{insideA, insideB} {
			for i := range 9 {
				_, err := a.Take(Request{Holder: client, Proto: p, Addrs: outside[:1]})
				if (err == nil) != (i < 7) || err != nil && !errors.Is(err, ErrQuota) {
					t.Errorf("%v %v: port %d: %v", client, p, i+1, err)
				}
			}
			if err := a.LeaseExactFor(client, p, netip.AddrPortFrom(outside[0], 80), 1); !errors.Is(err, ErrQuota) {
				t.Errorf("%v %v: a port by its number: %v", client, p, err)
			}
		}
	}
	if s := a.Stats(); s.Leased != 6*7 || s.OverQuota != 6*3 {
		t.Errorf("%+v", s)
	}
}

// Another configuration is for requests to come; what is out stays out.
func TestReconfigure(t *testing.T) {
	a, _ := testAllocator(AllocatorConfig{Leases: tenPorts, Quota: 2})
	take := func() (netip.AddrPort, error) {
		return a.Take(Request{Holder: insideA, Proto: flow.UDP, Addrs: outside[:1]})
	}
	old, err := take()
	if err != nil || !a.Covers(old.Port()) || a.Covers(3000) {
		t.Fatal(old, err)
	}
	a.Reconfigure([]Range{{3000, 3001}}, Range{}, 3)
	for i := range 3 {
		at, err := take()
		if (err == nil) != (i < 2) || err == nil && at.Port() < 3000 {
			t.Errorf("%v, %v", at, err)
		}
	}
	if err := a.LeaseExact(flow.UDP, old, 1); !errors.Is(err, ErrLeased) {
		t.Errorf("the old lease: %v", err)
	}
	a.Return(flow.UDP, old)
	if _, err := take(); !errors.Is(err, ErrExhausted) {
		t.Errorf("a port out of the ranges came back: %v", err)
	}
}

// A wish is granted while nothing stands in its way, and a strict one or none.
func TestAPreferredPort(t *testing.T) {
	a, now := testAllocator(AllocatorConfig{Leases: tenPorts, Quota: 5, Quarantine: Quarantine})
	ask := func(client netip.Addr, port uint16, strict bool) (int, error) {
		at, err := a.Take(Request{Holder: client, Proto: flow.TCP, Addrs: outside[:1], Preferred: port, Strict: strict})
		return int(at.Port()), err
	}
	if got, err := ask(insideA, 2004, true); got != 2004 {
		t.Fatalf("%v, %v", got, err)
	}
	if got, err := ask(insideB, 2004, false); got == 2004 || err != nil {
		t.Errorf("the second got %v, %v", got, err)
	}
	if got, err := ask(insideB, 2004, true); !errors.Is(err, ErrLeased) {
		t.Errorf("strictly: %v, %v", got, err)
	}
	if got, err := ask(insideB, 5000, true); !errors.Is(err, ErrUnavailable) {
		t.Errorf("outside of the leases: %v, %v", got, err)
	}
	a.Return(flow.TCP, netip.AddrPortFrom(outside[0], 2004))
	if got, err := ask(insideB, 2004, true); !errors.Is(err, ErrUnavailable) {
		t.Errorf("while it rests after another: %v, %v", got, err)
	}
	if got, err := ask(insideA, 2004, true); got != 2004 {
		t.Errorf("while it rests after itself: %v, %v", got, err)
	}
	a.Return(flow.TCP, netip.AddrPortFrom(outside[0], 2004))
	*now = now.Add(Quarantine)
	if got, err := ask(insideB, 2004, true); got != 2004 {
		t.Errorf("after its rest: %v, %v", got, err)
	}
}

// A block is one client's from its first port until the last has rested; then
// two records have told of it, and none of its ports.
func TestBlocks(t *testing.T) {
	var told []BlockEvent
	a, now := testAllocator(AllocatorConfig{
		Leases: []Range{{2000, 2063}}, Quota: 32, Quarantine: Quarantine, Block: 16,
		OnBlock: func(e BlockEvent) { told = append(told, e) },
	})
	var mine []Endpoint
	take := func(client netip.Addr, p flow.Proto) error {
		at, err := a.Take(Request{Holder: client, Proto: p, Addrs: outside[:1], Like: 1})
		if err == nil && client == insideA {
			mine = append(mine, Endpoint{p, at})
		}
		return err
	}
	for range 16 {
		for _, p := range []flow.Proto{flow.TCP, flow.UDP} {
			if err := take(insideA, p); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(told) != 1 || told[0].Holder != insideA || told[0].Ports.size() != 16 {
		t.Fatalf("told: %+v", told)
	}
	for i := range 20 { // the second block, and the end of the quota
		if err := take(insideA, flow.TCP); (err == nil) != (i < 16) || err != nil && !errors.Is(err, ErrQuota) {
			t.Fatalf("port %d: %v", 17+i, err)
		}
	}
	if err := take(insideB, flow.TCP); err != nil || len(told) != 3 {
		t.Fatalf("%v, told: %+v", err, told)
	}
	for _, e := range mine {
		if told[2].Ports.Lo <= e.Addr.Port() && e.Addr.Port() <= told[2].Ports.Hi {
			t.Errorf("%v is in the other client's block %v", e, told[2].Ports)
		}
		a.Return(e.Proto, e.Addr)
	}
	if *now = now.Add(Quarantine - time.Second); len(told) != 3 {
		t.Errorf("told while ports rest: %+v", told)
	}
	*now = now.Add(time.Second)
	a.Sweep()
	if len(told) != 5 || !told[3].Returned || !told[4].Returned || a.Stats().Blocks != 1 {
		t.Errorf("told: %+v", told)
	}
}

// Many at once get different ports, and everything is free in the end.
func TestAllocatorTogether(t *testing.T) {
	var told sync.Map // the blocks that are somebody's
	a := NewAllocatorWith(AllocatorConfig{
		Leases: []Range{{2000, 2255}}, Quota: 64, Block: 32, Quarantine: time.Millisecond, Now: time.Now,
		Busy: func(e Endpoint) bool { return e.Addr.Port()%7 == 0 },
		OnBlock: func(e BlockEvent) {
			owned := e
			owned.Returned = false
			if _, was := told.LoadOrStore(owned, true); was != e.Returned {
				t.Errorf("%+v, and it was owned: %v", e, was)
			}
			if e.Returned {
				told.Delete(owned)
			}
		},
	})
	var out sync.Map
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			client := netip.AddrFrom4([4]byte{10, 0, 0, byte(i % 5)})
			for range 2000 {
				r := Request{Holder: client, Proto: flow.UDP, Addrs: outside, N: 1 + i%3, Even: i%2 == 0}
				at, err := a.Take(r)
				if err != nil {
					continue
				}
				for n := range r.N {
					x := netip.AddrPortFrom(at.Addr(), at.Port()+uint16(n))
					if other, twice := out.LoadOrStore(x, client); twice {
						t.Errorf("%v is %v's and %v's", x, other, client)
					}
				}
				for n := range r.N {
					x := netip.AddrPortFrom(at.Addr(), at.Port()+uint16(n))
					out.Delete(x)
					a.Return(flow.UDP, x)
				}
			}
		})
	}
	all.Wait()
	deadline := time.Now().Add(10 * time.Second)
	for a.Stats() != (AllocatorStats{OverQuota: a.Stats().OverQuota, Exhausted: a.Stats().Exhausted}) {
		if time.Now().After(deadline) {
			t.Fatalf("left: %+v", a.Stats())
		}
		time.Sleep(time.Millisecond)
	}
	told.Range(func(e, _ any) bool { t.Errorf("%+v was never returned", e); return true })
}

// Where everything is busy, as at an address that has gone, a request ends soon.
func TestBusyEverywhere(t *testing.T) {
	asked := 0
	a := NewAllocatorWith(AllocatorConfig{
		Leases: defaultLeases, Quota: 2048, Now: time.Now, Busy: func(Endpoint) bool { asked++; return true },
	})
	_, err := a.Take(Request{Holder: insideA, Proto: flow.TCP, Addrs: outside[:1], Like: 1})
	if s := a.Stats(); !errors.Is(err, ErrExhausted) || asked > maxBusy || s.Leased+s.Resting+s.Holders != 0 {
		t.Errorf("%v after %d questions, %+v", err, asked, s)
	}
}

// Whatever a port is asked about is not asked twice, and only what would be
// leased is asked about.
func TestBusyIsAskedOfCandidatesOnly(t *testing.T) {
	asked := map[Endpoint]int{}
	a := NewAllocatorWith(AllocatorConfig{
		Leases: []Range{{1024, 65535}}, Quota: 65535, Now: time.Now,
		Busy: func(e Endpoint) bool { asked[e]++; return e.Addr.Port()%2 == 0 },
	})
	const n = 1000
	for range n {
		at, err := a.Take(Request{Holder: insideA, Proto: flow.TCP, Addrs: outside[:1]})
		if err != nil || at.Port()%2 == 0 {
			t.Fatal(at, err)
		}
	}
	sum := 0
	for _, k := range asked {
		sum += k
	}
	if sum > 4*n { // half of them are busy
		t.Errorf("asked %d times for %d leases", sum, n)
	}
}
