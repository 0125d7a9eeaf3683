package kernelpath

import (
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// judged acts on the path that the queue's verdict wrote into the packet's mark.
// The verdict is NF_REPEAT: the packet begins arrive anew and comes here, and no
// base chain of its own, which every other packet would pass, waits for it.
//
//	chain judged {
//		meta mark and MASK vmap { reject : goto refuse_marked, ..., exhausted : goto exhausted, K : goto carry_first, PLAIN : goto carry_plain, U : goto take_first }
//	}
func (b *builder) judged() error {
	s := b.chain(chainJudged)
	on := func(p flow.Path, to stmt) branch { return branch{[]value{markValue(b.mark(p))}, to} }
	s.add(switchMark(fieldMetaMark, b.Marks.Mask(), []branch{
		on(flow.Reject, goTo("refuse_marked")),
		on(flow.HostUnreachable, goTo("host_unreachable")),
		on(flow.NetUnreachable, goTo("net_unreachable")),
		on(flow.PortUnreachable, goTo("port_unreachable")),
		on(flow.Exhausted, goTo("exhausted")),
		on(flow.Kernel, goTo(chainCarryFirst)),
		on(flow.Plain, goTo(chainCarryPlain)),
		on(flow.User, goTo(chainTakeFirst)),
	}))

	refuseWith(b.chain("refuse_marked"))
	b.chain("host_unreachable").add(unreachable(hostUnreachable))
	b.chain("net_unreachable").add(unreachable(noRouteToNetwork))
	b.chain("port_unreachable").add(unreachable(portUnreachable))
	b.exhausted()

	b.chain(chainTakeFirst).add(b.putPath(fieldCtMark, flow.User), goTo(chainDivert))

	// The mark leads the packet to this host by the policy routing rule;
	// tproxy gives it to the socket of its flow, or to the listener.
	d := b.chain(chainDivert)
	d.add(b.putPath(fieldMetaMark, flow.User))
	for _, f := range []family{ipv4, ipv6} {
		d.add(is(fieldNFProto, f.nfproto), tcpOrUDP(), divertTo(f, b.TProxyPort), accept())
	}
	d.add(accept())

	b.chain(chainLocalOwn).add(b.putPath(fieldMetaMark, flow.User), accept())
	return nil
}

// exhausted tells who gets no external port. A host that meets it goes on
// asking, so that only so many a second are told.
//
//	chain exhausted {
//		counter name "exhausted"
//		limit rate 100/second burst 100 packets reject with icmpx type admin-prohibited
//		drop
//	}
func (b *builder) exhausted() {
	c := b.chain("exhausted")
	c.add(count(counterExhausted))
	c.add(atMost(errorRate, errorBurst), unreachable(adminProhibited))
	c.add(drop())
}

// forward lets nothing pass but kernel flows.
//
//	ct mark and MASK == K accept (with a flowtable: goto carry, or see offloaded)
//	ct mark and MASK vmap { K with the cut bit : goto cut, ONE WAY : accept, STRANGER : goto peer }
//	meta mark and MASK == K ct mark set K goto carry
//	counter name "unmarked" drop
//
// The third rule is for what a rule that fails open lets pass unqueued.
func (b *builder) forward() error {
	f := b.base("forward", filterHook("forward", unix.NF_INET_FORWARD, priorityFilter, nftables.ChainPolicyDrop))
	f.add(masked(fieldCtMark, b.Marks.Mask(), b.mark(flow.Kernel)), b.offloaded())
	f.add(switchMark(fieldCtMark, b.Marks.Mask(), []branch{
		{[]value{markValue(b.Marks.CutValue(flow.Kernel))}, goTo(chainCut)},
		// Never offloaded: arrive drops its answers.
		{[]value{markValue(b.Marks.OneWay())}, accept()},
		{[]value{markValue(b.Marks.Stranger())}, goTo(chainPeer)},
	}))
	f.add(masked(fieldMetaMark, b.Marks.Mask(), b.mark(flow.Kernel)), masked(fieldCtMark, b.Marks.Mask(), 0), b.putPath(fieldCtMark, flow.Kernel), goTo(chainCarry))
	f.add(count(counterUnmarked), drop())

	b.chain(chainCarry).rules = carryChain(len(b.Flowtable) > 0)
	return nil
}

// carryChain has the rules of the chain of that name.
//
//	meta l4proto { tcp, udp } flow add @fast
//	accept
func carryChain(offloading bool) []rule {
	rules := []rule{{accept()}}
	if offloading {
		rules = append([]rule{{tcpOrUDP(), offload()}}, rules...)
	}
	return rules
}

// upstreamZone keeps apart the two legs of a flow that the gateway carries on
// from the client's own address: they have the same tuple, so the upstream leg
// gets a conntrack zone of its own, on the way out by the socket's mark, on
// the way in by the socket that waits for the packet. It also marks every
// upstream leg. The way in looks a socket up for every packet of every flow, so
// that its chain waits for the first flow of user space.
func (b *builder) upstreamZone() error {
	arriving := b.base("zone_in", prerouting(priorityRaw))
	arriving.onDemand = true
	ifaces, every := b.upstreamInterfaces()
	if every || len(ifaces) > 0 {
		// Only packets of TCP and UDP, and ICMP errors about them, have a socket:
		// asking for their protocol before would ask twice (nf_sk_lookup_slow_v4 in
		// net/ipv4/netfilter/nf_socket_ipv4.c).
		takeover := rule{is(fieldTransparent, byteValue("1", 1)), goTo("zone_socket")}
		if every {
			arriving.add(append(rule{isNot(fieldIIf, host32(`"lo"`, 1))}, takeover...)...)
		} else {
			b.set(interfaceSet("zone_if", "", ifaces))
			arriving.add(append(rule{in("zone_if", fieldIIfName)}, takeover...)...)
		}
	}

	out := b.base("zone_out", output(priorityRaw))
	out.add(b.hasPath(fieldMetaMark, flow.Reject), untrack(), accept())
	out.add(b.hasPath(fieldMetaMark, flow.Own), isNot(fieldSaddrType, typeLocal), goTo("zone_leg"))

	own := b.base("own_out", output(priorityOwn))
	own.add(b.hasPath(fieldMetaMark, flow.Own), masked(fieldCtMark, b.Marks.Mask(), 0), b.putPath(fieldCtMark, flow.Own))

	b.zoneChains(every || len(ifaces) > 0)
	if every || len(ifaces) > 0 {
		b.ownErrors(own)
	}
	return nil
}

// ownErrors: a leg under the client's own address whose next hop does not
// answer is told so at that address, past the gateway's socket.
func (b *builder) ownErrors(own *chain) {
	for _, f := range []struct {
		family
		kind value
	}{{ipv4, unreachable4}, {ipv6, unreachable6}} {
		own.add(is(fieldNFProto, f.nfproto), is(fieldL4Proto, protoValue(f.icmp)), is(f.icmpType, f.kind),
			atMost(errorRate, errorBurst), report(b.LogGroup, reportError))
	}
}

// zoneChains: a socket in FIN-WAIT-2 or TIME-WAIT has no mark to be known by
// (nft_socket.c reads it of full sockets only), and the client's leg may be in
// that state as well. So a leg that sends its FIN is remembered by tuple.
func (b *builder) zoneChains(takeover bool) {
	for _, f := range []family{ipv4, ipv6} {
		b.set(&set{
			name: setClosing(f), key: fieldTypes(legKey(f.saddr, f.daddr, fieldSport, fieldDport)),
			dynamic: true, timeout: true, lasting: true, size: anySize,
		})
	}
	leg := b.chain("zone_leg")
	leg.add(setZone(b.Zone))
	for _, f := range []family{ipv4, ipv6} {
		leg.add(is(fieldNFProto, f.nfproto), is(fieldL4Proto, protoValue(flow.TCP)), closing(),
			refresh(setClosing(f), lingering, legKey(f.daddr, f.saddr, fieldDport, fieldSport)...))
	}
	if !takeover {
		return
	}
	s := b.chain("zone_socket")
	s.add(b.hasPath(fieldSocketMark, flow.Own), setZone(b.Zone), accept())
	s.add(maskedNot(fieldSocketMark, b.Marks.PathMask(), b.mark(flow.Own)), accept())
	for _, f := range []family{ipv4, ipv6} {
		s.add(is(fieldNFProto, f.nfproto), in(setClosing(f), legKey(f.saddr, f.daddr, fieldSport, fieldDport)...), setZone(b.Zone), accept())
	}
}

func setClosing(f family) string { return "closing" + f.suffix }

// lingering is longer than FIN-WAIT-2 and TIME-WAIT together, 60 s each.
const lingering = 130 * time.Second

func legKey(src, dst, sport, dport field) []field {
	return []field{src, dst, fieldL4Proto, sport, dport}
}

// upstreamInterfaces are where answers to such a leg can come from: those of
// all networks that a network rule joins, if any flow can reach user space at
// all. every: one of these networks is not bound to interfaces.
func (b *builder) upstreamInterfaces() (ifaces []string, every bool) {
	switch {
	case b.publishesToUser():
		return nil, true // where a server is, no network says
	case !b.asks():
		return nil, false
	}
	seen := map[string]bool{}
	for _, r := range b.in.NetworkRules {
		for _, name := range []string{r.From, r.To} {
			if name == policy.Gateway {
				continue
			}
			n, _ := b.network(name)
			if len(n.Interfaces) == 0 {
				return nil, true
			}
			for _, i := range n.Interfaces {
				if !seen[i] {
					seen[i] = true
					ifaces = append(ifaces, i)
				}
			}
		}
	}
	return ifaces, false
}

// asks says whether any flow can reach user space. Permissions alone cannot:
// without a filter there is nobody who makes them.
func (b *builder) asks() bool { return asksIn(b.in.Compiled.Forward) }

func asksIn(tables []policy.Table) bool {
	for _, t := range tables {
		for _, s := range t.Stages {
			for _, x := range s.Boxes {
				switch x.Class {
				case policy.ClassAsk, policy.ClassAskOpen, policy.ClassMap, policy.ClassMapOpen:
					return true
				}
			}
		}
	}
	return false
}
