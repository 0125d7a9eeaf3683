package engine

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// admitAround judges a flow from the inside to the external endpoint of a
// mapping (hairpin, RFC 4787, REQ-9) as one to the outside, by the interface
// that the mapping's own flows leave by.
func (e *Engine) admitAround(rules *policy.Policy, c *connection, q policy.Question, target *mapping) *refused {
	x := &e.mappings
	x.mu.Lock()
	if target.rule >= 0 {
		q.OutIface = x.rules[target.rule].iface
	}
	x.mu.Unlock()
	q.ToGateway = false
	v := rules.Judge(q)
	c.rule, c.uses, c.protocol = v.Rule, v.Filters, protocolName(v)
	if r := refusedByRules(v); r != nil {
		return r
	}
	if !v.Maps(q.Tuple) {
		return &refused{flow.Drop, flow.Denied, filtered}
	}
	c.around, c.leaving, c.netRule = target, q, v.NetworkRule
	return nil
}

const filtered = "filtered by the mapping"

// mappingAt is the mapping that has an external endpoint; nil: there is none.
func (e *Engine) mappingAt(p flow.Proto, at netip.AddrPort) *mapping {
	if !at.Addr().Is4() {
		return nil
	}
	e.mappings.mu.Lock()
	defer e.mappings.mu.Unlock()
	m := e.mappings.byExternal[externalKey{p, packed(at)}]
	if m == nil || m.state == mappingOutlived {
		return nil
	}
	return m
}

// mapConnection gives the flow its external endpoint, and says why it cannot go
// on.
func (e *Engine) mapConnection(ctx context.Context, c *connection) *refused {
	if c.netRule == nil {
		return nil
	}
	if c.source = e.perms.leavesFrom(c.netRule.Name, c.tuple); c.source.IsValid() {
		return e.aroundFromBind(ctx, c)
	}
	m, err := e.mapFlow(ctx, c, c.netRule, c.leaving)
	switch {
	case errors.Is(err, errNoExternalPort):
		return &refused{flow.Exhausted, flow.Failed, err.Error()}
	case errors.Is(err, errDeniedByFilter):
		return &refused{refusedPath(c), flow.Denied, err.Error()}
	case err != nil:
		return &refused{refusedPath(c), flow.Failed, err.Error()}
	}
	c.mapping, c.source = m, m.external.addrPort()
	if c.around == nil {
		return nil
	}
	if !e.attempt(m, c.around) {
		return &refused{flow.Drop, flow.Denied, filtered}
	}
	if err := e.revive(ctx, c.around); err != nil {
		return &refused{refusedPath(c), flow.Failed, err.Error()}
	}
	return nil
}

// aroundFromBind lets a flow that leaves from a bind in to a mapping, unless
// that asks whom it has sent to: a bind remembers nobody.
func (e *Engine) aroundFromBind(ctx context.Context, c *connection) *refused {
	if c.around == nil {
		return nil
	}
	e.mappings.mu.Lock()
	everybody := c.around.filtering == policy.FilterEndpointIndependent && c.around.opens()
	e.mappings.mu.Unlock()
	if !everybody {
		return &refused{flow.Drop, flow.Denied, filtered}
	}
	if err := e.revive(ctx, c.around); err != nil {
		return &refused{refusedPath(c), flow.Failed, err.Error()}
	}
	return nil
}

// mapPermitted has a flow that a permission lets out leave by a mapping, if
// the rules want that where it goes.
func (e *Engine) mapPermitted(rules *policy.Policy, c *connection) {
	if c.inbound() || c.perm.source.IsValid() {
		return
	}
	to := c.tuple
	to.Dst = c.target()
	q, err := e.question(to, c.inIface)
	if err != nil {
		return // the dial, or the kernel, meets the same
	}
	if v := rules.Judge(q); v.Maps(to) {
		c.leaving, c.netRule = q, v.NetworkRule
	}
}

// holdMappings counts a flow that user space carries.
func (e *Engine) holdMappings(c *connection) {
	c.holds = true
	e.holdThem(c, 1)
}

func (e *Engine) unholdMappings(c *connection) {
	if !c.holds {
		return
	}
	c.holds = false
	e.holdThem(c, -1)
}

func (e *Engine) holdThem(c *connection, by int32) {
	if c.mapping != nil {
		e.hold(c.mapping, c.leaving.Dst.Addr(), by)
	}
	if c.around != nil {
		e.hold(c.around, c.source.Addr(), by)
	}
}

// mappedIn says whether the rules in force let a flow be that came in to a
// mapping.
func (e *Engine) mappedIn(t flow.Tuple) bool {
	if !t.Is4() {
		return false
	}
	e.mappings.mu.Lock()
	m := e.mappings.byExternal[externalKey{t.Proto, packed(t.Dst)}]
	mapped := m != nil && m.rule >= 0
	e.mappings.mu.Unlock()
	if !mapped {
		return false
	}
	q, err := e.question(t, "")
	return err == nil && q.ToGateway && refusedByRules(e.judgeLetIn(e.Policy(), q)) == nil
}

// judgeLetIn judges a flow that the kernel let in. One to the external endpoint
// of a mapping runs under the rule that lets the mapping's own flows out, or its
// sender's, if that is of the inside.
func (e *Engine) judgeLetIn(rules *policy.Policy, q policy.Question) policy.Verdict {
	v := rules.Judge(q)
	if !q.ToGateway || !q.Is4() || refusedByRules(v) == nil {
		return v
	}
	x := &e.mappings
	x.mu.Lock()
	m := x.byExternal[externalKey{q.Proto, packed(q.Dst)}]
	if m == nil || m.rule < 0 || m.first == (socket4{}) {
		x.mu.Unlock()
		return v
	}
	around := q
	around.ToGateway, around.OutIface = false, x.rules[m.rule].iface
	out := flow.Tuple{Proto: m.proto, Src: m.inside.addrPort(), Dst: m.first.addrPort()}
	x.mu.Unlock()
	if w := rules.Judge(around); w.NetworkRule != nil && !w.Reverse {
		return w
	}
	first, err := e.question(out, "")
	if err != nil {
		return v
	}
	return rules.Judge(first)
}

// maxAttempts bounds what one mapping remembers of hosts behind the same
// gateway that it has sent to.
const maxAttempts = 64

// attempt remembers that one mapping sends to another one, which may answer for
// a while, and says whether that one lets it in, as if it were outside.
func (e *Engine) attempt(sender, target *mapping) bool {
	x := &e.mappings
	x.mu.Lock()
	defer x.mu.Unlock()
	now := e.now()
	tried := sender.more()
	if tried.attempts == nil {
		tried.attempts = make(map[netip.AddrPort]int64)
	}
	if len(tried.attempts) >= maxAttempts {
		sender.forgetAttempts(now.UnixNano())
	}
	tried.attempts[target.external.addrPort()] = now.Add(filterLife).UnixNano()
	opens := target.opens() // else a bind says who, and this flow is none that it lets in
	if opens && target.filtering == policy.FilterEndpointIndependent {
		return true
	}
	if target.extra == nil {
		return false
	}
	from := sender.external.addrPort()
	for at, until := range target.extra.attempts {
		if until > now.UnixNano() && (at == from || opens && at.Addr() == from.Addr()) {
			return true
		}
	}
	return false
}

// forgetAttempts makes room: for what is over, else for the oldest. mappings.mu
// is held.
func (m *mapping) forgetAttempts(now int64) {
	var oldest netip.AddrPort
	for at, until := range m.extra.attempts {
		if until <= now {
			delete(m.extra.attempts, at)
		} else if !oldest.IsValid() || until < m.extra.attempts[oldest] {
			oldest = at
		}
	}
	if len(m.extra.attempts) >= maxAttempts {
		delete(m.extra.attempts, oldest)
	}
}

// attempted says whether somebody that it has sent to may still answer.
// mappings.mu is held.
func (m *mapping) attempted(now int64) bool {
	if m.extra == nil || len(m.extra.attempts) == 0 {
		return false
	}
	for at, until := range m.extra.attempts {
		if until <= now {
			delete(m.extra.attempts, at)
		}
	}
	return len(m.extra.attempts) > 0
}

// decideMapped decides about a flow that no filter has to do with: there is
// nothing to remember of it but its mapping. One for the gateway itself is Plain:
// the external endpoint may be a bind that lets nobody in, or others, and must not
// lead it there.
func (e *Engine) decideMapped(ctx context.Context, rules *policy.Policy, c *connection) Decision {
	if r := e.mapConnection(ctx, c); r != nil {
		return e.refuse(c, *r)
	}
	if now := e.Policy(); now != rules && c.netRule != nil {
		e.remap()
		if refusedByRules(now.Judge(c.leaving)) != nil {
			return e.refuse(c, refused{refusedPath(c), flow.CutByPolicy, "the rules changed meanwhile"})
		}
	}
	if ctx.Err() != nil {
		return e.refuse(c, refused{refusedPath(c), flow.Failed, "decision came too late"})
	}
	if c.netRule == nil {
		return Decision{Path: flow.Plain}
	}
	return Decision{Path: flow.Kernel}
}

// filterLife is how long a mapping admits whom it has sent to without an
// answer.
const filterLife = 300 * time.Second
