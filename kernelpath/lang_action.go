package kernelpath

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/nat"
)

func verdict(text string, v expr.Verdict) stmt {
	return stmt{text, func(c *code) { c.add(&v) }}
}

func accept() stmt { return verdict("accept", expr.Verdict{Kind: expr.VerdictAccept}) }
func drop() stmt   { return verdict("drop", expr.Verdict{Kind: expr.VerdictDrop}) }

func goTo(chain string) stmt {
	return verdict("goto "+chain, expr.Verdict{Kind: expr.VerdictGoto, Chain: chain})
}

func jump(chain string) stmt {
	return verdict("jump "+chain, expr.Verdict{Kind: expr.VerdictJump, Chain: chain})
}

func leave() stmt { return verdict("return", expr.Verdict{Kind: expr.VerdictReturn}) }

// setMark writes some bits of a mark and keeps the others:
//
//	ct mark set ct mark and 0xf0ffffff or 0x05000000
func setMark(f field, mask, bits uint32) stmt {
	text := fmt.Sprintf("%s set %s and 0x%08x or 0x%08x", f.text, f.text, ^mask, bits)
	return stmt{text, func(c *code) {
		c.add(f.load(1), maskAndSet(^mask, bits))
		if f.text == fieldCtMark.text {
			c.add(&expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true})
			return
		}
		c.add(&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true})
	}}
}

// tellDestroy has conntrack tell of the flow when it ends, and of nothing before
// (IPCT_DESTROY of linux/netfilter/nf_conntrack_common.h).
func tellDestroy() stmt {
	const destroy = 1 << 2
	return stmt{"ct event set destroy", func(c *code) {
		c.add(&expr.Immediate{Register: 1, Data: markValue(destroy).raw}, &expr.Ct{Key: expr.CtKeyEVENTMASK, Register: 1, SourceRegister: true})
	}}
}

// setZone puts an untracked packet into a conntrack zone:  ct zone set 7
func setZone(zone uint16) stmt {
	return stmt{fmt.Sprintf("ct zone set %d", zone), func(c *code) {
		c.add(&expr.Immediate{Register: 1, Data: binary.NativeEndian.AppendUint16(nil, zone)},
			&expr.Ct{Key: expr.CtKeyZONE, Register: 1, SourceRegister: true})
	}}
}

func untrack() stmt { return stmt{"notrack", func(c *code) { c.add(&expr.Notrack{}) }} }

// count counts in a named counter, which outlives a reload.
func count(name string) stmt {
	return stmt{fmt.Sprintf("counter name %q", name), func(c *code) {
		c.add(&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name})
	}}
}

// atMost stops matching beyond a rate: a token bucket.
func atMost(perSecond uint64, burst uint32) stmt {
	return stmt{fmt.Sprintf("limit rate %d/second burst %d packets", perSecond, burst), func(c *code) {
		c.add(&expr.Limit{Type: expr.LimitTypePkts, Rate: perSecond, Unit: expr.LimitTimeSecond, Burst: burst})
	}}
}

// logHeaders is how much of a packet the log group gets, in bytes: the IP
// header with its extensions and the ports.
const logHeaders = 128

// report sends the packet's headers to the log group.
func report(group uint16, prefix string) stmt {
	text := fmt.Sprintf("log prefix %q group %d snaplen %d", prefix, group, logHeaders)
	return stmt{text, func(c *code) {
		c.add(&expr.Log{
			Key:   1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX | 1<<unix.NFTA_LOG_SNAPLEN,
			Group: group, Snaplen: logHeaders, Data: []byte(prefix),
		})
	}}
}

// reset answers a TCP segment with a reset. The rule must have matched TCP.
func reset() stmt {
	return stmt{"reject with tcp reset", func(c *code) { c.add(&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}) }}
}

// The ICMP errors that both families have (linux/netfilter/nf_tables.h).
const (
	noRouteToNetwork = unix.NFT_REJECT_ICMPX_NO_ROUTE
	portUnreachable  = unix.NFT_REJECT_ICMPX_PORT_UNREACH
	hostUnreachable  = unix.NFT_REJECT_ICMPX_HOST_UNREACH
	adminProhibited  = unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED
)

var icmpxNames = [...]string{
	noRouteToNetwork: "no-route", portUnreachable: "port-unreachable",
	hostUnreachable: "host-unreachable", adminProhibited: "admin-prohibited",
}

// unreachable answers with an ICMP error.
func unreachable(icmpx uint8) stmt {
	return stmt{"reject with icmpx type " + icmpxNames[icmpx], func(c *code) {
		c.add(&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: icmpx})
	}}
}

// enqueue hands the packet to user space. With bypass it leaves the base chain
// when nobody listens. native is nft's own expression; the other form is xt's
// NFQUEUE revision 3 (linux/netfilter/xt_NFQUEUE.h), which works in a kernel
// without nft_queue and for which nft's language has no word.
func enqueue(native bool, first, number uint16, bypass bool) stmt {
	flags, word := uint16(0), ""
	if bypass {
		flags, word = 1, "flags bypass "
	}
	queues := fmt.Sprint(first)
	if number > 1 {
		queues = fmt.Sprintf("%d-%d", first, first+number-1)
	}
	if native {
		return stmt{"queue " + word + "to " + queues, func(c *code) {
			c.add(&expr.Queue{Num: first, Total: number, Flag: expr.QueueFlag(flags)})
		}}
	}
	info := xt.Unknown{}
	for _, v := range []uint16{first, number, flags, 0} {
		info = binary.NativeEndian.AppendUint16(info, v)
	}
	return stmt{"# xt NFQUEUE " + word + "to " + queues + " (nft's language cannot say it)", func(c *code) {
		c.add(&expr.Target{Name: xtQueue, Rev: xtQueueRevision, Info: &info})
	}}
}

// divertTo gives the packet to a transparent socket. The rule must have
// matched the family and TCP or UDP.
func divertTo(f family, port uint16) stmt {
	to := netip.AddrPortFrom(f.loopback, port)
	return stmt{fmt.Sprintf("tproxy %s to %s", f.word, to), func(c *code) {
		c.add(&expr.Immediate{Register: 1, Data: f.loopback.AsSlice()},
			&expr.Immediate{Register: 2, Data: portValue(port).raw},
			&expr.TProxy{Family: f.number, RegAddr: 1, RegPort: 2})
	}}
}

// translateTo sends a flow to the address and port that a map has for its
// destination. The rule must have matched the family and TCP or UDP.
func translateTo(f family, name string) stmt {
	text := fmt.Sprintf("dnat %s to %s map @%s", f.word, fieldText(f.socket()), name)
	return stmt{text, func(c *code) { c.translate(expr.NATTypeDestNAT, f, name, f.socket()) }}
}

// leaveFrom gives a flow the source address and port that a map has for the
// first packet. The rule must have matched the family and TCP or UDP.
func leaveFrom(f family, name string) stmt {
	text := fmt.Sprintf("snat %s to %s map @%s", f.word, fieldText(f.request()), name)
	return stmt{text, func(c *code) { c.translate(expr.NATTypeSourceNAT, f, name, f.request()) }}
}

// leaveMapped gives a flow the source that a map has for who sent its first
// packet, an inside endpoint. The rule must have matched IPv4 and TCP, UDP or
// ICMP.
func leaveMapped(name string) stmt {
	text := fmt.Sprintf("snat ip to %s map @%s", fieldText(insideEndpoint()), name)
	return stmt{text, func(c *code) { c.translate(expr.NATTypeSourceNAT, ipv4, name, insideEndpoint()) }}
}

// translate writes an address and a port of a map.
func (c *code) translate(typ expr.NATType, f family, name string, key []field) {
	c.load(key)
	address := registers([]nftables.SetDatatype{f.addr, nftables.TypeInetService})
	c.add(&expr.Lookup{SourceRegister: 1, SetName: name, IsDestRegSet: true, DestRegister: 1},
		&expr.NAT{Type: typ, Family: uint32(f.number),
			RegAddrMin: address[0], RegAddrMax: address[0],
			RegProtoMin: address[1], RegProtoMax: address[1], Specified: true})
}

// leaveFromAddress gives a flow the source address that a map has for the
// first packet, and a port of a range; a zero range: the kernel's choice.
func leaveFromAddress(f family, name string, ports nat.Range) stmt {
	text := fmt.Sprintf("snat %s to %s map @%s", f.word, fieldText(f.request()), name)
	if ports != (nat.Range{}) {
		text += ":" + ports.String()
	}
	return stmt{text, func(c *code) {
		c.load(f.request())
		n := &expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.number), RegAddrMin: 1, RegAddrMax: 1}
		c.add(&expr.Lookup{SourceRegister: 1, SetName: name, IsDestRegSet: true, DestRegister: 1})
		if ports != (nat.Range{}) {
			c.loadPorts(2, 3, ports)
			n.RegProtoMin, n.RegProtoMax, n.Specified = 2, 3, true
		}
		c.add(n)
	}}
}

// hideBehind writes an IPv4 address of the gateway as the source. A range
// needs a match of TCP or UDP before it.
func hideBehind(a netip.Addr, ports nat.Range) stmt {
	return sourceNAT("snat ip to "+a.String(), &expr.Immediate{Register: 1, Data: a.AsSlice()}, ports)
}

// hideBehindAsked writes the address that the flow was first sent to as the
// source.
func hideBehindAsked(ports nat.Range) stmt {
	return sourceNAT("snat ip to ct original ip daddr", fieldAskedDaddr4.load(1), ports)
}

func sourceNAT(text string, address expr.Any, ports nat.Range) stmt {
	if ports != (nat.Range{}) {
		text += ":" + ports.String()
	}
	return stmt{text, func(c *code) {
		n := &expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(ipv4.number), RegAddrMin: 1, RegAddrMax: 1}
		c.add(address)
		if ports != (nat.Range{}) {
			c.loadPorts(2, 3, ports)
			n.RegProtoMin, n.RegProtoMax, n.Specified = 2, 3, true
		}
		c.add(n)
	}}
}

// masquerade writes the address that the route prefers as the source.
func masquerade(ports nat.Range) stmt {
	if ports == (nat.Range{}) {
		return stmt{"masquerade", func(c *code) { c.add(&expr.Masq{}) }}
	}
	return stmt{"masquerade to :" + ports.String(), func(c *code) {
		c.loadPorts(1, 2, ports)
		c.add(&expr.Masq{ToPorts: true, RegProtoMin: 1, RegProtoMax: 2})
	}}
}

func (c *code) loadPorts(lo, hi uint32, ports nat.Range) {
	c.add(&expr.Immediate{Register: lo, Data: portValue(ports.Lo).raw},
		&expr.Immediate{Register: hi, Data: portValue(ports.Hi).raw})
}

// offload moves an established flow into the flowtable.
func offload() stmt {
	return stmt{"flow add @" + flowtableName, func(c *code) { c.add(&expr.FlowOffload{Name: flowtableName}) }}
}
