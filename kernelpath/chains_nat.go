package kernelpath

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// network finds a network by name, with its number, which its sets are named
// after. The built-in policy.Any has neither interfaces nor prefixes.
func (b *builder) network(name string) (policy.Network, int) {
	for i, n := range b.in.Networks {
		if n.Name == name {
			return n, i
		}
	}
	return policy.Network{Name: name}, -1
}

// networkSets are the interfaces and IPv4 prefixes of the networks that
// network rules name. (Only IPv4 is translated.)
func (b *builder) networkSets() error {
	used := map[string]bool{}
	for _, r := range b.in.NetworkRules {
		for _, name := range []string{r.From, r.To} {
			_, at := b.network(name)
			if at < 0 && name != policy.Any && name != policy.Gateway {
				return fmt.Errorf("network rule %q: network %q is not defined", r.Name, name)
			}
			if at >= 0 {
				used[name] = true
			}
		}
		if r.Address.IsValid() && (r.Relation != policy.NAT || !r.Address.Is4()) {
			return fmt.Errorf("network rule %q: address %s can hide nothing", r.Name, r.Address)
		}
	}
	for i, n := range b.in.Networks {
		if !used[n.Name] {
			continue
		}
		for _, name := range n.Interfaces {
			if err := checkInterface(name); err != nil {
				return fmt.Errorf("network %q: %w", n.Name, err)
			}
		}
		if len(n.Interfaces) > 1 {
			b.set(interfaceSet(networkInterfaces(i), n.Name, n.Interfaces))
		}
		if four := prefixes4(n.Prefixes); len(four) > 1 {
			b.set(prefixSet(networkPrefixes(i), n.Name, four))
		}
	}
	return nil
}

func networkInterfaces(i int) string { return fmt.Sprintf("net%d_if", i) }
func networkPrefixes(i int) string   { return fmt.Sprintf("net%d_addr4", i) }

func interfaceSet(name, comment string, ifaces []string) *set {
	s := &set{name: name, comment: plainComment(comment), key: []nftables.SetDatatype{nftables.TypeIFName}}
	for _, i := range slices.Compact(slices.Sorted(slices.Values(ifaces))) {
		v := ifNameValue(i)
		s.elems = append(s.elems, element{text: v.text, key: v.raw})
	}
	return s
}

// plainComment keeps a comment that nft can hold and quote; else none.
func plainComment(s string) string {
	if len(s) > 100 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' || r == '"' || r == '\\' }) {
		return ""
	}
	return s
}

// prefixes4 are the IPv4 prefixes in order. One inside another is left out: an
// interval set refuses what overlaps.
func prefixes4(prefixes []netip.Prefix) (disjoint []netip.Prefix) {
	var four []netip.Prefix
	for _, p := range prefixes {
		if p.Addr().Is4() {
			four = append(four, p.Masked())
		}
	}
	slices.SortFunc(four, func(x, y netip.Prefix) int {
		if c := x.Addr().Compare(y.Addr()); c != 0 {
			return c
		}
		return x.Bits() - y.Bits()
	})
	for _, p := range four {
		if n := len(disjoint); n == 0 || !disjoint[n-1].Overlaps(p) {
			disjoint = append(disjoint, p)
		}
	}
	return disjoint
}

// prefixSet holds disjoint IPv4 prefixes.
func prefixSet(name, comment string, prefixes []netip.Prefix) *set {
	s := &set{name: name, comment: plainComment(comment), key: []nftables.SetDatatype{nftables.TypeIPAddr}, interval: true}
	for _, p := range prefixes {
		e := element{text: p.String(), key: p.Addr().AsSlice()}
		if after := lastAddr(p).Next(); after.IsValid() {
			e.end = after.AsSlice()
		}
		s.elems = append(s.elems, e)
	}
	return s
}

// translate is the address translation of kernel flows. The first packet of a
// flow walks through it, conntrack does the rest.
//
//	chain dstnat {
//		meta mark and MASK == PLAIN accept
//		ct mark and MASK == K goto bound
//		ct mark and MASK == ONE WAY goto bound
//		ct mark and MASK == STRANGER goto bound
//		meta mark and MASK == K ct mark and MASK == 0 ct mark set K goto bound (what failed open)
//	}
//	chain bound {
//		meta nfproto ipv4 meta l4proto { tcp, udp } dnat ip to ip daddr . meta l4proto . th dport map @bind4
//		... (IPv6)
//		... (servers, see publish)
//	}
//	chain srcnat {
//		meta mark and MASK == PLAIN goto leave
//		ct mark and MASK == K goto hide
//		ct mark and MASK == ONE WAY goto hide
//	}
//	chain hide {
//		... (permissions with a source of their own, see source)
//		meta nfproto ipv6 goto hide6
//		... (servers that see the gateway, see seen)
//		ct status dnat ... (from a hidden network to itself) (its map, see outMaps) snat ip to ct original ip daddr
//		goto leave (see leaving)
//	}
func (b *builder) translate() error {
	d := b.base("dstnat", hook{nftables.ChainTypeNAT, "prerouting", nftables.ChainHook(unix.NF_INET_PRE_ROUTING), priorityDstNAT, nftables.ChainPolicyAccept})
	d.add(masked(fieldMetaMark, b.Marks.Mask(), b.mark(flow.Plain)), accept())
	for _, m := range []uint32{b.mark(flow.Kernel), b.Marks.OneWay(), b.Marks.Stranger()} {
		d.add(masked(fieldCtMark, b.Marks.Mask(), m), goTo(chainBound))
	}
	d.add(masked(fieldMetaMark, b.Marks.Mask(), b.mark(flow.Kernel)), masked(fieldCtMark, b.Marks.Mask(), 0), b.putPath(fieldCtMark, flow.Kernel), goTo(chainBound))
	bound := b.chain(chainBound)
	for _, f := range []family{ipv4, ipv6} {
		bound.add(is(fieldNFProto, f.nfproto), tcpOrUDP(), translateTo(f, mapBind(f)))
	}
	b.ifPublished(bound, chainServers)

	base := b.base("srcnat", hook{nftables.ChainTypeNAT, "postrouting", nftables.ChainHook(unix.NF_INET_POST_ROUTING), prioritySrcNAT, nftables.ChainPolicyAccept})
	base.add(masked(fieldMetaMark, b.Marks.Mask(), b.mark(flow.Plain)), goTo(chainLeave))
	for _, m := range []uint32{b.mark(flow.Kernel), b.Marks.OneWay()} {
		base.add(masked(fieldCtMark, b.Marks.Mask(), m), goTo(chainHide))
	}
	s := b.chain(chainHide)
	b.source(s, ipv4)
	s.add(is(fieldNFProto, ipv6.nfproto), goTo(chainHide+ipv6.suffix))
	s.add(ctTranslated(), tcpOrUDP(), jump(chainSeen+ipv4.suffix))
	six := b.chain(chainHide + ipv6.suffix)
	b.source(six, ipv6)
	six.add(tcpOrUDP(), jump(chainSeen+ipv6.suffix))
	six.add(accept())
	if err := b.seen(); err != nil {
		return err
	}
	for _, r := range b.in.NetworkRules {
		if r.Relation == policy.NAT && r.From != policy.Any {
			b.hairpin(s, r)
		}
	}
	s.add(goTo(chainLeave))
	return b.leaving()
}

// leaving is what the network rules say, the first that matches. An inside
// endpoint that a permission gives a source of its own has a gate (see
// setGate); where every endpoint has one, nobody looks for that.
//
//	chain leave {
//		meta nfproto ipv6 accept
//		meta nfproto ipv4 iifname "lan0" oifname "wan0" goto leave_0
//	}
//	chain leave_0 {
//		meta nfproto ipv4 ip saddr @gate4 meta l4proto { icmp, tcp, udp } snat ip to ENDPOINT map @out4_91b7584a2265b1f5
//		meta l4proto { tcp, udp } masquerade to :20000-29999
//		masquerade
//	}
func (b *builder) leaving() error {
	s := b.chain(chainLeave)
	s.add(is(fieldNFProto, ipv6.nfproto), accept())
	for i, r := range b.in.NetworkRules {
		there, ok := b.between(r.From, r.To)
		if !ok {
			continue
		}
		switch r.Relation {
		case policy.Route:
			s.add(append(there, accept())...)
			if back, ok := b.between(r.To, r.From); ok {
				s.add(append(back, accept())...)
			}
		case policy.NAT:
			to := b.chain(fmt.Sprintf("%s_%d", chainLeave, i))
			s.add(append(there, goTo(to.name))...)
			mapped := rule{is(fieldNFProto, ipv4.nfproto)}
			if r.Mapping != policy.MapEndpointIndependent {
				mapped = append(mapped, in(setGate(ipv4), fieldSaddr4))
			}
			to.add(append(mapped, hasEndpoint(), leaveMapped(mapOut(r.Name)))...)
			b.hide(to, nil, func(ports nat.Range) stmt {
				if r.Address.IsValid() {
					return hideBehind(r.Address, ports)
				}
				return masquerade(ports)
			})
		default:
			return fmt.Errorf("network rule %q: relation %d is unknown", r.Name, r.Relation)
		}
	}
	return nil
}

// source gives the flows of permissions with a source address of their own
// that address.
//
//	chain hide {
//		meta nfproto ipv4 meta l4proto { tcp, udp } REQUEST vmap @source4
//	}
//	chain source_addr4 {
//		meta nfproto ipv4 meta l4proto { tcp, udp } snat ip to REQUEST map @source_addr4:20000-29999
//	}
//	chain source_port4 {
//		meta nfproto ipv4 meta l4proto { tcp, udp } snat ip to REQUEST map @source_port4
//	}
func (b *builder) source(s *chain, f family) {
	family := is(fieldNFProto, f.nfproto)
	s.add(family, tcpOrUDP(), vmap(mapSource(f), f.request()...))
	b.chain(mapSourceAddr(f)).add(family, tcpOrUDP(), leaveFromAddress(f, mapSourceAddr(f), b.Ranges.Kernel))
	b.chain(mapSourcePort(f)).add(family, tcpOrUDP(), leaveFrom(f, mapSourcePort(f)))
}

// hairpin is for a host of a hidden network that reaches another one of it by
// its external address: it must show an external address as well, or the
// answer would not come back this way (RFC 4787, REQ-9).
func (b *builder) hairpin(s *chain, r policy.NetworkRule) {
	for _, other := range b.hiddenNetworks() {
		if other != r.From && r.Mapping != policy.MapEndpointIndependent {
			continue
		}
		if inside, ok := b.between(r.From, other); ok {
			s.add(append(rule{ctTranslated()}, append(inside, hasEndpoint(), leaveMapped(mapOut(r.Name)))...)...)
		}
	}
	if inside, ok := b.between(r.From, r.From); ok {
		b.hide(s, append(rule{ctTranslated()}, inside...), hideBehindAsked)
	}
}

// hide translates TCP and UDP into the kernel's port range, and everything
// else without one.
func (b *builder) hide(s *chain, match rule, with func(nat.Range) stmt) {
	if ports := b.Ranges.Kernel; ports != (nat.Range{}) {
		s.add(append(slices.Clone(match), tcpOrUDP(), with(ports))...)
	}
	s.add(append(slices.Clone(match), with(nat.Range{}))...)
}

// between matches an IPv4 packet that goes from one network to another. Not
// ok: there are none.
func (b *builder) between(from, to string) (rule, bool) {
	r := rule{is(fieldNFProto, ipv4.nfproto)}
	for _, side := range []struct {
		name        string
		iface, addr field
	}{{from, fieldIIfName, fieldSaddr4}, {to, fieldOIfName, fieldDaddr4}} {
		if side.name == policy.Gateway {
			return nil, false
		}
		n, at := b.network(side.name)
		switch len(n.Interfaces) {
		case 0:
		case 1: // a comparison costs less than a look-up
			r = append(r, is(side.iface, ifNameValue(n.Interfaces[0])))
		default:
			r = append(r, in(networkInterfaces(at), side.iface))
		}
		if len(n.Prefixes) == 0 {
			continue
		}
		switch four := prefixes4(n.Prefixes); len(four) {
		case 0:
			return nil, false
		case 1: // some 10 ns; a look-up of ranges costs 140
			r = append(r, within(side.addr, four[0]))
		default:
			r = append(r, in(networkPrefixes(at), side.addr))
		}
	}
	return r, true
}
