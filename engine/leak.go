package engine

import (
	"runtime/metrics"
	"slices"
	"sync"
	"time"
	"weak"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/flow"
)

// DefaultLeakDelay is how long after the end of a connection a filter may hold
// on to it without being named, twice that at the most.
const DefaultLeakDelay = 5 * time.Minute

// maxWatched bounds how many ended connections are watched at a time. Who
// forgets to let go of them does so with those, too, that are watched later.
const maxWatched = 4096

// leaks looks whether filters let go of their handles of connections that are
// over. Nothing runs while there is none to look at.
type leaks struct {
	delay time.Duration

	mu      sync.Mutex
	sweeps  bool
	watched []departed
}

// departed is a handle that nobody needs any more.
type departed struct {
	handle weak.Pointer[connHandle]
	r      *registered
	tuple  flow.Tuple
	ended  time.Time
	cycles uint64 // of the garbage collector, when the delay was over; 0: it is not
}

// letGo keeps a connection of which nothing more is heard from holding its
// handles. c.mu is held.
func (c *connection) letGo() {
	c.gone = true
	// These lead to handles, too; a permission may need its primary connection
	// for longer.
	c.takeover, c.links, c.peers = nil, nil, nil
	now := c.e.now()
	for i, h := range c.handles {
		x := h.strong
		if x == nil {
			continue
		}
		c.handles[i] = held{r: h.r, weak: weak.Make(x)}
		if h.r == nil {
			continue
		}
		x.over.Store(slices.ContainsFunc(c.hearers, func(y hearer) bool { return y.r == h.r }))
		c.e.leaks.watch(c.e, departed{handle: c.handles[i].weak, r: h.r, tuple: c.tuple, ended: now})
	}
}

func (l *leaks) watch(e *Engine, d departed) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.watched) >= maxWatched {
		return
	}
	l.watched = append(l.watched, d)
	if !l.sweeps {
		l.sweeps = true
		e.later(l.delay, e.sweepLeaks)
	}
}

// sweepLeaks names the filters whose handles outlived the delay and two runs of
// the garbage collector after it: one may have begun before the handle was let
// go of.
func (e *Engine) sweepLeaks() {
	l, now, cycles := &e.leaks, e.now(), collections()
	held := make(map[*registered][]departed)
	l.mu.Lock()
	kept := l.watched[:0:0]
	for _, d := range l.watched {
		switch {
		case d.cycles == 0 && !now.Before(d.ended.Add(l.delay)):
			d.cycles = cycles
		case d.cycles != 0 && cycles >= d.cycles+2:
			// Asked once only: the answer keeps a handle that nobody has over a
			// run that is just then marking.
			if d.handle.Value() != nil {
				held[d.r] = append(held[d.r], d)
			}
			continue
		}
		kept = append(kept, d)
	}
	l.watched = kept
	l.mu.Unlock()
	for r, all := range held {
		r.log.Warn("the filter holds connections that are over", zap.Int("connections", len(all)),
			zap.Stringer("flow", all[0].tuple), zap.Time("ended", all[0].ended))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sweeps = len(l.watched) > 0; l.sweeps {
		e.later(l.delay/2, e.sweepLeaks)
	}
}

// collections is how often the garbage collector has run, never 0.
func collections() uint64 {
	s := []metrics.Sample{{Name: "/gc/cycles/total:gc-cycles"}}
	metrics.Read(s)
	return s[0].Value.Uint64() + 1
}

// used notes a call on a handle of something that its filter knows to be over.
func (r *registered) used(call string, of zap.Field) {
	log := r.log.Debug
	if r.afterEnd.Add(1) == 1 {
		log = r.log.Warn
	}
	log("the filter uses what is over", zap.String("call", call), of)
}

// used notes a call.
func (h *connHandle) used(call string) {
	if h.over.Load() {
		h.r.used(call, zap.Stringer("flow", h.c.tuple))
	}
}

// used notes a call.
func (h *sessionHandle) used(call string) {
	if h.over.Load() {
		h.r.used(call, zap.Uint64("session", h.s.id))
	}
}
