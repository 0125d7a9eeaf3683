package sip

import (
	"context"
	"fmt"
	"net/netip"
	"runtime/debug"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// session is the filter's part in one client's session: registrations and
// calls, shared by all of the client's connections. Its fields belong to the
// goroutine of run, which takes one message at a time and may wait for the
// kernel meanwhile; nothing is locked then.
type session struct {
	filter *filter
	log    *zap.Logger
	api    filterapi.Session
	client netip.Addr
	turns  chan turn
	over   chan struct{} // closed by Detach
	once   sync.Once
	open   openings

	transactions map[transactionKey]*transaction
	contacts     map[contactKey]*contact
	calls        map[string]*call // by Call-ID
	lingering    []lingering
	// held keeps the client's session alive while anybody may still call it.
	held filterapi.Session
}

func newSession(f *filter, api filterapi.Session) *session {
	return &session{
		filter: f, log: f.log, api: api, client: api.ClientAddr(),
		turns: make(chan turn), over: make(chan struct{}),
		transactions: map[transactionKey]*transaction{}, contacts: map[contactKey]*contact{}, calls: map[string]*call{},
	}
}

// turn is something to do on the session's goroutine.
type turn struct {
	do   func()
	done chan error
}

// run takes turns until the session or the filter ends.
func (s *session) run() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case t := <-s.turns:
			t.done <- s.protect(t.do)
		case <-timer.C:
		case <-s.over:
			return
		case <-s.filter.stop:
			return
		}
		_ = s.protect(s.sweep) // it logs
		timer.Reset(s.untilNext())
	}
}

// protect turns a panic into an error: it must not end the gateway.
func (s *session) protect(do func()) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic in the SIP filter", zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	do()
	return nil
}

// take runs do on the session's goroutine and waits for it.
// filterapi.ErrTerminating: the session has ended.
func (s *session) take(ctx context.Context, do func()) error {
	t := turn{do, make(chan error, 1)}
	select {
	case s.turns <- t:
		return <-t.done
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-s.over:
	case <-s.filter.stop:
	}
	return filterapi.ErrTerminating
}

// lingering are connections that may still carry the end of a conversation.
type lingering struct {
	until time.Time
	conns []filterapi.Connection
}

// answerTime is how long a request may be without an answer, and how long its
// answer is repeated: 64 times T1 (RFC 3261, 17).
const answerTime = 32 * time.Second

// sweep ends what has had its time.
func (s *session) sweep() {
	now := time.Now()
	for key, t := range s.transactions {
		if !now.Before(t.until) {
			s.endTransaction(key, t)
		}
	}
	for _, c := range s.calls {
		if !c.until.IsZero() && !now.Before(c.until) {
			s.log.Info("call has had its time", zap.String("call", c.id), zap.Stringer("client", s.client))
			s.endCall(c)
		}
	}
	for _, c := range s.contacts {
		c.expire(now)
		s.tidy(c)
	}
	rest := s.lingering[:0]
	for _, l := range s.lingering {
		if now.Before(l.until) {
			rest = append(rest, l)
			continue
		}
		for _, c := range l.conns {
			c.Kill()
		}
	}
	clear(s.lingering[len(rest):])
	s.lingering = rest
	s.hold()
}

// untilNext is how long nothing will have had its time.
func (s *session) untilNext() time.Duration {
	next := time.Now().Add(time.Hour)
	sooner := func(t time.Time) {
		if !t.IsZero() && t.Before(next) {
			next = t
		}
	}
	for _, t := range s.transactions {
		sooner(t.until)
	}
	for _, c := range s.calls {
		sooner(c.until)
	}
	for _, c := range s.contacts {
		for _, until := range c.uses {
			sooner(until)
		}
	}
	for _, l := range s.lingering {
		sooner(l.until)
	}
	return max(time.Until(next), time.Millisecond)
}

// hold keeps the client's session for as long as it has registrations or
// calls: its flows may all be silent meanwhile.
func (s *session) hold() {
	needed := len(s.contacts)+len(s.calls)+len(s.lingering) > 0
	switch {
	case needed && s.held == nil:
		held, err := s.filter.gateway.ClientSession(s.client)
		if err != nil {
			s.log.Warn("session is not kept", zap.Stringer("client", s.client), zap.Error(err))
			return
		}
		s.held = held
	case !needed && s.held != nil:
		s.held.Close()
		s.held = nil
	}
}
