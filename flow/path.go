package flow

import (
	"fmt"
	"math/bits"
)

// Path says which way a flow goes. It is what the packet mark and the
// conntrack mark of a flow carry, and all that they carry. The zero value is
// the safe one.
type Path uint8

// The paths. Their numbers are the bits in the mark; see Marks.
const (
	// Drop is no path at all: a packet without a path dies in the forward
	// chain, without a word to its sender.
	Drop Path = iota
	// Reject answers a TCP packet with a reset and everything else with ICMP
	// "administratively prohibited".
	Reject
	// HostUnreachable answers with that ICMP error.
	HostUnreachable
	// NetUnreachable answers with that ICMP error.
	NetUnreachable
	// PortUnreachable answers with that ICMP error.
	PortUnreachable
	// Kernel is carried by the kernel: forwarded, translated, offloaded.
	Kernel
	// User is taken over in user space.
	User
	// Own marks the gateway's own sockets that carry a taken-over flow on to
	// its server (the upstream leg).
	Own
	// Exhausted answers every packet, TCP too, with ICMP "administratively
	// prohibited": there was no external port for its flow (RFC 5508, REQ-8).
	// It stands in the packet mark only: no flow begins that has it.
	Exhausted
)

// Plain is Kernel for a flow with which no permission, mapping or publication
// has to do: its translation looks none up. It stands in the packet mark only.
const Plain Path = 8 | Kernel

var pathNames = [...]string{"drop", "reject", "host-unreachable", "net-unreachable", "port-unreachable", "kernel", "user", "own", "exhausted"}

func (p Path) String() string {
	if p == Plain {
		p = Kernel
	}
	if int(p) < len(pathNames) {
		return pathNames[p]
	}
	return fmt.Sprintf("path(%d)", uint8(p))
}

// Carries says whether packets of this path go anywhere at all.
func (p Path) Carries() bool { return p == Kernel || p == User }

// Bits that a Marks needs: three for the path, one for the cut bit.
const markBits = 4

// DefaultMask is where the mark bits are unless the administrator moves them.
const DefaultMask = 0x0f000000

// Marks is the one place that knows which bits of the packet mark and of the
// conntrack mark belong to Sluice:
//
//	mask      c p p p      p p p = the Path
//	          |            c     = cut, in the conntrack mark; in the packet
//	          |                    mark it is the fourth bit of the Path
//
// Two values of the conntrack mark stand for themselves, because a living flow
// is never refused: the cut bit with the path Reject is a kernel flow that
// passes one way only (see OneWay), and with HostUnreachable a first packet
// whose sender is still to be looked for among the peers of a mapping (see
// Stranger). So does one value of the packet mark, see Plain. All bits outside
// the mask are other people's and are kept.
type Marks struct {
	shift uint
}

// NewMarks takes the administrator's mask: four adjacent bits.
func NewMarks(mask uint32) (Marks, error) {
	shift := uint(bits.TrailingZeros32(mask))
	if mask == 0 || mask>>shift != 1<<markBits-1 {
		return Marks{}, fmt.Errorf("mark mask 0x%08x: want exactly %d adjacent bits", mask, markBits)
	}
	return Marks{shift: shift}, nil
}

// Mask has the bits of Sluice set: the path and the cut bit.
func (m Marks) Mask() uint32 { return (1<<markBits - 1) << m.shift }

// PathMask has the bits of the path set.
func (m Marks) PathMask() uint32 { return 7 << m.shift }

// Cut is the bit of a conntrack mark that ends a living flow.
func (m Marks) Cut() uint32 { return 8 << m.shift }

// Value is the mark of a path, with nobody else's bits.
func (m Marks) Value(p Path) uint32 { return uint32(p) << m.shift }

// Put writes a path into a mark and keeps the bits of others.
func (m Marks) Put(mark uint32, p Path) uint32 { return mark&^m.Mask() | m.Value(p) }

// OneWay is the conntrack mark of a kernel flow whose answers are dropped, with
// nobody else's bits.
func (m Marks) OneWay() uint32 { return m.Cut() | m.Value(Reject) }

// IsOneWay says whether a conntrack mark is that of such a flow.
func (m Marks) IsOneWay(mark uint32) bool { return mark&m.Mask() == m.OneWay() }

// Stranger is the conntrack mark of the first packet of an inbound kernel flow,
// from where it was let in until the forward chain knows that its sender is one
// of the addresses that the inside endpoint has sent to, with nobody else's
// bits. No flow keeps it.
func (m Marks) Stranger() uint32 { return m.Cut() | m.Value(HostUnreachable) }

// Path reads the path out of a conntrack mark.
func (m Marks) Path(mark uint32) Path {
	if m.IsOneWay(mark) || mark&m.Mask() == m.Stranger() {
		return Kernel
	}
	return Path(mark >> m.shift & 7)
}

// CutValue is the conntrack mark of a flow of a path that was cut, with nobody
// else's bits.
func (m Marks) CutValue(p Path) uint32 { return m.Cut() | m.Value(p) }

// IsCut says whether a conntrack mark is that of a flow that was cut.
func (m Marks) IsCut(mark uint32) bool {
	return mark&m.Cut() != 0 && !m.IsOneWay(mark) && mark&m.Mask() != m.Stranger()
}
