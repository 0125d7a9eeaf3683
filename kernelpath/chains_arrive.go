package kernelpath

import (
	"github.com/sluicegw/sluice/flow"
)

// Where the base chains stand. arrive comes after conntrack (-200) and before
// destination NAT (-100). Every hook costs each packet of each flow about 3% of
// what forwarding it costs, so a kernel flow meets two: arrive and forward.
const (
	priorityRaw    = -300
	priorityArrive = -155
	priorityOwn    = -150
	priorityClamp  = -150
	priorityDstNAT = -100
	priorityFilter = 0
	prioritySrcNAT = 100
)

// arrive sees every packet first. A packet of a known kernel flow leaves it with
// the first rule, by a comparison, which costs less than a look-up; a first
// packet finds a permission or the table of its two zones.
//
//	ct mark and MASK == K accept
//	ct mark and MASK != 0 goto marked
//	ct state vmap { established : accept, related : accept, untracked : accept, new : goto first }
//	fib saddr . iif oif missing jump reverse_path
//	accept
//
//	chain marked {
//		ct mark and MASK vmap { U : goto divert, O : goto local_own, each and K with the cut bit : goto cut, ONE WAY : goto one_way }
//		ct state != new accept
//		goto first
//	}
//	chain first {
//		iif "lo" accept
//		meta mark and MASK != 0 jump judged
//		fib saddr . iif oif missing jump reverse_path
//		meta l4proto tcp tcp flags & (fin|syn|rst|ack) != syn goto not_syn
//		meta nfproto ipv4 ip daddr @gate4 jump permit4
//		meta nfproto ipv6 ip6 daddr @gate6 jump permit6
//		meta l4proto { tcp, udp } th dport LEASES fib daddr type local jump around
//		... (see publish)
//		fib daddr type { local, broadcast, anycast, multicast } accept
//		... (see limitSessions)
//		iifname "lan0" goto from_1 (of each zone; many: iifname vmap @zones)
//		goto from_0
//	}
//
// Packets without a mark that are accepted here die in forward, unless they
// are for the gateway itself.
func (b *builder) arrive() error {
	a := b.base("arrive", prerouting(priorityArrive))
	a.add(masked(fieldCtMark, b.Marks.Mask(), b.mark(flow.Kernel)), accept())
	a.add(maskedNot(fieldCtMark, b.Marks.Mask(), 0), goTo(chainMarked))
	a.add(switchOn([]field{fieldCtState}, []branch{
		{[]value{stateEstablished}, accept()}, {[]value{stateRelated}, accept()}, {[]value{stateUntracked}, accept()},
		{[]value{stateNew}, goTo(chainFirst)},
	}))
	if b.ReversePath != ReversePathOff {
		a.add(noRoute(b.ReversePath == ReversePathStrict), jump(chainReversePath))
	}
	a.add(accept())

	m := b.chain(chainMarked)
	branches := []branch{
		{[]value{markValue(b.mark(flow.User))}, goTo(chainDivert)},
		{[]value{markValue(b.mark(flow.Own))}, goTo(chainLocalOwn)},
	}
	for _, p := range []flow.Path{flow.Kernel, flow.User, flow.Own} {
		branches = append(branches, branch{[]value{markValue(b.Marks.CutValue(p))}, goTo(chainCut)})
	}
	branches = append(branches, branch{[]value{markValue(b.Marks.OneWay())}, goTo(chainOneWay)})
	m.add(switchMark(fieldCtMark, b.Marks.Mask(), branches))
	m.add(isNot(fieldCtState, stateNew), accept())
	m.add(goTo(chainFirst))

	f := b.chain(chainFirst)
	f.add(is(fieldIIf, host32(`"lo"`, 1)), accept())
	f.add(maskedNot(fieldMetaMark, b.Marks.Mask(), 0), jump(chainJudged))
	if b.ReversePath != ReversePathOff {
		f.add(noRoute(b.ReversePath == ReversePathStrict), jump(chainReversePath))
	}
	f.add(is(fieldL4Proto, protoValue(flow.TCP)), notOpening(), goTo(chainNotSyn))
	for _, family := range []family{ipv4, ipv6} {
		f.add(is(fieldNFProto, family.nfproto), in(setGate(family), family.daddr), jump(chainPermit+family.suffix))
	}
	b.ifMapped(f)
	b.ifPublished(f, chainPublished)
	f.add(toGateway(), accept())
	b.limitSessions(f)
	b.byInterface(f, mapZones, func(id int) stmt { return goTo(zoneChain(id)) })
	f.add(goTo(zoneChain(0)))

	b.reversePath()
	n := b.chain(chainNotSyn)
	n.add(toGateway(), accept())
	n.add(count(counterNotSyn), drop())
	b.permit()
	b.answers()
	b.mapped()
	return nil
}

func tcpOrUDP() stmt { return oneOf(fieldL4Proto, protoValue(flow.TCP), protoValue(flow.UDP)) }

// toGateway matches what the gateway itself receives (linux/rtnetlink.h,
// RTN_*).
func toGateway() stmt {
	return oneOf(fieldDaddrType, typeLocal, host32("broadcast", 3), host32("anycast", 4), host32("multicast", 5))
}

var typeLocal = host32("local", 2)

// reversePath drops spoofed sources. A host that has no address yet asks with
// the unspecified one (RFC 2131, RFC 4862).
//
//	chain arrive {
//		fib saddr . iif oif missing jump reverse_path
//	}
//	chain reverse_path {
//		meta nfproto ipv4 ip saddr 0.0.0.0 return
//		meta nfproto ipv6 ip6 saddr :: return
//		counter name "spoofed" drop
//	}
func (b *builder) reversePath() {
	if b.ReversePath == ReversePathOff {
		return
	}
	c := b.chain(chainReversePath)
	for _, f := range []family{ipv4, ipv6} {
		c.add(is(fieldNFProto, f.nfproto), is(f.saddr, f.unspecified), leave())
	}
	c.add(count(counterSpoofed), drop())
}

// answers are what a first packet may get.
func (b *builder) answers() {
	ask := b.chain(chainAsk)
	ask.add(count(counterQueued))
	ask.add(enqueue(b.Native, b.FirstClosed, b.NumClosed, false))

	// A packet that nobody queued leaves arrive at once: it must carry its path
	// already, for dstnat and forward.
	open := b.chain(chainAskOpen)
	open.add(count(counterQueued), b.putPath(fieldMetaMark, flow.Kernel))
	open.add(enqueue(b.Native, b.FirstOpen, b.NumOpen, true))

	c := b.chain(chainCarryFirst)
	b.lookTimersUp(c)
	c.add(b.putPath(fieldCtMark, flow.Kernel), accept())

	// No permission has to do with it: translation looks none up.
	p := b.chain(chainCarryPlain)
	p.add(setMark(fieldMetaMark, b.Marks.Mask(), b.mark(flow.Plain)), b.putPath(fieldCtMark, flow.Kernel), accept())

	r := b.chain(chainRefuse)
	r.add(atMost(logRate, logBurst), report(b.LogGroup, reportDenied))
	r.add(count(counterRefused))
	refuseWith(r)

	d := b.chain(chainDiscard)
	d.add(atMost(logRate, logBurst), report(b.LogGroup, reportDenied))
	d.add(count(counterDiscarded), drop())

	w := b.chain(chainOneWay)
	w.add(is(fieldCtDir, byteValue("original", 0)), accept())
	w.add(count(counterDiscarded), drop())

	k := b.chain(chainCut)
	k.add(count(counterCut))
	k.add(is(fieldL4Proto, protoValue(flow.TCP)), reset())
	k.add(drop())
}

// Denials that reach the log: a second, and at once.
const (
	logRate  = 10
	logBurst = 20
	// ICMP errors of the gateway's own that are looked at, and those that say
	// that no port is left.
	errorRate  = 100
	errorBurst = 100
)

func refuseWith(c *chain) {
	c.add(is(fieldL4Proto, protoValue(flow.TCP)), reset())
	c.add(unreachable(adminProhibited))
}
