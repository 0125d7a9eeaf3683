package engine

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// QuietMappings ends the mappings of network rules that ignore what comes in
// and whose inside has sent nothing for as long as a flow of their protocol may
// be idle (RFC 4787, REQ-6): conntrack's own timers begin anew with packets of
// both directions. living is a dump, with its counters; it is to be called every
// now and then. The flows of those that end are cut.
func (e *Engine) QuietMappings(ctx context.Context, living []LivingFlow, idle func(flow.Proto) time.Duration) error {
	x := &e.mappings
	ignore := map[string]bool{}
	for _, r := range e.Policy().NetworkRules() {
		ignore[r.Name] = r.IgnoreInbound && r.Mapping == policy.MapEndpointIndependent
	}
	now := e.now()
	x.mu.Lock()
	sent, flows := map[*mapping]uint64{}, map[*mapping][]flow.Tuple{}
	note := func(m *mapping, t flow.Tuple, packets uint64) {
		if m != nil && m.state == mappingLive && ignore[x.rules[m.rule].name] {
			sent[m] += packets
			flows[m] = append(flows[m], t)
		}
	}
	for _, f := range living {
		sender, target := x.of(f.Tuple, f.Translation)
		note(sender, f.Tuple, f.Counts.OutPackets)
		note(target, f.Tuple, f.Counts.InPackets)
	}
	var end []*mapping
	var cut []flow.Tuple
	for m, n := range sent {
		more := m.more()
		if more.quiet == 0 || n > more.sent {
			more.quiet = now.UnixNano()
		}
		more.sent = n // less than before: a flow has ended
		if more.inUser > 0 || more.change != nil || now.UnixNano()-more.quiet < int64(idle(m.proto)) {
			continue
		}
		x.outlive(m)
		end = append(end, m)
		cut = append(cut, flows[m]...)
	}
	x.mu.Unlock()
	for _, m := range end {
		e.closeBind(m)
	}
	e.each(end, e.takeOut)
	if len(cut) == 0 {
		return nil
	}
	e.log.Debug("mappings end that only the outside uses", zap.Int("mappings", len(end)), zap.Int("flows", len(cut)))
	return e.kernel.Cut(ctx, cut...)
}

// outlive takes a mapping off the way of new flows; takeOut must follow. x.mu is
// held.
func (x *mappings) outlive(m *mapping) {
	delete(x.byInside, m.insideKey())
	m.state = mappingOutlived
	m.more().change = make(chan struct{})
}
