package policy

import (
	"net/netip"
	"slices"
)

// layer sorts boxes of one family and kind, in the order in which they are
// tried, into stages: a box stands one stage behind the highest that an
// earlier box with which it overlaps stands in. Boxes inside an earlier one
// can never be hit and are left out.
//
// To find the earlier boxes that overlap, each of the three dimensions has an
// index; the one that offers the fewest candidates is asked.
func layer(boxes []Box, kind Kind) [][]Box {
	if len(boxes) == 0 {
		return nil
	}
	src := newPrefixLine(boxes, func(b *Box) netip.Prefix { return b.Src })
	dst := newPrefixLine(boxes, func(b *Box) netip.Prefix { return b.Dst })
	prt := newPortLine(boxes, kind)

	var stages [][]Box
	stageOf := make([]int32, len(boxes)) // -1: dead
	for i := range boxes {
		b := &boxes[i]
		stage, dead := int32(0), false
		look := func(candidates []int32) bool {
			for _, j := range candidates {
				if int(j) >= i {
					return true
				}
				if stageOf[j] < 0 || !overlap(b, &boxes[j]) {
					continue
				}
				if contains(&boxes[j], b) {
					dead = true
					return false
				}
				stage = max(stage, stageOf[j]+1)
			}
			return true
		}
		bySrc, byDst, byPort := src.count(i), dst.count(i), prt.count(b)
		switch {
		case bySrc <= byDst && bySrc <= byPort:
			src.each(i, look)
		case byDst <= byPort:
			dst.each(i, look)
		default:
			prt.each(b, look)
		}
		if dead {
			stageOf[i] = -1
			continue
		}
		stageOf[i] = stage
		for len(stages) <= int(stage) {
			stages = append(stages, nil)
		}
		stages[stage] = append(stages[stage], *b)
	}
	return stages
}

func overlap(a, b *Box) bool {
	return a.Ports.Lo <= b.Ports.Hi && b.Ports.Lo <= a.Ports.Hi &&
		a.Protos[0] <= b.Protos[1] && b.Protos[0] <= a.Protos[1] &&
		a.Src.Overlaps(b.Src) && a.Dst.Overlaps(b.Dst)
}

// contains says whether b lies wholly inside a.
func contains(a, b *Box) bool {
	return a.Ports.Lo <= b.Ports.Lo && b.Ports.Hi <= a.Ports.Hi &&
		a.Protos[0] <= b.Protos[0] && b.Protos[1] <= a.Protos[1] &&
		covers(a.Src, b.Src) && covers(a.Dst, b.Dst)
}

// prefixLine has the distinct prefixes of the boxes in the order of a walk
// through their tree: all that lie inside one follow it.
type prefixLine struct {
	ids    [][]int32 // boxes with this prefix, ascending
	parent []int32   // the next wider prefix that is there; -1: none
	end    []int32   // the first one behind that is not inside
	before []int     // how many boxes there are before this place
	place  []int32   // by box
}

func newPrefixLine(boxes []Box, get func(*Box) netip.Prefix) *prefixLine {
	distinct := make([]netip.Prefix, 0, len(boxes))
	for i := range boxes {
		distinct = append(distinct, get(&boxes[i]))
	}
	slices.SortFunc(distinct, comparePrefixes)
	distinct = slices.Compact(distinct)
	n := len(distinct)
	l := &prefixLine{
		ids: make([][]int32, n), parent: make([]int32, n), end: make([]int32, n),
		before: make([]int, n+1), place: make([]int32, len(boxes)),
	}
	at := make(map[netip.Prefix]int32, n)
	open := int32(-1)
	for i, p := range distinct {
		at[p] = int32(i)
		for open >= 0 && !covers(distinct[open], p) {
			l.end[open] = int32(i)
			open = l.parent[open]
		}
		l.parent[i] = open
		open = int32(i)
	}
	for ; open >= 0; open = l.parent[open] {
		l.end[open] = int32(n)
	}
	for i := range boxes {
		k := at[get(&boxes[i])]
		l.place[i] = k
		l.ids[k] = append(l.ids[k], int32(i))
	}
	for k := range n {
		l.before[k+1] = l.before[k] + len(l.ids[k])
	}
	return l
}

// count is how many boxes each offers for box i.
func (l *prefixLine) count(i int) int {
	k := l.place[i]
	n := l.before[l.end[k]] - l.before[k]
	for k = l.parent[k]; k >= 0; k = l.parent[k] {
		n += len(l.ids[k])
	}
	return n
}

// each offers the boxes whose prefix overlaps that of box i, list by list,
// until look says no.
func (l *prefixLine) each(i int, look func([]int32) bool) {
	k := l.place[i]
	for p := l.parent[k]; p >= 0; p = l.parent[p] {
		if !look(l.ids[p]) {
			return
		}
	}
	for p := k; p < l.end[k]; p++ {
		if !look(l.ids[p]) {
			return
		}
	}
}

// portLine has the boxes by blocks of ports (for KindOther, of protocol
// numbers); those that span many blocks are in a list of their own.
type portLine struct {
	kind   Kind
	blocks [1 << 16 / portBlock][]int32
	wide   []int32
}

const (
	portBlock  = 64
	wideBlocks = 8
)

func newPortLine(boxes []Box, kind Kind) *portLine {
	l := &portLine{kind: kind}
	for i := range boxes {
		lo, hi := l.span(&boxes[i])
		if hi-lo >= wideBlocks {
			l.wide = append(l.wide, int32(i))
			continue
		}
		for k := lo; k <= hi; k++ {
			l.blocks[k] = append(l.blocks[k], int32(i))
		}
	}
	return l
}

func (l *portLine) span(b *Box) (lo, hi int) {
	if l.kind == KindOther {
		return int(b.Protos[0]) / portBlock, int(b.Protos[1]) / portBlock
	}
	return int(b.Ports.Lo) / portBlock, int(b.Ports.Hi) / portBlock
}

func (l *portLine) count(b *Box) int {
	n := len(l.wide)
	lo, hi := l.span(b)
	for k := lo; k <= hi; k++ {
		n += len(l.blocks[k])
	}
	return n
}

func (l *portLine) each(b *Box, look func([]int32) bool) {
	if !look(l.wide) {
		return
	}
	lo, hi := l.span(b)
	for k := lo; k <= hi; k++ {
		if !look(l.blocks[k]) {
			return
		}
	}
}
