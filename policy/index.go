package policy

import (
	"math/bits"
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/flow"
)

// Network IDs: the built-in networks, then the defined ones in their order.
const (
	anyNet int32 = iota
	gatewayNet
	firstNet
)

// Protocol IDs: the built-in protocol, then the definitions in their order.
const (
	anyProto int32 = iota
	firstProto
)

// index answers "which networks", "which protocols" and "which is the first
// rule" without walking the rules.
type index struct {
	nets      []netSet
	bare      map[string][]int32 // interface to the networks without prefixes that name it
	owners    [2]prefixOwners    // by family
	protocols protocolIndex
	// from, to and protos have, for each ID, the rules that name it.
	from, to, protos []posting
	// users has the rules that name a user, or AnyUser; nil: none does. forAll
	// are then the rules without users.
	users  map[string]posting
	forAll posting
	// ruleProtos are the protocol IDs of each rule, in the rule's order;
	// ruleFrom and ruleTo its networks.
	ruleFrom, ruleTo, ruleProtos [][]int32
	// netRules are the two ends of each network rule.
	netRules [][2]int32
	// joins has, for each network, the network rules that name it, ascending.
	joins     [][]int32
	published publishedIndex
	// inside are the networks that stand on the From side of a network rule.
	inside []bool
}

// netSet is a network, ready for arithmetic.
type netSet struct {
	interfaces []string          // nil: all
	prefixes   [2][]netip.Prefix // by family; sorted, disjoint
}

// reachedThrough says whether hosts behind the interface can belong to it.
func (n *netSet) reachedThrough(iface string) bool {
	return n.interfaces == nil || slices.Contains(n.interfaces, iface)
}

// prefixOwners finds the networks that list a prefix around an address.
type prefixOwners struct {
	lengths []int // that occur
	of      map[netip.Prefix][]int32
}

func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

func newIndex(p *Policy) *index {
	ix := &index{bare: map[string][]int32{}}
	for f := range ix.owners {
		ix.owners[f].of = map[netip.Prefix][]int32{}
	}
	netID := map[string]int32{Any: anyNet, Gateway: gatewayNet}
	everywhere := [2][]netip.Prefix{{netip.PrefixFrom(netip.IPv4Unspecified(), 0)}, {netip.PrefixFrom(netip.IPv6Unspecified(), 0)}}
	ix.nets = append(ix.nets, netSet{prefixes: everywhere}, netSet{})
	for _, n := range p.networks {
		id := int32(len(ix.nets))
		netID[n.Name] = id
		s := netSet{interfaces: n.Interfaces, prefixes: everywhere}
		if len(n.Interfaces) == 0 {
			s.interfaces = nil
		}
		if len(n.Prefixes) > 0 {
			s.prefixes = disjoint(n.Prefixes)
			ix.own(id, s.prefixes)
		} else {
			for _, name := range n.Interfaces {
				ix.bare[name] = append(ix.bare[name], id)
			}
		}
		ix.nets = append(ix.nets, s)
	}
	ix.indexNetworkRules(p, netID)

	protoID := map[string]int32{AnyProtocol: anyProto}
	for i := range p.protocols {
		protoID[p.protocols[i].Name] = firstProto + int32(i)
	}
	ix.protocols = newProtocolIndex(p.protocols)
	ix.from, ix.to = make([]posting, len(ix.nets)), make([]posting, len(ix.nets))
	ix.protos = make([]posting, len(p.protocols)+1)
	for i := range p.rules {
		r := &p.rules[i]
		ix.ruleFrom = append(ix.ruleFrom, post(ix.from, i, r.From, netID))
		ix.ruleTo = append(ix.ruleTo, post(ix.to, i, r.To, netID))
		ix.ruleProtos = append(ix.ruleProtos, post(ix.protos, i, r.Protocols, protoID))
		ix.published.add(i, r, p.protocols, ix.ruleProtos[i])
		ix.indexUsers(i, r.Users)
	}
	return ix
}

func (ix *index) indexUsers(rule int, users []string) {
	if len(users) == 0 {
		ix.forAll = ix.forAll.with(rule)
		return
	}
	if ix.users == nil {
		ix.users = map[string]posting{}
	}
	for _, name := range users {
		ix.users[name] = ix.users[name].with(rule)
	}
}

// ofUser are the rules that are for a user, or for all.
func (ix *index) ofUser(user string) [3]posting {
	if user == "" {
		return [3]posting{ix.forAll}
	}
	return [3]posting{ix.forAll, ix.users[AnyUser], ix.users[user]}
}

// isFor says whether a rule is for a user.
func (r *Rule) isFor(user string) bool {
	return len(r.Users) == 0 || user != "" && (slices.Contains(r.Users, AnyUser) || slices.Contains(r.Users, user))
}

// own records the prefixes of a network.
func (ix *index) own(id int32, prefixes [2][]netip.Prefix) {
	for f := range prefixes {
		o := &ix.owners[f]
		for _, prefix := range prefixes[f] {
			o.of[prefix] = append(o.of[prefix], id)
			if !slices.Contains(o.lengths, prefix.Bits()) {
				o.lengths = append(o.lengths, prefix.Bits())
			}
		}
	}
}

func (ix *index) indexNetworkRules(p *Policy, netID map[string]int32) {
	ix.joins, ix.inside = make([][]int32, len(ix.nets)), make([]bool, len(ix.nets))
	for i, r := range p.netRules {
		from, to := netID[r.From], netID[r.To]
		ix.netRules = append(ix.netRules, [2]int32{from, to})
		ix.inside[from] = true
		ix.joins[from] = append(ix.joins[from], int32(i))
		if to != from {
			ix.joins[to] = append(ix.joins[to], int32(i))
		}
	}
}

// post enters rule i under each of its names and returns their IDs.
func post(lists []posting, i int, names []string, idOf map[string]int32) []int32 {
	ids := make([]int32, len(names))
	for k, name := range names {
		ids[k] = idOf[name]
		lists[ids[k]] = lists[ids[k]].with(i)
	}
	return ids
}

// networksOf appends the IDs of the networks that a host belongs to.
func (ix *index) networksOf(ids []int32, addr netip.Addr, iface string) []int32 {
	ids = append(ids, anyNet)
	ids = append(ids, ix.bare[iface]...)
	o := &ix.owners[family(addr)]
	for _, length := range o.lengths {
		prefix, err := addr.Prefix(length)
		if err != nil {
			continue // cannot be: the length is one of this family
		}
		for _, id := range o.of[prefix] {
			if ix.nets[id].reachedThrough(iface) {
				ids = append(ids, id)
			}
		}
	}
	return ids
}

// posting is a sparse set of rule numbers: its words that are not zero.
type posting []word

type word struct {
	at   uint32 // the word has the rules 64*at .. 64*at+63
	bits uint64
}

// with adds a rule that is not below those already there.
func (p posting) with(rule int) posting {
	at, bit := uint32(rule/64), uint64(1)<<(rule%64)
	if n := len(p); n > 0 && p[n-1].at == at {
		p[n-1].bits |= bit
		return p
	}
	return append(p, word{at, bit})
}

// from is the part whose words are not below at.
func (p posting) from(at uint32) posting {
	if len(p) == 0 || p[0].at >= at {
		return p
	}
	// In a dense posting the word is exactly where it would be without gaps.
	if d := int(at - p[0].at); d < len(p) && p[d].at == at {
		return p[d:]
	}
	i, _ := slices.BinarySearchFunc(p, at, func(w word, at uint32) int { return int(w.at) - int(at) })
	return p[i:]
}

// firstCommon is the lowest rule that is in the union of each of the four
// lists, or -1. It leaps from word to word and moves the lists' starts.
func firstCommon(dims *[4][]posting) int {
	for at := uint32(0); ; {
		common, next := ^uint64(0), at
		for _, dim := range dims {
			var union uint64
			lowest := ^uint32(0)
			for i := range dim {
				dim[i] = dim[i].from(at)
				if len(dim[i]) == 0 {
					continue
				}
				if dim[i][0].at == at {
					union |= dim[i][0].bits
				}
				lowest = min(lowest, dim[i][0].at)
			}
			if lowest == ^uint32(0) {
				return -1
			}
			next = max(next, lowest)
			common &= union
		}
		switch {
		case next > at:
			at = next
		case common != 0:
			return int(at)*64 + bits.TrailingZeros64(common)
		default:
			at++
		}
	}
}

// protocolIndex finds the definitions that match a destination port, an ICMP
// type or a protocol number.
type protocolIndex struct {
	ports map[flow.Proto]stabbing
	other map[flow.Proto][]int32
}

func newProtocolIndex(list []Protocol) protocolIndex {
	ix := protocolIndex{ports: map[flow.Proto]stabbing{}, other: map[flow.Proto][]int32{}}
	for _, p := range []flow.Proto{flow.TCP, flow.UDP, flow.ICMP, flow.ICMPv6} {
		ix.ports[p] = stabbing{}
	}
	for i := range list {
		id := firstProto + int32(i)
		for _, m := range list[i].Matches {
			if tree, ok := ix.ports[m.Proto]; ok {
				tree.add(m.Ports, id)
			} else {
				ix.other[m.Proto] = append(ix.other[m.Proto], id)
			}
		}
	}
	return ix
}

// matching appends the IDs of the definitions that match, in no order and
// perhaps twice. An ICMP of the other family is matched by none.
func (ix *protocolIndex) matching(ids []int32, t flow.Tuple) []int32 {
	switch kindOf(t.Proto, family(t.Src.Addr())) {
	case KindPorts, KindICMP:
		return ix.ports[t.Proto].at(ids, t.Dst.Port())
	}
	return append(ids, ix.other[t.Proto]...)
}

// kindOf is the kind of lookup for a protocol in a family.
func kindOf(p flow.Proto, family int) Kind {
	switch {
	case p.HasPorts():
		return KindPorts
	case p == flow.ICMP && family == 0, p == flow.ICMPv6 && family == 1:
		return KindICMP
	}
	return KindOther
}

// stabbing is a sparse segment tree over the 65536 ports: each range is
// entered at the few nodes that make it up, and a port finds the ranges that
// hold it on its way to the root.
type stabbing map[uint32][]int32

func (s stabbing) add(r PortRange, id int32) {
	for lo, hi := uint32(r.Lo)+1<<16, uint32(r.Hi)+1<<16+1; lo < hi; lo, hi = lo/2, hi/2 {
		if lo&1 == 1 {
			s[lo] = append(s[lo], id)
			lo++
		}
		if hi&1 == 1 {
			hi--
			s[hi] = append(s[hi], id)
		}
	}
}

func (s stabbing) at(ids []int32, port uint16) []int32 {
	if len(s) == 0 {
		return ids
	}
	for node := uint32(port) + 1<<16; node > 0; node /= 2 {
		ids = append(ids, s[node]...)
	}
	return ids
}
