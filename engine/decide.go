package engine

import (
	"context"
	"errors"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// Decide answers the one question that a first packet is. It may block in a
// filter, no longer than ctx. Once ctx has ended the answer is not used by
// anyone, so nothing is kept of the flow then.
func (e *Engine) Decide(ctx context.Context, first flow.Packet) Decision {
	c, ok := e.admit(first)
	if !ok {
		return e.refuse(c, flow.Denied, "rule")
	}
	if c.rule == nil || len(c.uses) == 0 && !c.rule.NoKernelMode && c.perm == nil && !e.anyProtocol() {
		return e.carry(c) // the rules changed while the packet was queued
	}
	if err := e.raise(ctx, c); err != nil {
		result := flow.Denied
		if !errors.Is(err, errDeniedByFilter) {
			result = flow.Failed
		}
		return e.refuse(c, result, err.Error())
	}
	if ctx.Err() != nil {
		return e.refuse(c, flow.Failed, "decision came too late")
	}
	c.mu.Lock()
	inUser := len(c.links) > 0
	c.mu.Unlock()
	if inUser || c.rule.NoKernelMode || c.perm != nil && c.perm.ToUser {
		return e.takeOver(c)
	}
	return e.carry(c)
}

// anyProtocol says whether a filter asks for flows of rules that do not name
// it.
func (e *Engine) anyProtocol() bool {
	for _, r := range e.filters {
		if r.events.AnyProtocol {
			return true
		}
	}
	return false
}

// admit makes the connection of a first packet and says whether the rules, or
// a permission, let it in. A refused one has no session.
func (e *Engine) admit(p flow.Packet) (*connection, bool) {
	c := &connection{
		e: e, tuple: p.Tuple, inIface: p.InIface, start: e.now(),
		judged: p.Tuple, judgedIface: p.InIface,
	}
	if perm := e.usePermission(p.Tuple); perm != nil {
		c.inherit(perm.primary, perm)
		c.session = perm.session
		if c.session.ref() {
			return c, true
		}
		c.session = nil
		return c, false
	}
	q, err := e.question(p.Tuple, p.InIface)
	if err != nil {
		return c, false
	}
	v := e.Policy().Judge(q)
	c.rule, c.uses = v.Rule, v.Filters
	if v.Protocol != nil {
		c.protocol = v.Protocol.Name
	}
	if v.Class == policy.ClassDrop || v.Class == policy.ClassReject {
		return c, false
	}
	c.session = e.acquire(p.Src.Addr())
	return c, true
}

// inherit makes a secondary connection run under its primary's rule.
func (c *connection) inherit(primary *connection, perm *permission) {
	c.perm, c.secondary = perm, true
	c.rule, c.protocol, c.uses = primary.rule, primary.protocol, primary.uses
	c.judged, c.judgedIface = primary.judged, primary.judgedIface
}

// about is what the events of a connection have in common.
func (c *connection) about(options any) filterapi.About {
	return filterapi.About{
		Connection: c.public(), Protocol: c.protocol, Rule: c.rule.Name,
		Options: options, Secondary: c.secondary,
	}
}

// raise tells the filters of a flow that is about to be.
func (e *Engine) raise(ctx context.Context, c *connection) error {
	inbound := c.perm != nil && c.perm.inbound()
	switch {
	case c.tuple.Proto == flow.TCP && inbound:
		return e.notify(ctx, c, filterapi.Accepted, func(o any) filterapi.Event {
			return &filterapi.AcceptEvent{About: c.about(o), Listener: c.perm.object, Remote: c.tuple.Src, Local: c.tuple.Dst}
		})
	case c.tuple.Proto == flow.TCP:
		return e.notify(ctx, c, filterapi.ConnectTCP, func(o any) filterapi.Event {
			return &filterapi.ConnectEvent{About: c.about(o), Target: c.tuple.Dst}
		})
	case c.tuple.Proto == flow.UDP:
		peer := c.tuple.Dst
		if inbound {
			peer = c.tuple.Src
		}
		return e.notify(ctx, c, filterapi.UDPDestination, func(o any) filterapi.Event {
			return &filterapi.UDPDestinationEvent{About: c.about(o), Peer: peer}
		})
	}
	return nil
}

// refuse ends a flow that never began. UDP destinations are lost silently.
func (e *Engine) refuse(c *connection, r flow.Result, reason string) Decision {
	path := flow.Drop
	if c.tuple.Proto == flow.TCP {
		path = flow.Reject
	}
	e.over(c, flow.End{Tuple: c.tuple, Path: path, Start: c.start, Result: r, Reason: reason})
	return Decision{Path: path}
}

// carry hands a judged flow to the kernel.
func (e *Engine) carry(c *connection) Decision {
	c.mu.Lock()
	c.path = flow.Kernel
	c.mu.Unlock()
	e.begin(c)
	return Decision{Path: flow.Kernel}
}

// takeOver hands a judged flow to user space.
func (e *Engine) takeOver(c *connection) Decision {
	t := &Takeover{Tuple: c.tuple, flow: c, kill: make(chan struct{})}
	if c.perm != nil && c.perm.inbound() {
		t.InitiatorExternal = true
		t.Dial = Dial{Proto: c.tuple.Proto, Target: c.perm.Client, Source: c.tuple.Src, Transparent: true}
	} else {
		t.Dial = e.upstream(c)
	}
	c.mu.Lock()
	c.path, c.takeover = flow.User, t
	t.Chain = append([]Link(nil), c.links...)
	t.Buffer = c.buffer
	c.mu.Unlock()
	if t.Buffer == 0 {
		t.Buffer = filterapi.DefaultStreamBuffer
		if c.tuple.Proto == flow.UDP {
			t.Buffer = filterapi.DefaultDatagramBuffer
		}
	}
	e.begin(c)
	return Decision{Path: flow.User, Takeover: t}
}

// upstream says from where the gateway goes on to the server: hidden behind
// an address of the gateway, or as the client itself.
func (e *Engine) upstream(c *connection) Dial {
	d := Dial{Proto: c.tuple.Proto, Target: c.tuple.Dst, Source: c.tuple.Src, Transparent: true}
	q, err := e.question(c.tuple, c.inIface)
	if err != nil {
		return d
	}
	v := e.Policy().Judge(q)
	if v.Translated(c.tuple) {
		d.Transparent = false
		d.Source = netip.AddrPortFrom(v.NetworkRule.Address, 0)
		if !v.NetworkRule.Address.IsValid() {
			d.Source = netip.AddrPort{}
		}
	}
	return d
}
