package kernelpath

import (
	"context"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// heldMany is how many permissions are held while others come and go; that and
// callsPerSecond are a large gateway's normal work.
const (
	heldMany       = 100_000
	callsPerSecond = 1000
)

// many is the nth of many permissions: by turns outbound, a leased port, and a
// redirect, for 250 clients.
func many(n int) nat.Permission {
	client := netip.AddrFrom4([4]byte{10, 0, 0, byte(2 + n%250)})
	port := uint16(1024 + n/250%60000)
	p := nat.Permission{ID: uint64(n + 1), Proto: flow.TCP, Timeout: time.Hour, Client: netip.AddrPortFrom(client, 0),
		Target: netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, 10}), port)}
	switch n % 3 {
	case 0:
		p.Direction = nat.Outbound
	case 1:
		p.Direction, p.Client, p.Target = nat.Inbound, netip.AddrPortFrom(client, port), netip.AddrPort{}
		p.External = netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, byte(n % 250), 1}), port)
		p.Sources = []netip.Prefix{netip.MustParsePrefix("203.0.113.10/32")}
	case 2:
		p.Direction = nat.Outbound
		p.Target = netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, byte(n / 60000), 10}), 2000)
		p.Via = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n / 60000), 1}), uint16(n%60000+1024))
	}
	return p
}

// hold installs permissions, as many together as callers come together.
func hold(tb testing.TB, table *Table, from, to int) {
	tb.Helper()
	var wg sync.WaitGroup
	next := make(chan int)
	for range 256 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for n := range next {
				if err := table.Install(context.Background(), many(n)); err != nil {
					tb.Error(err)
				}
			}
		}()
	}
	for n := from; n < to; n++ {
		next <- n
	}
	close(next)
	wg.Wait()
}

// BenchmarkInstallAmongMany gives the time that one call takes while 100,000
// permissions are held and 1,000 calls come each second: an installation and,
// as often, the removal of another one. Every second call goes to a table that
// holds few, so that both have the same moments of a noisy machine; p50-ratio
// and p99-ratio compare the two.
func BenchmarkInstallAmongMany(b *testing.B) {
	_, crowded := loadedTable(b)
	_, roomy := loadedTable(b)
	before := heapInUse()
	began := time.Now()
	hold(b, crowded, 0, heldMany)
	bulk, heap := time.Since(began), heapInUse()-before
	calls := max(b.N, 4*callsPerSecond) / 4 * 4
	few := calls / 4
	hold(b, roomy, 0, few)
	commits := commitsOf(crowded)
	took := [2][]time.Duration{make([]time.Duration, calls/2), make([]time.Duration, calls/2)}
	var wg sync.WaitGroup
	b.ResetTimer()
	start := time.Now()
	for i := range calls {
		time.Sleep(time.Until(start.Add(time.Duration(i) * time.Second / (2 * callsPerSecond))))
		wg.Go(func() {
			table, held, nth := crowded, heldMany, i/2
			if i%2 == 1 {
				table, held = roomy, few
			}
			call, p := table.Install, many(held+nth)
			if nth%2 == 1 {
				call, p = table.Remove, many(nth/2)
			}
			called := time.Now()
			if err := call(context.Background(), p); err != nil {
				b.Error(err)
			}
			took[i%2][nth] = time.Since(called)
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(bulk.Microseconds())/heldMany, "µs/install-in-bulk")
	b.ReportMetric(float64(heap)/heldMany, "heap-B/permission")
	for i := range took {
		slices.Sort(took[i])
	}
	n := len(took[0])
	for name, at := range map[string]int{"p50": n / 2, "p99": n * 99 / 100} {
		b.ReportMetric(float64(took[0][at].Microseconds()), name+"-µs")
		b.ReportMetric(float64(took[0][at])/float64(took[1][at]), name+"-ratio")
	}
	b.ReportMetric(float64(took[0][n-1].Microseconds()), "max-µs")
	b.ReportMetric(float64(n)/float64(commitsOf(crowded)-commits), "calls/transaction")
}

func heapInUse() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// More than the 65,535 elements that a set of nft's own size takes.
func TestPermissionsHoldMany(t *testing.T) {
	s, table := loadedTable(t)
	hold(t, table, 0, heldMany)
	wantAll := func() {
		t.Helper()
		all, err := table.Permissions()
		if err != nil {
			t.Fatal(err)
		}
		uses := map[string]int{}
		for _, p := range all {
			uses[p.Use]++
		}
		if uses["once"] != heldMany || uses["bind"] != 2*heldMany/3 || uses["refuse"] != heldMany/3 {
			t.Errorf("the kernel holds %v", uses)
		}
	}
	wantAll()
	// Somebody deletes the table: all of them come back with the next one.
	s.sh("nft delete table inet sluice")
	o := testOptions(t)
	o.Native = false
	mustLoad(t, table, mustBuild(t, twoZones(), o))
	wantAll()
	if err := table.FlushPermissions(); err != nil {
		t.Fatal(err)
	}
	if all, err := table.Permissions(); err != nil || len(all) != 0 {
		t.Errorf("after the flush: %d elements, %v", len(all), err)
	}
}
