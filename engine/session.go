package engine

import (
	"context"
	"net/netip"
	"sync"

	"github.com/sluicegw/sluice/filterapi"
)

// session is everything one client address does. It lives while anything
// refers to it: a flow, or a permission that waits.
type session struct {
	e    *Engine
	id   uint64
	addr netip.Addr

	mu       sync.Mutex
	refs     int
	ended    bool
	attached map[*registered]*attachment
}

// attachment is one filter's part in a session. ready is closed when the other
// fields are set.
type attachment struct {
	ready  chan struct{}
	filter filterapi.SessionFilter // nil: not interested
	events filterapi.Events
}

type sessions struct {
	mu     sync.Mutex
	byAddr map[netip.Addr]*session
}

func (s *sessions) all() []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*session, 0, len(s.byAddr))
	for _, x := range s.byAddr {
		out = append(out, x)
	}
	return out
}

// acquire finds or makes the session of a client and refers to it.
func (e *Engine) acquire(addr netip.Addr) *session {
	e.sessions.mu.Lock()
	defer e.sessions.mu.Unlock()
	if s := e.sessions.byAddr[addr]; s != nil && s.ref() {
		return s
	}
	s := &session{e: e, id: e.nextID(), addr: addr, refs: 1, attached: make(map[*registered]*attachment)}
	e.sessions.byAddr[addr] = s
	return s
}

// ref refers to a living session; false if it has ended.
func (s *session) ref() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return false
	}
	s.refs++
	return true
}

// release drops one reference and ends the session with the last.
func (e *Engine) release(s *session) {
	s.mu.Lock()
	s.refs--
	last := s.refs == 0
	s.mu.Unlock()
	if last {
		e.endSession(s)
	}
}

// endSession voids the session's permissions and detaches its filters. It may
// be called again.
func (e *Engine) endSession(s *session) {
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return
	}
	s.ended = true
	attached := s.attached
	s.attached = nil
	s.mu.Unlock()

	e.sessions.mu.Lock()
	if e.sessions.byAddr[s.addr] == s {
		delete(e.sessions.byAddr, s.addr)
	}
	e.sessions.mu.Unlock()
	for _, p := range e.perms.of(s) {
		_ = e.void(p) // already used or expired is as good
	}
	for r, a := range attached {
		<-a.ready
		if a.filter != nil {
			e.detach(r, a.filter)
		}
	}
}

// attach gives the filter's part in the session, made at the first event. A
// filter that fails to attach is asked again at the next event.
func (e *Engine) attach(ctx context.Context, s *session, r *registered) (*attachment, error) {
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return nil, filterapi.ErrTerminating
	}
	if a := s.attached[r]; a != nil {
		s.mu.Unlock()
		select {
		case <-a.ready:
			return a, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	a := &attachment{ready: make(chan struct{})}
	s.attached[r] = a
	s.mu.Unlock()
	got, err := call(ctx, func() (attachment, error) {
		sf, events, err := r.filter.AttachToSession(s)
		return attachment{filter: sf, events: events}, err
	})
	if err == nil {
		a.filter, a.events = got.filter, got.events
	} else {
		s.mu.Lock()
		delete(s.attached, r)
		s.mu.Unlock()
	}
	close(a.ready)
	return a, err
}

// wants says what a filter is registered for in a session: its own
// registration until it was attached, the session's from then on.
func (s *session) wants(r *registered) filterapi.Events {
	s.mu.Lock()
	a := s.attached[r]
	s.mu.Unlock()
	if a == nil {
		return r.events
	}
	<-a.ready
	if a.filter == nil {
		return filterapi.Events{}
	}
	return a.events
}

// ID implements filterapi.Session.
func (s *session) ID() uint64 { return s.id }

// ClientAddr implements filterapi.Session.
func (s *session) ClientAddr() netip.Addr { return s.addr }
