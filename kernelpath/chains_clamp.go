package kernelpath

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// clamp bounds the segments of TCP between the networks of a rule that says
// so: where a link is narrower than those beside it and the ICMP errors that
// tell so get lost (RFC 4821, section 1; RFC 2923, section 2.1), segments fit all
// the same. The MSS option of both sides' SYN becomes what the routes to both
// hosts can carry, and never grows. The chain is only there with such a rule:
// each packet of every flow passes it.
//
//	chain clamp {
//		meta l4proto tcp tcp flags & (syn|rst) == syn goto segments
//	}
//	chain segments {
//		meta l4proto tcp iifname "lan0" oifname "wan0" tcp option maxseg size set rt mtu
//		meta l4proto tcp iifname "wan0" oifname "lan0" tcp option maxseg size set rt mtu
//	}
func (b *builder) clamp() error {
	var rules []rule
	for _, r := range b.in.NetworkRules {
		if !r.ClampMSS {
			continue
		}
		for _, way := range [][2]string{{r.From, r.To}, {r.To, r.From}} {
			rules = append(rules, append(b.through(way[0], way[1]), setMSS()))
		}
	}
	if len(rules) == 0 {
		return nil
	}
	c := b.base("clamp", filterHook("forward", unix.NF_INET_FORWARD, priorityClamp, nftables.ChainPolicyAccept))
	c.add(is(fieldL4Proto, protoValue(flow.TCP)), tcpOpening(), goTo(chainSegments))
	b.chain(chainSegments).rules = rules
	return nil
}

// through matches TCP that goes from the interfaces of one network to those of
// another; policy.Any is everywhere.
func (b *builder) through(from, to string) rule {
	r := rule{is(fieldL4Proto, protoValue(flow.TCP))}
	for _, side := range []struct {
		name  string
		iface field
	}{{from, fieldIIfName}, {to, fieldOIfName}} {
		n, at := b.network(side.name)
		switch len(n.Interfaces) {
		case 0:
		case 1:
			r = append(r, is(side.iface, ifNameValue(n.Interfaces[0])))
		default:
			r = append(r, in(networkInterfaces(at), side.iface))
		}
	}
	return r
}

// tcpOpening matches a SYN and its answer, which alone have an MSS option (RFC 9293,
// section 3.7.1).
func tcpOpening() stmt {
	return tcpFlags("tcp flags & (syn|rst) == syn", tcpSYN|tcpRST, expr.CmpOpEq, tcpSYN)
}

// setMSS writes what the routes to and from the packet's addresses can carry
// into its MSS option, unless that is less. A segment without the option stays
// as it is.
func setMSS() stmt {
	const maxSegmentSize = 2 // the option's kind; its value stands two octets behind
	return stmt{"tcp option maxseg size set rt mtu", func(c *code) {
		c.add(&expr.Rt{Register: 1, Key: expr.RtTCPMSS},
			&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 2, Size: 2},
			&expr.Exthdr{SourceRegister: 1, Type: maxSegmentSize, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt})
	}}
}
