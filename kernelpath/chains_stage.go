package kernelpath

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// stages adds the look-ups of one family and kind and says how many they are.
// A hash costs a first packet some 30 ns, with a mask 50, whatever it holds.
// Ranges cost 70 if they are few, and 300 and more if they are thousands. So
// the boxes of a stage are sorted by shape: those whose prefixes have the same
// lengths are looked up in one hash, by the masked addresses of the packet. The
// boxes of a stage are disjoint, so that the order of its look-ups is free.
//
//	chain pair_1_2_ports4 {
//		meta l4proto . th dport vmap @p1_2_ports4_0
//		meta nfproto ipv4 ip saddr and 255.255.255.0 . meta l4proto . th dport vmap @p1_2_ports4_1
//		meta nfproto ipv4 ip saddr . ip daddr . meta l4proto . th dport vmap @p1_2_ports4_2
//		goto discard
//	}
func (b *builder) stages(name, maps string, k stageKind, stages []policy.Stage, rest string, verdict boxVerdict) (int, error) {
	match := append(rule{is(fieldNFProto, k.family.nfproto)}, k.match...)
	if k.kind == policy.KindICMP {
		match = append(match, is(fieldL4Proto, protoValue(k.family.icmp)))
	}
	n := 0
	var c *chain
	for _, s := range stages {
		if s.Kind > policy.KindOther {
			return 0, fmt.Errorf("stage of kind %d is unknown", s.Kind)
		}
		if s.Is6 != (k.family.number == ipv6.number) || s.Kind != k.kind || len(s.Boxes) == 0 {
			continue
		}
		boxes, err := b.judge(k, s.Boxes, verdict)
		if err != nil {
			return 0, err
		}
		if err := checkBoxes(k, boxes); err != nil {
			return 0, err
		}
		if c == nil {
			c = b.chain(name)
		}
		for _, l := range lookupsOf(k, boxes) {
			key := l.key(k)
			if len(key) == 0 {
				c.add(l.boxes[0].to) // the only box of its stage: everything
				n++
				continue
			}
			m := &set{
				name: fmt.Sprintf("%s_%d", maps, n), key: fieldTypes(key), interval: l.last == lastRanges,
				data: []nftables.SetDatatype{nftables.TypeVerdict},
			}
			for _, x := range l.boxes {
				m.elems = append(m.elems, l.elements(k, x)...)
			}
			b.set(m)
			before := match
			if l.src+l.dst == 0 && k.kind == policy.KindPorts {
				before = nil // the chain is that of its family, and nothing here depends on it
			}
			c.add(append(slices.Clone(before), vmap(m.name, key...))...)
			n++
		}
	}
	if n > 0 && rest != "" {
		c.add(goTo(rest))
	}
	return n, nil
}

func checkBoxes(k stageKind, boxes []judgedBox) error {
	for _, x := range boxes {
		switch {
		case !x.Src.IsValid() || !x.Dst.IsValid() || x.Src.Addr().Is4() != x.Dst.Addr().Is4() ||
			x.Src.Addr().Is4() != (k.family.number == ipv4.number):
			return fmt.Errorf("box from %s to %s is not in its family", x.Src, x.Dst)
		case x.Protos[0] > x.Protos[1] || x.Ports.Lo > x.Ports.Hi:
			return errors.New("box with an empty range")
		case k.kind == policy.KindICMP && x.Ports.Hi > 255:
			return fmt.Errorf("icmp type %d does not exist", x.Ports.Hi)
		}
	}
	return nil
}

// shape is what the key of a look-up has of a packet.
type shape struct {
	// src and dst are how many bits of the address the key has; 0: it has none.
	// A key of ranges has the whole address, or none.
	src, dst int
	last     lastPart
}

// lastPart is what a key has after the addresses.
type lastPart int

const (
	lastNothing lastPart = iota // all of its kind
	lastProto                   // the protocol, of every port
	lastValues                  // the values of stageKind.last, each an element
	lastRanges                  // ranges of them, and of the addresses
)

// lookup is what one look-up decides.
type lookup struct {
	shape
	boxes []judgedBox
	// bounded: boxes of more than one port are not in it.
	bounded bool
}

const (
	// maxValues bounds the elements that the boxes of one look-up become in a
	// hash, if they are not of one port each. With addresses in the key there is
	// less to gain: people read the table, too.
	maxValues     = 4096
	maxWithPrefix = 256
	// manyBoxes is from where on a look-up of ranges costs more than several
	// hashes, of which there are at most manyHashes; below, fewHashes.
	manyBoxes  = 256
	manyHashes = 6
	fewHashes  = 2
)

// lookupsOf sorts boxes by shape, the cheapest look-up first. What has too many
// values or too rare a shape goes into one look-up of ranges, and so does
// everything where there are few boxes and one such look-up anyway.
func lookupsOf(k stageKind, boxes []judgedBox) []lookup {
	var hashes []lookup
	at := map[shape]int{}
	for _, x := range boxes {
		s := shapeOf(k, x.Box)
		if s.last == lastRanges {
			continue
		}
		i, ok := at[s]
		if !ok {
			i = len(hashes)
			at[s] = i
			hashes = append(hashes, lookup{shape: s})
		}
		hashes[i].boxes = append(hashes[i].boxes, x)
	}
	hashed := 0
	for i := range hashes {
		hashes[i].bound(k)
		hashed += len(hashes[i].boxes)
	}
	hashes = slices.DeleteFunc(hashes, func(l lookup) bool { return len(l.boxes) == 0 })
	slices.SortStableFunc(hashes, func(x, y lookup) int { return cmp.Compare(len(y.boxes), len(x.boxes)) })
	switch {
	case len(boxes) >= manyBoxes:
		hashes = hashes[:min(len(hashes), manyHashes)]
	case hashed < len(boxes) || len(hashes) > fewHashes:
		hashes = nil
	}
	slices.SortStableFunc(hashes, func(x, y lookup) int { return cmp.Compare(x.fields(), y.fields()) })
	left := slices.DeleteFunc(slices.Clone(boxes), func(x judgedBox) bool {
		return slices.ContainsFunc(hashes, func(l lookup) bool { return l.takes(k, x.Box) })
	})
	if len(left) > 0 {
		hashes = append(hashes, lookup{shape: rangesOf(k, left), boxes: left})
	}
	return hashes
}

// takes says whether a box is in the hash.
func (l lookup) takes(k stageKind, x policy.Box) bool {
	return shapeOf(k, x) == l.shape && (!l.bounded || values(k, x) <= 2)
}

// bound leaves the boxes of more than one port out, if the hash would have too
// many elements with them.
func (l *lookup) bound(k stageKind) {
	if l.last != lastValues {
		return
	}
	n, most := 0, maxValues
	if l.src+l.dst > 0 {
		most = maxWithPrefix
	}
	for _, x := range l.boxes {
		n += values(k, x.Box)
	}
	if l.bounded = n > max(most, 2*len(l.boxes)); l.bounded {
		l.boxes = slices.DeleteFunc(l.boxes, func(x judgedBox) bool { return !l.takes(k, x.Box) })
	}
}

// shapeOf is the shape of the hash that a box would be in; lastRanges: it has
// too many values for one.
func shapeOf(k stageKind, x policy.Box) shape {
	s := shape{src: x.Src.Bits(), dst: x.Dst.Bits(), last: lastValues}
	all := policy.PortRange{Lo: 0, Hi: 65535}
	switch {
	case k.kind == policy.KindPorts && x.Ports == all && x.Protos == [2]flow.Proto{flow.TCP, flow.UDP},
		k.kind == policy.KindICMP && x.Ports == policy.PortRange{Lo: 0, Hi: 255},
		k.kind == policy.KindOther && x.Protos == [2]flow.Proto{0, 255}:
		s.last = lastNothing
	case k.kind == policy.KindPorts && x.Ports == all:
		s.last = lastProto
	case values(k, x) > maxValues:
		return shape{last: lastRanges}
	}
	return s
}

// values is how many elements of a hash a box makes.
func values(k stageKind, x policy.Box) int {
	n := int(x.Ports.Hi) - int(x.Ports.Lo) + 1
	switch k.kind {
	case policy.KindPorts:
		return n * len(singleProtos(k, x))
	case policy.KindOther:
		return int(x.Protos[1]) - int(x.Protos[0]) + 1
	}
	return n
}

// rangesOf is the shape of one look-up of ranges for boxes. A field that is
// anything in each of them is left out, but two fields there must be.
func rangesOf(k stageKind, boxes []judgedBox) shape {
	s := shape{last: lastRanges}
	for _, x := range boxes {
		s.src, s.dst = max(s.src, x.Src.Bits()), max(s.dst, x.Dst.Bits())
	}
	if k.kind != policy.KindPorts {
		s.dst = max(s.dst, 1)
	}
	return s
}

// fields is how many fields the key has, to compare what look-ups cost.
func (s shape) fields() int {
	n := int(s.last)
	for _, bits := range []int{s.src, s.dst} {
		if bits > 0 {
			n += int(lastRanges) + 1
		}
	}
	return n
}

func (s shape) key(k stageKind) []field {
	var key []field
	for _, a := range []struct {
		field
		bits int
	}{{k.family.saddr, s.src}, {k.family.daddr, s.dst}} {
		switch {
		case a.bits == 0:
		case s.last == lastRanges:
			key = append(key, a.field)
		default:
			key = append(key, firstBits(a.field, k.family, a.bits))
		}
	}
	switch s.last {
	case lastNothing:
		return key
	case lastProto:
		return append(key, fieldL4Proto)
	}
	return append(key, k.last...)
}

// singleProtos are the protocols of a box of KindPorts.
func singleProtos(k stageKind, x policy.Box) []flow.Proto {
	var out []flow.Proto
	for _, p := range k.protos {
		if x.Protos[0] <= p && p <= x.Protos[1] {
			out = append(out, p)
		}
	}
	return out
}

// elements are a box in the map of its look-up: one with a range in every field,
// or each of its values.
func (s shape) elements(k stageKind, x judgedBox) []element {
	address := prefixExtent
	if s.last != lastRanges {
		address = firstExtent
	}
	var addrs []extent
	if s.src > 0 {
		addrs = append(addrs, address(x.Src))
	}
	if s.dst > 0 {
		addrs = append(addrs, address(x.Dst))
	}
	var list []element
	for _, last := range s.lasts(k, x.Box) {
		e := makeElement(append(addrs[:len(addrs):len(addrs)], last...), x.to)
		if s.last != lastRanges {
			e.end = nil
		}
		list = append(list, e)
	}
	return list
}

// lasts are what the keys of a box have after the addresses.
func (s shape) lasts(k stageKind, x policy.Box) (list [][]extent) {
	protos := singleProtos(k, x)
	switch {
	case s.last == lastNothing:
		return [][]extent{nil}
	case s.last == lastRanges && k.kind == policy.KindPorts:
		return [][]extent{{protoExtent(x.Protos), portExtent(x.Ports)}}
	case s.last == lastRanges && k.kind == policy.KindICMP:
		return [][]extent{{byteExtent(byte(x.Ports.Lo), byte(x.Ports.Hi))}}
	case s.last == lastRanges:
		return [][]extent{{protoExtent(x.Protos)}}
	case s.last == lastProto:
		for _, p := range protos {
			list = append(list, []extent{protoExtent([2]flow.Proto{p, p})})
		}
		return list
	case k.kind == policy.KindOther:
		for p := int(x.Protos[0]); p <= int(x.Protos[1]); p++ {
			list = append(list, []extent{protoExtent([2]flow.Proto{flow.Proto(p), flow.Proto(p)})})
		}
		return list
	}
	if k.kind == policy.KindICMP {
		for t := int(x.Ports.Lo); t <= int(x.Ports.Hi); t++ {
			list = append(list, []extent{byteExtent(byte(t), byte(t))})
		}
		return list
	}
	for _, p := range protos {
		for port := int(x.Ports.Lo); port <= int(x.Ports.Hi); port++ {
			one := policy.PortRange{Lo: uint16(port), Hi: uint16(port)}
			list = append(list, []extent{protoExtent([2]flow.Proto{p, p}), portExtent(one)})
		}
	}
	return list
}
