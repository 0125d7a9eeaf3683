package policy

import "slices"

// JudgeProtocol decides about a flow as part of a protocol, whatever its ports
// say: a flow that another one negotiated has none of its own that a
// definition could name. The ports in q decide nothing. A q without a
// destination asks whether the client may use the protocol towards anybody:
// the first rule counts that allows it to some network that a network rule
// joins, unless one before it denies it to all. An unknown name is refused
// with ReasonProtocol.
func (p *Policy) JudgeProtocol(q Question, name string) Verdict {
	i := slices.IndexFunc(p.protocols, func(d Protocol) bool { return d.Name == name })
	if i < 0 {
		return Verdict{Reason: ReasonProtocol}
	}
	protos := []int32{firstProto + int32(i)}
	var v Verdict
	switch {
	case q.oneFamily():
		v = p.judge(q, protos)
	case q.Src.Addr().IsValid() && !q.Dst.Addr().IsValid():
		v = p.judgeAnywhere(q, protos)
	default:
		v.Reason = ReasonDefault
	}
	v.Protocol = &p.protocols[i]
	return v
}

// judgeAnywhere walks the rules: it is for the calls of filters, not for
// packets.
func (p *Policy) judgeAnywhere(q Question, protos []int32) Verdict {
	ix, is6 := p.ix, !q.Src.Addr().Is4()
	from := ix.networksOf(nil, q.Src.Addr().WithZone(""), q.InIface)
	shares := func(a, b []int32) bool {
		return slices.ContainsFunc(a, func(id int32) bool { return slices.Contains(b, id) })
	}
	v := Verdict{Reason: ReasonDefault}
	for n := range p.rules {
		if !p.rules[n].isFor(q.User) || !shares(ix.ruleFrom[n], from) || !shares(ix.ruleProtos[n], append(protos, anyProto)) {
			continue
		}
		if p.rules[n].Action == Deny {
			if slices.Contains(ix.ruleTo[n], anyNet) {
				p.apply(&v, n, q, protos, true)
				return v
			}
			continue
		}
		for _, to := range ix.ruleTo[n] {
			if to == gatewayNet {
				continue
			}
			if v.NetworkRule, v.Reverse = p.joining(from, p.within(to), is6); v.NetworkRule != nil {
				v.Reason = ""
				p.apply(&v, n, q, protos, !v.Reverse)
				return v
			}
			v.Reason = ReasonNetwork
		}
	}
	return v
}

// within are the networks that a host may be in of which no more is known than
// one: for "any" that is every one.
func (p *Policy) within(id int32) []int32 {
	if id != anyNet {
		return []int32{anyNet, id}
	}
	all := []int32{anyNet}
	for i := range p.networks {
		all = append(all, firstNet+int32(i))
	}
	return all
}
