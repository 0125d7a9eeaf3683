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
}
