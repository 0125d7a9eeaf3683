package engine

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// BenchmarkDecide is the life of a flow that the kernel carries, as the engine
// has to do with it: unheard of by any filter, or with a filter that leaves it
// alone. The client has other flows, so that its session stays.
func BenchmarkDecide(b *testing.B) {
	for name, dst := range map[string]string{"unheard": "203.0.113.10:80", "heard": "203.0.113.10:21"} {
		b.Run(name, func(b *testing.B) {
			rules, err := policy.New(
				[]policy.Network{{Name: "inside", Interfaces: []string{"lan0"}}, {Name: "outside", Interfaces: []string{"wan0"}}},
				[]policy.NetworkRule{{Name: "internet", From: "inside", To: "outside", Relation: policy.NAT}},
				policy.Builtin(),
				[]policy.Rule{{Name: "all", Action: policy.Allow, From: []string{"inside"}, To: []string{"outside"},
					Protocols: []string{"ftp", "http"}, Filters: []policy.FilterUse{{Name: "ftp"}}}})
			if err != nil {
				b.Fatal(err)
			}
			p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP | filterapi.Accepted | filterapi.Terminating}}
			p.handle = func(filterapi.Event) error { return nil }
			e, err := New(Config{
				Policy: rules, Filters: []filterapi.Filter{p}, Kernel: &fakeKernel{held: map[uint64]nat.Permission{}}, Routes: fakeRoutes{},
				Ports: nat.NewAllocator(nat.Range{Lo: 61000, Hi: 61003}, func(nat.Endpoint) bool { return false }, time.Now), Log: zap.NewNop(),
			})
			if err != nil {
				b.Fatal(err)
			}
			e.Decide(context.Background(), syn("10.0.0.2:1", dst))
			first := syn("10.0.0.2:40000", dst)
			b.ReportAllocs()
			for b.Loop() {
				first.Src = netip.AddrPortFrom(first.Src.Addr(), first.Src.Port()+1)
				if d := e.Decide(context.Background(), first); d.Path != flow.Kernel {
					b.Fatal(d.Path)
				}
				e.KernelEnded(flow.End{Tuple: first.Tuple, Path: flow.Kernel, Result: flow.Closed})
			}
		})
	}
}
