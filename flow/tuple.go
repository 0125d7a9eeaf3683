// Package flow holds the words that every other package speaks: the tuple of
// a flow, the path it takes, the packet that opens it, what it counted and how
// it ended. It has values only; nothing here opens a socket or keeps state.
package flow

import (
	"fmt"
	"net/netip"
)

// Proto is an IP protocol number (IANA "protocol numbers").
type Proto uint8

// The protocols that have a name of their own in Sluice.
const (
	ICMP   Proto = 1
	TCP    Proto = 6
	UDP    Proto = 17
	ICMPv6 Proto = 58
)

// String gives the lower-case name that nft uses, or the number.
func (p Proto) String() string {
	switch p {
	case ICMP:
		return "icmp"
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case ICMPv6:
		return "icmpv6"
	}
	return fmt.Sprintf("%d", uint8(p))
}

// HasPorts says whether the tuple of this protocol carries port numbers.
func (p Proto) HasPorts() bool { return p == TCP || p == UDP }

// Tuple names a flow as its first packet does: the initiator is Src, before
// any translation. For ICMP the port of Src is the query identifier and the
// port of Dst is the type. Addresses are never IPv4-mapped IPv6.
type Tuple struct {
	Proto Proto
	Src   netip.AddrPort
	Dst   netip.AddrPort
}

// Reverse is the tuple of the answers when nothing is translated.
func (t Tuple) Reverse() Tuple { return Tuple{t.Proto, t.Dst, t.Src} }

// Is4 says whether the flow is IPv4.
func (t Tuple) Is4() bool { return t.Src.Addr().Is4() }

func (t Tuple) String() string {
	return fmt.Sprintf("%s %s > %s", t.Proto, t.Src, t.Dst)
}

// Packet is a first packet as user space sees it: enough to judge a flow,
// never the payload. It is a value and may be kept.
type Packet struct {
	Tuple
	// InIface is the name of the interface on which the packet arrived.
	InIface string
	// Mark is the whole packet mark that it carried, bits of others included.
	Mark uint32
}
