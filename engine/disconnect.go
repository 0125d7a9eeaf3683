package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// SessionInfo is a living session, for people.
type SessionInfo struct {
	ID          uint64
	Client      netip.Addr
	User        string // empty: it has none
	Private     bool
	Since       time.Time
	Flows       int // those that user space judged
	Permissions int
	Filters     []string // that are attached
}

// Sessions lists them by age.
func (e *Engine) Sessions() []SessionInfo {
	flows := make(map[*session]int)
	for _, c := range e.flows.all() {
		flows[c.session]++
	}
	perms := make(map[uint64]int)
	for _, p := range e.Permissions() {
		perms[p.Session]++
	}
	var out []SessionInfo
	for _, s := range e.sessions.all() {
		i := SessionInfo{ID: s.id, Client: s.addr, User: s.user, Private: s.private, Since: s.start, Flows: flows[s], Permissions: perms[s.id]}
		s.mu.Lock()
		for r, a := range s.attached {
			if a.done() && a.err == nil && a.filter != nil {
				i.Filters = append(i.Filters, r.filter.Name())
			}
		}
		s.mu.Unlock()
		slices.Sort(i.Filters)
		out = append(out, i)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out
}

// Disconnect ends a session: its permissions are void, its sockets closed and
// its flows cut, also the client's kernel flows that user space never saw, as
// just dumped from conntrack. What the client begins anew belongs to a new
// session. filterapi.ErrNotFound: no such session.
func (e *Engine) Disconnect(ctx context.Context, id uint64, kernel []flow.Tuple) error {
	s := e.sessions.find(id)
	if s == nil {
		return fmt.Errorf("session %d: %w", id, filterapi.ErrNotFound)
	}
	s.mu.Lock()
	s.cut = true // a flow that is being judged is cut when it begins
	s.mu.Unlock()
	e.shut(s)
	var known []*connection
	for _, c := range e.flows.all() {
		switch t := c.carrier(); {
		case c.session != s:
		case t != nil:
			t.cut()
		default:
			known = append(known, c)
		}
	}
	var unknown []flow.Tuple
	for _, t := range kernel {
		if !s.private && (t.Src.Addr() == s.addr || e.leadsTo(t, s.addr)) && e.flows.find(t) == nil {
			unknown = append(unknown, t)
		}
	}
	err := e.cutKernel(ctx, known...)
	if err == nil {
		for _, c := range known {
			e.sever(c)
		}
	}
	if len(unknown) > 0 {
		err = errors.Join(err, e.kernel.Cut(ctx, unknown...))
	}
	e.takeBack(s)
	return err
}

// carrier is what user space carries the flow by; nil: it does not.
func (c *connection) carrier() *Takeover {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.takeover
}

// shut has a session take nothing new: what it has opened is closed when shut
// returns. It ends with its last flow.
func (e *Engine) shut(s *session) {
	s.mu.Lock()
	s.closing = true
	sockets := s.takeSockets()
	s.mu.Unlock()
	e.sessions.forget(s, false)
	e.closeAll(s, sockets)
}

// takeBack drops the references that filters hold.
func (e *Engine) takeBack(s *session) {
	s.mu.Lock()
	s.refs++ // of this function
	for _, h := range s.handles {
		s.refs -= h.owed
		h.owed = 0
	}
	s.mu.Unlock()
	e.release(s)
}

// isCut says whether the session was disconnected.
func (s *session) isCut() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cut
}
