package nat

import (
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
)

var defaultLeases = []Range{{20000, 32767}, {61000, 65535}}

// perClient is how many ports each client has.
const perClient = 16

// fill leases ports of several addresses for many clients. It gives the bytes
// that one of them costs.
func fill(b *testing.B, a *Allocator, addrs []netip.Addr, n int) float64 {
	b.Helper()
	before := heap()
	for i := range n {
		c := i/len(addrs)/perClient*len(addrs) + i%len(addrs)
		client := netip.AddrFrom4([4]byte{10, byte(c >> 16), byte(c >> 8), byte(c)})
		if _, err := a.Take(Request{Holder: client, Proto: flow.UDP, Addrs: addrs[i%len(addrs):][:1], Like: uint16(1024 + i%60000)}); err != nil {
			b.Fatalf("lease %d: %v", i, err)
		}
	}
	return float64(heap()-before) / float64(n)
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkAllocate leases and returns one port while so much of the default
// ranges of one address is leased.
func BenchmarkAllocate(b *testing.B) {
	addrs := []netip.Addr{netip.MustParseAddr("203.0.113.1")}
	total := defaultLeases[0].size() + defaultLeases[1].size()
	for _, full := range []int{10, 50, 90, 99} {
		b.Run(fmt.Sprintf("%d%%", full), func(b *testing.B) {
			now := time.Unix(1000, 0)
			a := NewAllocatorWith(AllocatorConfig{
				Leases: defaultLeases, Quota: 2048, Quarantine: Quarantine,
				Busy: func(Endpoint) bool { return false }, Now: func() time.Time { return now },
			})
			bytes := fill(b, a, addrs, total*full/100)
			r := Request{Holder: netip.MustParseAddr("192.168.0.2"), Proto: flow.UDP, Addrs: addrs, Like: 40001}
			b.ReportAllocs()
			for b.Loop() {
				at, err := a.Take(r)
				if err != nil {
					b.Fatal(err)
				}
				a.Return(flow.UDP, at)
				now = now.Add(Quarantine / 64) // 64 rest at a time
			}
			b.ReportMetric(bytes, "B/mapping")
		})
	}
}

// BenchmarkMillion leases a million ports of sixty-four addresses.
func BenchmarkMillion(b *testing.B) {
	var addrs []netip.Addr
	for i := range 64 {
		addrs = append(addrs, netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}))
	}
	const n = 1_000_000
	for b.Loop() {
		a := NewAllocatorWith(AllocatorConfig{
			Leases: defaultLeases, Quota: 2048, Quarantine: Quarantine,
			Busy: func(Endpoint) bool { return false }, Now: time.Now,
		})
		bytes := fill(b, a, addrs, n)
		b.ReportMetric(bytes, "B/mapping")
		runtime.KeepAlive(a)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/lease")
}
