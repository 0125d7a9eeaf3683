package engine

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/sluicegw/sluice/filterapi"
)

// session is everything one client address does. It lives as long as anything
// refers to it: a flow, or an event that is being raised. Permissions that
// wait do not; they end with it.
type session struct {
	e    *Engine
	id   uint64
	addr netip.Addr

	private bool   // a filter made it, for a client that asked the filter
	user    string // of a private one
	start   time.Time

	mu       sync.Mutex
	refs     int
	closing  bool // it takes nothing new, and ends with its last flow
	cut      bool // and its flows are cut
	ended    bool
	sockets  map[sessionSocket]struct{} // of Session.Network
	attached map[*registered]*attachment
	handles  []*sessionHandle
	peers    map[peerKey][]remembered // data filters for peers of the client's sockets

	perms   map[*permission]struct{} // under permissions.mu
	grounds grounds

	published map[publicationKey]*permission // with living flows; under mu
}

// attachment is one filter's part in a session. ready is closed when the other
// fields are set.
type attachment struct {
	ready  chan struct{}
	code   *code
	filter filterapi.SessionFilter // nil: not interested
	events filterapi.Events
	err    error
}

// done says whether the filter has answered.
func (a *attachment) done() bool {
	select {
	case <-a.ready:
		return true
	default:
		return false
	}
}

// sessions are those that live. A client has one whose flows pass through the
// gateway by themselves, and any number of private ones.
type sessions struct {
	mu     sync.Mutex
	byAddr map[netip.Addr]*session
	byID   map[uint64]*session // the private ones, too
}

func (s *sessions) init() {
	s.byAddr = make(map[netip.Addr]*session)
	s.byID = make(map[uint64]*session)
}

func (s *sessions) all() []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.byID))
}

// find gives a living session; nil: there is none of that number.
func (s *sessions) find(id uint64) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byID[id]
}

// of gives the session of a client; nil: it has none.
func (s *sessions) of(client netip.Addr) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byAddr[client]
}

// forget takes a session off the way of new flows, and, once it has ended, off
// the list.
func (s *sessions) forget(x *session, ended bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byAddr[x.addr] == x {
		delete(s.byAddr, x.addr)
	}
	if ended {
		delete(s.byID, x.id)
	}
}

// acquire finds or makes the session of a client and refers to it.
func (e *Engine) acquire(addr netip.Addr) *session {
	e.sessions.mu.Lock()
	defer e.sessions.mu.Unlock()
	if s := e.sessions.byAddr[addr]; s != nil && s.ref() {
		return s
	}
	s := e.newSession(addr)
	e.sessions.byAddr[addr] = s
	return s
}

// newSession makes a session with one reference. sessions.mu is held.
func (e *Engine) newSession(addr netip.Addr) *session {
	s := &session{
		e: e, id: e.nextID(), addr: addr, start: e.now(), refs: 1,
		attached: make(map[*registered]*attachment), perms: make(map[*permission]struct{}),
	}
	e.sessions.byID[s.id] = s
	return s
}

// ref refers to a living session; false if it has ended.
func (s *session) ref() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || s.closing {
		return false
	}
	s.refs++
	return true
}

// lives is false once the session has ended.
func (s *session) lives() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.ended && !s.closing
}

// release drops one reference and ends the session with the last.
func (e *Engine) release(s *session) {
	s.mu.Lock()
	s.refs--
	if s.refs > 0 || s.ended {
		s.mu.Unlock()
		return
	}
	e.endSession(s)
}

// endSession ends a session whose lock the caller holds, and unlocks it: its
// permissions are voided and its filters detached, in the background.
func (e *Engine) endSession(s *session) {
	var attached []hearer
	if !s.ended {
		for r, a := range s.attached {
			if a.done() { // else attachNow sees that nobody needs it any more
				attached = append(attached, hearer{r, a})
			}
		}
	}
	s.ended = true
	s.attached, s.peers = nil, nil
	sockets := s.takeSockets()
	s.mu.Unlock()

	e.sessions.forget(s, true)
	if len(attached)+len(sockets) == 0 && e.owns(s) == 0 {
		return
	}
	e.tasks.run(func() {
		e.closeAll(s, sockets)
		for _, h := range attached {
			e.detach(h.r, h.a.filter)
			s.handle(h.r).over.Store(h.a.filter != nil)
		}
	})
}

// owns counts what a session has opened, but for its sockets.
func (e *Engine) owns(s *session) int { return len(e.perms.of(s)) + len(e.factories.owned(s)) }

// closeAll closes what a session has opened.
func (e *Engine) closeAll(s *session, sockets []sessionSocket) {
	for _, c := range sockets {
		_ = c.Close() // nobody asks any more
	}
	for _, f := range e.factories.owned(s) {
		e.uninstall(f)
	}
	e.voidAll(e.perms.of(s))
}

// voidAll voids the permissions of a session that has ended: all of them at
// once, so that the kernel gets them together.
func (e *Engine) voidAll(perms []*permission) {
	var changes sync.WaitGroup
	for _, p := range perms {
		if !e.end(p) {
			continue // used up; it ends with its flow
		}
		changes.Go(func() { _ = e.enforce(p) }) // it logs
		if c := p.object(); c != nil && c.finish() {
			e.terminating(c)
		}
	}
	changes.Wait()
}

// attach gives the filter's part in the session, made at the first event, and
// waits for it no longer than ctx. A filter that fails to attach is asked
// again at the next event.
func (e *Engine) attach(ctx context.Context, s *session, r *registered) (*attachment, error) {
	s.mu.Lock()
	if s.ended || s.closing && s.attached[r] == nil {
		s.mu.Unlock()
		return nil, filterapi.ErrTerminating
	}
	a := s.attached[r]
	if a == nil {
		a = &attachment{ready: make(chan struct{}), code: e.code(r, "AttachToSession", nil)}
		s.attached[r] = a
		go e.attachNow(s, r, a)
	}
	s.mu.Unlock()
	if a.done() {
		return a, a.err
	}
	select {
	case <-a.ready:
		return a, a.err
	case <-ctx.Done():
		a.code.missed()
		return nil, fmt.Errorf("attach to session: %w: %w", errLate, ctx.Err())
	}
}

// attachNow asks the filter. The answer counts for the events to come, also
// when the event that it was asked for waits no more.
func (e *Engine) attachNow(s *session, r *registered, a *attachment) {
	func() {
		defer recovered(&a.err)
		a.filter, a.events, a.err = r.filter.AttachToSession(s.handle(r))
	}()
	a.code.answered()
	e.widen(a.events)
	s.mu.Lock()
	ended := s.ended
	if a.err != nil && !ended {
		delete(s.attached, r)
	}
	close(a.ready)
	s.mu.Unlock()
	if ended && a.err == nil {
		e.detach(r, a.filter)
	}
}

// wants says what a filter is registered for in a session: its own
// registration until it has attached, the session's from then on.
func (s *session) wants(r *registered) filterapi.Events {
	s.mu.Lock()
	a := s.attached[r]
	s.mu.Unlock()
	if a == nil || !a.done() || a.err != nil {
		return s.scope(r.events)
	}
	return s.scope(a.wants())
}

// source is where the session's flows come from.
func (s *session) source() filterapi.Sources {
	if s.private {
		return filterapi.Explicit
	}
	return filterapi.Transparent
}

// scope is what of a registration concerns the session.
func (s *session) scope(ev filterapi.Events) filterapi.Events {
	if ev.Sources != 0 && ev.Sources&s.source() == 0 {
		return filterapi.Events{}
	}
	return ev
}

// attachedTo is a filter's part in the session; nil: it has none.
func (s *session) attachedTo(r *registered) *attachment {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.attached[r]; a != nil && a.done() && a.err == nil && a.filter != nil {
		return a
	}
	return nil
}

// wants is the registration of a filter that has attached.
func (a *attachment) wants() filterapi.Events {
	if a.filter == nil {
		return filterapi.Events{}
	}
	return a.events
}
