package policy

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/flow"
)

// publishedIndex finds the rules that publish.
type publishedIndex struct {
	// at has the rules by the address that clients go to: an address of the
	// gateway, or an IPv6 server's own. everywhere are those that are published
	// at every IPv4 address of the gateway. Both ascend.
	at         map[netip.Addr][]int32
	everywhere []int32
	// denying are the rules that deny somebody everything that is not the
	// gateway: they count for published servers, too.
	denying posting
	// ports has, for a rule with a ServerPort, its ports.
	ports map[int]PortRange
}

func (x *publishedIndex) add(rule int, r *Rule, all []Protocol, protos []int32) {
	if r.Action == Deny && slices.Contains(r.To, Any) {
		x.denying = x.denying.with(rule)
	}
	if r.Action != Publish {
		return
	}
	if x.at == nil {
		x.at, x.ports = map[netip.Addr][]int32{}, map[int]PortRange{}
	}
	enter := func(a netip.Addr) { x.at[a] = append(x.at[a], int32(rule)) }
	if six := r.Publication.Server(true); six.IsValid() {
		enter(six)
	}
	if r.Publication.Server(false).IsValid() {
		for _, a := range r.Publication.Addresses {
			enter(a)
		}
		if len(r.Publication.Addresses) == 0 {
			x.everywhere = append(x.everywhere, int32(rule))
		}
	}
	if r.Publication.ServerPort != 0 {
		var matches []Match
		for _, id := range protos {
			matches = append(matches, all[id-firstProto].Matches...)
		}
		x.ports[rule], _ = oneRange(spansOf(matches))
	}
}

// oneRange is the range of ports that matches of TCP and UDP have, if it is one.
func oneRange(s spans) (PortRange, bool) {
	both := merge(append(slices.Clone(s.tcp), s.udp...))
	same := len(s.tcp) == 0 || len(s.udp) == 0 || slices.Equal(s.tcp, s.udp)
	if len(both) != 1 || !same || len(s.other) > 0 {
		return PortRange{}, false
	}
	return both[0], true
}

// leads is where a flow of rule n is sent.
func (x *publishedIndex) leads(n int, r *Publication, q Question) netip.AddrPort {
	server, port := r.Server(!q.Is4()), q.Dst.Port()
	if ports, shifted := x.ports[n]; shifted && q.Is4() && ports.Lo <= port && port <= ports.Hi {
		port += r.ServerPort - ports.Lo
	}
	return netip.AddrPortFrom(server, port)
}

// firstOf is the first rule for a flow, where n, or none (-1), is the first
// access rule. What is published at an address of the gateway goes further than
// the gateway: a rule before that denies its source "any" counts, too.
func (p *Policy) firstOf(n int, q Question, from, protos []int32) int {
	m := p.firstPublished(q, from, protos)
	if m < 0 || n >= 0 && n < m {
		return n
	}
	if q.ToGateway && p.ix.published.denying != nil {
		var fromBuf, toBuf, protoBuf [usualMembers + 1]posting
		userBuf := p.ix.ofUser(q.User)
		dims := [4][]posting{fromBuf[:0], append(toBuf[:0], p.ix.published.denying), append(protoBuf[:0], p.ix.protos[anyProto]), userBuf[:]}
		for _, id := range from {
			dims[0] = append(dims[0], p.ix.from[id])
		}
		for _, id := range protos {
			dims[2] = append(dims[2], p.ix.protos[id])
		}
		if d := firstCommon(&dims); d >= 0 && d < m {
			return d
		}
	}
	return m
}

// firstPublished is the first rule that publishes what a flow asks for, or -1.
func (p *Policy) firstPublished(q Question, from, protos []int32) int {
	x := &p.ix.published
	if x.at == nil || q.ToGateway != q.Is4() {
		return -1
	}
	matches := func(n int32) bool {
		shares := func(ids, named []int32) bool {
			return slices.ContainsFunc(ids, func(id int32) bool { return slices.Contains(named, id) })
		}
		return shares(from, p.ix.ruleFrom[n]) && shares(protos, p.ix.ruleProtos[n])
	}
	first := int32(-1)
	lists := [][]int32{x.at[q.Dst.Addr().WithZone("")], nil}
	if q.Is4() {
		lists[1] = x.everywhere
	}
	for _, list := range lists {
		for _, n := range list {
			if first >= 0 && n > first {
				break
			}
			if matches(n) {
				first = n
				break
			}
		}
	}
	return int(first)
}

// Hairpin says whether a flow that was sent on to a server comes from where the
// server is: behind the same hidden network. The server must then see an address
// of the gateway, or its answers would not come back this way (RFC 4787, REQ-9).
// The interfaces are those that lead to the two.
func (p *Policy) Hairpin(client netip.Addr, clientIface string, server netip.Addr, serverIface string) bool {
	if !client.Is4() || !server.Is4() {
		return false
	}
	from, to := p.ix.networksOf(nil, client, clientIface), p.ix.networksOf(nil, server, serverIface)
	for i, r := range p.netRules {
		end := p.ix.netRules[i][0]
		if r.Relation == NAT && end != anyNet && slices.Contains(from, end) && slices.Contains(to, end) {
			return true
		}
	}
	return false
}

// Seen says from which address of the gateway a server sees a flow that was sent
// on to it: the network rule that hides its client from the server; nil: it sees
// the client.
func (p *Policy) Seen(client netip.Addr, clientIface string, server netip.Addr, serverIface string) *NetworkRule {
	if !client.Is4() || !server.Is4() {
		return nil
	}
	r, reverse := p.joining(p.ix.networksOf(nil, client, clientIface), p.ix.networksOf(nil, server, serverIface), false)
	if r == nil || reverse || r.Relation != NAT {
		return nil
	}
	return r
}

// Endpoints are what one rule publishes in one family, by one protocol and range
// of ports.
type Endpoints struct {
	Rule  *Rule
	Proto flow.Proto
	// At is where clients go; invalid: every IPv4 address of the gateway.
	At    netip.Addr
	Ports PortRange // 0..65535 without ports
	// Server is where flows to the first of Ports are sent.
	Server netip.AddrPort
}

// Published lists what is published, in the order of the rules. What it points to
// belongs to the Policy.
func (p *Policy) Published() []Endpoints {
	var out []Endpoints
	for n := range p.rules {
		r := &p.rules[n]
		if r.Action != Publish {
			continue
		}
		var matches []Match
		for _, id := range p.ix.ruleProtos[n] {
			matches = append(matches, p.protocols[id-firstProto].Matches...)
		}
		for _, server := range r.Publication.Servers {
			at := []netip.Addr{server}
			if server.Is4() {
				at = r.Publication.Addresses
			}
			if len(at) == 0 {
				at = []netip.Addr{{}}
			}
			for _, a := range at {
				out = append(out, endpoints(r, a, server, spansOf(matches))...)
			}
		}
	}
	return out
}

func endpoints(r *Rule, at, server netip.Addr, s spans) []Endpoints {
	var out []Endpoints
	add := func(proto flow.Proto, ports PortRange, port uint16) {
		out = append(out, Endpoints{r, proto, at, ports, netip.AddrPortFrom(server, port)})
	}
	for proto, list := range map[flow.Proto][]PortRange{flow.TCP: s.tcp, flow.UDP: s.udp} {
		for _, ports := range list {
			first := ports.Lo
			if r.Publication.ServerPort != 0 && server.Is4() {
				first = r.Publication.ServerPort
			}
			add(proto, ports, first)
		}
	}
	for _, x := range s.other {
		add(flow.Proto(x.Lo), every, 0)
	}
	slices.SortFunc(out, func(a, b Endpoints) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), compareRanges(a.Ports, b.Ports))
	})
	return out
}

// PublishedAt is the first rule that publishes a port of an IPv4 address of the
// gateway, to whomever; nil: none does.
func (p *Policy) PublishedAt(proto flow.Proto, at netip.AddrPort) *Rule {
	x := &p.ix.published
	if x.at == nil || !at.Addr().Is4() {
		return nil
	}
	var buf [usualMembers]int32
	protos := p.ix.protocols.matching(buf[:0], flow.Tuple{Proto: proto, Src: at, Dst: at})
	first := -1
	for _, list := range [][]int32{x.at[at.Addr()], x.everywhere} {
		for _, n := range list {
			named := slices.ContainsFunc(protos, func(id int32) bool { return slices.Contains(p.ix.ruleProtos[n], id) })
			if named && p.rules[n].Publication.Server(false).IsValid() && (first < 0 || int(n) < first) {
				first = int(n)
			}
		}
	}
	if first < 0 {
		return nil
	}
	return &p.rules[first]
}
