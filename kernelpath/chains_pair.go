package kernelpath

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// mapZones leads from the interface a packet came from to the chain of its
// zone.
const mapZones = "zones"

func zoneChain(id int) string { return fmt.Sprintf("from_%d", id) }

func pairChain(in, out int) string { return fmt.Sprintf("pair_%d_%d", in, out) }

// pairs leads a first packet to the table of its two zones: the interface it
// came from, and the one that its route leaves by. Zone 0 is what no name
// matches.
//
//	chain from_1 {
//		fib daddr . mark oifname vmap { "wan0" : goto pair_1_2, "lan0" : goto discard }
//		goto pair_1_0
//	}
func (b *builder) pairs() error {
	c := b.in.Compiled
	if err := checkZones(c.Zones); err != nil {
		return err
	}
	tables := map[[2]int]policy.Table{}
	for _, t := range c.Forward {
		at := [2]int{t.In, t.Out}
		if t.In < 0 || t.Out < 0 || t.In > max(0, len(c.Zones)-1) || t.Out > max(0, len(c.Zones)-1) {
			return fmt.Errorf("table for zones %d and %d: no such zone", t.In, t.Out)
		}
		if _, twice := tables[at]; twice {
			return fmt.Errorf("two tables for zones %d and %d", t.In, t.Out)
		}
		tables[at] = t
	}
	to := func(in, out int) stmt {
		if _, ok := tables[[2]int{in, out}]; ok {
			return goTo(pairChain(in, out))
		}
		return goTo(chainDiscard)
	}
	for in := range max(1, len(c.Zones)) {
		f := b.chain(zoneChain(in))
		var branches []branch
		for out := 1; out < len(c.Zones); out++ {
			for _, name := range c.Zones[out].Interfaces {
				branches = append(branches, branch{[]value{ifNameValue(name)}, to(in, out)})
			}
		}
		if len(branches) > 0 {
			f.add(switchOn([]field{fieldOutRoute}, branches))
		}
		f.add(to(in, 0))
	}
	for _, t := range c.Forward {
		if err := b.table(pairChain(t.In, t.Out), fmt.Sprintf("p%d_%d", t.In, t.Out), t, chainDiscard, b.forwardVerdict); err != nil {
			return err
		}
	}
	return nil
}

func checkZones(zones []policy.Zone) error {
	seen := map[string]int{}
	for i, z := range zones {
		if z.ID != i || (i == 0) != (len(z.Interfaces) == 0) {
			return fmt.Errorf("zone %d has the number %d and %d interfaces", i, z.ID, len(z.Interfaces))
		}
		for _, name := range z.Interfaces {
			if err := checkInterface(name); err != nil {
				return err
			}
			if j, twice := seen[name]; twice {
				return fmt.Errorf("interface %q is in zones %d and %d", name, j, i)
			}
			seen[name] = i
		}
	}
	return nil
}

// fewInterfaces are compared with one after the other, which costs a first packet
// less than looking one of them up.
const fewInterfaces = 4

// byInterface leads from the interface a packet came from to the chain of its
// zone: by comparisons, or by a map of that name.
func (b *builder) byInterface(c *chain, name string, to func(id int) stmt) {
	zones := b.in.Compiled.Zones
	if len(zones) <= 1 {
		return
	}
	n := 0
	for _, z := range zones {
		n += len(z.Interfaces)
	}
	if n > fewInterfaces {
		b.zoneMap(name, to)
		c.add(vmap(name, fieldIIfName))
		return
	}
	for _, z := range zones[1:] {
		for _, i := range z.Interfaces {
			c.add(is(fieldIIfName, ifNameValue(i)), to(z.ID))
		}
	}
}

// zoneMap is a verdict map from the names of all zones but zone 0.
func (b *builder) zoneMap(name string, to func(id int) stmt) {
	s := &set{name: name, key: []nftables.SetDatatype{nftables.TypeIFName}, data: []nftables.SetDatatype{nftables.TypeVerdict}}
	for _, z := range b.in.Compiled.Zones[1:] {
		for _, i := range z.Interfaces {
			s.elems = append(s.elems, verdictElement([]value{ifNameValue(i)}, to(z.ID)))
		}
	}
	b.set(s)
}

// boxVerdict is what becomes of the first packets of a box.
type boxVerdict func(policy.Box) (stmt, error)

func (b *builder) forwardVerdict(x policy.Box) (stmt, error) {
	switch x.Class {
	case policy.ClassKernel:
		if x.Publication != 0 {
			return goTo(chainCarryFirst), nil
		}
		return goTo(b.plain()), nil
	case policy.ClassReject:
		return goTo(chainRefuse), nil
	case policy.ClassDrop:
		return goTo(chainDiscard), nil
	case policy.ClassAsk:
		return goTo(chainAsk), nil
	case policy.ClassAskOpen:
		return goTo(chainAskOpen), nil
	case policy.ClassMap, policy.ClassMapOpen:
		if n := int(x.NetworkRule); n < len(b.in.NetworkRules) && b.in.NetworkRules[n].Mapping == policy.MapEndpointIndependent {
			return goTo(mappedChain(b.in.NetworkRules[n].Name, x.Class == policy.ClassMapOpen)), nil
		}
		return stmt{}, fmt.Errorf("network rule %d maps no endpoints", x.NetworkRule)
	}
	return stmt{}, fmt.Errorf("class %d is unknown", x.Class)
}

// inputVerdict: nothing that the gateway itself receives is asked about.
func inputVerdict(x policy.Box) (stmt, error) {
	switch x.Class {
	case policy.ClassKernel:
		return accept(), nil
	case policy.ClassReject:
		return goTo(chainRefuse), nil
	case policy.ClassDrop:
		return goTo(chainUnwanted), nil
	}
	return stmt{}, fmt.Errorf("class %d cannot be that of a flow to the gateway itself", x.Class)
}

// stageKind is what the stages of one family and kind have in common.
type stageKind struct {
	name   string
	family family
	kind   policy.Kind
	protos []flow.Proto // empty: every other one
	last   []field      // of the key, after the addresses
	match  rule         // what nft wants to know before the key
}

func stageKinds() []stageKind {
	var kinds []stageKind
	for _, f := range []family{ipv4, ipv6} {
		kinds = append(kinds,
			stageKind{"ports" + f.suffix, f, policy.KindPorts, []flow.Proto{flow.TCP, flow.UDP}, []field{fieldL4Proto, fieldDport}, nil},
			stageKind{"icmp" + f.suffix, f, policy.KindICMP, []flow.Proto{f.icmp}, []field{f.icmpType}, nil},
			stageKind{"other" + f.suffix, f, policy.KindOther, nil, []field{fieldL4Proto}, nil})
	}
	return kinds
}

// table is the chain of one table: by family and protocol to a row of lookups.
//
//	chain pair_1_2 {
//		meta nfproto . meta l4proto vmap { ipv4 . tcp : goto pair_1_2_ports4, ... }
//		meta nfproto ipv4 goto pair_1_2_other4
//		goto discard
//	}
//	chain pair_1_2_ports4 {
//		meta nfproto ipv4 meta l4proto . th dport vmap @p1_2_ports4_0
//		meta nfproto ipv4 ip saddr . ip daddr . meta l4proto . th dport vmap @p1_2_ports4_1
//		goto discard
//	}
//
// rest is the chain for what no stage has.
func (b *builder) table(name, short string, t policy.Table, rest string, verdict boxVerdict) error {
	top := b.chain(name)
	var branches []branch
	var others []rule
	for _, k := range stageKinds() {
		sub := name + "_" + k.name
		n, err := b.stages(sub, short+"_"+k.name, k, t.Stages, rest, verdict)
		if err != nil {
			return fmt.Errorf("table of zones %d and %d: %w", t.In, t.Out, err)
		}
		for _, p := range k.protos {
			to := goTo(sub)
			if n == 0 {
				to = goTo(rest)
			}
			branches = append(branches, branch{[]value{k.family.nfproto, protoValue(p)}, to})
		}
		if n > 0 && len(k.protos) == 0 {
			others = append(others, rule{is(fieldNFProto, k.family.nfproto), goTo(sub)})
		}
	}
	top.add(switchOn([]field{fieldNFProto, fieldL4Proto}, branches))
	top.rules = append(top.rules, others...)
	top.add(goTo(rest))
	return nil
}

// stages adds the lookups of one family and kind and says how many they are.
func (b *builder) stages(chain, maps string, k stageKind, stages []policy.Stage, rest string, verdict boxVerdict) (int, error) {
	match := append(rule{is(fieldNFProto, k.family.nfproto)}, k.match...)
	if k.kind == policy.KindICMP {
		match = append(match, is(fieldL4Proto, protoValue(k.family.icmp)))
	}
	n := 0
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
		shape := shapeOf(k, boxes)
		key := shape.key(k)
		m := &set{
			name: fmt.Sprintf("%s_%d", maps, n), key: fieldTypes(key), interval: !shape.exact,
			data: []nftables.SetDatatype{nftables.TypeVerdict},
		}
		for _, x := range boxes {
			e, err := boxElements(k, shape, x.Box, x.to)
			if err != nil {
				return 0, err
			}
			m.elems = append(m.elems, e...)
		}
		b.set(m)
		if n == 0 {
			b.chain(chain)
		}
		c := b.r.chains[len(b.r.chains)-1]
		c.add(append(append(rule{}, match...), vmap(m.name, key...))...)
		n++
	}
	if n > 0 && rest != "" {
		b.r.chains[len(b.r.chains)-1].add(goTo(rest))
	}
	return n, nil
}

// shape is what the key of one stage looks like. A field that is anything in
// every box is left out, and where few single values remain they are looked up
// in a hash: both cost a new flow a fraction of a look-up of ranges.
type shape struct {
	src, dst bool // the key has the address
	exact    bool // no ranges
}

// maxExact bounds the elements that the ranges of one stage become in a hash.
const maxExact = 4096

func shapeOf(k stageKind, boxes []judgedBox) shape {
	s := shape{exact: k.kind == policy.KindPorts}
	elements := 0
	for _, x := range boxes {
		s.src = s.src || x.Src.Bits() != 0
		s.dst = s.dst || x.Dst.Bits() != 0
		elements += len(singleProtos(k, x.Box)) * (int(x.Ports.Hi) - int(x.Ports.Lo) + 1)
		single := func(p netip.Prefix) bool { return p.Bits() == 0 || p.IsSingleIP() }
		if elements > maxExact || !single(x.Src) || !single(x.Dst) {
			s.exact = false
		}
	}
	for _, x := range boxes {
		// Anything beside a single address is a range.
		if s.src && x.Src.Bits() == 0 || s.dst && x.Dst.Bits() == 0 {
			s.exact = false
		}
	}
	if k.kind != policy.KindPorts {
		s.dst = true // a key of ranges has two fields
	}
	return s
}

func (s shape) key(k stageKind) []field {
	var key []field
	if s.src {
		key = append(key, k.family.saddr)
	}
	if s.dst {
		key = append(key, k.family.daddr)
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

// boxElements is one box of a stage: one element with a range in every field
// of the key, or each of its values.
func boxElements(k stageKind, s shape, x policy.Box, to stmt) ([]element, error) {
	if !x.Src.IsValid() || !x.Dst.IsValid() || x.Src.Addr().Is4() != x.Dst.Addr().Is4() ||
		x.Src.Addr().Is4() != (k.family.number == ipv4.number) {
		return nil, fmt.Errorf("box from %s to %s is not in its family", x.Src, x.Dst)
	}
	if x.Protos[0] > x.Protos[1] || x.Ports.Lo > x.Ports.Hi {
		return nil, errors.New("box with an empty range")
	}
	if k.kind == policy.KindICMP && x.Ports.Hi > 255 {
		return nil, fmt.Errorf("icmp type %d does not exist", x.Ports.Hi)
	}
	var addrs []extent
	address := prefixExtent
	if s.exact {
		address = hostOrPrefix
	}
	if s.src {
		addrs = append(addrs, address(x.Src))
	}
	if s.dst {
		addrs = append(addrs, address(x.Dst))
	}
	if !s.exact {
		last := []extent{protoExtent(x.Protos)}
		switch k.kind {
		case policy.KindPorts:
			last = append(last, portExtent(x.Ports))
		case policy.KindICMP:
			last = []extent{byteExtent(byte(x.Ports.Lo), byte(x.Ports.Hi))}
		}
		e := makeElement(append(addrs, last...), to)
		return []element{e}, nil
	}
	var out []element
	for _, p := range singleProtos(k, x) {
		for port := int(x.Ports.Lo); port <= int(x.Ports.Hi); port++ {
			one := policy.PortRange{Lo: uint16(port), Hi: uint16(port)}
			e := makeElement(append(addrs[:len(addrs):len(addrs)], protoExtent([2]flow.Proto{p, p}), portExtent(one)), to)
			e.end = nil
			out = append(out, e)
		}
	}
	return out, nil
}
