package engine

import (
	"slices"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// over is the one end of every flow that user space judged: it leaves the
// list of the living, is logged once, its permission is settled, its filters
// hear of it and its session is released. It does not wait for filters or for
// the kernel.
func (e *Engine) over(c *connection, end flow.End) {
	if !c.finish() {
		return
	}
	e.flows.remove(c)
	e.unholdMappings(c)
	if end.Start.IsZero() {
		end.Start = c.start
	}
	if end.Stop.IsZero() {
		end.Stop = e.now()
	}
	if end.Start.After(end.Stop) {
		end.Start = end.Stop // its end was heard before its beginning
	}
	a := about{rule: c.rule, protocol: c.protocol, session: c.session, secondary: c.secondary}
	if !c.published() {
		a.perm = c.perm
	}
	e.record(end, a)
	if c.done != nil {
		close(c.done)
	}
	if c.perm != nil {
		e.settle(c)
	}
	leave := func() {
		if c.held {
			e.release(c.session)
		}
	}
	if !c.hasListeners() {
		leave()
		return
	}
	e.tasks.run(func() {
		c.farewells()
		e.terminating(c)
		leave()
	})
}

// begin takes a flow in. One of the same tuple must have ended, though its
// report is still on its way.
func (e *Engine) begin(c *connection) {
	defer func() {
		if c.session.isCut() {
			// Whoever disconnected it found the flow among the living, or it is
			// found here.
			e.tasks.run(c.Kill)
		}
	}()
	if old := e.flows.add(c); old != nil {
		old.mu.Lock()
		path, t := old.path, old.takeover
		old.mu.Unlock()
		if t != nil {
			t.cut() // and userpath reports its end
			return
		}
		e.over(old, flow.End{Tuple: old.tuple, Path: path, Start: old.start, Result: flow.Closed, Reason: "its tuple was used anew"})
	}
}

// sameStart bounds how much later than conntrack's entry user space may hear
// of a flow.
const sameStart = time.Second

// KernelEnded takes conntrack's word that a kernel flow is over. It is called
// for every flow with the Kernel mark, judged here or not, and does not block.
func (e *Engine) KernelEnded(end flow.End) {
	e.mapped(end.Tuple, end.Translation, -1)
	if e.endUnheard(end) {
		return
	}
	c := e.flows.find(end.Tuple)
	if c != nil && c.inKernel() {
		if !end.Start.IsZero() && end.Start.Add(sameStart).Before(c.start) {
			return // of the flow that c has replaced, which is in the log
		}
		e.over(c, end)
		return
	}
	if end.Stop.IsZero() {
		end.Stop = e.now()
	}
	if c == nil && e.overtakes(end) {
		return
	}
	e.recordByRules(end)
}

// recordByRules records the end of a kernel flow that the rules alone let in.
func (e *Engine) recordByRules(end flow.End) {
	if end.Start.IsZero() {
		end.Start = end.Stop
	}
	q, err := e.question(end.Tuple, "")
	if err != nil {
		e.record(end, about{})
		return
	}
	v := e.judgeLetIn(e.policies.at(end.Start), q)
	e.record(end, about{rule: v.Rule, protocol: protocolName(v)})
}

// KernelDenied takes a sample of what the kernel refused on its own.
func (e *Engine) KernelDenied(p flow.Packet) {
	now := e.now()
	end := flow.End{Tuple: p.Tuple, Path: flow.Drop, Start: now, Stop: now, Result: flow.Denied}
	q, err := e.question(p.Tuple, p.InIface)
	if err != nil {
		end.Reason = "no route"
		e.record(end, about{})
		return
	}
	v := e.Policy().Judge(q)
	if v.Class == policy.ClassReject {
		end.Path = flow.Reject
	}
	end.Reason = string(v.Reason)
	e.record(end, about{rule: v.Rule, protocol: protocolName(v)})
}

func protocolName(v policy.Verdict) string {
	if v.Protocol == nil {
		return ""
	}
	return v.Protocol.Name
}

// about is what the log adds to an End.
type about struct {
	rule      *policy.Rule
	protocol  string
	session   *session
	secondary bool
	perm      *permission // that let it in; nil: none
}

// record writes the one line of a flow.
func (e *Engine) record(end flow.End, a about) {
	if a.rule != nil && a.rule.NoLog {
		return
	}
	ce := e.log.Check(zapcore.InfoLevel, "flow")
	if ce == nil {
		return
	}
	f := make([]zap.Field, 0, 20)
	f = append(f,
		zap.String("result", string(end.Result)),
		zap.String("path", end.Path.String()),
		zap.String("proto", end.Proto.String()),
		zap.Stringer("src", end.Src),
		zap.Stringer("dst", end.Dst))
	if a.rule != nil {
		f = append(f, zap.String("rule", a.rule.Name))
	}
	if a.protocol != "" {
		f = append(f, zap.String("protocol", a.protocol))
	}
	if a.session != nil {
		f = append(f, zap.Uint64("session", a.session.id))
		if a.session.user != "" {
			f = append(f, zap.String("user", a.session.user))
		}
	}
	if a.secondary {
		f = append(f, zap.Bool("secondary", true))
	}
	if a.perm != nil {
		f = append(f, zap.Uint64("permission", a.perm.id))
	}
	if end.Translation.Src.IsValid() {
		f = append(f, zap.Stringer("nat_src", end.Translation.Src))
	}
	if end.Translation.Dst.IsValid() {
		f = append(f, zap.Stringer("nat_dst", end.Translation.Dst))
	}
	f = append(f,
		zap.Time("start", end.Start),
		zap.Duration("duration", end.Stop.Sub(end.Start).Round(time.Microsecond)))
	if end.Path.Carries() {
		f = append(f,
			zap.Uint64("out_bytes", end.Counts.OutBytes), zap.Uint64("in_bytes", end.Counts.InBytes),
			zap.Uint64("out_packets", end.Counts.OutPackets), zap.Uint64("in_packets", end.Counts.InPackets))
	}
	if end.Reason != "" {
		f = append(f, zap.String("reason", end.Reason))
	}
	ce.Write(f...)
}

// unconfirmed bounds how long a flow may have been decided and not yet be in
// conntrack's table: its packet waits for the verdict.
const unconfirmed = 5 * time.Second

// Resync ends the kernel flows that are no more and of whose end conntrack did
// not tell: its report was lost, or the flow's first packet never got through.
// alive are the flows of a dump that began at the time since.
func (e *Engine) Resync(alive map[flow.Tuple]bool, since time.Time) {
	for _, c := range e.flows.heard() {
		if c.inKernel() && c.start.Add(unconfirmed).Before(since) && !alive[c.tuple] {
			e.over(c, lostEnd(c.tuple, c.start))
		}
	}
	for t, u := range e.flows.forgotten(alive, since.Add(-unconfirmed)) {
		e.overUnheard(u, lostEnd(t, u.start))
	}
}

func lostEnd(t flow.Tuple, start time.Time) flow.End {
	return flow.End{Tuple: t, Path: flow.Kernel, Start: start, Result: flow.Closed, Reason: "conntrack does not know it any more"}
}

// HoldsKernelFlows says whether the engine knows a kernel flow that began
// before a time.
func (e *Engine) HoldsKernelFlows(before time.Time) bool {
	return e.flows.olderUnheard(before) || slices.ContainsFunc(e.flows.heard(), func(c *connection) bool { return c.start.Before(before) && c.inKernel() })
}
