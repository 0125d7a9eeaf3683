package nat

import "fmt"

// Range is an inclusive range of ports.
type Range struct{ Lo, Hi uint16 }

func (r Range) String() string { return fmt.Sprintf("%d-%d", r.Lo, r.Hi) }

// size is how many ports a range has.
func (r Range) size() int { return int(r.Hi) - int(r.Lo) + 1 }

// Ranges are the disjoint ranges of external ports. Where they overlap, the
// kernel's choice for one flow makes the packets of another vanish.
type Ranges struct {
	// Kernel is what the kernel's source NAT chooses from.
	Kernel Range
	// Leases is what the ports of mappings and of binds for clients are leased
	// from.
	Leases []Range
	// WellKnown is what they are leased from for a client's port below 1024;
	// the zero Range: from Leases, too.
	WellKnown Range
	// Own is where the gateway's own sockets get their ports: the kernel's
	// ip_local_port_range, read at the start, not configured.
	Own Range
}

// Check says which two ranges share ports. A zero range has none.
func (r Ranges) Check() error {
	type named struct {
		name string
		Range
	}
	all := []named{{"ports.kernel", r.Kernel}}
	for _, l := range r.Leases {
		all = append(all, named{"ports.leases", l})
	}
	all = append(all, named{"ports.well_known", r.WellKnown},
		named{"the gateway's own ports (net.ipv4.ip_local_port_range)", r.Own})
	for i, a := range all {
		for _, b := range all[:i] {
			if a.Range != (Range{}) && b.Range != (Range{}) && a.Lo <= b.Hi && b.Lo <= a.Hi {
				return fmt.Errorf("%s (%v) and %s (%v) overlap", b.name, b.Range, a.name, a.Range)
			}
		}
	}
	return nil
}
