package policy

import (
	"net/netip"

	"github.com/sluicegw/sluice/flow"
)

// Compiled is a Policy as the kernel can look it up: no list of rules is
// walked for a flow. A flow's two interfaces give one Table; a Table is a
// short row of stages, each one lookup in a set of disjoint boxes; the first
// hit decides. A flow that hits nothing is dropped (ClassDrop).
type Compiled struct {
	// Zones are classes of interfaces that no network tells apart; they are
	// disjoint. Zone 0 has no names: it is every other interface.
	Zones []Zone
	// Forward has a table for each pair of zones that has any stage at all.
	Forward []Table
	// Input has, per zone In, what may reach the gateway itself. Its classes
	// are ClassKernel (accept), ClassReject and ClassDrop.
	Input []Table
	// Publish has, per zone In, what is published at addresses of the gateway,
	// and is asked before Input about a flow to one of them. A flow that hits
	// nothing, or a box of ClassKernel without a Publication, is for the gateway
	// itself. IPv4 alone: an IPv6 server is in Forward.
	Publish []Table
	// Publications are those that Box.Publication counts, from 1.
	Publications []Published
}

// Published is a rule that publishes, as the kernel needs it.
type Published struct {
	Rule string
	Publication
	// Ports are the external ports that ServerPort shifts; zero without it.
	Ports PortRange
}

// Zone is a class of interfaces.
type Zone struct {
	ID         int // its index in Compiled.Zones
	Interfaces []string
}

// Table decides for one pair of zones.
type Table struct {
	In, Out int // zone IDs; Out is 0 in Input
	Stages  []Stage
}

// Kind says what the last field of a stage's key is.
type Kind uint8

const (
	// KindPorts: TCP and UDP; key = source . destination . protocol . port.
	KindPorts Kind = iota
	// KindICMP: ICMP or ICMPv6 (by family); key = source . destination . type.
	KindICMP
	// KindOther: everything else; key = source . destination . protocol.
	KindOther
)

// Stage is one lookup. Its boxes have one family and one kind, and no two of
// them overlap.
type Stage struct {
	Is6   bool
	Kind  Kind
	Boxes []Box
}

// Box is one element of a stage: all flows inside it get one class.
type Box struct {
	Src, Dst netip.Prefix // 0.0.0.0/0 or ::/0: any
	// Protos is the range of protocol numbers. In KindPorts it is TCP..TCP,
	// UDP..UDP or TCP..UDP (6..17: only those two get there).
	Protos [2]flow.Proto
	// Ports are destination ports or ICMP types (0..255); 0..65535 in KindOther.
	Ports PortRange
	Class Class
	// Publication says whose flows these are: Compiled.Publications, counted
	// from 1; 0: no published server's.
	Publication int
	// NetworkRule is the place in Policy.NetworkRules of the one that maps the
	// endpoints of ClassMap and ClassMapOpen.
	NetworkRule int32
}
