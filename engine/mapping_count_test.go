package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

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

// The end of a flow that began without a word takes neither a mapping away that
// user space or a bind holds, nor its port.
func TestMappingHeldAmongUntoldEnds(t *testing.T) {
	t.Run("flow in user space", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b, ports := mappingBench(t, mappingPolicy(t, nil))
			to := func(port int) flow.Packet { return udpPacket("10.0.0.2:5000", fmt.Sprintf("203.0.113.10:%d", port)) }
			b.carries(t, to(1))
			x := b.kernel.only(t).External
			m := b.mappings.byInside[insideKey{b.mappings.numberOf("internet"), flow.UDP, packed(ap("10.0.0.2:5000"))}]
			b.hold(m, to(2).Dst.Addr(), 1)
			b.ended(to(3), x)
			time.Sleep(time.Hour)
			if err := ports.LeaseExact(flow.UDP, x, 1); err == nil {
				t.Fatalf("the port of a living flow, %s, is another's", x)
			}
			b.hold(m, to(2).Dst.Addr(), -1)
			time.Sleep(time.Minute)
			synctest.Wait()
			if ports.Leased() != 0 || !b.kernel.empty() {
				t.Errorf("after its end: %d ports, kernel %v", ports.Leased(), b.kernel.held)
			}
		})
	})
	t.Run("bind", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b, s := mappedOffice(t, policy.FilterEndpointIndependent)
			if _, err := claimed(s, 0, ""); err != nil {
				t.Fatal(err)
			}
			_, _, x := b.kernel.openings()
			leased := b.ports.Stats().Leased
			b.ended(udpPacket("10.0.0.2:5000", "203.0.113.10:3"), x)
			time.Sleep(time.Minute)
			synctest.Wait()
			if now := b.ports.Stats().Leased; now != leased || len(b.Binds()) == 0 {
				t.Errorf("%d ports are leased, %d were; binds: %v", now, leased, b.Binds())
			}
		})
	})
}
