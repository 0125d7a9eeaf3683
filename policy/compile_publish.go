package policy

import (
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/flow"
)

// publications numbers the rules that publish, and notes those that have an
// IPv6 server.
func (c *compiler) publications() []Published {
	c.pinholes, c.numbers = make([]uint64, (len(c.rules)+63)/64), make([]int, len(c.rules))
	var out []Published
	for n := range c.Policy.rules {
		r := &c.Policy.rules[n]
		if r.Action != Publish {
			continue
		}
		out = append(out, Published{r.Name, *r.Publication, c.ix.published.ports[n]})
		c.numbers[n] = len(out)
		if r.Publication.Server(true).IsValid() {
			c.pinholes[n/64] |= 1 << (n % 64)
		}
	}
	return out
}

// publish expands what is published at addresses of the gateway for sources
// behind a zone. What the gateway's own rules decide before stands there only
// where it takes flows away from a server.
func (c *compiler) publish(in int) {
	c.boxes = c.boxes[:0]
	if c.ix.published.at == nil {
		return
	}
	var own []int // boxes of flows that are for the gateway itself
	for n := range c.Policy.rules {
		r := &c.Policy.rules[n]
		before := len(c.boxes)
		switch {
		case len(r.Users) > 0: // what the kernel sees has no user
		case r.Action == Publish && r.Publication.Server(false).IsValid():
			c.published(n, in)
		case r.Action != Publish && slices.Contains(c.ix.ruleTo[n], gatewayNet):
			c.gatewaysOwn(n, in)
			for i := before; i < len(c.boxes); i++ {
				own = append(own, i)
			}
		}
	}
	c.dropUseless(own)
}

// published expands one rule, and what earlier ones deny its clients.
func (c *compiler) published(n, in int) {
	r, cells := &c.Policy.rules[n], &c.rules[n]
	dsts := []netip.Prefix{c.ix.nets[anyNet].prefixes[0][0]}
	if len(r.Publication.Addresses) > 0 {
		dsts = dsts[:0]
		for _, a := range r.Publication.Addresses {
			dsts = append(dsts, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	whole := slices.Concat(cells.ask[0], cells.others[0])
	for d := range n {
		if deny := &c.Policy.rules[d]; deny.Action == Deny && len(deny.Users) == 0 && slices.Contains(c.ix.ruleTo[d], anyNet) {
			c.deniedTo(d, n, in, dsts, meet(c.rules[d].others[0], whole))
		}
	}
	var areas []area
	for _, from := range c.ix.ruleFrom[n] {
		if c.members[in][from] {
			areas = cross(areas, c.ix.nets[from].prefixes[0], dsts)
		}
	}
	c.fillPublished(areas, cells.ask[0], r.ask(), c.numbers[n])
	c.fillPublished(areas, cells.others[0], ClassKernel, c.numbers[n])
}

// deniedTo expands what rule d denies the clients of rule n.
func (c *compiler) deniedTo(d, n, in int, dsts []netip.Prefix, cells []cell) {
	if len(cells) == 0 {
		return
	}
	r := &c.Policy.rules[d]
	for _, g := range c.inputRegions(in) {
		var areas []area
		for _, from := range c.ix.ruleFrom[d] {
			for _, to := range c.ix.ruleFrom[n] {
				if c.members[in][from] && c.members[in][to] {
					srcs := intersect(c.share(0, from, to), c.ix.nets[g.from].prefixes[0])
					areas = cross(areas, srcs, dsts)
				}
			}
		}
		c.fill(areas, cells, refusal(r.Refusal, g.tell))
	}
}

// gatewaysOwn expands what a rule decides for the gateway itself.
func (c *compiler) gatewaysOwn(n, in int) {
	var areas []area
	for _, from := range c.ix.ruleFrom[n] {
		if c.members[in][from] {
			areas = cross(areas, c.ix.nets[from].prefixes[0], c.ix.nets[anyNet].prefixes[0])
		}
	}
	c.fill(areas, slices.Concat(c.rules[n].ask[0], c.rules[n].others[0]), ClassKernel)
}

// dropUseless drops those of the boxes that take no flow away from a later one
// that is not among them.
func (c *compiler) dropUseless(own []int) {
	useless := make([]bool, len(c.boxes))
	for _, i := range own {
		useless[i] = true
	}
	for _, i := range own {
		for j := i + 1; j < len(c.boxes); j++ {
			if (c.boxes[j].Publication != 0 || c.boxes[j].Class != ClassKernel) && overlap(&c.boxes[i], &c.boxes[j]) {
				useless[i] = false
				break
			}
		}
	}
	kept := c.boxes[:0]
	for i, b := range c.boxes {
		if !useless[i] {
			kept = append(kept, b)
		}
	}
	c.boxes = kept
}

// pinhole expands a rule that publishes an IPv6 server at its own address.
func (c *compiler) pinhole(f, n, in int, regions []region) {
	r, cells := &c.Policy.rules[n], &c.rules[n]
	server := r.Publication.Server(true)
	if f == 0 || !server.IsValid() {
		return
	}
	host := netip.PrefixFrom(server, server.BitLen())
	var areas []area
	for _, g := range regions {
		if !slices.ContainsFunc(c.ix.nets[g.to].prefixes[f], func(p netip.Prefix) bool { return p.Contains(server) }) {
			continue
		}
		for _, from := range c.ix.ruleFrom[n] {
			if c.members[in][from] {
				areas = cross(areas, c.share(f, from, g.from), []netip.Prefix{host})
			}
		}
	}
	widestFirst(areas)
	c.fillPublished(areas, cells.ask[f], r.ask(), c.numbers[n])
	c.fillPublished(areas, cells.others[f], ClassKernel, c.numbers[n])
}

// fillPublished makes boxes of a publication.
func (c *compiler) fillPublished(areas []area, cells []cell, class Class, number int) {
	before := len(c.boxes)
	c.fill(areas, cells, class)
	for i := before; i < len(c.boxes); i++ {
		c.boxes[i].Publication = number
	}
}

func cross(list []area, srcs, dsts []netip.Prefix) []area {
	for _, src := range srcs {
		for _, dst := range dsts {
			list = append(list, area{src, dst})
		}
	}
	return list
}

// meet is what two lists of cells have in common.
func meet(a, b []cell) []cell {
	var out []cell
	for _, x := range a {
		for _, y := range b {
			m := cell{x.kind,
				[2]flow.Proto{max(x.protos[0], y.protos[0]), min(x.protos[1], y.protos[1])},
				PortRange{max(x.ports.Lo, y.ports.Lo), min(x.ports.Hi, y.ports.Hi)}}
			if x.kind == y.kind && m.protos[0] <= m.protos[1] && m.ports.Lo <= m.ports.Hi {
				out = append(out, m)
			}
		}
	}
	return out
}

// Deciding keeps of a table the boxes that want says yes to, and those that take
// flows away from them.
func (t Table) Deciding(want func(*Box) bool) Table {
	var wanted []*Box
	out := Table{In: t.In, Out: t.Out}
	for i := len(t.Stages) - 1; i >= 0; i-- {
		s := &t.Stages[i]
		kept := Stage{Is6: s.Is6, Kind: s.Kind}
		for j := range s.Boxes {
			b := &s.Boxes[j]
			before := func(x *Box) bool { return x.Src.Addr().Is4() == b.Src.Addr().Is4() && overlap(x, b) }
			if want(b) || slices.ContainsFunc(wanted, before) {
				kept.Boxes = append(kept.Boxes, *b)
			}
		}
		for j := range s.Boxes {
			if want(&s.Boxes[j]) {
				wanted = append(wanted, &s.Boxes[j])
			}
		}
		if len(kept.Boxes) > 0 {
			out.Stages = append(out.Stages, kept)
		}
	}
	slices.Reverse(out.Stages)
	return out
}
