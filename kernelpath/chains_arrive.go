package kernelpath

import (
	"github.com/sluicegw/sluice/flow"
)

// Where the base chains stand. arrive comes after conntrack (-200); a packet
// that the queue gives back goes on with steer, the next base chain of the
// hook. Both come before destination NAT (-100).
const (
	priorityRaw    = -300
	priorityArrive = -155
	prioritySteer  = -150
	priorityDstNAT = -100
	priorityFilter = 0
	prioritySrcNAT = 100
)

// arrive sees every packet first. A packet of a known flow leaves it with the
// first rule; a first packet finds a permission or the table of its two zones.
//
//	ct mark and MASK vmap { K : accept, U : accept, O : accept, each with the cut bit : goto cut, ONE WAY : goto one_way }
//	ct state established,related,untracked accept
//	iif "lo" accept
//	fib saddr . iif oif missing jump reverse_path
//	ct state != new accept
//	meta l4proto tcp tcp flags & (fin|syn|rst|ack) != syn goto not_syn
//	meta l4proto { tcp, udp } jump permit
//	... (see publish)
//	fib daddr type { local, broadcast, anycast, multicast } accept
//	iifname vmap @zones
//	goto from_0
//
// Packets without a mark that are accepted here die in forward, unless they
// are for the gateway itself.
func (b *builder) arrive() error {
	a := b.base("arrive", prerouting(priorityArrive))
	var branches []branch
	for _, p := range []flow.Path{flow.Kernel, flow.User, flow.Own} {
		branches = append(branches, branch{[]value{markValue(b.mark(p))}, accept()})
	}
	for _, p := range []flow.Path{flow.Kernel, flow.User, flow.Own} {
		branches = append(branches, branch{[]value{markValue(b.Marks.CutValue(p))}, goTo(chainCut)})
	}
	branches = append(branches, branch{[]value{markValue(b.Marks.OneWay())}, goTo(chainOneWay)})
	a.add(switchMark(fieldCtMark, b.Marks.Mask(), branches))
	a.add(ctStates(stateEstablished, stateRelated, stateUntracked), accept())
	a.add(is(fieldIIf, host32(`"lo"`, 1)), accept())
	if b.ReversePath != ReversePathOff {
		a.add(noRoute(b.ReversePath == ReversePathStrict), jump(chainReversePath))
	}
	a.add(isNot(fieldCtState, stateNew), accept())
	a.add(is(fieldL4Proto, protoValue(flow.TCP)), notOpening(), goTo(chainNotSyn))
	a.add(tcpOrUDP(), jump(chainPermit))
	b.ifPublished(a, chainPublished)
	a.add(toGateway(), accept())
	if len(b.in.Compiled.Zones) > 1 {
		a.add(vmap(mapZones, fieldIIfName))
	}
	a.add(goTo(zoneChain(0)))

	b.reversePath()
	n := b.chain(chainNotSyn)
	n.add(toGateway(), accept())
	n.add(count(counterNotSyn), drop())
	b.permit()
	b.answers()
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

	// A packet that nobody queued leaves arrive at once and meets steer: it
	// must carry its path already.
	open := b.chain(chainAskOpen)
	open.add(count(counterQueued), b.putPath(fieldMetaMark, flow.Kernel))
	open.add(enqueue(b.Native, b.FirstOpen, b.NumOpen, true))

	c := b.chain(chainCarryFirst)
	c.add(b.putPath(fieldCtMark, flow.Kernel), accept())

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
