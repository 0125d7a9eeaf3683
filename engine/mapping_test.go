package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
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

// The kernel knows the peers of an endpoint as long as flows to them live.
func TestMappingPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, ports := mappingBench(t, mappingPolicy(t, filteringBy(policy.FilterAddress)))
		b.carries(t, udpPacket("10.0.0.9:5000", "203.0.113.10:1000")) // nobody tells of a flow
		time.Sleep(time.Minute)
		synctest.Wait()
		if !b.kernel.empty() || ports.Leased() != 0 {
			t.Errorf("a mapping without a flow stays: %v", b.kernel.held)
		}
		first, second := udpPacket("10.0.0.2:5000", "203.0.113.10:1000"), udpPacket("10.0.0.2:5000", "203.0.113.10:1001")
		b.carries(t, first)
		p := b.kernel.only(t)
		if !p.AnySource || !p.PeersOnly {
			t.Errorf("the kernel holds %+v", p)
		}
		peer := nat.Peer{Proto: flow.UDP, Inside: ap("10.0.0.2:5000"), Addr: ap("203.0.113.10:0").Addr()}
		knows := func() bool {
			time.Sleep(3 * time.Second)
			synctest.Wait()
			b.kernel.mu.Lock()
			defer b.kernel.mu.Unlock()
			return b.kernel.peers[peer]
		}
		b.began(first, p.External)
		b.began(second, p.External)
		b.ended(first, p.External)
		if !knows() {
			t.Error("a peer with a flow is not known")
		}
		b.ended(second, p.External)
		if knows() {
			t.Error("a peer without a flow is known")
		}
		// One whose flow never begins goes with the mapping.
		b.carries(t, first)
		if !knows() {
			t.Error("the peer of a first packet is not known")
		}
		time.Sleep(time.Minute)
		if knows() || !b.kernel.empty() {
			t.Errorf("after the mapping: %v, %v", b.kernel.peers, b.kernel.held)
		}
	})
}

// The kernel begins flows of a known endpoint without a word. They are looked for
// before their mapping goes.
func TestMappingUntoldFlows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, ports := mappingBench(t, mappingPolicy(t, nil))
		flows := func(external netip.AddrPort, all ...flow.Packet) {
			b.kernel.mu.Lock()
			defer b.kernel.mu.Unlock()
			b.kernel.living = nil
			for _, p := range all {
				b.kernel.living = append(b.kernel.living, LivingFlow{Tuple: p.Tuple, Translation: flow.Translation{Src: external}})
			}
		}
		to := func(port int) flow.Packet { return udpPacket("10.0.0.2:5000", fmt.Sprintf("203.0.113.10:%d", port)) }
		b.carries(t, to(1))
		x := b.kernel.only(t).External
		b.began(to(1), x)
		flows(x, to(2), to(3))
		if got := b.Binds(); len(got) != 1 || got[0].Flows != 2 {
			t.Errorf("binds %+v", got)
		}
		b.ended(to(1), x)
		time.Sleep(time.Minute)
		flows(x, to(3))
		b.ended(to(2), x)
		time.Sleep(time.Minute)
		if b.kernel.empty() || len(b.mappings.idle) != 0 {
			t.Fatalf("a flow lives; the kernel holds %v", b.kernel.held)
		}
		// One begins in the moment between the look and the end.
		flows(x)
		b.ended(to(3), x)
		time.Sleep(lateReports + sweepEvery)
		synctest.Wait()
		if !b.kernel.empty() {
			t.Fatalf("without a flow the kernel holds %v", b.kernel.held)
		}
		flows(x, to(4))
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := b.kernel.only(t).External; got != x || ports.Leased() != 1 {
			t.Errorf("it is back at %s, it was at %s", got, x)
		}
		flows(x)
		b.ended(to(4), x)
		time.Sleep(time.Minute)
		synctest.Wait()
		if !b.kernel.empty() || ports.Leased() != 0 || len(b.mappings.byExternal)+len(b.mappings.idle) != 0 {
			t.Errorf("left: %v, %d ports", b.kernel.held, ports.Leased())
		}
	})
}

// Mappings that the rules do not make any more take nothing new, and keep their
// ports as long as they have flows.
func TestMappingReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, ports := mappingBench(t, mappingPolicy(t, nil))
		first := udpPacket("10.0.0.2:5000", "203.0.113.10:1000")
		b.carries(t, first)
		x := b.kernel.only(t).External
		b.began(first, x)
		reload := func(change func(*policy.NetworkRule)) {
			b.SetPolicy(mappingPolicy(t, change))
			if err := b.Recheck(context.Background(), []KernelFlow{{Tuple: first.Tuple}}); err != nil {
				t.Error(err)
			}
		}
		reload(filteringBy(policy.FilterEndpointIndependent))
		if p := b.kernel.only(t); p.External != x || !p.AnySource {
			t.Errorf("with another filtering the kernel holds %+v", p)
		}
		in := udpPacket("203.0.113.11:7", x.String())
		b.KernelBegan(in.Tuple, flow.Translation{Dst: ap("10.0.0.2:5000")})
		if err := b.Recheck(context.Background(), []KernelFlow{{Tuple: in.Tuple, Translation: flow.Translation{Dst: ap("10.0.0.2:5000")}}}); err != nil || len(b.kernel.cut) != 0 {
			t.Errorf("cut %v, %v", b.kernel.cut, err)
		}
		reload(func(r *policy.NetworkRule) { r.Address = ap("203.0.113.2:0").Addr() })
		if !b.kernel.empty() || ports.Leased() != 1 {
			t.Errorf("with another address the kernel holds %v, %d ports are out", b.kernel.held, ports.Leased())
		}
		b.carries(t, udpPacket("10.0.0.2:5000", "203.0.113.10:1001"))
		if p := b.kernel.only(t); p.External.Addr() != ap("203.0.113.2:0").Addr() {
			t.Errorf("the next one is at %s", p.External)
		}
		b.ended(first, x)
		b.KernelEnded(flow.End{Tuple: in.Tuple, Translation: flow.Translation{Dst: ap("10.0.0.2:5000")}, Path: flow.Kernel})
		time.Sleep(time.Minute)
		synctest.Wait()
		if ports.Leased() != 0 || len(b.mappings.byExternal) != 0 {
			t.Errorf("left: %d ports, %v", ports.Leased(), b.mappings.byExternal)
		}
	})
}

// What an earlier run has left goes on as it was; other living flows keep their
// ports.
func TestMappingAdopt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, ports := mappingBench(t, mappingPolicy(t, nil))
		first, foreign := udpPacket("10.0.0.2:5000", "203.0.113.10:1000"), udpPacket("10.0.0.3:5000", "203.0.113.10:1000")
		x, y, z := ap("203.0.113.1:61007"), ap("203.0.113.1:61008"), ap("203.0.113.1:61009")
		b.Adopt([]Held{
			{"internet", flow.UDP, ap("10.0.0.2:5000"), x}, {"internet", flow.UDP, ap("10.0.0.4:5000"), y}, {"gone", flow.UDP, ap("10.0.0.3:5000"), z},
		}, []LivingFlow{
			{Tuple: first.Tuple, Translation: flow.Translation{Src: x}}, {Tuple: foreign.Tuple, Translation: flow.Translation{Src: z}},
			{Tuple: syn("10.0.0.9:1", "203.0.113.10:80").Tuple, Translation: flow.Translation{Src: ap("203.0.113.1:20000")}},
		})
		b.InstallAdopted()
		if p := b.kernel.only(t); p.External != x || p.Client != ap("10.0.0.2:5000") || p.Leaves != "internet" {
			t.Errorf("the kernel holds %+v", p)
		}
		if ports.Leased() != 2 {
			t.Errorf("%d ports are out", ports.Leased())
		}
		b.carries(t, udpPacket("10.0.0.3:5000", "203.0.113.10:1001"))
		if p, _ := b.leaving(ap("10.0.0.3:5000"), flow.UDP); p.External == z || !p.External.IsValid() {
			t.Errorf("the other host's next flow is at %v", p.External)
		}
		b.ended(first, x)
		b.ended(foreign, z)
		time.Sleep(time.Minute)
		synctest.Wait()
		if ports.Leased() != 0 || !b.kernel.empty() {
			t.Errorf("left: %d ports, %v", ports.Leased(), b.kernel.held)
		}
	})
}

// A client that had more ports in an earlier run than it may have now keeps those
// that are in use.
func TestMappingAdoptBeyondQuota(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, ports := mappingBench(t, mappingPolicy(t, nil))
		ports.Reconfigure([]nat.Range{{Lo: 61000, Hi: 61099}}, nat.Range{}, 1)
		var held []Held
		var living []LivingFlow
		for i := range uint16(3) {
			at := netip.AddrPortFrom(ap("203.0.113.1:0").Addr(), 61000+i)
			p := udpPacket(fmt.Sprintf("10.0.0.2:%d", 5000+i), "203.0.113.10:1000")
			held = append(held, Held{"internet", flow.UDP, p.Src, at})
			living = append(living, LivingFlow{Tuple: p.Tuple, Translation: flow.Translation{Src: at}})
		}
		b.Adopt(held, living)
		b.InstallAdopted()
		for _, h := range held {
			if p, _ := b.leaving(h.Inside, flow.UDP); p.External != h.External {
				t.Errorf("%v leaves from %v, it had %v", h.Inside, p.External, h.External)
			}
		}
		if d := b.Decide(t.Context(), udpPacket("10.0.0.2:6000", "203.0.113.10:1000")); d.Path != flow.Exhausted {
			t.Errorf("one more: %v", d.Path)
		}
		for _, f := range living {
			b.KernelEnded(flow.End{Tuple: f.Tuple, Translation: f.Translation, Path: flow.Kernel})
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if ports.Leased() != 0 || !b.kernel.empty() {
			t.Errorf("left: %d ports, %v", ports.Leased(), b.kernel.held)
		}
	})
}

// A flow that ends and begins anew while flows are counted lives, and one that
// begins and ends does not.
func TestMappingRecountMeanwhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, _ := mappingBench(t, mappingPolicy(t, nil))
		again, short := udpPacket("10.0.0.2:5000", "203.0.113.10:1000"), udpPacket("10.0.0.3:5000", "203.0.113.10:1000")
		b.carries(t, again)
		b.carries(t, short)
		at := func(p flow.Packet) netip.AddrPort { h, _ := b.leaving(p.Src, flow.UDP); return h.External }
		x, y := at(again), at(short)
		b.began(again, x)
		err := b.Recount(t.Context(), func(context.Context) ([]LivingFlow, error) {
			b.began(short, y)
			b.ended(again, x)
			b.began(again, x)
			b.ended(short, y)
			return []LivingFlow{{Tuple: again.Tuple, Translation: flow.Translation{Src: x}}}, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if at(again) != x || at(short).IsValid() {
			t.Errorf("who lives leaves from %v, it had %v; who does not from %v", at(again), x, at(short))
		}
		b.ended(again, x)
		time.Sleep(time.Minute)
		synctest.Wait()
		if !b.kernel.empty() {
			t.Errorf("left: %v", b.kernel.held)
		}
	})
}

// Where what comes in does not keep a mapping alive, it ends when the inside has
// sent nothing for long enough, and its flows are cut.
func TestMappingQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, _ := mappingBench(t, mappingPolicy(t, func(r *policy.NetworkRule) { r.IgnoreInbound = true }))
		quiet, busy := udpPacket("10.0.0.2:5000", "203.0.113.10:1000"), udpPacket("10.0.0.3:5000", "203.0.113.10:1000")
		b.carries(t, quiet)
		b.carries(t, busy)
		at := func(p flow.Packet) netip.AddrPort { h, _ := b.leaving(p.Src, flow.UDP); return h.External }
		x, y := at(quiet), at(busy)
		b.began(quiet, x)
		b.began(busy, y)
		for i := range uint64(20) {
			time.Sleep(30 * time.Second)
			living := []LivingFlow{
				{quiet.Tuple, flow.Translation{Src: x}, flow.Counts{OutPackets: min(i, 3), InPackets: 10 * i}},
				{busy.Tuple, flow.Translation{Src: y}, flow.Counts{OutPackets: i, InPackets: 10 * i}},
			}
			if err := b.QuietMappings(context.Background(), living, func(flow.Proto) time.Duration { return 300 * time.Second }); err != nil {
				t.Fatal(err)
			}
			if _, there := b.leaving(quiet.Src, flow.UDP); there != (i < 13) {
				t.Errorf("after %d s: %v", 30*(i+1), there)
			}
		}
		if _, there := b.leaving(busy.Src, flow.UDP); !there || !slices.Equal(b.kernel.cut, []flow.Tuple{quiet.Tuple}) {
			t.Errorf("the other one is there: %v; cut %v", there, b.kernel.cut)
		}
	})
}

// Whatever is told, lost or told twice: an endpoint with a living flow has its
// mapping, no two have the same one, and in the end nothing is left.
func TestMappingsAtRandom(t *testing.T) {
	for seed := range uint64(60) {
		synctest.Test(t, func(t *testing.T) { randomMappings(t, rand.New(rand.NewPCG(seed, 7))) })
	}
}

func randomMappings(t *testing.T, r *rand.Rand) {
	filtering := policy.Filtering(r.IntN(3))
	b, ports := mappingBench(t, mappingPolicy(t, filteringBy(filtering)))
	living := map[flow.Tuple]flow.Translation{} // conntrack
	dump := func(context.Context) (out []LivingFlow, err error) {
		for t, tr := range living {
			out = append(out, LivingFlow{Tuple: t, Translation: tr})
		}
		return out, nil
	}
	show := func() {
		b.kernel.mu.Lock()
		defer b.kernel.mu.Unlock()
		b.kernel.living, _ = dump(t.Context())
	}
	for range 300 {
		src := netip.AddrPortFrom(ap(fmt.Sprintf("10.0.0.%d:0", 2+r.IntN(3))).Addr(), uint16(5000+r.IntN(3)))
		dst := fmt.Sprintf("203.0.113.%d:%d", 10+r.IntN(2), 1000+r.IntN(3))
		p := udpPacket(src.String(), dst)
		lost := false
		switch r.IntN(6) {
		case 0, 1:
			held, known := b.leaving(src, flow.UDP)
			if !known { // else the kernel asks nobody
				b.carries(t, p)
				held, _ = b.leaving(src, flow.UDP)
			}
			if tr, there := living[p.Tuple]; there {
				if tr.Src != held.External {
					t.Fatalf("%s lives from %s, and its endpoint is mapped to %s", p.Tuple, tr.Src, held.External)
				}
				break
			}
			living[p.Tuple] = flow.Translation{Src: held.External}
			show()
			switch told := !known || filtering == policy.FilterAddress; {
			case !told: // the kernel does not
			case r.IntN(8) > 0:
				b.began(p, held.External)
			default:
				lost = true
			}
		case 2, 3:
			for tuple, tr := range living {
				delete(living, tuple)
				show()
				if lost = r.IntN(8) == 0; !lost {
					b.ended(flow.Packet{Tuple: tuple}, tr.Src)
				}
				break
			}
		case 4:
			if err := b.Recount(context.Background(), dump); err != nil {
				t.Fatal(err)
			}
		case 5:
			time.Sleep(time.Duration(r.IntN(1500)) * time.Millisecond)
		}
		if lost { // which is noticed at once
			if err := b.Recount(context.Background(), dump); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		of := map[netip.AddrPort]netip.AddrPort{}
		for tuple, tr := range living {
			held, known := b.leaving(tuple.Src, flow.UDP)
			if !known || held.External != tr.Src {
				t.Fatalf("%s lives from %s; the kernel holds %v", tuple, tr.Src, held.External)
			}
			if other, taken := of[tr.Src]; taken && other != tuple.Src {
				t.Fatalf("%s and %s share %s", other, tuple.Src, tr.Src)
			}
			of[tr.Src] = tuple.Src
		}
	}
	clear(living)
	show()
	if err := b.Recount(context.Background(), dump); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Minute)
	synctest.Wait()
	if ports.Leased() != 0 || !b.kernel.empty() || len(b.kernel.peers) != 0 || len(b.mappings.byExternal)+len(b.mappings.byInside)+len(b.mappings.idle) != 0 {
		t.Errorf("left: %d ports, kernel %v, peers %v, %v", ports.Leased(), b.kernel.held, b.kernel.peers, b.mappings.byExternal)
	}
}

// Nobody stays known to whom no flow has come about, whoever else the endpoint
// speaks to; whose flow is told of late is known again.
func TestMappingPeersWithoutFlows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, _ := mappingBench(t, mappingPolicy(t, filteringBy(policy.FilterAddress)))
		first := udpPacket("10.0.0.2:5000", "203.0.113.10:1000")
		b.carries(t, first)
		x := b.kernel.only(t).External
		b.began(first, x)
		known := func(addr string) bool {
			synctest.Wait()
			b.kernel.mu.Lock()
			defer b.kernel.mu.Unlock()
			return b.kernel.peers[nat.Peer{Proto: flow.UDP, Inside: ap("10.0.0.2:5000"), Addr: netip.MustParseAddr(addr)}]
		}
		b.carries(t, udpPacket("10.0.0.2:5000", "203.0.113.11:1000"))
		time.Sleep(time.Minute)
		if known("203.0.113.11") || !known("203.0.113.10") || len(b.mappings.byInside) != 1 {
			t.Errorf("after a first packet without a flow: %v", b.kernel.peers)
		}
		late := udpPacket("10.0.0.2:5000", "203.0.113.13:1000")
		var set []nat.Peer // as the kernel fills it by itself
		for _, addr := range []string{"203.0.113.10", "203.0.113.12", "203.0.113.13"} {
			set = append(set, nat.Peer{Proto: flow.UDP, Inside: ap("10.0.0.2:5000"), Addr: netip.MustParseAddr(addr)})
		}
		for range 2 {
			if err := errors.Join(b.kernel.Peers(t.Context(), set, nil), b.ForgetStrays(t.Context(), set)); err != nil {
				t.Fatal(err)
			}
			if known("203.0.113.12") || !known("203.0.113.10") {
				t.Errorf("strays are known: %v", b.kernel.peers)
			}
			b.began(late, x)
			time.Sleep(2 * lateReports)
			if !known("203.0.113.13") || known("203.0.113.12") {
				t.Errorf("told of late: %v", b.kernel.peers)
			}
		}
	})
}
