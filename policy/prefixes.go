package policy

import (
	"net/netip"
	"slices"
)

// comparePrefixes sorts by address and puts the wider of two first: the order
// in which a walk through the tree of prefixes meets them.
func comparePrefixes(a, b netip.Prefix) int {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c
	}
	return a.Bits() - b.Bits()
}

// covers says whether b lies wholly inside a.
func covers(a, b netip.Prefix) bool {
	return a.Bits() <= b.Bits() && a.Overlaps(b)
}

// disjoint sorts prefixes by family and leaves out those inside another.
func disjoint(list []netip.Prefix) (byFamily [2][]netip.Prefix) {
	sorted := slices.Clone(list)
	slices.SortFunc(sorted, comparePrefixes)
	for _, p := range sorted {
		out := &byFamily[family(p.Addr())]
		if n := len(*out); n == 0 || !covers((*out)[n-1], p) {
			*out = append(*out, p)
		}
	}
	return byFamily
}

// intersect is what two sorted, disjoint lists of one family have in common.
// Two prefixes are disjoint or nested, so it is a list of the same kind.
func intersect(a, b []netip.Prefix) []netip.Prefix {
	var both []netip.Prefix
	for len(a) > 0 && len(b) > 0 {
		switch {
		case covers(a[0], b[0]):
			both = append(both, b[0])
			b = b[1:]
		case covers(b[0], a[0]):
			both = append(both, a[0])
			a = a[1:]
		case a[0].Addr().Less(b[0].Addr()):
			a = a[1:]
		default:
			b = b[1:]
		}
	}
	return both
}
