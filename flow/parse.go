package flow

import (
	"encoding/binary"
	"net/netip"
)

// The flags of a TCP header, as ParsePacket returns them (RFC 9293, 3.1).
const (
	FlagFIN uint8 = 1 << iota
	FlagSYN
	FlagRST
	FlagPSH
	FlagACK
	FlagURG
)

// IPv6 next-header values that stand between the fixed header and the
// transport. The list is that of the kernel's ipv6_ext_hdr() on purpose: what
// nft calls "meta l4proto" and conntrack calls the protocol of a flow must be
// what is judged here. Mobility, HIP and ESP end the walk there too.
const (
	nextHopByHop    = 0
	nextRouting     = 43
	nextFragment    = 44
	nextAuth        = 51
	nextNone        = 59
	nextDestination = 60
)

// ParsePacket reads the tuple of an IPv4 or IPv6 packet that starts with its
// IP header; tcpFlags are byte 13 of a TCP header and 0 for the rest.
//
// The packet may be cut short behind its transport header (a queue that
// copies little): lengths that reach beyond b are no error. Not ok are: a
// later fragment, a header that is cut or lies about its own length, and IPv6
// with an IPv4-mapped address, which must never be judged as IPv4. ICMP errors
// have identifier 0. It allocates nothing and keeps nothing of b.
func ParsePacket(b []byte) (t Tuple, tcpFlags uint8, ok bool) {
	if len(b) == 0 {
		return Tuple{}, 0, false
	}
	switch b[0] >> 4 {
	case 4:
		return parse4(b)
	case 6:
		return parse6(b)
	}
	return Tuple{}, 0, false
}

// parse4 follows RFC 791, 3.1.
func parse4(b []byte) (Tuple, uint8, bool) {
	if len(b) < 20 {
		return Tuple{}, 0, false
	}
	head := int(b[0]&15) * 4
	total := int(binary.BigEndian.Uint16(b[2:]))
	// Length 0 is what a merged packet above 64 KiB says (BIG TCP).
	if total != 0 {
		if total < head {
			return Tuple{}, 0, false
		}
		b = b[:min(len(b), total)]
	}
	const offsetMask = 0x1fff
	if head < 20 || head > len(b) || binary.BigEndian.Uint16(b[6:])&offsetMask != 0 {
		return Tuple{}, 0, false
	}
	src := netip.AddrFrom4([4]byte(b[12:16]))
	dst := netip.AddrFrom4([4]byte(b[16:20]))
	return parseTransport(Proto(b[9]), src, dst, b[head:])
}

// parse6 follows RFC 8200, sections 3 and 4.
func parse6(b []byte) (Tuple, uint8, bool) {
	const fixed = 40
	if len(b) < fixed {
		return Tuple{}, 0, false
	}
	src := netip.AddrFrom16([16]byte(b[8:24]))
	dst := netip.AddrFrom16([16]byte(b[24:40]))
	if src.Is4In6() || dst.Is4In6() {
		return Tuple{}, 0, false
	}
	next := b[6]
	// Payload length 0 belongs to a jumbogram (RFC 2675).
	if payload := int(binary.BigEndian.Uint16(b[4:])); payload != 0 {
		b = b[:min(len(b), fixed+payload)]
	}
	for b = b[fixed:]; ; {
		size := 8
		switch next {
		case nextHopByHop, nextRouting, nextDestination:
			if len(b) < 8 {
				return Tuple{}, 0, false
			}
			size = (int(b[1]) + 1) * 8
		case nextAuth:
			// RFC 4302, 2.2: in words of four bytes, minus two.
			if len(b) < 8 {
				return Tuple{}, 0, false
			}
			size = (int(b[1]) + 2) * 4
		case nextFragment:
			if len(b) < 8 || binary.BigEndian.Uint16(b[2:])&^7 != 0 {
				return Tuple{}, 0, false
			}
		case nextNone:
			return Tuple{}, 0, false
		default:
			return parseTransport(Proto(next), src, dst, b)
		}
		if size > len(b) {
			return Tuple{}, 0, false
		}
		next, b = b[0], b[size:]
	}
}

func parseTransport(p Proto, src, dst netip.Addr, b []byte) (Tuple, uint8, bool) {
	var from, to uint16
	var flags uint8
	switch p {
	case TCP:
		if len(b) < 14 || b[12]>>4 < 5 {
			return Tuple{}, 0, false
		}
		from, to, flags = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:]), b[13]
	case UDP:
		if len(b) < 8 {
			return Tuple{}, 0, false
		}
		from, to = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	case ICMP, ICMPv6:
		if (p == ICMP) != src.Is4() || len(b) < 8 {
			return Tuple{}, 0, false
		}
		to = uint16(b[0])
		if isQuery(p, b[0]) {
			from = binary.BigEndian.Uint16(b[4:])
		}
	}
	return Tuple{p, netip.AddrPortFrom(src, from), netip.AddrPortFrom(dst, to)}, flags, true
}

// isQuery names the ICMP types that carry an identifier: echo, timestamp,
// information and address mask (RFC 792, RFC 950), ICMPv6 echo (RFC 4443).
func isQuery(p Proto, kind uint8) bool {
	if p == ICMPv6 {
		return kind == 128 || kind == 129
	}
	return kind == 8 || kind == 0 || kind >= 13 && kind <= 18
}
