package policy

import (
	"net/netip"
	"slices"
)

// area is a pair of prefixes.
type area struct{ src, dst netip.Prefix }

// areas are the pairs of prefixes that rule n names inside the regions, the
// widest first: what lies inside another is then found dead.
func (c *compiler) areas(f, n, in int, to []bool, regions []region) []area {
	var list []area
	for _, g := range regions {
		for _, from := range c.ix.ruleFrom[n] {
			if !c.members[in][from] {
				continue
			}
			for _, t := range c.ix.ruleTo[n] {
				if to[t] {
					list = c.crossing(f, from, t, g, list)
				}
			}
		}
	}
	widestFirst(list)
	return list
}

func widestFirst(list []area) {
	slices.SortStableFunc(list, func(a, b area) int {
		return a.src.Bits() + a.dst.Bits() - b.src.Bits() - b.dst.Bits()
	})
}

// crossing appends what two networks of a rule have in a region.
func (c *compiler) crossing(f int, from, to int32, g region, list []area) []area {
	if to == gatewayNet {
		to = anyNet // every address that a flow to the gateway can have
	}
	srcs, dsts := c.share(f, from, g.from), c.share(f, to, g.to)
	if n := len(list) + len(srcs)*len(dsts); n > maxBoxes || c.total > maxBoxes {
		c.total = max(c.total, n)
		return nil
	}
	for _, src := range srcs {
		for _, dst := range dsts {
			list = append(list, area{src, dst})
		}
	}
	return list
}

// share is what two networks have in common.
func (c *compiler) share(f int, a, b int32) []netip.Prefix {
	switch {
	case a == b || b == anyNet:
		return c.ix.nets[a].prefixes[f]
	case a == anyNet:
		return c.ix.nets[b].prefixes[f]
	}
	key := [2]int32{min(a, b), max(a, b)}
	both, ok := c.shared[f][key]
	if !ok {
		both = intersect(c.ix.nets[a].prefixes[f], c.ix.nets[b].prefixes[f])
		c.shared[f][key] = both
	}
	return both
}
