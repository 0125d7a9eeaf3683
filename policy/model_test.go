package policy

import (
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/flow"
)

// model judges as the documentation reads: list by list, rule by rule.
type model struct {
	networks  []Network
	netRules  []NetworkRule
	protocols []Protocol
	rules     []Rule
}

func (m *model) in(network string, a netip.Addr, iface string, gateway bool) bool {
	if network == Gateway || gateway {
		return network == Gateway && gateway
	}
	if network == Any {
		return true
	}
	for _, n := range m.networks {
		if n.Name != network {
			continue
		}
		return (len(n.Interfaces) == 0 || slices.Contains(n.Interfaces, iface)) &&
			(len(n.Prefixes) == 0 || slices.ContainsFunc(n.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) }))
	}
	return false
}

func (m *model) matches(d Protocol, t flow.Tuple) bool {
	return slices.ContainsFunc(d.Matches, func(x Match) bool {
		if x.Proto != t.Proto || x.Proto == flow.ICMP && !t.Is4() || x.Proto == flow.ICMPv6 && t.Is4() {
			return false
		}
		return !x.Proto.HasPorts() && x.Proto != flow.ICMP && x.Proto != flow.ICMPv6 ||
			x.Ports.Lo <= t.Dst.Port() && t.Dst.Port() <= x.Ports.Hi
	})
}

// answer is a Verdict with names for pointers.
type answer struct {
	class                   Class
	rule, protocol, network string
	reverse                 bool
	filters                 string
	reason                  Reason
}

func plain(v Verdict) answer {
	a := answer{class: v.Class, reverse: v.Reverse, reason: v.Reason}
	if v.Rule != nil {
		a.rule = v.Rule.Name
	}
	if v.Protocol != nil {
		a.protocol = v.Protocol.Name
	}
	if v.NetworkRule != nil {
		a.network = v.NetworkRule.Name
	}
	for _, f := range v.Filters {
		a.filters += f.Name + " "
	}
	return a
}

func (m *model) judge(q Question) (a answer) {
	src := func(n string) bool { return m.in(n, q.Src.Addr(), q.InIface, false) }
	dst := func(n string) bool { return m.in(n, q.Dst.Addr(), q.OutIface, q.ToGateway) }
	defined := ""
	for _, d := range m.protocols {
		if m.matches(d, q.Tuple) {
			defined = d.Name
			break
		}
	}
	inside, joined, maps := false, q.ToGateway, false
	for _, r := range m.netRules {
		if q.ToGateway {
			inside = inside || src(r.From)
			continue
		}
		back := src(r.To) && dst(r.From) && (r.Relation == Route || !q.Is4())
		if forth := src(r.From) && dst(r.To); forth || back {
			a.network, a.reverse, inside, joined = r.Name, !forth, forth, true
			maps = forth && r.Mapping == MapEndpointIndependent && q.Is4()
			break
		}
	}
	a.protocol = defined
	if !joined {
		a.reason = ReasonNetwork
		return a
	}
	r, own := m.first(q, src, func(r *Rule) bool {
		return r.Action == Publish && m.publishedAt(r, q) || slices.ContainsFunc(r.To, dst)
	})
	if r != nil && r.Action == Publish && q.ToGateway {
		// What was denied somebody before wherever he goes, he does not reach
		// by way of the gateway.
		r, own = m.first(q, src, func(x *Rule) bool { return x == r || x.Action == Deny && slices.Contains(x.To, Any) })
	}
	if r != nil {
		return m.decided(a, q, r, own, inside, defined != "", maps)
	}
	a.reason = ReasonDefault
	if inside && defined != "" {
		a.class = ClassReject
	}
	return a
}

// first is the first rule for a flow of those that go where it goes, with its
// own definitions that match.
func (m *model) first(q Question, src func(string) bool, goes func(*Rule) bool) (*Rule, []Protocol) {
	for i := range m.rules {
		r := &m.rules[i]
		if len(r.Users) > 0 && (q.User == "" || !slices.Contains(r.Users, AnyUser) && !slices.Contains(r.Users, q.User)) {
			continue
		}
		if !slices.ContainsFunc(r.From, src) || !goes(r) {
			continue
		}
		var own []Protocol
		all := false
		for _, name := range r.Protocols {
			all = all || name == AnyProtocol
			for _, d := range m.protocols {
				if d.Name == name && m.matches(d, q.Tuple) {
					own = append(own, d)
				}
			}
		}
		if !all && len(own) == 0 {
			continue
		}
		return r, own
	}
	return nil, nil
}

// publishedAt says whether a rule publishes at the address of a flow.
func (m *model) publishedAt(r *Rule, q Question) bool {
	if !q.Is4() {
		return !q.ToGateway && r.Publication.Server(true) == q.Dst.Addr()
	}
	at := r.Publication.Addresses
	return q.ToGateway && r.Publication.Server(false).IsValid() && (len(at) == 0 || slices.Contains(at, q.Dst.Addr()))
}

func (m *model) decided(a answer, q Question, r *Rule, own []Protocol, inside, defined, maps bool) answer {
	a.rule = r.Name
	if len(own) > 0 {
		a.protocol = own[0].Name
	}
	if r.Action == Deny {
		a.reason = ReasonRule
		tell := inside && (defined || !q.ToGateway)
		if r.Refusal == RefuseReject || r.Refusal == RefuseAuto && tell {
			a.class = ClassReject
		}
		return a
	}
	a.class = ClassKernel
	if maps && (q.Proto.HasPorts() || q.Proto == flow.ICMP) {
		a.class = ClassMap
		if r.FailOpen {
			a.class = ClassMapOpen
		}
	}
	if !q.Proto.HasPorts() || q.ToGateway && r.Action != Publish {
		return a
	}
	for _, u := range r.Filters {
		if slices.ContainsFunc(own, func(d Protocol) bool { return d.Filter == u.Name }) {
			a.filters += u.Name + " "
		}
	}
	if a.filters != "" || r.NoKernelMode {
		a.class = ClassAsk
		if r.FailOpen {
			a.class = ClassAskOpen
		}
	}
	return a
}

// server is where a flow that is allowed is sent, if it is published.
func (m *model) server(a answer, q Question) netip.AddrPort {
	i := slices.IndexFunc(m.rules, func(r Rule) bool { return r.Name == a.rule && r.Action == Publish })
	if i < 0 {
		return netip.AddrPort{}
	}
	r, port := &m.rules[i], q.Dst.Port()
	if r.Publication.ServerPort != 0 && q.Is4() {
		lowest := uint16(65535)
		for _, d := range m.protocols {
			for _, y := range d.Matches {
				if slices.Contains(r.Protocols, d.Name) {
					lowest = min(lowest, y.Ports.Lo)
				}
			}
		}
		port = port - lowest + r.Publication.ServerPort
	}
	return netip.AddrPortFrom(r.Publication.Server(!q.Is4()), port)
}
