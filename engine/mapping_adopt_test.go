package engine

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

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
