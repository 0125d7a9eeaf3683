package kernelpath

import (
	"fmt"

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
//
// rest is the chain for what no stage has. See stages for the others.
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
