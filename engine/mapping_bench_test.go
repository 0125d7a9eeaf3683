package engine

import (
	"context"
	"net/netip"
	"runtime"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// forgetful is a kernel that says yes and keeps nothing.
type forgetful struct{ fakeKernel }

func (*forgetful) Install(context.Context, nat.Permission) error { return nil }
func (*forgetful) Remove(context.Context, nat.Permission) error  { return nil }

// benchEngine has eight external addresses' worth of ports, and endpoints to fill
// most of them.
func benchEngine(b *testing.B) (*Engine, []flow.Packet) {
	var external []netip.Addr
	for i := range 8 {
		external = append(external, netip.AddrFrom4([4]byte{203, 0, 113, byte(1 + i)}))
	}
	ports := nat.NewAllocatorWith(nat.AllocatorConfig{
		Leases: []nat.Range{{Lo: 1024, Hi: 65535}}, Quota: 1 << 30, Now: time.Now, Busy: func(nat.Endpoint) bool { return false },
	})
	e, err := New(Config{Policy: mappingPolicy(b, nil), Kernel: &forgetful{}, Routes: manyAddresses{external}, Ports: ports, Log: zap.NewNop()})
	if err != nil {
		b.Fatal(err)
	}
	packets := make([]flow.Packet, 400_000)
	for i := range packets {
		packets[i] = udpPacket("10.0.0.2:5000", "203.0.113.100:1000")
		packets[i].Src = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 10), byte(i >> 2)}), uint16(5000+i&3))
		packets[i].Dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i % 8)}), 1000)
	}
	return e, packets
}

// manyAddresses are routes that prefer one of several addresses, by where they
// lead.
type manyAddresses struct{ external []netip.Addr }

func (m manyAddresses) Lookup(dst netip.Addr) (string, netip.Addr, bool, error) {
	if b := dst.As4(); b[0] == 10 {
		return "lan0", netip.AddrFrom4([4]byte{10, 0, 0, 1}), false, nil
	} else {
		return "wan0", m.external[int(b[3])%len(m.external)], false, nil
	}
}

func (m manyAddresses) AddressOf(string, bool) (netip.Addr, error) { return m.external[0], nil }

// BenchmarkMapping is what the engine has to do with an endpoint beside the
// kernel's part: the decision about its first packet, and what is kept of it.
func BenchmarkMapping(b *testing.B) {
	e, packets := benchEngine(b)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		if n == len(packets) {
			b.StopTimer()
			e, packets = benchEngine(b)
			n = 0
			runtime.GC()
			runtime.ReadMemStats(&before)
			b.StartTimer()
		}
		if d := e.Decide(context.Background(), packets[n]); d.Path != flow.Kernel {
			b.Fatalf("%d: %v", n, d.Path)
		}
		n++
	}
	b.StopTimer()
	runtime.GC()
	runtime.ReadMemStats(&after)
	living := float64(e.Mappings().Living)
	b.ReportMetric(float64(int64(after.HeapAlloc)-int64(before.HeapAlloc))/living, "B/mapping")
}

// BenchmarkMappingKnown is a packet of an endpoint that has a mapping: one that
// was queued for a filter's sake.
func BenchmarkMappingKnown(b *testing.B) {
	e, packets := benchEngine(b)
	e.Decide(context.Background(), packets[0])
	b.ReportAllocs()
	for b.Loop() {
		if d := e.Decide(context.Background(), packets[0]); d.Path != flow.Kernel {
			b.Fatal(d.Path)
		}
	}
}

// BenchmarkMappingFlow is what conntrack tells of a flow: its beginning and its
// end.
func BenchmarkMappingFlow(b *testing.B) {
	e, packets := benchEngine(b)
	e.Decide(context.Background(), packets[0])
	at := e.Binds()[0].External
	translation := flow.Translation{Src: at}
	b.ReportAllocs()
	for b.Loop() {
		e.KernelBegan(packets[0].Tuple, translation)
		e.mapped(packets[0].Tuple, translation, -1)
	}
}
