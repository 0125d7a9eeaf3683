package engine

import (
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// Most first packets of inside endpoints need a mapping and nothing else. Nobody
// waits for the kernel's word on each: a goroutine that did would be woken by one
// that is woken itself, and that is more work than the mapping. What is to be done
// then is called.

// Waiting is a first packet that waits for its answer.
type Waiting interface {
	// Answer is called exactly once, and does not block. false: it was too late.
	Answer(flow.Path) (inTime bool)
}

// DecideLater is Decide for first packets that want a new mapping alone: no
// filter has to do with them. It does not wait; w is answered when the kernel
// holds the mapping, or there is none to be had, on any goroutine, perhaps before
// the return. ok is false for all other packets: w is not answered, and Decide
// has to be asked. An answer that comes too late counts for nothing; the mapping
// ends by itself then.
func (e *Engine) DecideLater(first flow.Packet, w Waiting) (ok bool) {
	rules := e.Policy()
	v, q, known := e.byRules(rules, first)
	if !known || !v.Maps(first.Tuple) || len(v.Filters) > 0 || e.wide.Load() ||
		v.NetworkRule.Filtering == policy.FilterAddress || e.perms.leavesFrom(v.NetworkRule.Name, first.Tuple).IsValid() {
		return false
	}
	x := &e.mappings
	x.mu.Lock()
	key := insideKey{x.numberOf(v.NetworkRule.Name), q.Proto, packed(q.Src)}
	if x.byInside[key] != nil {
		x.mu.Unlock()
		return false // it is being made, or changed
	}
	x.rules[key.rule].iface = q.OutIface
	m := e.newMapping(v.NetworkRule, q, key)
	x.mu.Unlock()
	l := &later{e: e, rules: rules, verdict: v, question: q, inIface: first.InIface, mapping: m, waiting: w}
	if err := e.leaseMapping(m, v.NetworkRule, q); err != nil {
		e.abandonMapping(m)
		e.tasks.run(func() { l.refuse(refused{flow.Exhausted, flow.Failed, err.Error()}) })
		return true
	}
	x.mu.Lock()
	e.rest(m, e.now().Add(unconfirmed))
	l.holds = x.permission(m)
	x.mu.Unlock()
	e.kernel.InstallLater(l.holds, l.installed)
	return true
}

// later is a first packet whose mapping is on its way to the kernel.
type later struct {
	e        *Engine
	rules    *policy.Policy
	verdict  policy.Verdict
	question policy.Question
	inIface  string
	mapping  *mapping
	holds    nat.Permission
	waiting  Waiting
}

// installed goes on when the kernel has answered. It runs on the kernel path's
// goroutine, for which the kernel must not be asked anything.
func (l *later) installed(err error) {
	e := l.e
	e.mappings.mu.Lock()
	err = e.mappingPut(l.mapping, l.holds, err)
	e.mappings.mu.Unlock()
	switch {
	case err != nil:
		e.tasks.run(func() {
			e.abandonMapping(l.mapping)
			e.closeBind(l.mapping) // one that a filter has opened meanwhile
			l.refuse(refused{l.refusedPath(), flow.Failed, err.Error()})
		})
	case e.Policy() != l.rules:
		e.tasks.run(l.judgeAgain)
	default:
		l.carried()
	}
}

// carried lets the packet go.
func (l *later) carried() {
	if !l.waiting.Answer(flow.Kernel) {
		l.e.tasks.run(func() {
			l.e.refuse(l.connection(), refused{l.refusedPath(), flow.Failed, "decision came too late"})
		})
	}
}

// judgeAgain is for rules that have changed meanwhile.
func (l *later) judgeAgain() {
	l.e.remap()
	if refusedByRules(l.e.Policy().Judge(l.question)) != nil {
		l.refuse(refused{l.refusedPath(), flow.CutByPolicy, "the rules changed meanwhile"})
		return
	}
	l.carried()
}

func (l *later) refuse(r refused) {
	l.waiting.Answer(l.e.refuse(l.connection(), r).Path)
}

func (l *later) refusedPath() flow.Path { return refusedPath(l.connection()) }

// connection is the flow as the log wants it.
func (l *later) connection() *connection {
	return &connection{
		e: l.e, tuple: l.question.Tuple, inIface: l.inIface, start: l.e.now(),
		rule: l.verdict.Rule, uses: l.verdict.Filters, protocol: protocolName(l.verdict),
	}
}
