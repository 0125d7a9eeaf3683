package engine

import (
	"context"
	"net/netip"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// unheardEngine has a rule with a filter that hears of TCP alone. now is its
// clock.
func unheardEngine(t testing.TB, now *time.Time) (*Engine, *fakeKernel, *probe, *observer.ObservedLogs) {
	t.Helper()
	p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP | filterapi.Terminating}}
	p.handle = func(filterapi.Event) error { return nil }
	core, logs := observer.New(zapcore.InfoLevel)
	k := &fakeKernel{held: map[uint64]nat.Permission{}}
	e, err := New(Config{
		Policy: unheardPolicy(t, "ftp", "dns", "http"), Filters: []filterapi.Filter{p}, Kernel: k, Routes: fakeRoutes{}, Log: zap.New(core),
		Ports: nat.NewAllocator(nat.Range{Lo: 61000, Hi: 61003}, func(nat.Endpoint) bool { return false }, time.Now),
		Now:   func() time.Time { return *now },
	})
	if err != nil {
		t.Fatal(err)
	}
	return e, k, p, logs
}

func unheardPolicy(t testing.TB, protocols ...string) *policy.Policy {
	t.Helper()
	rules, err := policy.New(
		[]policy.Network{{Name: "inside", Interfaces: []string{"lan0"}}, {Name: "outside", Interfaces: []string{"wan0"}}},
		[]policy.NetworkRule{{Name: "internet", From: "inside", To: "outside", Relation: policy.NAT}}, policy.Builtin(),
		[]policy.Rule{{Name: "all", Action: policy.Allow, From: []string{"inside"}, To: []string{"outside"},
			Protocols: protocols, Filters: []policy.FilterUse{{Name: "ftp"}}}})
	if err != nil {
		t.Fatal(err)
	}
	return rules
}

func query(src string) flow.Packet {
	return flow.Packet{InIface: "lan0", Tuple: flow.Tuple{Proto: flow.UDP, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort("203.0.113.10:53")}}
}

// What no filter hears of is decided at once, has a session and one record, and
// the rules are asked about it again like about every other flow.
func TestDecideNow(t *testing.T) {
	now := time.Now()
	e, k, p, logs := unheardEngine(t, &now)
	one := query("10.0.0.2:1000")
	for range 3 { // as many packets of it as were queued
		if path, ok := e.DecideNow(one); path != flow.Plain || !ok {
			t.Fatalf("a flow that nobody hears of: %v, %v", path, ok)
		}
	}
	web := syn("10.0.0.2:2000", "203.0.113.10:80")
	web.InIface = "lan0"
	if path, ok := e.DecideNow(web); path != flow.Plain || !ok {
		t.Errorf("a rule without a filter for it: %v, %v", path, ok)
	}
	if path, ok := e.DecideNow(web); path != flow.Drop || !ok {
		t.Errorf("its SYN, sent twice: %v, %v", path, ok)
	}
	for name, x := range map[string]flow.Packet{
		"heard":   syn("10.0.0.2:3000", "203.0.113.10:21"),
		"refused": {InIface: "lan0", Tuple: flow.Tuple{Proto: flow.UDP, Src: one.Src, Dst: netip.MustParseAddrPort("203.0.113.10:54")}},
		"local":   {InIface: "lan0", Tuple: flow.Tuple{Proto: flow.UDP, Src: one.Src, Dst: netip.MustParseAddrPort("203.0.113.1:53")}},
		"ping":    {InIface: "lan0", Tuple: flow.Tuple{Proto: flow.ICMP, Src: one.Src, Dst: netip.MustParseAddrPort("203.0.113.10:8")}},
	} {
		x.InIface = "lan0"
		if path, ok := e.DecideNow(x); path != flow.Drop || ok {
			t.Errorf("%s: %v, %v", name, path, ok)
		}
	}
	if s := e.Sessions(); len(s) != 1 || p.attached != 0 {
		t.Errorf("sessions: %+v, attached %d times", s, p.attached)
	}

	// One ends, unseen by anybody else.
	e.KernelEnded(flow.End{Tuple: web.Tuple, Path: flow.Kernel, Result: flow.Closed, Counts: flow.Counts{OutBytes: 7}})
	if got := logs.FilterMessage("flow").All(); len(got) != 1 || got[0].ContextMap()["session"] != uint64(1) || got[0].ContextMap()["rule"] != "all" ||
		got[0].ContextMap()["out_bytes"] != uint64(7) || got[0].ContextMap()["protocol"] != "http" {
		t.Errorf("recorded: %+v", got)
	}

	// The other is listed, and cut when the rules no longer allow it.
	if all := e.Flows(); len(all) != 1 || all[0].Tuple != one.Tuple || all[0].Session != 1 || all[0].Path != flow.Kernel || all[0].Rule != "all" {
		t.Errorf("flows: %+v", all)
	}
	if path, ok := e.DecideNow(one); path != flow.Drop || ok {
		t.Errorf("a tuple whose flow has not ended: %v, %v", path, ok)
	}
	e.SetPolicy(unheardPolicy(t, "ftp", "http"))
	if err := e.Recheck(context.Background(), nil); err != nil {
		t.Error(err)
	}
	if !slices.Contains(k.cut, one.Tuple) {
		t.Errorf("cut: %v", k.cut)
	}
	e.KernelEnded(flow.End{Tuple: one.Tuple, Path: flow.Kernel, Result: flow.CutByPolicy})
	if got := logs.FilterMessage("flow").Len(); got != 2 {
		t.Errorf("%d records", got)
	}
	e.tasks.wait()
	if s := e.Sessions(); len(s) != 0 {
		t.Errorf("sessions at the end: %+v", s)
	}
}

// A tuple that is used anew is a flow of its own, and a flow whose end was lost
// ends with the next comparison.
func TestDecideNowAnewAndLost(t *testing.T) {
	now := time.Now()
	e, _, _, logs := unheardEngine(t, &now)
	one := query("10.0.0.2:1000")
	e.DecideNow(one)
	now = now.Add(2 * sameFlow)
	if path, ok := e.DecideNow(one); ok {
		t.Errorf("a tuple that is used anew: %v", path)
	}
	if d := e.Decide(context.Background(), one); d.Path != flow.Kernel {
		t.Error(d)
	}
	if got := logs.FilterMessage("flow").All(); len(got) != 1 || got[0].ContextMap()["reason"] != "its tuple was used anew" {
		t.Errorf("recorded: %+v", got)
	}
	two, three := query("10.0.0.2:1001"), query("10.0.0.2:1002")
	e.DecideNow(two)
	e.DecideNow(three)
	if e.HoldsKernelFlows(now) || !e.HoldsKernelFlows(now.Add(time.Second)) {
		t.Error("the age of the flows is not known")
	}
	now = now.Add(time.Minute)
	e.Resync(map[flow.Tuple]bool{three.Tuple: true}, now)
	if got := logs.FilterMessage("flow").Len(); got != 3 {
		t.Errorf("%d records, want those of the two that are lost", got)
	}
	// The end of a flow before it is not its end.
	e.KernelEnded(flow.End{Tuple: three.Tuple, Path: flow.Kernel, Start: now.Add(-time.Hour), Stop: now.Add(-time.Hour)})
	if all := e.Flows(); len(all) != 1 || all[0].Tuple != three.Tuple {
		t.Errorf("living: %+v", all)
	}
}

// No garbage is made of a flow that nobody hears of, from its first packet to
// its end, but for its record in the log.
func TestDecideNowAllocatesNothing(t *testing.T) {
	now := time.Now()
	e, _, _, _ := unheardEngine(t, &now)
	e.log = zap.NewNop()
	e.Decide(context.Background(), syn("10.0.0.2:1", "203.0.113.10:80")) // the session stays
	first := query("10.0.0.2:1000")
	if n := testing.AllocsPerRun(1000, func() {
		first.Src = netip.AddrPortFrom(first.Src.Addr(), first.Src.Port()+1)
		if path, ok := e.DecideNow(first); path != flow.Plain || !ok {
			t.Fatal(path, ok)
		}
		e.KernelEnded(flow.End{Tuple: first.Tuple, Path: flow.Kernel, Result: flow.Closed})
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkDecideNow is the life of a flow that no filter hears of, as
// BenchmarkDecide is that of the others. The target is no allocation.
func BenchmarkDecideNow(b *testing.B) {
	now := time.Now()
	e, _, _, _ := unheardEngine(b, &now)
	e.log = zap.NewNop()
	e.Decide(context.Background(), syn("10.0.0.2:1", "203.0.113.10:80"))
	first := query("10.0.0.2:1000")
	b.ReportAllocs()
	for b.Loop() {
		first.Src = netip.AddrPortFrom(first.Src.Addr(), first.Src.Port()+1)
		if path, ok := e.DecideNow(first); path != flow.Plain || !ok {
			b.Fatal(path, ok)
		}
		e.KernelEnded(flow.End{Tuple: first.Tuple, Path: flow.Kernel, Result: flow.Closed})
	}
}
