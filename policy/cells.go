package policy

import (
	"slices"

	"github.com/sluicegw/sluice/flow"
)

// cell is what a Box says about protocol and port, without the addresses.
type cell struct {
	kind   Kind
	protos [2]flow.Proto
	ports  PortRange
}

// cellsByFamily are the disjoint cells of a set of matches; ICMP belongs to
// one family only.
type cellsByFamily [2][]cell

// spans are matches as sorted, disjoint ranges: of ports, of ICMP types, of
// protocol numbers.
type spans struct{ tcp, udp, icmp, icmpv6, other []PortRange }

// allSpans is the built-in protocol "any".
func allSpans() spans {
	ports, bytes := []PortRange{every}, []PortRange{{0, 255}}
	return spans{ports, ports, bytes, bytes, bytes}
}

func spansOf(matches []Match) spans {
	var s spans
	for _, m := range matches {
		switch m.Proto {
		case flow.TCP:
			s.tcp = append(s.tcp, m.Ports)
		case flow.UDP:
			s.udp = append(s.udp, m.Ports)
		case flow.ICMP:
			s.icmp = append(s.icmp, m.Ports)
		case flow.ICMPv6:
			s.icmpv6 = append(s.icmpv6, m.Ports)
		default:
			s.other = append(s.other, PortRange{uint16(m.Proto), uint16(m.Proto)})
		}
	}
	return spans{merge(s.tcp), merge(s.udp), merge(s.icmp), merge(s.icmpv6), merge(s.other)}
}

// carried is the part that user space can carry.
func (s spans) carried() spans { return spans{tcp: s.tcp, udp: s.udp} }

// withoutPorts takes the TCP and UDP ports of b away.
func (s spans) withoutPorts(b spans) spans {
	s.tcp, s.udp = subtract(s.tcp, b.tcp), subtract(s.udp, b.udp)
	return s
}

// cells makes the fewest disjoint cells that have the same flows.
func (s spans) cells() (cells cellsByFamily) {
	common := portCells(s.tcp, s.udp)
	var rest []cell
	for _, r := range s.other {
		rest = append(rest, cell{KindOther, [2]flow.Proto{flow.Proto(r.Lo), flow.Proto(r.Hi)}, every})
	}
	for f, proto := range [2]flow.Proto{flow.ICMP, flow.ICMPv6} {
		cells[f] = slices.Clone(common)
		for _, r := range [2][]PortRange{s.icmp, s.icmpv6}[f] {
			cells[f] = append(cells[f], cell{KindICMP, [2]flow.Proto{proto, proto}, r})
		}
		cells[f] = append(cells[f], rest...)
	}
	return cells
}

// portCells joins the ranges that TCP and UDP have in common.
func portCells(tcp, udp []PortRange) []cell {
	var cells []cell
	for _, r := range tcp {
		last := flow.TCP
		if _, same := slices.BinarySearchFunc(udp, r, compareRanges); same {
			last = flow.UDP
		}
		cells = append(cells, cell{KindPorts, [2]flow.Proto{flow.TCP, last}, r})
	}
	for _, r := range udp {
		if _, same := slices.BinarySearchFunc(tcp, r, compareRanges); !same {
			cells = append(cells, cell{KindPorts, [2]flow.Proto{flow.UDP, flow.UDP}, r})
		}
	}
	return cells
}

func compareRanges(a, b PortRange) int {
	if a.Lo != b.Lo {
		return int(a.Lo) - int(b.Lo)
	}
	return int(a.Hi) - int(b.Hi)
}

// merge sorts ranges and joins those that overlap or touch.
func merge(list []PortRange) []PortRange {
	sorted := slices.Clone(list)
	slices.SortFunc(sorted, compareRanges)
	var out []PortRange
	for _, r := range sorted {
		if n := len(out); n > 0 && int(r.Lo) <= int(out[n-1].Hi)+1 {
			out[n-1].Hi = max(out[n-1].Hi, r.Hi)
			continue
		}
		out = append(out, r)
	}
	return out
}

// subtract takes b from a; both are sorted and disjoint.
func subtract(a, b []PortRange) []PortRange {
	var out []PortRange
	for _, r := range a {
		lo := int(r.Lo)
		for _, cut := range b {
			if cut.Hi < uint16(lo) || cut.Lo > r.Hi {
				continue
			}
			if int(cut.Lo) > lo {
				out = append(out, PortRange{uint16(lo), cut.Lo - 1})
			}
			if lo = int(cut.Hi) + 1; lo > int(r.Hi) {
				break
			}
		}
		if lo <= int(r.Hi) {
			out = append(out, PortRange{uint16(lo), r.Hi})
		}
	}
	return out
}
