package kernelpath

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// field is something that a rule can read of a packet.
type field struct {
	text string
	typ  nftables.SetDatatype
	load func(register uint32) expr.Any
	// mask has the bits that a key takes of it; none: all. Only keys have one.
	mask []byte
}

// firstBits is so many bits of an address, the others zero, as part of a key.
func firstBits(f field, of family, n int) field {
	if width := 8 * len(of.unspecified.raw); n < width {
		ones, _ := netip.AddrFromSlice(bytes.Repeat([]byte{0xff}, width/8))
		mask := netip.PrefixFrom(ones, n).Masked().Addr()
		f.text, f.mask = fmt.Sprintf("%s and %s", f.text, mask), mask.AsSlice()
	}
	return f
}

func metaField(text string, typ nftables.SetDatatype, key expr.MetaKey) field {
	return field{text: text, typ: typ, load: func(r uint32) expr.Any { return &expr.Meta{Key: key, Register: r} }}
}

func ctField(text string, typ nftables.SetDatatype, key expr.CtKey) field {
	return field{text: text, typ: typ, load: func(r uint32) expr.Any { return &expr.Ct{Key: key, Register: r} }}
}

func payload(text string, typ nftables.SetDatatype, base expr.PayloadBase, offset, size uint32) field {
	return field{text: text, typ: typ, load: func(r uint32) expr.Any {
		return &expr.Payload{DestRegister: r, Base: base, Offset: offset, Len: size}
	}}
}

// The fields that the table reads. Offsets are those of RFC 791, 8200, 9293,
// 768, 792 and 4443.
var (
	fieldIIf      = metaField("iif", nftables.TypeIFIndex, expr.MetaKeyIIF)
	fieldIIfName  = metaField("iifname", nftables.TypeIFName, expr.MetaKeyIIFNAME)
	fieldOIfName  = metaField("oifname", nftables.TypeIFName, expr.MetaKeyOIFNAME)
	fieldNFProto  = metaField("meta nfproto", nftables.TypeNFProto, expr.MetaKeyNFPROTO)
	fieldL4Proto  = metaField("meta l4proto", nftables.TypeInetProto, expr.MetaKeyL4PROTO)
	fieldMetaMark = metaField("meta mark", nftables.TypeMark, expr.MetaKeyMARK)
	fieldCtMark   = ctField("ct mark", nftables.TypeMark, expr.CtKeyMARK)
	fieldCtState  = ctField("ct state", nftables.TypeCTState, expr.CtKeySTATE)
	fieldCtStatus = ctField("ct status", nftables.TypeCTStatus, expr.CtKeySTATUS)
	fieldCtDir    = ctField("ct direction", nftables.TypeCTDir, expr.CtKeyDIRECTION)
	fieldSaddr4   = payload("ip saddr", nftables.TypeIPAddr, expr.PayloadBaseNetworkHeader, 12, 4)
	fieldDaddr4   = payload("ip daddr", nftables.TypeIPAddr, expr.PayloadBaseNetworkHeader, 16, 4)
	fieldSaddr6   = payload("ip6 saddr", nftables.TypeIP6Addr, expr.PayloadBaseNetworkHeader, 8, 16)
	fieldDaddr6   = payload("ip6 daddr", nftables.TypeIP6Addr, expr.PayloadBaseNetworkHeader, 24, 16)
	fieldSport    = payload("th sport", nftables.TypeInetService, expr.PayloadBaseTransportHeader, 0, 2)
	fieldDport    = payload("th dport", nftables.TypeInetService, expr.PayloadBaseTransportHeader, 2, 2)
	fieldICMP4    = payload("icmp type", nftables.TypeICMPType, expr.PayloadBaseTransportHeader, 0, 1)
	fieldICMP6    = payload("icmpv6 type", nftables.TypeICMP6Type, expr.PayloadBaseTransportHeader, 0, 1)
	fieldTCPFlags = payload("tcp flags", nftables.TypeTCPFlag, expr.PayloadBaseTransportHeader, 13, 1)
	fieldOutRoute = field{text: "fib daddr . mark oifname", typ: nftables.TypeIFName, load: func(r uint32) expr.Any {
		return &expr.Fib{Register: r, ResultOIFNAME: true, FlagDADDR: true, FlagMARK: true}
	}}
	fieldDaddrType = field{text: "fib daddr type", typ: nftables.TypeFIBAddr, load: func(r uint32) expr.Any {
		return &expr.Fib{Register: r, ResultADDRTYPE: true, FlagDADDR: true}
	}}
	fieldSaddrType = field{text: "fib saddr type", typ: nftables.TypeFIBAddr, load: func(r uint32) expr.Any {
		return &expr.Fib{Register: r, ResultADDRTYPE: true, FlagSADDR: true}
	}}
	fieldSocketMark = field{text: "socket mark", typ: nftables.TypeMark, load: func(r uint32) expr.Any {
		return &expr.Socket{Key: expr.SocketKeyMark, Register: r}
	}}
	fieldTransparent = field{text: "socket transparent", typ: nftables.TypeBoolean, load: func(r uint32) expr.Any {
		return &expr.Socket{Key: expr.SocketKeyTransparent, Register: r}
	}}
)

// What conntrack knows of the first packet of a flow, before any translation.
var (
	fieldAskedSaddr4 = ctField("ct original ip saddr", nftables.TypeIPAddr, unix.NFT_CT_SRC_IP)
	fieldAskedDaddr4 = ctField("ct original ip daddr", nftables.TypeIPAddr, unix.NFT_CT_DST_IP)
	fieldAskedSaddr6 = ctField("ct original ip6 saddr", nftables.TypeIP6Addr, unix.NFT_CT_SRC_IP6)
	fieldAskedDaddr6 = ctField("ct original ip6 daddr", nftables.TypeIP6Addr, unix.NFT_CT_DST_IP6)
	fieldAskedDport  = ctField("ct original proto-dst", nftables.TypeInetService, expr.CtKeyPROTODST)
	// For ICMP it is the identifier of a query (nf_conntrack_tuple.h).
	fieldAskedSport = ctField("ct original proto-src", nftables.TypeInetService, expr.CtKeyPROTOSRC)
)

// family holds what differs between IPv4 and IPv6.
type family struct {
	suffix       string
	nfproto      value
	addr         nftables.SetDatatype
	saddr, daddr field
	// asked are the addresses of the first packet, before any translation.
	asked       [2]field
	word        string // nft's
	icmp        flow.Proto
	icmpType    field
	loopback    netip.Addr
	unspecified value
	number      byte // NFPROTO_*
}

var (
	ipv4 = family{
		suffix: "4", nfproto: value{"ipv4", []byte{2}}, addr: nftables.TypeIPAddr,
		saddr: fieldSaddr4, daddr: fieldDaddr4, asked: [2]field{fieldAskedSaddr4, fieldAskedDaddr4}, word: "ip", icmp: flow.ICMP, icmpType: fieldICMP4,
		loopback:    netip.AddrFrom4([4]byte{127, 0, 0, 1}),
		unspecified: value{"0.0.0.0", make([]byte, 4)}, number: 2,
	}
	ipv6 = family{
		suffix: "6", nfproto: value{"ipv6", []byte{10}}, addr: nftables.TypeIP6Addr,
		saddr: fieldSaddr6, daddr: fieldDaddr6, asked: [2]field{fieldAskedSaddr6, fieldAskedDaddr6}, word: "ip6", icmp: flow.ICMPv6, icmpType: fieldICMP6,
		loopback:    netip.IPv6Loopback(),
		unspecified: value{"::", make([]byte, 16)}, number: 10,
	}
)

func familyOf(is6 bool) family {
	if is6 {
		return ipv6
	}
	return ipv4
}

// tuple is the key of a permission: source, destination, protocol and
// destination port; socket is the key without its source.
func (f family) tuple() []field  { return []field{f.saddr, f.daddr, fieldL4Proto, fieldDport} }
func (f family) socket() []field { return []field{f.daddr, fieldL4Proto, fieldDport} }

// request is the tuple of the first packet, as conntrack keeps it. nft wants a
// match of TCP or UDP before it.
func (f family) request() []field {
	return []field{f.asked[0], f.asked[1], fieldL4Proto, fieldAskedDport}
}

// value is a constant: nft's text and the kernel's bytes.
type value struct {
	text string
	raw  []byte
}

// host32 is a number in the host's byte order, as marks and flags are.
func host32(text string, v uint32) value {
	return value{text, binary.NativeEndian.AppendUint32(nil, v)}
}

func markValue(v uint32) value { return host32(fmt.Sprintf("0x%08x", v), v) }

func protoValue(p flow.Proto) value {
	text := p.String()
	if p == flow.ICMPv6 {
		text = "ipv6-icmp"
	}
	return value{text, []byte{byte(p)}}
}

func portValue(p uint16) value {
	return value{fmt.Sprint(p), binary.BigEndian.AppendUint16(nil, p)}
}

func byteValue(text string, b byte) value { return value{text, []byte{b}} }

// ifNameValue is an interface name as the kernel compares it: padded to
// IFNAMSIZ (linux/if.h).
func ifNameValue(name string) value {
	raw := make([]byte, 16)
	copy(raw, name)
	return value{quote(name), raw}
}

// registers gives the register of each part of a concatenated key: the parts
// stand one after the other, each padded to 32 bits (nf_tables.h:
// NFT_REG32_00 is 8 and the same storage as NFT_REG_1).
func registers(parts []nftables.SetDatatype) []uint32 {
	regs := make([]uint32, len(parts))
	word := uint32(0)
	for i, t := range parts {
		regs[i] = 8 + word
		if i == 0 {
			regs[i] = 1
		}
		word += (t.Bytes + 3) / 4
	}
	return regs
}

// pack makes the key of a set element: one part as it is, several each padded
// to 32 bits.
func pack(parts ...[]byte) []byte {
	if len(parts) == 1 {
		return parts[0]
	}
	var key []byte
	for _, p := range parts {
		key = append(key, p...)
		for len(key)%4 != 0 {
			key = append(key, 0)
		}
	}
	return key
}

func fieldTypes(fields []field) []nftables.SetDatatype {
	types := make([]nftables.SetDatatype, len(fields))
	for i, f := range fields {
		types[i] = f.typ
	}
	return types
}

func fieldText(fields []field) string {
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.text
	}
	return strings.Join(names, " . ")
}
