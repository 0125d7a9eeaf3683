package engine

import (
	"slices"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// unheard is a flow of the kernel's that a rule let pass whose filters do not
// want to hear of it. It is all that is kept of most flows that are queued, a
// value in a map; who wants more of one gets a connection (living.promote).
type unheard struct {
	session  *session // which it refers to
	rule     *policy.Rule
	uses     []policy.FilterUse
	protocol string
	inIface  string
	start    time.Time
}

// sameFlow is how long a further packet of a tuple belongs to the flow that has
// just begun: it was queued before the kernel had the verdict. It is not less
// than the queue may take to read it.
const sameFlow = 500 * time.Millisecond

// DecideNow is Decide for those who cannot wait: it asks no filter and no
// kernel, and allocates nothing for a client that is known. Its answer is
// Plain. ok is false for the flows that need more than the rules; Decide answers
// these. Drop, with ok, is
// a segment that was sent twice.
func (e *Engine) DecideNow(first flow.Packet) (path flow.Path, ok bool) {
	rules := e.Policy()
	v, ok := e.plainly(rules, first)
	if !ok {
		return flow.Drop, false
	}
	s := e.sessions.of(first.Src.Addr())
	if e.wanted(s, first, v.Filters) {
		return flow.Drop, false
	}
	if s == nil || !s.ref() {
		s = e.acquire(first.Src.Addr())
	}
	u := unheard{
		session: s, rule: v.Rule, uses: v.Filters, protocol: protocolName(v),
		inIface: first.InIface, start: e.now(),
	}
	switch e.flows.addUnheard(first.Tuple, u) {
	case placeOld:
		e.release(u.session)
		return flow.Drop, false
	case placeSame:
		e.release(u.session)
		if first.Proto == flow.TCP {
			return flow.Drop, true
		}
		return flow.Plain, true
	}
	// Whoever disconnected its session, or changed the rules, meanwhile found
	// the flow among the living, or it is found here.
	if cut := u.session.isCut(); cut || e.Policy() != rules {
		c := e.flows.find(first.Tuple)
		switch {
		case c == nil: // it has ended since
		case cut:
			e.tasks.run(c.Kill)
		case !e.stillAllowed(c):
			return e.refuse(c, refused{refusedPath(c), flow.CutByPolicy, "the rules changed meanwhile"}).Path, true
		}
	}
	return flow.Plain, true
}

// plainly judges a flow by the rules, if nothing else has a say.
func (e *Engine) plainly(rules *policy.Policy, first flow.Packet) (v policy.Verdict, ok bool) {
	v, _, ok = e.byRules(rules, first)
	return v, ok && !v.Maps(first.Tuple)
}

// byRules does so, wherever the flow leaves from, and gives what the rules were
// asked.
func (e *Engine) byRules(rules *policy.Policy, first flow.Packet) (v policy.Verdict, q policy.Question, ok bool) {
	t := first.Tuple
	if !t.Proto.HasPorts() || first.InIface == "" || e.factories.concern(t.Src.Addr()) || e.perms.concern(t) {
		return v, q, false
	}
	out, local, known := "", false, false
	if e.cached != nil {
		out, local, known = e.cached.Known(t.Dst.Addr())
	}
	if !known || local {
		return v, q, false
	}
	q = policy.Question{Tuple: t, InIface: first.InIface, OutIface: out}
	v = rules.Judge(q)
	carried := v.Class != policy.ClassDrop && v.Class != policy.ClassReject
	return v, q, carried && v.Rule != nil && !v.Rule.NoKernelMode && !v.Server.IsValid()
}

// wanted says whether a filter wants to hear of a new flow; s may be nil.
func (e *Engine) wanted(s *session, first flow.Packet, uses []policy.FilterUse) bool {
	if len(uses) == 0 && !e.wide.Load() {
		return false
	}
	kind := filterapi.ConnectTCP
	if first.Proto == flow.UDP {
		kind = filterapi.UDPDestination
	}
	for _, r := range e.filters {
		name := r.filter.Name()
		if !e.wide.Load() && !slices.ContainsFunc(uses, func(u policy.FilterUse) bool { return u.Name == name }) {
			continue
		}
		ev := r.events
		switch {
		case s != nil:
			ev = s.wants(r)
		case ev.Sources != 0 && ev.Sources&filterapi.Transparent == 0:
			continue
		}
		if _, ok := bound(ev, kind, name, uses, false); ok {
			return true
		}
	}
	return false
}

// endUnheard takes conntrack's word that a flow is over; false: it is none of
// the unheard.
func (e *Engine) endUnheard(end flow.End) bool {
	u, ok := e.flows.takeUnheard(end)
	if ok {
		e.overUnheard(u, end)
	}
	return ok
}

// overUnheard is over for what takeUnheard has taken.
func (e *Engine) overUnheard(u unheard, end flow.End) {
	if end.Start.IsZero() {
		end.Start = u.start
	}
	if end.Stop.IsZero() {
		end.Stop = e.now()
	}
	if end.Start.After(end.Stop) {
		end.Start = end.Stop // its end was heard before its beginning
	}
	e.record(end, about{rule: u.rule, protocol: u.protocol, session: u.session})
	e.release(u.session)
}

// placement is where a flow that is not heard of comes.
type placement uint8

const (
	placeNew  placement = iota
	placeSame           // it has just begun
	placeOld            // another flow of its tuple has not ended, or is being made
)

// addUnheard takes a flow in.
func (l *living) addUnheard(t flow.Tuple, u unheard) placement {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old, there := l.unheard[t]; there {
		if u.start.Sub(old.start) < sameFlow {
			return placeSame
		}
		return placeOld
	}
	if _, out := l.reserved[t]; out || l.byTuple[t] != nil {
		return placeOld
	}
	if l.unheard == nil {
		l.unheard = make(map[flow.Tuple]unheard)
	}
	l.unheard[t] = u
	return placeNew
}

// takeUnheard takes out the flow of an end, unless it began after that.
func (l *living) takeUnheard(end flow.End) (u unheard, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if u, ok = l.unheard[end.Tuple]; !ok || !end.Start.IsZero() && end.Start.Add(sameStart).Before(u.start) {
		return unheard{}, false
	}
	delete(l.unheard, end.Tuple)
	return u, true
}

// promoteLocked makes a connection of a flow; nil: there is no such flow.
func (l *living) promoteLocked(t flow.Tuple) *connection {
	u, ok := l.unheard[t]
	if !ok {
		return nil
	}
	delete(l.unheard, t)
	c := &connection{
		e: u.session.e, session: u.session, held: true, tuple: t, inIface: u.inIface, start: u.start,
		rule: u.rule, uses: u.uses, protocol: u.protocol, path: flow.Kernel,
	}
	l.byTuple[t] = c
	return c
}

// forgotten takes out the flows that began before a time and are not alive.
func (l *living) forgotten(alive map[flow.Tuple]bool, before time.Time) map[flow.Tuple]unheard {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[flow.Tuple]unheard{}
	for t, u := range l.unheard {
		if u.start.Before(before) && !alive[t] {
			out[t] = u
			delete(l.unheard, t)
		}
	}
	return out
}

// olderUnheard says whether there is one that began before a time.
func (l *living) olderUnheard(before time.Time) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	for _, u := range l.unheard {
		if u.start.Before(before) {
			return true
		}
	}
	return false
}
