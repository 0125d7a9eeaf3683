package engine

import (
	"context"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// manyClients is how many ask for permissions in turn, each by a control
// connection of its own.
const manyClients = 250

// askers are sessions of a filter, with their control connections.
type askers struct {
	e     *Engine
	each  []*callerSession
	lives []*Takeover
}

// insideOf are routes whose address towards a client is one of 250.
type insideOf struct{ manyAddresses }

func (r insideOf) Lookup(dst netip.Addr) (string, netip.Addr, bool, error) {
	if b := dst.As4(); b[0] == 10 {
		return "lan0", netip.AddrFrom4([4]byte{10, 1, 0, b[3]}), false, nil
	}
	return r.manyAddresses.Lookup(dst)
}

func newAskers(tb testing.TB) *askers {
	f := newCaller()
	ports := nat.NewAllocatorWith(nat.AllocatorConfig{
		Leases: []nat.Range{{Lo: 1024, Hi: 65535}}, Quota: 1 << 30, Now: time.Now, Busy: func(nat.Endpoint) bool { return false },
	})
	e, err := New(Config{
		Policy: officePolicy(tb), Filters: []filterapi.Filter{f}, Kernel: &forgetful{}, Ports: ports, Quota: 1 << 30, Log: zap.NewNop(),
		Routes: insideOf{manyAddresses{[]netip.Addr{netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("203.0.113.2")}}},
	})
	if err != nil {
		tb.Fatal(err)
	}
	a := &askers{e: e}
	for i := range manyClients {
		client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(2 + i)}), 40000)
		d := e.Decide(context.Background(), syn(client.String(), control))
		if d.Path != flow.User {
			tb.Fatalf("%v: %v", client, d.Path)
		}
		d.Takeover.Connected(netip.AddrPortFrom(e.routes.(insideOf).external[i%2], 33000), ap(control))
		a.each, a.lives = append(a.each, f.sessions[client.Addr()]), append(a.lives, d.Takeover)
	}
	return a
}

// askers' kinds of permission: what each call leaves with the filter.
var askedKinds = []struct {
	name string
	most int64 // bytes that the engine and the allocator may take for each
	ask  func(s *callerSession, n filterapi.Negotiated, i int) (any, error)
}{
	{"connection to come", 220, func(s *callerSession, n filterapi.Negotiated, i int) (any, error) {
		return s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: netip.AddrPortFrom(ap(control).Addr(), uint16(1024+i/manyClients))})
	}},
	{"redirection", 400, func(s *callerSession, n filterapi.Negotiated, i int) (any, error) {
		_, actions, err := s.RedirectConnections(filterapi.Redirect{
			Negotiated: n, Targets: []netip.AddrPort{netip.AddrPortFrom(ap(control).Addr(), uint16(1024+i/manyClients))},
		})
		return actions, err
	}},
	{"bind", 1500, func(s *callerSession, n filterapi.Negotiated, i int) (any, error) {
		return s.BindForClient(filterapi.Bind{
			Negotiated: n, Clients: []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(2 + i%manyClients)}), uint16(1024+i/manyClients))},
			IPFilter: filterapi.OnlyFrom(ap(control).Addr()),
		})
	}},
}

// hold asks for n permissions of a kind, and says what each of them takes of
// the heap while the filter has what it was given.
func (a *askers) hold(tb testing.TB, kind, n int) int64 {
	tb.Helper()
	given := make([]any, n)
	before := heapInUse()
	for i := range given {
		s := a.each[i%manyClients]
		var err error
		given[i], err = askedKinds[kind].ask(s, filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP, Flags: filterapi.Timeout, Expiry: time.Hour}, i)
		if err != nil {
			tb.Fatal(err)
		}
	}
	each := (heapInUse() - before) / int64(n)
	runtime.KeepAlive(given)
	return each
}

func heapInUse() int64 {
	runtime.GC()
	runtime.GC() // what the first one found to be weak
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestPermissionsAreSmall bounds what very many permissions take.
func TestPermissionsAreSmall(t *testing.T) {
	for i, kind := range askedKinds {
		if each := newAskers(t).hold(t, i, 20_000); each > kind.most {
			t.Errorf("a %s takes %d B, more than %d", kind.name, each, kind.most)
		}
	}
}

// BenchmarkPermissionMemory is what each of 100,000 permissions takes, without
// the kernel path's part, and how long a call is when that part takes no time.
func BenchmarkPermissionMemory(b *testing.B) {
	for i, kind := range askedKinds {
		b.Run(kind.name, func(b *testing.B) {
			n := 0
			var each int64
			for b.Loop() {
				each = newAskers(b).hold(b, i, 100_000)
				n += 100_000
			}
			b.ReportMetric(float64(each), "B/permission")
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(n), "µs/permission")
		})
	}
}
