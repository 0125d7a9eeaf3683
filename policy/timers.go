package policy

import (
	"slices"

	"github.com/sluicegw/sluice/flow"
)

// Timer says how long UDP flows to a range of ports may carry nothing.
type Timer struct {
	Ports   PortRange
	Seconds uint32
}

// timersOf are those of all protocols, disjoint and in the order of their
// ports. Of several for one port that of the first protocol counts.
func timersOf(protocols []Protocol) []Timer {
	var timers []Timer
	var taken []PortRange
	for _, d := range protocols {
		if d.Timeout == 0 {
			continue
		}
		var mine []PortRange
		for _, m := range d.Matches {
			if m.Proto == flow.UDP {
				mine = append(mine, m.Ports)
			}
		}
		for _, r := range subtract(merge(mine), taken) {
			timers = append(timers, Timer{r, d.Timeout})
		}
		taken = merge(append(taken, mine...))
	}
	slices.SortFunc(timers, func(a, b Timer) int { return compareRanges(a.Ports, b.Ports) })
	return timers
}

// Timers are those of the protocols that have one, disjoint and in the order of
// their ports. The slice belongs to the Policy.
func (p *Policy) Timers() []Timer { return p.timers }

// Timer is how many seconds a flow may carry nothing, by the port that it was
// sent to; 0: its protocol does not say.
func (p *Policy) Timer(t flow.Tuple) uint32 {
	if t.Proto != flow.UDP {
		return 0
	}
	i, found := slices.BinarySearchFunc(p.timers, t.Dst.Port(), func(x Timer, port uint16) int {
		switch {
		case x.Ports.Hi < port:
			return -1
		case x.Ports.Lo > port:
			return 1
		}
		return 0
	})
	if !found {
		return 0
	}
	return p.timers[i].Seconds
}
