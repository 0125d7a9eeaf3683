package kernelpath

import (
	"fmt"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// mapInput leads from the interface a packet came from to the table of what
// may reach the gateway itself.
const mapInput = "inputs"

// What every host must hear, whatever its policy says (RFC 4861, RFC 2710,
// RFC 3810, RFC 792, RFC 4443).
var (
	neighbours = []value{
		byteValue("mld-listener-query", 130), byteValue("mld-listener-report", 131), byteValue("mld-listener-done", 132),
		byteValue("nd-router-solicit", 133), byteValue("nd-router-advert", 134),
		byteValue("nd-neighbor-solicit", 135), byteValue("nd-neighbor-advert", 136), byteValue("nd-redirect", 137),
		byteValue("mld2-listener-report", 143),
	}
	unreachable4 = byteValue("destination-unreachable", 3)
	unreachable6 = byteValue("destination-unreachable", 1)

	errors4 = []value{unreachable4, byteValue("time-exceeded", 11), byteValue("parameter-problem", 12)}
	errors6 = []value{
		unreachable6, byteValue("packet-too-big", 2),
		byteValue("time-exceeded", 3), byteValue("parameter-problem", 4),
	}
)

// gateway is what the gateway itself receives. An ICMP error about a flow is
// let in by its type; nothing is let in because it is "related". A verdict's mark
// ends here: what a tunnel's packet carries has the mark of that packet, and comes
// to arrive as if it had been judged itself.
//
//	iif "lo" accept
//	ct mark and PATH vmap { U : accept, O : accept }
//	ct state established accept
//	meta mark and MASK != 0 meta mark set 0
//	... neighbour discovery, multicast listeners, DHCP client, ICMP errors accept
//	iifname vmap @inputs
//	goto in_0
func (b *builder) gateway() error {
	c := b.base("input", filterHook("input", unix.NF_INET_LOCAL_IN, priorityFilter, nftables.ChainPolicyDrop))
	c.add(is(fieldIIf, host32(`"lo"`, 1)), accept())
	c.add(switchMark(fieldCtMark, b.Marks.PathMask(), []branch{
		{[]value{markValue(b.mark(flow.User))}, accept()}, {[]value{markValue(b.mark(flow.Own))}, accept()},
	}))
	c.add(ctStates(stateEstablished), accept())
	c.add(maskedNot(fieldMetaMark, b.Marks.Mask(), 0), setMark(fieldMetaMark, b.Marks.Mask(), 0))
	c.add(jump("host_needs"))
	hostNeeds(b.chain("host_needs"))

	inputs := map[int]bool{}
	for _, t := range b.in.Compiled.Input {
		if t.In < 0 || t.In > max(0, len(b.in.Compiled.Zones)-1) || inputs[t.In] {
			return fmt.Errorf("table for the gateway and zone %d: no such zone, or two tables", t.In)
		}
		inputs[t.In] = true
	}
	to := func(in int) stmt {
		if inputs[in] {
			return goTo(inputChain(in))
		}
		return goTo(chainUnwanted)
	}
	if len(b.in.Compiled.Zones) > 1 {
		b.zoneMap(mapInput, to)
		c.add(vmap(mapInput, fieldIIfName))
	}
	c.add(to(0))
	for _, t := range b.in.Compiled.Input {
		if err := b.table(inputChain(t.In), fmt.Sprintf("i%d", t.In), policy.Table{In: t.In, Stages: t.Stages}, chainUnwanted, inputVerdict); err != nil {
			return err
		}
	}
	b.unwanted()
	return nil
}

// unwanted discards what the gateway itself does not take. Who goes to the
// address of a redirect without leave, or after it is over, is told so.
//
//	meta nfproto ipv4 meta l4proto { tcp, udp } ip daddr . meta l4proto . th dport @via4 goto refuse
//	goto discard
func (b *builder) unwanted() {
	c := b.chain(chainUnwanted)
	for _, f := range []family{ipv4, ipv6} {
		c.add(is(fieldNFProto, f.nfproto), tcpOrUDP(), in(setVia(f), f.socket()...), goTo(chainRefuse))
	}
	c.add(goTo(chainDiscard))
}

func inputChain(in int) string { return fmt.Sprintf("in_%d", in) }

func hostNeeds(c *chain) {
	four, six := is(fieldNFProto, ipv4.nfproto), is(fieldNFProto, ipv6.nfproto)
	udp := is(fieldL4Proto, protoValue(flow.UDP))
	icmp6 := is(fieldL4Proto, protoValue(flow.ICMPv6))
	c.add(six, icmp6, oneOf(fieldICMP6, neighbours...), accept())
	c.add(six, icmp6, oneOf(fieldICMP6, errors6...), accept())
	c.add(four, is(fieldL4Proto, protoValue(flow.ICMP)), oneOf(fieldICMP4, errors4...), accept())
	c.add(four, is(fieldL4Proto, byteValue("igmp", unix.IPPROTO_IGMP)), accept())
	// DHCP: servers answer from port 67 to 68, and from 547 to 546.
	c.add(four, udp, fromTo(67, 68), accept())
	c.add(six, udp, fromTo(547, 546), accept())
}
