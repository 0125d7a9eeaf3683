package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// mappingPolicy lets everything out by a network rule that maps endpoints.
func mappingPolicy(t testing.TB, change func(*policy.NetworkRule)) *policy.Policy {
	t.Helper()
	r := policy.NetworkRule{Name: "internet", From: "inside", To: "outside", Relation: policy.NAT, Mapping: policy.MapEndpointIndependent}
	if change != nil {
		change(&r)
	}
	p, err := policy.New(
		[]policy.Network{{Name: "inside", Interfaces: []string{"lan0"}}, {Name: "outside", Interfaces: []string{"wan0"}}},
		[]policy.NetworkRule{r}, policy.Builtin(),
		[]policy.Rule{
			{Name: "ftp", Action: policy.Allow, From: []string{"inside"}, To: []string{"outside"}, Protocols: []string{"ftp"}, Filters: []policy.FilterUse{{Name: "ftp"}}},
			{Name: "all", Action: policy.Allow, From: []string{"inside"}, To: []string{"outside"}, Protocols: []string{policy.AnyProtocol}},
		})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func filteringBy(f policy.Filtering) func(*policy.NetworkRule) {
	return func(r *policy.NetworkRule) { r.Filtering = f }
}

// mappingBench is an engine with 100 ports whose kernel is a fake; the ports
// rest as usual.
func mappingBench(t testing.TB, p *policy.Policy, filters ...filterapi.Filter) (*bench, *nat.Allocator) {
	t.Helper()
	core, logs := observer.New(zapcore.InfoLevel)
	k := &fakeKernel{held: map[uint64]nat.Permission{}}
	leases := nat.Range{Lo: 61000, Hi: 61099}
	ports := nat.NewAllocatorWith(nat.AllocatorConfig{
		Leases: []nat.Range{leases}, Quota: 1000, Quarantine: nat.Quarantine, Now: time.Now, Busy: func(nat.Endpoint) bool { return false },
	})
	e, err := New(Config{Policy: p, Filters: filters, Kernel: k, Routes: fakeRoutes{}, Ports: ports, Log: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	return &bench{e, k, logs}, ports
}

func udpPacket(src, dst string) flow.Packet {
	return flow.Packet{Tuple: flow.Tuple{Proto: flow.UDP, Src: ap(src), Dst: ap(dst)}, InIface: "lan0"}
}

// carries decides about a packet that the kernel is to carry.
func (b *bench) carries(t *testing.T, p flow.Packet) {
	t.Helper()
	if d := b.Decide(context.Background(), p); d.Path != flow.Kernel {
		t.Errorf("%s: %v, want kernel", p.Tuple, d.Path)
	}
}

// leaving is what the kernel holds of an inside endpoint.
func (b *bench) leaving(at netip.AddrPort, proto flow.Proto) (nat.Permission, bool) {
	b.kernel.mu.Lock()
	defer b.kernel.mu.Unlock()
	for _, p := range b.kernel.held {
		if p.Leaves != "" && p.Client == at && p.Proto == proto {
			return p, true
		}
	}
	return nat.Permission{}, false
}

// began and ended are conntrack's words about an outbound flow.
func (b *bench) began(p flow.Packet, external netip.AddrPort) {
	b.KernelBegan(p.Tuple, flow.Translation{Src: external})
}

func (b *bench) ended(p flow.Packet, external netip.AddrPort) {
	b.KernelEnded(flow.End{Tuple: p.Tuple, Translation: flow.Translation{Src: external}, Path: flow.Kernel, Result: flow.Closed})
}

// All first packets of an endpoint, also those at the same time, have one
// mapping, whatever their destination; another endpoint or protocol has another.
func TestMappingOfAnEndpoint(t *testing.T) {
	b, ports := mappingBench(t, mappingPolicy(t, nil))
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() { b.carries(t, udpPacket("10.0.0.2:5000", fmt.Sprintf("203.0.113.10:%d", 1000+i))) })
	}
	all.Wait()
	p := b.kernel.only(t)
	if p.Leaves != "internet" || p.External.Addr() != ap("203.0.113.1:0").Addr() || p.AnySource || !p.Mapped {
		t.Errorf("the kernel holds %+v", p)
	}
	b.carries(t, udpPacket("10.0.0.3:5000", "203.0.113.10:1000"))
	b.carries(t, syn("10.0.0.2:5000", "203.0.113.10:80"))
	query := flow.Packet{Tuple: flow.Tuple{Proto: flow.ICMP, Src: ap("10.0.0.2:5000"), Dst: ap("203.0.113.10:8")}, InIface: "lan0"}
	b.carries(t, query)
	if len(b.kernel.held) != 4 || ports.Leased() != 4 || len(b.Flows()) != 0 || len(b.Sessions()) != 0 {
		t.Errorf("the kernel holds %v; %d ports; flows %v", b.kernel.held, ports.Leased(), b.Flows())
	}
	if got := b.Binds(); len(got) != 4 || got[0].By != "network rule internet" || got[0].State != "discarding" {
		t.Errorf("binds %+v", got)
	}
}

// A mapping lives as long as conntrack has a flow of it, and a moment more.
func TestMappingLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, ports := mappingBench(t, mappingPolicy(t, nil))
		first, second := udpPacket("10.0.0.2:5000", "203.0.113.10:1000"), udpPacket("10.0.0.2:5000", "203.0.113.11:1000")
		b.carries(t, first)
		x := b.kernel.only(t).External
		b.began(first, x)
		b.began(second, x)
		time.Sleep(time.Hour)
		b.ended(first, x)
		time.Sleep(time.Minute)
		if b.kernel.empty() {
			t.Fatal("a flow lives, the mapping does not")
		}
		// The end of one flow and the beginning of the next are told by two
		// sockets.
		third := udpPacket("10.0.0.2:5000", "203.0.113.11:1001")
		b.ended(third, x)
		b.began(third, x)
		b.ended(second, x)
		time.Sleep(lateReports + sweepEvery)
		synctest.Wait()
		if !b.kernel.empty() || ports.Leased() != 1 {
			t.Errorf("without a flow the kernel holds %v, %d ports are out", b.kernel.held, ports.Leased())
		}
		// A flow that had begun before is told of late.
		b.began(first, x)
		time.Sleep(2 * sweepEvery)
		synctest.Wait()
		if got := b.kernel.only(t).External; got != x {
			t.Errorf("it is back at %s, it was at %s", got, x)
		}
		b.ended(first, x)
		time.Sleep(lateReports + sweepEvery)
		synctest.Wait()
		// And a packet in the last moment.
		b.carries(t, second)
		if got := b.kernel.only(t).External; got != x {
			t.Errorf("the next packet has %s, it was %s", got, x)
		}
		time.Sleep(time.Minute) // no flow came of it
		synctest.Wait()
		if !b.kernel.empty() || ports.Leased() != 0 || len(b.mappings.byInside)+len(b.mappings.byExternal)+len(b.mappings.idle) != 0 {
			t.Errorf("left: kernel %v, %d ports, %+v", b.kernel.held, ports.Leased(), b.mappings.byExternal)
		}
		b.carries(t, first)
		if got := b.kernel.only(t).External; got == x {
			t.Errorf("%s does not rest", x)
		}
	})
}

// Who gets no port is told, and nothing stays of it.
func TestMappingExhausted(t *testing.T) {
	b, ports := mappingBench(t, mappingPolicy(t, nil))
	for i := range 100 {
		b.carries(t, udpPacket(fmt.Sprintf("10.0.0.2:%d", 5000+i), "203.0.113.10:1000"))
	}
	if d := b.Decide(context.Background(), udpPacket("10.0.0.2:6000", "203.0.113.10:1000")); d.Path != flow.Exhausted {
		t.Errorf("the 101st: %v", d.Path)
	}
	if n := len(b.mappings.byInside); n != 100 || ports.Leased() != 100 {
		t.Errorf("%d mappings, %d ports", n, ports.Leased())
	}
}

// A mapping that the kernel does not take is none; the port is free again.
func TestMappingRefusedByKernel(t *testing.T) {
	b, ports := mappingBench(t, mappingPolicy(t, nil))
	b.kernel.fail = errors.New("no memory")
	if d := b.Decide(context.Background(), udpPacket("10.0.0.2:5000", "203.0.113.10:1000")); d.Path != flow.Drop {
		t.Errorf("%v", d.Path)
	}
	if d := b.Decide(context.Background(), syn("10.0.0.2:5000", "203.0.113.10:80")); d.Path != flow.Reject {
		t.Errorf("%v", d.Path)
	}
	if ports.Leased() != 0 || len(b.mappings.byInside)+len(b.mappings.byExternal) != 0 {
		t.Errorf("left: %d ports, %v", ports.Leased(), b.mappings.byInside)
	}
	b.kernel.fail = nil
	b.carries(t, udpPacket("10.0.0.2:5000", "203.0.113.10:1000"))
}

// A filter that denies the bind of a flow refuses the flow; else it has an
// object, until the mapping ends.
func TestMappingRaisesBind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		deny := true
		var bind filterapi.Connection
		var emulating error
		over := 0
		f := &probe{events: filterapi.Events{Types: filterapi.BindTCP | filterapi.Terminating}}
		f.handle = func(ev filterapi.Event) error {
			switch e := ev.(type) {
			case *filterapi.BindEvent:
				if bind = e.Connection; !e.TCP || e.External.Port() < 61000 {
					t.Errorf("event %+v", e)
				}
				emulating = e.Connection.EmulateForBind()
				if deny {
					return e.Connection.Deny()
				}
			case *filterapi.TerminatingEvent:
				over++
			}
			return nil
		}
		b, ports := mappingBench(t, mappingPolicy(t, nil), f)
		if d := b.Decide(context.Background(), syn(client, control)); d.Path != flow.Reject || !b.kernel.empty() || ports.Leased() != 0 {
			t.Errorf("denied: %v, kernel %v, %d ports", d.Path, b.kernel.held, ports.Leased())
		}
		deny = false
		b.carries(t, syn(client, control))
		x := b.kernel.only(t).External
		if emulating != filterapi.ErrNotSupported {
			t.Errorf("emulating it: %v", emulating)
		}
		if name, err := bind.ExternalName(); err != nil || name != x {
			t.Errorf("the bind is at %s, %v; the mapping at %s", name, err, x)
		}
		if err := bind.SetIPFilter(&filterapi.IPFilter{}); err != nil {
			t.Error(err)
		}
		b.began(syn(client, control), x)
		b.ended(syn(client, control), x)
		time.Sleep(time.Minute)
		synctest.Wait()
		if !b.kernel.empty() || ports.Leased() != 0 || len(b.Permissions()) != 0 || len(b.Sessions()) != 0 || over != 2 {
			t.Errorf("left: kernel %v, %d ports, %+v, sessions %+v; %d were told over", b.kernel.held, ports.Leased(), b.Permissions(), b.Sessions(), over)
		}
	})
}

// A host of the inside gets in to another one's external endpoint as one of the
// outside would.
func TestMappingAround(t *testing.T) {
	for filtering, answers := range map[policy.Filtering][2]bool{
		// before the other one has sent to it, and before it has to another port
		policy.FilterEndpointIndependent: {true, true},
		policy.FilterAddress:             {false, true},
		policy.FilterAddressAndPort:      {false, false},
	} {
		b, _ := mappingBench(t, mappingPolicy(t, filteringBy(filtering)))
		one, two := ap("10.0.0.2:5000"), ap("10.0.0.3:5000")
		b.carries(t, udpPacket(one.String(), "203.0.113.10:1000"))
		x, _ := b.leaving(one, flow.UDP)
		in := func(from netip.AddrPort) bool {
			return b.Decide(context.Background(), udpPacket(from.String(), x.External.String())).Path == flow.Kernel
		}
		if got := in(two); got != answers[0] {
			t.Errorf("filtering %d: in at once: %v", filtering, got)
		}
		y, ok := b.leaving(two, flow.UDP)
		if !ok {
			t.Fatalf("filtering %d: the sender has no mapping", filtering)
		}
		// It sends to another endpoint at the same address first.
		third := ap("10.0.0.4:5000")
		b.carries(t, udpPacket(third.String(), "203.0.113.10:1000"))
		z, _ := b.leaving(third, flow.UDP)
		b.Decide(context.Background(), udpPacket(one.String(), z.External.String()))
		if got := in(two); got != answers[1] {
			t.Errorf("filtering %d: in after something to its address: %v", filtering, got)
		}
		b.Decide(context.Background(), udpPacket(one.String(), y.External.String()))
		if !in(two) {
			t.Errorf("filtering %d: not in after something to its endpoint", filtering)
		}
	}
}
