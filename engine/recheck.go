package engine

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/flow"
)

// stillAllowed judges a flow, or what it stands on, by the policy in force.
func (e *Engine) stillAllowed(c *connection) bool {
	if c.perm != nil && !c.published() {
		return e.stands(c.perm)
	}
	return e.allowed(c.basis())
}

// KernelFlow is a living flow that the kernel carries, as conntrack tells it.
type KernelFlow struct {
	flow.Tuple
	Translation flow.Translation
}

// basis is what the rules are asked about a flow that user space never saw. If
// they send it to a server, that must be where it goes.
func (k KernelFlow) basis() basis {
	b := basis{tuple: k.Tuple, leads: k.Tuple.Dst, kernel: true}
	if k.Translation.Dst.IsValid() {
		b.leads = k.Translation.Dst
	}
	return b
}

// Recheck ends what the policy in force no longer allows: flows in user
// space, the kernel's flows (also those as just dumped from conntrack that
// user space never saw), and permissions.
func (e *Engine) Recheck(ctx context.Context, kernel []KernelFlow) error {
	e.remap()
	e.revoke(slices.DeleteFunc(e.perms.all(), e.stands))
	e.recheckSockets()
	e.denyMappings(kernel)
	var known []*connection
	for _, c := range e.flows.all() {
		if e.stillAllowed(c) {
			continue
		}
		c.mu.Lock()
		t := c.takeover
		c.mu.Unlock()
		if t != nil {
			t.cut()
		} else {
			known = append(known, c)
		}
	}
	var cut []flow.Tuple
	for _, k := range kernel {
		if e.flows.find(k.Tuple) == nil && !e.allowed(k.basis()) && !e.mappedIn(k.Tuple) {
			cut = append(cut, k.Tuple)
		}
	}
	err := e.cutKernel(ctx, known...)
	if len(cut) > 0 {
		err = errors.Join(err, e.kernel.Cut(ctx, cut...))
	}
	return err
}

// together is how many changes wait for the kernel at a time.
const together = 1024

// revoke voids permissions, many at a time, so that the kernel gets them
// together: one by one the last of very many would be open for minutes.
func (e *Engine) revoke(perms []*permission) {
	for some := range slices.Chunk(perms, together) {
		var changes sync.WaitGroup
		for _, p := range some {
			changes.Go(func() { _ = e.void(p) }) // used up or gone: its flows are looked at by themselves
		}
		changes.Wait()
	}
}

// cutKernel cuts kernel flows. One that was decided a moment ago may not be in
// conntrack's table yet, where the cut would find it; it is cut again.
func (e *Engine) cutKernel(ctx context.Context, flows ...*connection) error {
	if len(flows) == 0 {
		return nil
	}
	var tuples []flow.Tuple
	var young []*connection
	now := e.now()
	for _, c := range flows {
		tuples = append(tuples, c.tuple)
		if now.Before(c.start.Add(unconfirmed)) {
			young = append(young, c)
		}
	}
	if len(young) > 0 {
		e.later(cutAgain, func() { e.cutYoung(young) })
	}
	return e.kernel.Cut(ctx, tuples...)
}

// cutAgain is longer than a decision may take.
const cutAgain = time.Second

func (e *Engine) cutYoung(flows []*connection) {
	flows = slices.DeleteFunc(flows, func(c *connection) bool { return e.flows.find(c.tuple) != c })
	if err := e.cutKernel(context.Background(), flows...); err != nil {
		e.log.Error("cut failed", zap.Error(err))
	}
}

// FlowInfo is a living flow, for people.
type FlowInfo struct {
	flow.Tuple
	Path        flow.Path
	Translation flow.Translation
	Rule        string
	Protocol    string
	Session     uint64 // the owner; 0: user space never saw it
	User        string // of the owner; empty: it has none
	Secondary   bool
	Permission  uint64 // that let it in; 0: none
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
		Tuple: c.tuple, Path: c.path, Protocol: c.protocol, Session: c.session.id, User: c.session.user,
		Secondary: c.secondary, Start: c.start,
	}
	if c.rule != nil {
		i.Rule = c.rule.Name
	}
	if c.perm != nil && !c.published() {
		i.Permission = c.perm.id
	}
	i.Translation = c.translation()
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
	v := e.judgeLetIn(e.policies.at(start), q)
	if v.Rule != nil {
		i.Rule = v.Rule.Name
	}
	i.Protocol = protocolName(v)
	return i
}
