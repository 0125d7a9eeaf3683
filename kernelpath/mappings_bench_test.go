package kernelpath

import (
	"context"
	"net/netip"
	"runtime"
	"sync"
	"testing"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// nthMapping is one of many, without filtering by user space.
func nthMapping(n int) nat.Permission {
	return nat.Permission{
		ID: uint64(n + 1), Direction: nat.Inbound, Proto: flow.UDP, Multiple: true, Mapped: true, Leaves: "out",
		Client:   netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}), 5000),
		External: netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(n >> 15)}), uint16(n&0x7fff+1024)),
	}
}

// BenchmarkMappings installs mappings as first packets bring them, many
// together, and says what the record of one costs in memory.
func BenchmarkMappings(b *testing.B) {
	s := newSpace(b)
	table := openTable(b, s)
	o := testOptions(b)
	o.Native = false
	mustLoad(b, table, mustBuild(b, twoZones(), o))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	b.ResetTimer()
	var wg sync.WaitGroup
	next := make(chan int)
	for range 64 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for n := range next {
				if err := table.Install(context.Background(), nthMapping(n)); err != nil {
					b.Error(err)
				}
			}
		}()
	}
	for n := range b.N {
		next <- n
	}
	close(next)
	wg.Wait()
	b.StopTimer()
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(int64(after.HeapAlloc)-int64(before.HeapAlloc))/float64(b.N), "B/mapping")
}
