package nat

import "fmt"

// Range is an inclusive range of ports.
type Range struct{ Lo, Hi uint16 }

func (r Range) String() string { return fmt.Sprintf("%d-%d", r.Lo, r.Hi) }

// Ranges are the three disjoint ranges of external ports. Where they overlap,
// the kernel's choice for one flow makes the packets of another vanish.
type Ranges struct {
	// Kernel is what the kernel's source NAT chooses from.
	Kernel Range
	// Leases is what binds for clients are leased from.
	Leases Range
	// Own is where the gateway's own sockets get their ports: the kernel's
	// ip_local_port_range, read at the start, not configured.
	Own Range
}

// Check says which two ranges share ports.
func (r Ranges) Check() error {
	named := []struct {
		name string
		Range
	}{{"ports.kernel", r.Kernel}, {"ports.leases", r.Leases}, {"the gateway's own ports (net.ipv4.ip_local_port_range)", r.Own}}
	for i, a := range named {
		for _, b := range named[:i] {
			if a.Lo <= b.Hi && b.Lo <= a.Hi {
				return fmt.Errorf("%s (%v) and %s (%v) overlap", b.name, b.Range, a.name, a.Range)
			}
		}
	}
	return nil
}
