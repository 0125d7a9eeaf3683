package engine

import (
	"context"
	"net/netip"
	"sort"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// stillAllowed judges a flow, or the primary connection that it came from, by
// the policy in force.
func (e *Engine) stillAllowed(c *connection) bool {
	return e.allowedNow(c.judged, c.judgedIface)
}

func (e *Engine) allowedNow(t flow.Tuple, inIface string) bool {
	q, err := e.question(t, inIface)
	if err != nil {
		return false
	}
	class := e.Policy().Judge(q).Class
	return class != policy.ClassDrop && class != policy.ClassReject
}

// Recheck ends what the policy in force no longer allows: flows in user
// space, the kernel's flows (as just dumped from conntrack), and permissions.
func (e *Engine) Recheck(ctx context.Context, kernel []flow.Tuple) error {
	for _, p := range e.perms.all() {
		if !e.stillAllowed(p.primary) {
			_ = e.void(p) // used up or gone: its flows are looked at below
		}
	}
	for _, c := range e.flows.all() {
		c.mu.Lock()
		t := c.takeover
		c.mu.Unlock()
		if t != nil && !e.stillAllowed(c) {
			t.cut()
		}
	}
	var cut []flow.Tuple
	for _, t := range kernel {
		if c := e.flows.find(t); c != nil {
			if !e.stillAllowed(c) {
				cut = append(cut, t)
			}
		} else if !e.allowedNow(t, "") {
			cut = append(cut, t)
		}
	}
	if len(cut) == 0 {
		return nil
	}
	return e.kernel.Cut(ctx, cut...)
}

// CutUser ends every flow in user space.
func (e *Engine) CutUser() {
	for _, c := range e.flows.all() {
		c.mu.Lock()
		t := c.takeover
		c.mu.Unlock()
		if t != nil {
			t.cut()
		}
	}
}

// FlowInfo is a living flow, for people.
type FlowInfo struct {
	flow.Tuple
	Path        flow.Path
	Translation flow.Translation
	Rule        string
	Protocol    string
	Session     uint64 // 0: user space never saw it
	Secondary   bool
	Start       time.Time
}

// Flows lists the flows that user space judged, in no order.
func (e *Engine) Flows() []FlowInfo {
	all := e.flows.all()
	out := make([]FlowInfo, 0, len(all))
	for _, c := range all {
		out = append(out, c.info())
	}
	return out
}

func (c *connection) info() FlowInfo {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := FlowInfo{
		Tuple: c.tuple, Path: c.path, Protocol: c.protocol, Session: c.session.id,
		Secondary: c.secondary, Start: c.start,
	}
	if c.rule != nil {
		i.Rule = c.rule.Name
	}
	if c.takeover != nil && c.takeover.InitiatorExternal {
		i.Translation.Dst = c.takeover.Dial.Target
	} else if c.name.IsValid() && c.name.Addr() != c.tuple.Src.Addr() {
		i.Translation.Src = c.name
	}
	return i
}

// Describe says which rule a kernel flow runs under.
func (e *Engine) Describe(t flow.Tuple, start time.Time) FlowInfo {
	if c := e.flows.find(t); c != nil {
		return c.info()
	}
	i := FlowInfo{Tuple: t, Path: flow.Kernel, Start: start}
	q, err := e.question(t, "")
	if err != nil {
		return i
	}
	v := e.policies.at(start).Judge(q)
	if v.Rule != nil {
		i.Rule = v.Rule.Name
	}
	i.Protocol = protocolName(v)
	return i
}

// PermissionInfo is a permission that waits or whose flows live, for people.
type PermissionInfo struct {
	nat.Permission
	Session uint64
	Owner   netip.Addr
	Rule    string
	// State is reserved, armed or used.
	State string
	Flows int
	// Expires is zero if it does not.
	Expires time.Time
}

// Permissions lists them by age.
func (e *Engine) Permissions() []PermissionInfo {
	all := e.perms.all()
	out := make([]PermissionInfo, 0, len(all))
	for _, p := range all {
		p.mu.Lock()
		i := PermissionInfo{
			Permission: p.Permission, Session: p.session.id, Owner: p.session.addr,
			Rule: p.primary.rule.Name, State: "used", Flows: p.flows, Expires: p.expiry,
		}
		if p.state == permWaiting {
			i.State = "armed"
			if p.inbound() && !p.AnySource && len(p.Sources) == 0 {
				i.State = "reserved"
			}
		}
		p.mu.Unlock()
		out = append(out, i)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out
}
