package engine

import (
	"sync"
	"time"

	"github.com/sluicegw/sluice/flow"
)

// overtaken are the ends of kernel flows that were heard before the word that
// a permission let the flow in: conntrack tells of the one and the log group
// of the other, each in its own time. An end waits for that word as long as it
// may be on its way.
type overtaken struct {
	mu      sync.Mutex
	waiting int
	byTuple map[flow.Tuple][]*overtakenEnd // oldest first
}

type overtakenEnd struct {
	end   flow.End
	timer *time.Timer
}

// maxOvertaken bounds the ends that wait. One more is recorded at once.
const maxOvertaken = 4096

// take gives the end that waits for a tuple; with which, only that one.
func (o *overtaken) take(t flow.Tuple, which *overtakenEnd) *overtakenEnd {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := o.byTuple[t]
	for i, x := range all {
		if which != nil && x != which {
			continue
		}
		x.timer.Stop()
		o.waiting--
		if len(all) == 1 {
			delete(o.byTuple, t)
		} else {
			o.byTuple[t] = append(all[:i:i], all[i+1:]...)
		}
		return x
	}
	return nil
}

// all are those that wait.
func (o *overtaken) all() []*overtakenEnd {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := make([]*overtakenEnd, 0, o.waiting)
	for _, same := range o.byTuple {
		out = append(out, same...)
	}
	return out
}

// overtakes says whether an end of a flow that nobody knows waits for the word
// that a permission let it in.
func (e *Engine) overtakes(end flow.End) bool {
	if !e.mayBePermitted(end) {
		return false
	}
	o := &e.overtaken
	o.mu.Lock()
	if o.waiting >= maxOvertaken {
		o.mu.Unlock()
		return false
	}
	if o.byTuple == nil {
		o.byTuple = make(map[flow.Tuple][]*overtakenEnd)
	}
	x := &overtakenEnd{end: end}
	x.timer = time.AfterFunc(lateReports, func() { e.unheard(x) })
	o.waiting++
	o.byTuple[end.Tuple] = append(o.byTuple[end.Tuple], x)
	o.mu.Unlock()
	// The word came meanwhile, and has found nothing that waits.
	if c := e.flows.find(end.Tuple); c != nil && c.inKernel() {
		if o.take(end.Tuple, x) != nil {
			e.over(c, end)
		}
	}
	return true
}

// overtake ends a flow whose end was heard before its beginning.
func (e *Engine) overtake(c *connection) {
	if x := e.overtaken.take(c.tuple, nil); x != nil {
		e.over(c, x.end)
	}
}

// unheard records an end that has waited long enough: the rules let the flow
// in.
func (e *Engine) unheard(x *overtakenEnd) {
	if e.overtaken.take(x.end.Tuple, x) != nil {
		e.recordByRules(x.end)
	}
}

// mayBePermitted says whether a permission may have let a kernel flow in: one
// for its addresses was open when it began.
func (e *Engine) mayBePermitted(end flow.End) bool {
	for _, p := range e.perms.find(end.Tuple) {
		if p.wasOpen(end.Start, end.Stop) {
			return true
		}
	}
	return false
}

// wasOpen says whether the kernel let flows in when one began that has ended
// now; start may be unknown.
func (p *permission) wasOpen(start, stop time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	until := int64(0)
	if p.use != nil {
		until = p.use.openUntil
	}
	switch {
	case p.openSince == 0:
		return false
	case start.IsZero():
		return until == 0 || until+int64(lateReports) >= stop.UnixNano()
	}
	return start.UnixNano() >= p.openSince && (until == 0 || start.UnixNano() <= until)
}
