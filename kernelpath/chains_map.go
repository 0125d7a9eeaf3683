package kernelpath

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strings"

	"github.com/google/nftables"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// outPrefix and knownPrefix begin the names of the sets of outMaps.
const (
	outPrefix   = "out4_"
	knownPrefix = "known4_"
)

// mapOut is the map of a NAT network rule that says for an inside endpoint
// (address, protocol, port) from which external address and port it leaves.
// The name depends on nothing but the rule's, so that the map goes with the
// rule and outlives every other change.
func mapOut(networkRule string) string {
	h := fnv.New64a()
	h.Write([]byte(networkRule))
	return fmt.Sprintf("%s%016x", outPrefix, h.Sum64())
}

// setKnown has the endpoints that are in mapOut.
func setKnown(networkRule string) string {
	return knownPrefix + strings.TrimPrefix(mapOut(networkRule), outPrefix)
}

// insideEndpoint is who sent the first packet of a flow, before any
// translation.
func insideEndpoint() []field { return []field{fieldAskedSaddr4, fieldL4Proto, fieldAskedSport} }

// hasEndpoint matches the protocols that have endpoints: ports, or identifiers
// of queries.
func hasEndpoint() stmt {
	return oneOf(fieldL4Proto, protoValue(flow.ICMP), protoValue(flow.TCP), protoValue(flow.UDP))
}

// outMaps are the maps of the NAT network rules, and the endpoints that are in
// them, because nft has no word for "is in the map". Only the first packet of
// a flow that is hidden pays for the look-up.
//
//	map out4_91b7584a2265b1f5 {
//		type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
//		flags timeout
//	}
//	set known4_91b7584a2265b1f5 {
//		type ipv4_addr . inet_proto . inet_service
//		flags timeout
//	}
//	chain hide {
//		... meta l4proto { icmp, tcp, udp } snat ip to ct original ip saddr . meta l4proto . ct original proto-src map @out4_91b7584a2265b1f5
//	}
//
// peer4 has, for inside endpoints of rules that filter by address, the
// addresses that they have sent to. The kernel adds to it, user space takes
// away what has no flow any more.
func (b *builder) outMaps() error {
	b.set(&set{name: setPeer, key: fieldTypes(peerKey(fieldSaddr4, fieldSport, fieldDaddr4)), dynamic: true, size: anySize, lasting: true})
	of := map[string]string{}
	for _, r := range b.in.NetworkRules {
		if r.Relation != policy.NAT {
			continue
		}
		name := mapOut(r.Name)
		if other, taken := of[name]; taken {
			return fmt.Errorf("network rules %q and %q: one of them needs another name", other, r.Name)
		}
		of[name] = r.Name
		b.set(&set{name: name, comment: plainComment(r.Name), key: fieldTypes(insideEndpoint()),
			data: []nftables.SetDatatype{ipv4.addr, nftables.TypeInetService}, timeout: true, lasting: true})
		b.set(&set{name: setKnown(r.Name), comment: plainComment(r.Name), key: fieldTypes(insideEndpoint()), timeout: true, lasting: true})
	}
	return nil
}

// setPeer has inside address . protocol . port . peer's address.
const setPeer = "peer4"

func peerKey(inside, port, peer field) []field { return []field{inside, fieldL4Proto, port, peer} }

// mapped sends the first packets of a network rule's flows on: those of known
// endpoints go, the others are asked about. There is a second form for rules
// that fail open.
//
//	chain mapped_91b7584a2265b1f5 {
//		meta nfproto ipv4 meta l4proto { icmp, tcp, udp } ct original ip saddr . meta l4proto . ct original proto-src @known4_91b7584a2265b1f5 goto carry_mapped
//		goto ask
//	}
//
// Where filtering depends on the address, goto carry_known stands for the
// first verdict:
//
//	chain carry_known {
//		meta nfproto ipv4 meta l4proto { icmp, tcp, udp } add @peer4 { ip saddr . meta l4proto . ct original proto-src . ip daddr }
//		... (timers)
//		goto carry_plain
//	}
//	chain carry_mapped {
//		ct event set destroy
//		... (timers)
//		goto carry_plain
//	}
//
// That a flow of a known endpoint begins, conntrack tells only where somebody
// keeps account of the peers. The word costs as much as the flow itself; the
// engine counts the flows of a mapping when it seems to have none.
func (b *builder) mapped() {
	byAddress := false
	four := is(fieldNFProto, ipv4.nfproto)
	for _, r := range b.in.NetworkRules {
		if r.Mapping != policy.MapEndpointIndependent {
			continue
		}
		byAddress = byAddress || r.Filtering == policy.FilterAddress
		carry := chainCarryMapped
		if r.Filtering == policy.FilterAddress {
			carry = chainCarryKnown
		}
		for _, rest := range []string{chainAsk, chainAskOpen} {
			c := b.chain(mappedChain(r.Name, rest == chainAskOpen))
			c.add(four, hasEndpoint(), in(setKnown(r.Name), insideEndpoint()...), goTo(carry))
			c.add(goTo(rest))
		}
	}
	if byAddress {
		c := b.chain(chainCarryKnown)
		c.add(four, hasEndpoint(), insert(setPeer, peerKey(fieldSaddr4, fieldAskedSport, fieldDaddr4)...))
		b.lookTimersUp(c)
		c.add(goTo(chainCarryPlain))
	}
	b.around()
	b.letIn()
	if b.maps() {
		c := b.chain(chainCarryMapped)
		c.add(tellDestroy())
		b.lookTimersUp(c)
		c.add(goTo(chainCarryPlain))
		u := b.chain(chainCarryUntold)
		u.add(tellDestroy())
		u.add(goTo(chainCarryPlain))
	}
}

// plain is where the first packets of the kernel's own flows go. Where endpoints
// are mapped, conntrack tells when flows begin, but not of these.
//
//	chain carry_untold {
//		ct event set destroy
//		goto carry_plain
//	}
func (b *builder) plain() string {
	if b.maps() {
		return chainCarryUntold
	}
	return chainCarryPlain
}

func mappedChain(networkRule string, open bool) string {
	name := "mapped_" + strings.TrimPrefix(mapOut(networkRule), outPrefix)
	if open {
		return name + "_open"
	}
	return name
}

// ifMapped sends what comes from a network whose endpoints are mapped, and goes
// to an external address of the gateway, to user space (hairpin, RFC 4787,
// REQ-9): it gives the sender a mapping of its own and knows whom that one has
// sent to. What mappings of others let in comes here by a permission; the ports
// of leases alone are looked at where there is none. Redirections of the inside
// are no external addresses.
//
//	chain first {
//		meta l4proto { tcp, udp } th dport 40000-49999 fib daddr type local jump around
//	}
//	chain around {
//		meta nfproto ipv4 meta l4proto { tcp, udp } ip daddr . meta l4proto . th dport @via4 return
//		meta nfproto ipv4 iifname @net0_if ip saddr @net0_addr4 jump sessions (see limitSessions)
//		meta nfproto ipv4 iifname @net0_if ip saddr @net0_addr4 goto ask
//	}
func (b *builder) ifMapped(c *chain) {
	if !b.maps() {
		return
	}
	for _, r := range append([]nat.Range{b.Ranges.WellKnown}, b.Ranges.Leases...) {
		if r != (nat.Range{}) {
			c.add(tcpOrUDP(), ports(fieldDport, r), is(fieldDaddrType, typeLocal), jump(chainAround))
		}
	}
}

func (b *builder) around() {
	c := b.chain(chainAround)
	c.add(is(fieldNFProto, ipv4.nfproto), tcpOrUDP(), in(setVia(ipv4), ipv4.socket()...), leave())
	for _, r := range b.in.NetworkRules {
		if r.Mapping != policy.MapEndpointIndependent {
			continue
		}
		if from, ok := b.between(r.From, policy.Any); ok {
			if b.Sessions > 0 {
				c.add(append(slices.Clone(from), jump(chainSessions))...)
			}
			c.add(append(from, goTo(chainAsk))...)
		}
	}
}

// letIn is what mappings let in, without a word to user space. Whether a sender
// is known can be said only when it is known to whom it sends.
//
//	chain use_mapped {
//		jump around
//		counter name "permitted"
//		goto carry_first
//	}
//	chain use_peer {
//		jump around
//		ct mark set ct mark and 0xf0ffffff or STRANGER accept
//	}
//	chain forward {
//		ct mark and MASK vmap { ..., STRANGER : goto peer }
//	}
//	chain peer {
//		meta nfproto ipv4 meta l4proto { tcp, udp } ip daddr . meta l4proto . th dport . ip saddr @peer4 counter name "permitted" ct mark set ct mark and 0xf0ffffff or K accept
//		counter name "discarded" drop
//	}
func (b *builder) letIn() {
	u := b.chain(chainUseMapped)
	u.add(jump(chainAround))
	u.add(count(counterPermitted))
	u.add(goTo(chainCarryFirst))

	p := b.chain(chainUsePeer)
	p.add(jump(chainAround))
	p.add(setMark(fieldCtMark, b.Marks.Mask(), b.Marks.Stranger()), accept())

	c := b.chain(chainPeer)
	c.add(is(fieldNFProto, ipv4.nfproto), tcpOrUDP(), in(setPeer, peerKey(fieldDaddr4, fieldDport, fieldSaddr4)...),
		count(counterPermitted), b.putPath(fieldCtMark, flow.Kernel), accept())
	c.add(count(counterDiscarded), drop())
}

// hiddenNetworks are the From sides of NAT network rules, each once.
func (b *builder) hiddenNetworks() []string {
	var names []string
	for _, r := range b.in.NetworkRules {
		if r.Relation == policy.NAT && r.From != policy.Any && !slices.Contains(names, r.From) {
			names = append(names, r.From)
		}
	}
	return names
}

// maps says whether any network rule maps endpoints.
func (b *builder) maps() bool {
	return slices.ContainsFunc(b.in.NetworkRules, func(r policy.NetworkRule) bool { return r.Mapping == policy.MapEndpointIndependent })
}

// outMapNames are the sets of network rules in a ruleset.
func (r Ruleset) outMapNames() map[string]bool {
	names := map[string]bool{}
	for _, s := range r.sets {
		if ofNetworkRule(s.name) {
			names[s.name] = true
		}
	}
	return names
}

// ofNetworkRule says whether a set goes with its network rule.
func ofNetworkRule(set string) bool {
	return strings.HasPrefix(set, outPrefix) || strings.HasPrefix(set, knownPrefix)
}

// lastingNames are the sets of permissions that a table has.
func (old *existing) lastingNames() []string {
	names := permissionSetNames()
	for _, name := range sortedKeys(old.sets) {
		if ofNetworkRule(name) || name == setPeer {
			names = append(names, name)
		}
	}
	return slices.DeleteFunc(names, func(name string) bool {
		_, there := old.sets[name]
		return !there
	})
}
