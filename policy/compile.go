package policy

import (
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"github.com/sluicegw/sluice/flow"
)

// maxBoxes bounds what Compile makes: far beyond any hand-written policy, and
// below what would fill the memory.
const maxBoxes = 2_000_000

// Compile expands the policy to lookups. For every Question the simulation of
// the result gives the Class that Judge gives. The error says that the policy
// multiplies to more than two million boxes.
func (p *Policy) Compile() (Compiled, error) {
	c := newCompiler(p)
	out := Compiled{Zones: c.zones(), Publications: c.publications()}
	for in := range out.Zones {
		c.publish(in)
		if stages := c.stages(0); len(stages) > 0 {
			out.Publish = append(out.Publish, Table{In: in, Stages: stages})
		}
		t := Table{In: in}
		for f := range 2 {
			c.input(f, in)
			t.Stages = append(t.Stages, c.stages(f)...)
		}
		if len(t.Stages) > 0 {
			out.Input = append(out.Input, t)
		}
		for outZone := range out.Zones {
			t := Table{In: in, Out: outZone}
			for f := range 2 {
				c.forward(f, in, outZone)
				t.Stages = append(t.Stages, c.stages(f)...)
			}
			if len(t.Stages) > 0 {
				out.Forward = append(out.Forward, t)
			}
			if c.total > maxBoxes {
				return Compiled{}, fmt.Errorf("compile the policy: networks and protocols of the rules multiply to more than %d combinations", maxBoxes)
			}
		}
	}
	return out, nil
}

// compiler expands one family of one pair of zones at a time.
type compiler struct {
	*Policy
	// defined are the cells of all definitions together.
	defined cellsByFamily
	rules   []ruleCells
	// members has, for each zone, the networks whose hosts can be behind it.
	members [][]bool
	// naming has, for each zone, the rules that name one of members, as bits:
	// on the From side, and on the To side.
	naming [2][][]uint64
	shared [2]map[[2]int32][]netip.Prefix // by family: prefixes that two networks share
	// pinholes are the rules that publish an IPv6 server, as bits; numbers has
	// Box.Publication of each rule.
	pinholes []uint64
	numbers  []int

	boxes []Box // of the family and pair at hand, in the order of the rules
	total int   // boxes made so far; beyond maxBoxes nothing more is made
}

// ruleCells are what a rule says about protocols: the flows that a filter of
// the rule (or no kernel mode) takes to user space, and the others.
type ruleCells struct{ ask, others cellsByFamily }

func newCompiler(p *Policy) *compiler {
	c := &compiler{Policy: p}
	for f := range c.shared {
		c.shared[f] = map[[2]int32][]netip.Prefix{}
	}
	var matches []Match
	for i := range p.protocols {
		matches = append(matches, p.protocols[i].Matches...)
	}
	c.defined = spansOf(matches).cells()
	for i := range p.rules {
		c.rules = append(c.rules, p.cellsOfRule(i))
	}
	return c
}

func (p *Policy) cellsOfRule(n int) ruleCells {
	r := &p.rules[n]
	var matches, asked []Match
	all := false
	for _, id := range p.ix.ruleProtos[n] {
		if id == anyProto {
			all = true
			continue
		}
		d := &p.protocols[id-firstProto]
		matches = append(matches, d.Matches...)
		if d.Filter != "" && slices.ContainsFunc(r.Filters, func(u FilterUse) bool { return u.Name == d.Filter }) {
			asked = append(asked, d.Matches...)
		}
	}
	whole := spansOf(matches)
	if all {
		whole = allSpans()
	}
	ask := spansOf(asked).carried()
	if r.NoKernelMode {
		ask = whole.carried()
	}
	return ruleCells{ask.cells(), whole.withoutPorts(ask).cells()}
}

// zones sorts the interfaces into classes that no network tells apart, and
// prepares what is known about each.
func (c *compiler) zones() []Zone {
	var named []string // interfaces, in the order of the networks
	naming := map[string][]string{}
	for id, n := range c.networks {
		for _, iface := range n.Interfaces {
			if naming[iface] == nil {
				named = append(named, iface)
			}
			naming[iface] = append(naming[iface], fmt.Sprint(id))
		}
	}
	zones := []Zone{{}}
	byNetworks := map[string]int{}
	for _, iface := range named {
		key := strings.Join(naming[iface], " ")
		id, ok := byNetworks[key]
		if !ok {
			id = len(zones)
			byNetworks[key] = id
			zones = append(zones, Zone{ID: id})
		}
		zones[id].Interfaces = append(zones[id].Interfaces, iface)
	}
	words := (len(c.rules) + 63) / 64
	for _, z := range zones {
		iface := "" // no interface has this name: every other one
		if len(z.Interfaces) > 0 {
			iface = z.Interfaces[0]
		}
		members := make([]bool, len(c.ix.nets))
		from, to := make([]uint64, words), make([]uint64, words)
		for id := range members {
			members[id] = int32(id) != gatewayNet && c.ix.nets[id].reachedThrough(iface)
			if members[id] {
				unite(from, c.ix.from[id])
				unite(to, c.ix.to[id])
			}
		}
		c.members = append(c.members, members)
		c.naming[0], c.naming[1] = append(c.naming[0], from), append(c.naming[1], to)
	}
	return zones
}

func unite(set []uint64, p posting) {
	for _, w := range p {
		set[w.at] |= w.bits
	}
}

// region is a part of a pair of zones that one direction of one network rule
// joins. A flow belongs to the first region that holds it.
type region struct {
	from, to int32 // networks
	tell     bool  // its initiators are told about refusals
	// everyProtocol: also about protocols that nobody defined.
	everyProtocol bool
	// maps: flows leave by mappings of netRule.
	maps    bool
	netRule int32
}

// regions are what network rules join between two zones.
func (c *compiler) regions(f, in, out int) []region {
	var list []region
	for i, r := range c.netRules {
		from, to := c.ix.netRules[i][0], c.ix.netRules[i][1]
		if c.members[in][from] && c.members[out][to] {
			maps := f == 0 && c.netRules[i].Maps(flow.TCP)
			list = append(list, region{from: from, to: to, tell: true, everyProtocol: true, maps: maps, netRule: int32(i)})
		}
		if (r.Relation == Route || f == 1) && c.members[in][to] && c.members[out][from] {
			list = append(list, region{from: to, to: from, everyProtocol: true})
		}
	}
	return list
}

// forward expands the rules between two zones.
func (c *compiler) forward(f, in, out int) {
	c.boxes = c.boxes[:0]
	regions := c.regions(f, in, out)
	if len(regions) == 0 {
		return
	}
	from, to := c.naming[0][in], c.naming[1][out]
	for w := range from {
		named := to[w]
		if f == 1 {
			named |= c.pinholes[w]
		}
		for set := from[w] & named; set != 0; set &= set - 1 {
			n := w*64 + bits.TrailingZeros64(set)
			c.rule(f, n, in, c.members[out], regions)
		}
	}
	c.rest(f, regions)
}

// inputRegions are the sources behind a zone that are told about refusals of the
// gateway itself, then all of them.
func (c *compiler) inputRegions(in int) []region {
	var regions []region
	for id, inside := range c.ix.inside {
		if inside && c.members[in][id] {
			regions = append(regions, region{from: int32(id), to: anyNet, tell: true})
		}
	}
	return append(regions, region{from: anyNet, to: anyNet})
}

// input expands the rules from a zone to the gateway itself.
func (c *compiler) input(f, in int) {
	c.boxes = c.boxes[:0]
	regions := c.inputRegions(in)
	gateway := make([]bool, len(c.ix.nets))
	gateway[gatewayNet] = true
	for _, w := range c.ix.to[gatewayNet] {
		for set := w.bits & c.naming[0][in][w.at]; set != 0; set &= set - 1 {
			n := int(w.at)*64 + bits.TrailingZeros64(set)
			c.rule(f, n, in, gateway, regions)
		}
	}
	c.rest(f, regions)
}

// rule expands access rule n for sources behind a zone and destinations in
// one of the networks to.
func (c *compiler) rule(f, n, in int, to []bool, regions []region) {
	r, cells := &c.Policy.rules[n], &c.rules[n]
	if len(r.Users) > 0 {
		return // what the kernel sees has no user
	}
	if r.Action == Publish {
		c.pinhole(f, n, in, regions)
		return
	}
	if r.Action == Deny && r.Refusal == RefuseAuto {
		for _, g := range regions {
			told := cells.others[f]
			if g.tell && !g.everyProtocol && slices.Contains(c.ix.ruleProtos[n], anyProto) {
				told = c.defined[f]
			}
			c.fill(c.areas(f, n, in, to, []region{g}), told, refusal(RefuseAuto, g.tell))
		}
		return
	}
	areas := c.areas(f, n, in, to, regions)
	if r.Action == Deny {
		c.fill(areas, cells.others[f], refusal(r.Refusal, false))
		return
	}
	c.fill(areas, cells.ask[f], r.ask())
	if !slices.ContainsFunc(regions, func(g region) bool { return g.maps }) {
		c.fill(areas, cells.others[f], ClassKernel)
		return
	}
	for _, g := range regions {
		class := ClassKernel
		if g.maps {
			class = r.mapped()
		}
		areas, endpoints, rest := c.areas(f, n, in, to, []region{g}), cells.others[f], []cell(nil)
		if g.maps {
			endpoints, rest = withEndpoints(endpoints)
		}
		c.fillFor(areas, endpoints, class, g.netRule)
		c.fill(areas, rest, ClassKernel)
	}
}

// withEndpoints splits off the cells of protocols that have no endpoints.
func withEndpoints(cells []cell) (with, without []cell) {
	for _, l := range cells {
		if l.kind == KindOther {
			without = append(without, l)
		} else {
			with = append(with, l)
		}
	}
	return with, without
}

// rest expands the default: initiators on the From side are told that a
// protocol that exists is refused. What lies in no box is dropped, so that a
// region of silence only counts where another one follows.
func (c *compiler) rest(f int, regions []region) {
	last := len(regions) - 1
	for last >= 0 && !regions[last].tell {
		last--
	}
	for _, g := range regions[:last+1] {
		areas := c.crossing(f, g.from, g.to, g, nil)
		c.fill(areas, c.defined[f], refusal(RefuseAuto, g.tell))
	}
}

// fill makes boxes of one class.
func (c *compiler) fill(areas []area, cells []cell, class Class) { c.fillFor(areas, cells, class, 0) }

// fillFor makes boxes of one class and, for mappings, one network rule.
func (c *compiler) fillFor(areas []area, cells []cell, class Class, netRule int32) {
	n := len(areas) * len(cells)
	if c.total += n; c.total > maxBoxes {
		return
	}
	c.boxes = slices.Grow(c.boxes, n)
	for _, a := range areas {
		for _, l := range cells {
			c.boxes = append(c.boxes, Box{Src: a.src, Dst: a.dst, Protos: l.protos, Ports: l.ports, Class: class, NetworkRule: netRule})
		}
	}
}

// stages sorts the boxes at hand, all of one family, into lookups.
func (c *compiler) stages(f int) []Stage {
	var byKind [KindOther + 1][]Box
	for _, b := range c.boxes {
		k := kindOf(b.Protos[0], f)
		byKind[k] = append(byKind[k], b)
	}
	var out []Stage
	for k, boxes := range byKind {
		for _, stage := range layer(boxes, Kind(k)) {
			out = append(out, Stage{Is6: f == 1, Kind: Kind(k), Boxes: stage})
		}
	}
	return out
}
