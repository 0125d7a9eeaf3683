package policy

import (
	"net/netip"
	"slices"
)

// Most flows belong to a handful of networks and protocols; more than this
// many still works, with an allocation.
const usualMembers = 16

// Judge decides about a flow: the network rule that joins its networks, then
// the first access rule that matches. It costs about a microsecond with
// thousands of rules, and allocates only for a flow with many networks or for
// one that some, but not all, of several filters of its rule apply to. What
// the Verdict points to belongs to the Policy.
func (p *Policy) Judge(q Question) Verdict {
	if !q.oneFamily() {
		return Verdict{Reason: ReasonDefault}
	}
	var buf [usualMembers]int32
	return p.judge(q, p.ix.protocols.matching(buf[:0], q.Tuple))
}

func (q Question) oneFamily() bool {
	src, dst := q.Src.Addr(), q.Dst.Addr()
	return src.IsValid() && dst.IsValid() && src.Is4() == dst.Is4()
}

// judge decides about a flow that these definitions match.
func (p *Policy) judge(q Question, protos []int32) Verdict {
	src, dst := q.Src.Addr().WithZone(""), q.Dst.Addr().WithZone("")
	ix := p.ix
	var fromBuf, toBuf [usualMembers]int32
	from := ix.networksOf(fromBuf[:0], src, q.InIface)
	to := append(toBuf[:0], gatewayNet)
	if !q.ToGateway {
		to = ix.networksOf(toBuf[:0], dst, q.OutIface)
	}

	var v Verdict
	inside := false
	if q.ToGateway {
		inside = slices.ContainsFunc(from, func(id int32) bool { return ix.inside[id] })
	} else {
		v.NetworkRule, v.Reverse = p.joining(from, to, !src.Is4())
		if v.NetworkRule == nil {
			v.Protocol, v.Reason = p.firstProtocol(protos), ReasonNetwork
			return v
		}
		inside = !v.Reverse
	}

	n := p.firstOf(ix.firstRule(from, to, protos, q.User), q, from, protos)
	if n < 0 {
		v.Protocol, v.Reason = p.firstProtocol(protos), ReasonDefault
		if inside && len(protos) > 0 {
			v.Class = ClassReject
		}
		return v
	}
	v.Protocol = p.protocolOf(n, protos)
	p.apply(&v, n, q, protos, inside)
	return v
}

// apply makes the verdict of rule n.
func (p *Policy) apply(v *Verdict, n int, q Question, protos []int32, inside bool) {
	v.Rule = &p.rules[n]
	if v.Rule.Action == Deny {
		v.Reason = ReasonRule
		v.Class = refusal(v.Rule.Refusal, inside && (!q.ToGateway || len(protos) > 0))
		return
	}
	v.Class = ClassKernel
	if v.Rule.Action == Publish {
		v.Server = p.ix.published.leads(n, v.Rule.Publication, q)
	}
	if v.Maps(q.Tuple) {
		v.Class = v.Rule.mapped()
	}
	if !q.Proto.HasPorts() || q.ToGateway && v.Rule.Action != Publish {
		return
	}
	v.Filters = p.filtersOf(n, protos)
	if v.Rule.NoKernelMode || len(v.Filters) > 0 {
		v.Class = v.Rule.ask()
	}
}

// NetworksOf names the networks that a host belongs to: the defined ones in
// their order, then Any.
func (p *Policy) NetworksOf(addr netip.Addr, iface string) []string {
	if !addr.IsValid() {
		return nil
	}
	ids := p.ix.networksOf(nil, addr.WithZone(""), iface)
	slices.Sort(ids)
	names := make([]string, 0, len(ids))
	for _, id := range ids[1:] {
		names = append(names, p.networks[id-firstNet].Name)
	}
	return append(names, Any)
}

// ask is the class of the rule's flows that need user space.
func (r *Rule) ask() Class {
	if r.FailOpen {
		return ClassAskOpen
	}
	return ClassAsk
}

// mapped is the class of the rule's flows whose endpoint may have a mapping.
func (r *Rule) mapped() Class {
	if r.FailOpen {
		return ClassMapOpen
	}
	return ClassMap
}

func refusal(r Refusal, tell bool) Class {
	if r == RefuseReject || r == RefuseAuto && tell {
		return ClassReject
	}
	return ClassDrop
}

// joining finds the first network rule that joins two hosts.
func (p *Policy) joining(from, to []int32, is6 bool) (rule *NetworkRule, reverse bool) {
	first := int32(len(p.netRules))
	for _, id := range from {
		for _, n := range p.ix.joins[id] {
			if n >= first {
				break
			}
			ends := p.ix.netRules[n]
			forward := slices.Contains(from, ends[0]) && slices.Contains(to, ends[1])
			backward := ends[1] == id && slices.Contains(to, ends[0]) && (is6 || p.netRules[n].Relation == Route)
			if forward || backward {
				first, reverse = n, !forward
				break
			}
		}
	}
	if first == int32(len(p.netRules)) {
		return nil, false
	}
	return &p.netRules[first], reverse
}

// firstRule is the number of the first rule that names one of each, and that is
// for the user, or -1.
func (ix *index) firstRule(from, to, protos []int32, user string) int {
	var fromBuf, toBuf, protoBuf [usualMembers + 1]posting
	userBuf := ix.ofUser(user)
	dims := [4][]posting{fromBuf[:0], toBuf[:0], protoBuf[:0], userBuf[:]}
	for _, id := range from {
		dims[0] = append(dims[0], ix.from[id])
	}
	for _, id := range to {
		dims[1] = append(dims[1], ix.to[id])
	}
	dims[2] = append(dims[2], ix.protos[anyProto])
	for _, id := range protos {
		dims[2] = append(dims[2], ix.protos[id])
	}
	return firstCommon(&dims)
}

// firstProtocol is the first of all definitions that match.
func (p *Policy) firstProtocol(protos []int32) *Protocol {
	if len(protos) == 0 {
		return nil
	}
	return &p.protocols[slices.Min(protos)-firstProto]
}

// protocolOf is the definition that names a flow of rule n: of the rule's own
// the first; where only "any" let it in, the first of all.
func (p *Policy) protocolOf(n int, protos []int32) *Protocol {
	for _, id := range p.ix.ruleProtos[n] {
		if slices.Contains(protos, id) {
			return &p.protocols[id-firstProto]
		}
	}
	return p.firstProtocol(protos)
}

// filtersOf are the filters of rule n that understand one of the rule's
// protocols that match.
func (p *Policy) filtersOf(n int, protos []int32) []FilterUse {
	all := p.rules[n].Filters
	if len(all) == 0 {
		return nil
	}
	applies := func(u FilterUse) bool {
		for _, id := range p.ix.ruleProtos[n] {
			if id != anyProto && p.protocols[id-firstProto].Filter == u.Name && slices.Contains(protos, id) {
				return true
			}
		}
		return false
	}
	count := 0
	for _, u := range all {
		if applies(u) {
			count++
		}
	}
	switch count {
	case 0:
		return nil
	case len(all):
		return all
	}
	some := make([]FilterUse, 0, count)
	for _, u := range all {
		if applies(u) {
			some = append(some, u)
		}
	}
	return some
}
