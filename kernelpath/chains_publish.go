package kernelpath

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// The chains and maps of published servers. An IPv6 server is reached at its own
// address and is in the tables of its two zones; what stands here is for
// addresses of the gateway, and for servers that see the gateway.
const (
	chainPublished   = "published"    // a first packet to an address of the gateway
	chainReceived    = "received"     // it is for the gateway itself
	chainServers     = "servers"      // where a published flow is sent
	chainSeen        = "seen"         // what a server sees as the source; with a family
	chainSeenGateway = "seen_gateway" // the gateway

	setPublished = "published_at" // the addresses, where all publications name theirs
)

// mapInside has the binds whose flows the client sees come from the gateway, by
// what their first packet asks for.
func mapInside(f family) string { return "inside" + f.suffix }

func (f family) askedSocket() []field { return []field{f.asked[1], fieldL4Proto, fieldAskedDport} }

// publish adds the tables of what is published at addresses of the gateway.
//
//	chain first {
//		... (after the permissions)
//		meta nfproto ipv4 ip daddr @published_at fib daddr type local goto published
//	}
//	chain published {
//		iifname vmap @published_from
//		goto published_0
//	}
//	chain bound {
//		... (after the binds)
//		meta nfproto ipv4 ip daddr @published_at fib daddr type local goto servers
//	}
//	chain servers {
//		iifname vmap @servers_from
//	}
//	chain server_1 {
//		meta nfproto ipv4 dnat ip to 10.0.0.5
//	}
//
// A publication that names no address has every one that the kernel calls local.
func (b *builder) publish() error {
	if len(b.in.Compiled.Publish) == 0 {
		return nil
	}
	b.chain(chainReceived).add(accept())
	b.publishedAddresses()
	if err := b.byZone(chainPublished, chainReceived, b.in.Compiled.Publish, b.publishVerdict); err != nil {
		return err
	}
	servers := make([]policy.Table, len(b.in.Compiled.Publish))
	for i, t := range b.in.Compiled.Publish {
		servers[i] = t.Deciding(func(x *policy.Box) bool { return x.Publication != 0 })
	}
	if err := b.byZone(chainServers, chainReceived, servers, serverVerdict); err != nil {
		return err
	}
	for i := range b.in.Compiled.Publications {
		b.server(i + 1)
	}
	return nil
}

func (b *builder) checkPublications() error {
	n := len(b.in.Compiled.Publications)
	for _, tables := range [][]policy.Table{b.in.Compiled.Publish, b.in.Compiled.Forward} {
		for _, t := range tables {
			for _, s := range t.Stages {
				for _, x := range s.Boxes {
					if x.Publication < 0 || x.Publication > n {
						return fmt.Errorf("publication %d of %d: there is none", x.Publication, n)
					}
				}
			}
		}
	}
	return nil
}

// publishedAddresses is the set of them, if every publication names its own.
func (b *builder) publishedAddresses() {
	s := &set{name: setPublished, key: []nftables.SetDatatype{nftables.TypeIPAddr}}
	var all []netip.Addr
	for _, p := range b.in.Compiled.Publications {
		if !p.Server(false).IsValid() {
			continue
		}
		if len(p.Addresses) == 0 {
			return
		}
		all = append(all, p.Addresses...)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	for _, a := range slices.Compact(all) {
		s.elems = append(s.elems, element{text: a.String(), key: a.AsSlice()})
	}
	b.set(s)
}

// ifPublished adds a way to a chain for what goes to an address of the gateway
// at which servers are published.
func (b *builder) ifPublished(c *chain, to string) {
	if len(b.in.Compiled.Publish) == 0 {
		return
	}
	r := rule{is(fieldNFProto, ipv4.nfproto)}
	named := func(p policy.Published) bool { return len(p.Addresses) > 0 || !p.Server(false).IsValid() }
	if !slices.ContainsFunc(b.in.Compiled.Publications, func(p policy.Published) bool { return !named(p) }) {
		r = append(r, in(setPublished, fieldDaddr4))
	}
	c.add(append(r, is(fieldDaddrType, typeLocal), goTo(to))...)
}

// byZone leads to the tables of the zones that packets come from; rest is the
// chain for what no table has.
func (b *builder) byZone(name, rest string, tables []policy.Table, verdict boxVerdict) error {
	of := map[int]bool{}
	for _, t := range tables {
		of[t.In] = true
	}
	to := func(in int) stmt {
		if of[in] {
			return goTo(fmt.Sprintf("%s_%d", name, in))
		}
		return goTo(rest)
	}
	c := b.chain(name)
	if len(b.in.Compiled.Zones) > 1 {
		b.zoneMap(name+"_from", to)
		c.add(vmap(name+"_from", fieldIIfName))
	}
	c.add(to(0))
	for _, t := range tables {
		at := fmt.Sprintf("%s_%d", name, t.In)
		if err := b.table(at, at, t, rest, verdict); err != nil {
			return err
		}
	}
	return nil
}

// publishVerdict: a box that is nobody's publication and lets a flow in is the
// gateway's own; its input chain decides.
func (b *builder) publishVerdict(x policy.Box) (stmt, error) {
	if x.Publication == 0 && x.Class == policy.ClassKernel {
		return goTo(chainReceived), nil
	}
	return b.forwardVerdict(x)
}

func serverVerdict(x policy.Box) (stmt, error) {
	if x.Publication == 0 {
		return goTo(chainReceived), nil
	}
	return goTo(serverChain(x.Publication)), nil
}

func serverChain(n int) string { return fmt.Sprintf("server_%d", n) }

// server sends flows to one published server. Ports are kept, or a map has the
// shifted ones: the kernel cannot add, and a translation into a range would move
// a flow whose port is taken to a port that is not published.
//
//	chain server_1 {
//		meta nfproto ipv4 dnat ip to 10.0.0.5
//	}
//	chain server_2 {
//		meta nfproto ipv4 meta l4proto { tcp, udp } dnat ip to th dport map @server_2
//	}
func (b *builder) server(n int) {
	p := &b.in.Compiled.Publications[n-1]
	to := p.Server(false)
	if !to.IsValid() {
		return
	}
	c := b.chain(serverChain(n))
	if p.ServerPort == 0 {
		c.add(is(fieldNFProto, ipv4.nfproto), sendTo(to))
		return
	}
	m := &set{name: serverChain(n), comment: plainComment(p.Rule), key: []nftables.SetDatatype{nftables.TypeInetService},
		data: []nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeInetService}}
	for i := 0; i <= int(p.Ports.Hi)-int(p.Ports.Lo); i++ {
		from, at := portValue(p.Ports.Lo+uint16(i)), portValue(p.ServerPort+uint16(i))
		m.elems = append(m.elems, element{
			text: fmt.Sprintf("%s : %s . %s", from.text, to, at.text), key: from.raw, val: pack(to.AsSlice(), at.raw),
		})
	}
	b.set(m)
	key := []field{fieldDport}
	c.add(is(fieldNFProto, ipv4.nfproto), tcpOrUDP(), stmt{"dnat ip to " + fieldText(key) + " map @" + m.name, func(c *code) {
		c.translate(expr.NATTypeDestNAT, ipv4, m.name, key)
	}})
}

// sendTo sends a flow to an IPv4 address and keeps its port.
func sendTo(a netip.Addr) stmt {
	return stmt{"dnat ip to " + a.String(), func(c *code) {
		c.add(&expr.Immediate{Register: 1, Data: a.AsSlice()},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(ipv4.number), RegAddrMin: 1, RegAddrMax: 1})
	}}
}

// seen is for servers, and for clients of binds, that see the gateway: their
// flows leave from the address that the route prefers. Plain flows pay for one
// look at their status, IPv6 for one look-up.
//
//	chain hide {
//		ct status dnat meta l4proto { tcp, udp } jump seen4
//	}
//	chain seen4 {
//		meta nfproto ipv4 meta l4proto { tcp, udp } ct original ip daddr . meta l4proto . ct original proto-dst vmap @inside4
//		iifname vmap @seen4_from
//	}
//	chain seen4_2 {
//		... ct original ip saddr . ct original ip daddr . meta l4proto . ct original proto-dst vmap @seen4_2_ports4_0
//	}
//	chain seen6_from_2 {
//		oifname vmap { "lan0" : goto seen6_2_1 }
//	}
//	chain seen_gateway {
//		meta l4proto { tcp, udp } masquerade to :10000-32767
//		masquerade
//	}
func (b *builder) seen() error {
	b.hide(b.chain(chainSeenGateway), nil, masquerade)
	for _, f := range []family{ipv4, ipv6} {
		c := b.chain(chainSeen + f.suffix)
		c.add(is(fieldNFProto, f.nfproto), tcpOrUDP(), vmap(mapInside(f), f.askedSocket()...))
		if err := b.seenPublished(c, f); err != nil {
			return err
		}
	}
	return nil
}

// seenPublished leads to the tables of one family: for IPv4 by the zone that the
// flow came from, for IPv6 by both zones.
func (b *builder) seenPublished(c *chain, f family) error {
	tables := b.in.Compiled.Forward
	if f.number == ipv4.number {
		tables = b.in.Compiled.Publish
	}
	sees := func(x *policy.Box) bool {
		return x.Publication != 0 && b.in.Compiled.Publications[x.Publication-1].FromGateway && x.Src.Addr().Is4() == (f.number == ipv4.number)
	}
	byIn := map[int][]policy.Table{}
	for _, t := range tables {
		if left := t.Deciding(sees); len(left.Stages) > 0 {
			byIn[t.In] = append(byIn[t.In], left)
		}
	}
	if len(byIn) == 0 {
		return nil
	}
	var branches []branch
	for _, in := range sortedZones(byIn) {
		to, err := b.seenFrom(c.name, f, byIn[in])
		if err != nil {
			return err
		}
		for _, name := range b.in.Compiled.Zones[in].Interfaces {
			branches = append(branches, branch{[]value{ifNameValue(name)}, goTo(to)})
		}
	}
	b.addSwitch(c, fieldIIfName, branches, byIn[0] != nil, func() stmt { return goTo(fmt.Sprintf("%s_0", c.name)) })
	return nil
}

// addSwitch adds a verdict map of interfaces, and what becomes of the others, if
// they have a chain.
func (b *builder) addSwitch(c *chain, f field, branches []branch, others bool, to func() stmt) {
	if others {
		// Every other zone has its own answer: none.
		var named []value
		for _, x := range branches {
			named = append(named, x.key...)
		}
		for _, z := range b.in.Compiled.Zones[1:] {
			for _, name := range z.Interfaces {
				v := ifNameValue(name)
				if !slices.ContainsFunc(named, func(n value) bool { return n.text == v.text }) {
					branches = append(branches, branch{[]value{v}, leave()})
				}
			}
		}
	}
	if len(branches) > 0 {
		c.add(switchOn([]field{f}, branches))
	}
	if others {
		c.add(to())
	}
}

func sortedZones(m map[int][]policy.Table) []int {
	var ids []int
	for id := range m {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// seenFrom adds the tables of one zone and gives the chain that leads to them.
func (b *builder) seenFrom(prefix string, f family, tables []policy.Table) (string, error) {
	name := fmt.Sprintf("%s_%d", prefix, tables[0].In)
	if f.number == ipv4.number {
		return name, b.seenTable(name, f, tables[0])
	}
	c := b.chain(name)
	var branches []branch
	others := false
	for _, t := range tables {
		pair := fmt.Sprintf("%s_%d", name, t.Out)
		if err := b.seenTable(pair, f, t); err != nil {
			return "", err
		}
		others = others || t.Out == 0
		for _, i := range b.in.Compiled.Zones[t.Out].Interfaces {
			branches = append(branches, branch{[]value{ifNameValue(i)}, goTo(pair)})
		}
	}
	b.addSwitch(c, fieldOIfName, branches, others, func() stmt { return goTo(name + "_0") })
	return name, nil
}

// seenTable looks flows up by what their first packet asked for.
func (b *builder) seenTable(name string, f family, t policy.Table) error {
	asked := f
	asked.saddr, asked.daddr = f.asked[0], f.asked[1]
	k := stageKind{"ports" + f.suffix, asked, policy.KindPorts, []flow.Proto{flow.TCP, flow.UDP},
		[]field{fieldL4Proto, fieldAskedDport}, rule{tcpOrUDP()}}
	_, err := b.stages(name, name+"_"+k.name, k, t.Stages, "", func(x policy.Box) (stmt, error) {
		if x.Publication != 0 && b.in.Compiled.Publications[x.Publication-1].FromGateway {
			return goTo(chainSeenGateway), nil
		}
		return leave(), nil
	})
	return err
}

// publishesToUser says whether user space carries flows to published servers.
func (b *builder) publishesToUser() bool { return asksIn(b.in.Compiled.Publish) }
