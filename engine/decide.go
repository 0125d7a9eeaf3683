package engine

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// Decide answers the one question that a first packet is. It may block in a
// filter, no longer than ctx. Once ctx has ended the answer is not used by
// anyone, so nothing is kept of the flow then.
func (e *Engine) Decide(ctx context.Context, first flow.Packet) Decision {
	rules := e.Policy()
	c, refusal := e.admit(rules, first)
	defer e.introduced(c)
	if refusal != nil {
		return e.refuse(c, *refusal)
	}
	if c.session == nil {
		return e.decideMapped(ctx, rules, c)
	}
	if r := e.mapConnection(ctx, c); r != nil {
		return e.refuse(c, *r)
	}
	if c.mapping != nil && e.Policy() != rules {
		e.remap()
	}
	d := Decision{Path: flow.Kernel}
	if e.concerns(c) {
		if err := e.raise(ctx, c); err != nil {
			r := refused{path: refusedPath(c), result: flow.Failed, reason: err.Error()}
			if errors.Is(err, errDeniedByFilter) {
				r.result = flow.Denied
			}
			return e.refuse(c, r)
		}
		if ctx.Err() != nil {
			return e.refuse(c, refused{refusedPath(c), flow.Failed, "decision came too late"})
		}
		if c.forUser() {
			d = e.takeOver(c)
			e.holdMappings(c)
		}
	}
	if !c.commit(d) {
		return e.refuse(c, refused{refusedPath(c), flow.CutByPolicy, "killed"})
	}
	e.begin(c)
	// Whoever changed the rules meanwhile found the flow among the living, or
	// it is judged once more.
	if e.Policy() != rules && !e.stillAllowed(c) {
		return e.refuse(c, refused{refusedPath(c), flow.CutByPolicy, "the rules changed meanwhile"})
	}
	if d.Path == flow.Kernel {
		e.passed(c)
	}
	return d
}

// concerns says whether a flow has to do with user space. The rules may have
// changed while its packet was queued.
func (e *Engine) concerns(c *connection) bool {
	return c.rule != nil && c.tuple.Proto.HasPorts() &&
		(len(c.uses) > 0 || c.rule.NoKernelMode || c.perm != nil || e.wide.Load() || e.factories.concern(c.tuple.Src.Addr()))
}

// forUser says whether a flow that the filters have seen goes to user space.
func (c *connection) forUser() bool {
	forced := false
	if c.perm != nil {
		forced, _, _ = c.perm.carriage()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.links) > 0 || c.rule.NoKernelMode || forced
}

// commit makes the decision known to the connection; false: it was killed
// before.
func (c *connection) commit(d Decision) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.killed {
		return false
	}
	c.path, c.takeover = d.Path, d.Takeover
	return true
}

// refused is why a flow never began, and what its sender is told.
type refused struct {
	path   flow.Path
	result flow.Result
	reason string
}

// refusedPath is what is told of a flow that the rules allow. UDP datagrams
// are lost silently.
func refusedPath(c *connection) flow.Path {
	if c.tuple.Proto == flow.TCP {
		return flow.Reject
	}
	return flow.Drop
}

// admit makes the connection of a first packet and says whether the rules, or
// a permission, refuse it. A refused one has no session.
func (e *Engine) admit(rules *policy.Policy, p flow.Packet) (*connection, *refused) {
	c := &connection{e: e, tuple: p.Tuple, inIface: p.InIface, start: e.now()}
	if perm := e.usePermission(p.Tuple, false); perm != nil {
		c.inherit(perm)
		c.pending = true
		if c.held = perm.session.ref(); !c.held {
			return c, &refused{refusedPath(c), flow.Denied, "the session of its permission has ended"}
		}
		c.session = perm.session
		e.mapPermitted(rules, c)
		return c, nil
	}
	if e.perms.leads(p.Tuple) {
		return c, &refused{flow.Reject, flow.Denied, "the address leads to a target, and not for this flow"}
	}
	q, err := e.question(p.Tuple, p.InIface)
	if err != nil {
		return c, &refused{flow.Reject, flow.Denied, err.Error()}
	}
	if target := e.mappingAt(p.Proto, p.Dst); target != nil && q.ToGateway {
		if r := e.admitAround(rules, c, q, target); r != nil {
			return c, r
		}
	} else {
		v := rules.Judge(q)
		c.rule, c.uses, c.protocol = v.Rule, v.Filters, protocolName(v)
		if r := refusedByRules(v); r != nil {
			return c, r
		}
		if v.Server.IsValid() {
			e.admitPublished(c, v)
			return c, nil
		}
		if q.ToGateway {
			return c, nil // for the gateway itself: its input chain has the last word
		}
		if v.Maps(q.Tuple) {
			c.leaving, c.netRule = q, v.NetworkRule
		}
	}
	if c.netRule == nil || e.concerns(c) {
		c.session, c.held = e.acquire(p.Src.Addr()), true
	}
	return c, nil
}

// refusedByRules is what the rules refuse; nil: nothing.
func refusedByRules(v policy.Verdict) *refused {
	switch v.Class {
	case policy.ClassDrop:
		return &refused{flow.Drop, flow.Denied, string(v.Reason)}
	case policy.ClassReject:
		return &refused{flow.Reject, flow.Denied, string(v.Reason)}
	}
	return nil
}

// inherit makes a connection run under the rule of the permission that let it
// in, or whose bind it is.
func (c *connection) inherit(p *permission) {
	if c.bind == nil {
		c.perm = p
	}
	stands := p.currentStanding()
	c.secondary = p.primary != nil
	c.rule, c.protocol, c.uses = stands.rule, stands.protocol, stands.uses
}

// ruleName is the name of the rule that allowed the connection; empty: none
// has yet.
func (c *connection) ruleName() string {
	if c.rule == nil {
		return ""
	}
	return c.rule.Name
}

// about is what the events of a connection have in common, for one filter.
func (c *connection) about(r *registered, options any) filterapi.About {
	return filterapi.About{
		Connection: c.handle(r), Protocol: c.protocol, Rule: c.ruleName(),
		Options: options, Secondary: c.secondary, Source: c.session.source(),
	}
}

// raise tells the filters of a flow that is about to be.
func (e *Engine) raise(ctx context.Context, c *connection) error {
	c.inheritLinks()
	if err := e.raiseExcept(ctx, c, nil); err != nil {
		return err
	}
	return e.manufacture(ctx, c)
}

// raiseExcept does so but for one filter.
func (e *Engine) raiseExcept(ctx context.Context, c *connection, except *registered) error {
	t := c.tuple
	switch {
	case t.Proto == flow.TCP && c.inbound():
		return e.notifyExcept(ctx, c, filterapi.Accepted, except, func(r *registered, a filterapi.About) filterapi.Event {
			return &filterapi.AcceptEvent{About: a, Listener: c.perm.object().handle(r), Remote: t.Src, Local: t.Dst}
		})
	case t.Proto == flow.TCP:
		return e.notifyExcept(ctx, c, filterapi.ConnectTCP, except, func(_ *registered, a filterapi.About) filterapi.Event {
			return &filterapi.ConnectEvent{About: a, Target: c.target()}
		})
	case t.Proto == flow.UDP:
		return e.notifyExcept(ctx, c, filterapi.UDPDestination, except, func(r *registered, a filterapi.About) filterapi.Event {
			return &filterapi.UDPDestinationEvent{About: a, Destination: destination{c, r}, Peer: c.far()}
		})
	}
	return nil
}

// refuse ends a flow that never began.
func (e *Engine) refuse(c *connection, r refused) Decision {
	e.over(c, flow.End{Tuple: c.tuple, Path: r.path, Start: c.start, Result: r.result, Reason: r.reason})
	return Decision{Path: r.path}
}

// takeOver makes what userpath needs to carry a flow.
func (e *Engine) takeOver(c *connection) Decision {
	t := &Takeover{Tuple: c.tuple, flow: c}
	emulated, _ := c.state()
	switch {
	case c.inbound() && c.explicit:
		t.InitiatorExternal = true
		t.Dial = Dial{Proto: c.tuple.Proto, Target: c.perm.client()} // it has dialled itself
	case c.around != nil && !emulated:
		t.Dial = Dial{Proto: c.tuple.Proto, Target: c.around.inside.addrPort(), Source: c.source}
	case c.inbound():
		t.InitiatorExternal = true
		t.Dial = e.seen(c)
	case emulated:
		t.Emulated = true
	default:
		t.Dial = e.upstream(c)
	}
	t.fill(c)
	return Decision{Path: flow.User, Takeover: t}
}

// fill takes over what filters have asked for.
func (t *Takeover) fill(c *connection) {
	if c.perm != nil {
		_, t.OneWay, t.Burst = c.perm.carriage()
	}
	t.Chain = c.chain()
	t.Idle = time.Duration(c.e.Policy().Timer(c.tuple)) * time.Second
	c.mu.Lock()
	t.Buffer = c.buffer
	c.mu.Unlock()
	switch {
	case t.Buffer != 0:
	case c.tuple.Proto == flow.UDP:
		t.Buffer = filterapi.DefaultDatagramBuffer
	default:
		t.Buffer = filterapi.DefaultStreamBuffer
	}
}

// upstream says from where the gateway goes on to the server: hidden behind
// an address of the gateway, or as the client itself.
func (e *Engine) upstream(c *connection) Dial {
	to := c.tuple
	to.Dst = c.target()
	d := Dial{Proto: to.Proto, Target: to.Dst, Source: to.Src, Transparent: true}
	if c.explicit {
		// Its client's packets end at the gateway, whose own address is as good.
		d.Source, d.Transparent = netip.AddrPort{}, false
	}
	if c.perm != nil && c.perm.source.IsValid() {
		d.Source, d.Transparent = c.perm.source, false
		return d
	}
	if c.source.IsValid() {
		d.Source, d.Transparent = c.source, false
		return d
	}
	q, err := e.question(to, c.inIface)
	if err != nil {
		return d
	}
	v := e.Policy().Judge(q)
	if v.Translated(to) {
		d.Transparent = false
		d.Source = netip.AddrPortFrom(v.NetworkRule.Address, 0)
		if !v.NetworkRule.Address.IsValid() {
			d.Source = netip.AddrPort{}
		}
		if at := e.perms.leavesFrom(v.NetworkRule.Name, to); at.IsValid() && !c.explicit {
			d.Source = at
		}
	}
	return d
}
