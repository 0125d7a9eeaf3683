package engine

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// connection is one flow that user space judged, carried by either path, or
// (bind != nil) an address that is open for inbound flows. Filters hold it by
// a connHandle.
type connection struct {
	e       *Engine
	session *session
	held    bool // refers to the session until it ends
	tuple   flow.Tuple
	inIface string
	start   time.Time

	// What the policy said of it; a secondary connection inherits it.
	rule      *policy.Rule
	protocol  string
	uses      []policy.FilterUse
	secondary bool
	perm      *permission // that let it in; nil: a primary connection
	bind      *permission // of a bind object

	// Where a network rule maps endpoints: the rule and what it was asked, the
	// mapping of the flow's source, and that of its destination, if it is one.
	netRule         *policy.NetworkRule
	leaving         policy.Question
	mapping, around *mapping
	source          netip.AddrPort // the external endpoint that it leaves from
	holds           bool           // it counts as a flow of them

	internalTranslation bool // its server sees the gateway's own address

	// explicit: the client asked the gateway for it, and has a connection to
	// that. done is closed when it is over.
	explicit bool
	done     chan struct{}
	asked    string // the protocol by which the rules were asked; empty: by the ports

	mu        sync.Mutex
	handler   *registered         // the filter whose handler runs; nil: none
	handling  filterapi.EventMask // what it handles
	denied    bool
	killed    bool
	links     []Link
	peers     []remembered // of a bind: data filters for one peer each
	number    uint64       // for remembered; 0: not asked for yet
	buffer    int
	emulated  bool        // a filter plays the far end
	emulator  *registered // which
	sent      uint64      // bytes that it says were sent
	path      flow.Path
	takeover  *Takeover
	name      netip.AddrPort // of the external side, once connected
	peer      netip.AddrPort
	near      netip.AddrPort // of the gateway, where the client of an inbound flow sees that
	named     bool           // a filter has set name
	ended     bool
	severed   bool          // cut, and known to its permission
	pending   bool          // user space holds the first packet, and its permission knows
	stands    bool          // it is established from end to end
	announced chan struct{} // closed when a filter has heard of that; nil: none hears
	hearers   []hearer
	handles   []held
	grounds   *grounds // of the permissions that have it for their primary one; nil: none
	gone      bool     // and nothing more is heard of it: handles are the filters'
}

type hearer struct {
	r *registered
	a *attachment
}

// living are the flows that user space judged and that have not ended.
type living struct {
	mu       sync.RWMutex
	byTuple  map[flow.Tuple]*connection
	unheard  map[flow.Tuple]unheard
	reserved map[flow.Tuple]struct{} // by those who are about to make a flow
}

// reserve keeps a tuple for one who makes a flow of it; false: one lives or is
// being made.
func (l *living) reserve(t flow.Tuple) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, taken := l.unheard[t]
	if _, out := l.reserved[t]; out || taken || l.byTuple[t] != nil {
		return false
	}
	if l.reserved == nil {
		l.reserved = make(map[flow.Tuple]struct{})
	}
	l.reserved[t] = struct{}{}
	return true
}

func (l *living) unreserve(t flow.Tuple) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.reserved, t)
}

// add takes a flow in and gives the one of the same tuple that it replaces,
// whose end has not been reported yet; nil: none.
func (l *living) add(c *connection) (old *connection) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old = l.byTuple[c.tuple]; old == nil {
		old = l.promoteLocked(c.tuple)
	}
	l.byTuple[c.tuple] = c
	return old
}

func (l *living) remove(c *connection) {
	l.mu.Lock()
	if l.byTuple[c.tuple] == c {
		delete(l.byTuple, c.tuple)
	}
	l.mu.Unlock()
}

func (l *living) find(t flow.Tuple) *connection {
	l.mu.RLock()
	c := l.byTuple[t]
	_, unheard := l.unheard[t]
	l.mu.RUnlock()
	if c != nil || !unheard {
		return c
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if c = l.byTuple[t]; c == nil {
		c = l.promoteLocked(t)
	}
	return c
}

// all makes connections of all of them.
func (l *living) all() []*connection {
	l.mu.Lock()
	defer l.mu.Unlock()
	for t := range l.unheard {
		l.promoteLocked(t)
	}
	return slices.Collect(maps.Values(l.byTuple))
}

// heard are those that are connections already.
func (l *living) heard() []*connection {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return slices.Collect(maps.Values(l.byTuple))
}

// inKernel says whether the kernel carries the flow.
func (c *connection) inKernel() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.path == flow.Kernel
}

// finish marks the end; false: it has ended before.
func (c *connection) finish() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	first := !c.ended
	c.ended = true
	if first && len(c.hearers) == 0 && c.announced == nil {
		c.letGo()
	}
	return first
}

// open and shut bracket a filter's event handler.
func (c *connection) open(filter *registered, kind filterapi.EventMask) {
	c.mu.Lock()
	c.handler, c.handling = filter, kind
	c.mu.Unlock()
}

func (c *connection) shut() { c.open(nil, 0) }

func (c *connection) isDenied() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.denied
}

// told remembers a filter that heard of the connection.
func (c *connection) told(r *registered, a *attachment) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.toldLocked(r, a)
}

func (c *connection) toldLocked(r *registered, a *attachment) {
	if a.events.Types&filterapi.Terminating == 0 {
		return
	}
	if h := (hearer{r, a}); !slices.Contains(c.hearers, h) { // a bind raises two events
		c.hearers = append(c.hearers, h)
	}
}

func (c *connection) heard() []hearer {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.hearers
}

// hasListeners says whether its end must wait for filters.
func (c *connection) hasListeners() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.hearers) > 0 || c.announced != nil
}

// ExternalName implements filterapi.Connection.
func (c *connection) ExternalName() (netip.AddrPort, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.name.IsValid() {
		return netip.AddrPort{}, filterapi.ErrBadContext
	}
	return c.name, nil
}

// ExternalPeer implements filterapi.Connection.
func (c *connection) ExternalPeer() (netip.AddrPort, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.peer.IsValid() {
		return netip.AddrPort{}, filterapi.ErrBadContext
	}
	return c.peer, nil
}

// SetIPFilter implements filterapi.Connection.
func (c *connection) SetIPFilter(f *filterapi.IPFilter) error {
	if emulated, _ := c.state(); c.bind == nil || emulated || c.bind.publication() != "" {
		return filterapi.ErrNotSupported
	}
	if !suits(f, c.session.addr) {
		return fmt.Errorf("set IP filter: %w", filterapi.ErrInvalidArgument)
	}
	if err := c.e.rearm(c.bind, f.Clone()); err != nil {
		return fmt.Errorf("set IP filter: %w", err)
	}
	return nil
}

// IPFilter implements filterapi.Connection.
func (c *connection) IPFilter() *filterapi.IPFilter {
	if c.bind == nil {
		return nil
	}
	return c.bind.ipFilter()
}

// SetExpiry implements filterapi.Connection.
func (c *connection) SetExpiry(d time.Duration) error {
	fail := func(err error) error { return fmt.Errorf("set expiry %v: %w", d, err) }
	switch {
	case c.bind == nil:
		return fail(filterapi.ErrNotSupported)
	case d < 0:
		return fail(filterapi.ErrInvalidArgument)
	case !c.e.expireAt(c.bind, d):
		return fail(filterapi.ErrTerminating)
	}
	if err := c.e.enforce(c.bind); err != nil {
		_ = c.e.void(c.bind) // it logs
		return fail(err)
	}
	if !c.bind.waits() {
		return fail(filterapi.ErrTerminating)
	}
	return nil
}

// Expiry implements filterapi.Connection.
func (c *connection) Expiry() (time.Time, bool) {
	if c.bind == nil {
		return time.Time{}, false
	}
	c.bind.mu.Lock()
	defer c.bind.mu.Unlock()
	return c.bind.expires()
}

// Kill implements filterapi.Connection.
func (c *connection) Kill() {
	if c.bind != nil && c.bind.publication() != "" {
		return // the administrator opened it
	}
	if c.bind != nil {
		_ = c.e.void(c.bind) // used up or gone: nothing is left to close
		return
	}
	c.mu.Lock()
	c.killed = true // before the decision that is enough
	path, t, ended := c.path, c.takeover, c.ended
	c.mu.Unlock()
	switch {
	case ended:
	case t != nil:
		t.cut()
	case path == flow.Kernel:
		if err := c.e.cutKernel(context.Background(), c); err != nil {
			c.e.log.Error("cut failed", zap.Stringer("flow", c.tuple), zap.Error(err))
			return
		}
		c.e.sever(c)
	}
}
