// Package probe is an application filter that does what a test tells it over
// a Unix socket. It is part of the test build of the gateway only (build tag
// "probe"). What goes over the socket is described in test/netns/lab/probe.go.
package probe

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// socketVariable names the socket in the environment. Without it the filter
// registers for nothing.
const socketVariable = "SLUICE_PROBE_SOCKET"

// Filter is the probe. Safe for concurrent use.
type Filter struct {
	log      *zap.Logger
	listener net.Listener

	mu       sync.Mutex
	answers  map[string]answer // by kind of event
	counts   map[string]int
	sessions map[uint64]filterapi.Session
	conns    map[uint64]filterapi.Connection
	ids      map[filterapi.Connection]uint64 // conns, the other way round
	actions  map[uint64]filterapi.Action
	held     map[uint64]chan answer // by number of event
	paused   map[filterapi.Connection]chan struct{}
	tests    map[*test]bool
	lastID   uint64
}

// answer is what an event gets.
type answer struct{ do, chain, priority string }

// test is one connection of a test.
type test struct {
	mu   sync.Mutex
	json *json.Encoder
}

func (t *test) send(v any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_ = t.json.Encode(v) // the test has gone
}

// New makes the probe filter.
func New() filterapi.Filter {
	return &Filter{
		answers: map[string]answer{}, counts: map[string]int{},
		sessions: map[uint64]filterapi.Session{}, conns: map[uint64]filterapi.Connection{}, ids: map[filterapi.Connection]uint64{},
		actions: map[uint64]filterapi.Action{}, held: map[uint64]chan answer{},
		paused: map[filterapi.Connection]chan struct{}{}, tests: map[*test]bool{},
	}
}

// Name implements filterapi.Filter.
func (f *Filter) Name() string { return "probe" }

const all = filterapi.ConnectTCP | filterapi.UDPDestination | filterapi.BindTCP | filterapi.BindUDP |
	filterapi.Listen | filterapi.Accepted | filterapi.Terminating

// Init implements filterapi.Filter.
func (f *Filter) Init(fw filterapi.Firewall) (filterapi.Events, error) {
	f.log = fw.Logger()
	path := os.Getenv(socketVariable)
	if path == "" {
		return filterapi.Events{}, nil
	}
	_ = os.Remove(path) // of an earlier run
	l, err := net.Listen("unix", path)
	if err != nil {
		return filterapi.Events{}, fmt.Errorf("probe socket: %w", err)
	}
	f.listener = l
	go f.serve()
	return filterapi.Events{Types: all}, nil
}

// Shutdown implements filterapi.Filter.
func (f *Filter) Shutdown() {
	if f.listener != nil {
		_ = f.listener.Close()
	}
}

// AttachToSession implements filterapi.Filter.
func (f *Filter) AttachToSession(s filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sessions[s.ID()] = s
	return &sessionFilter{f, s}, filterapi.Events{Types: all}, nil
}

type sessionFilter struct {
	f *Filter
	s filterapi.Session
}

// Detach implements filterapi.SessionFilter.
func (s *sessionFilter) Detach() {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	delete(s.f.sessions, s.s.ID())
}

// HandleEvent implements filterapi.SessionFilter.
func (s *sessionFilter) HandleEvent(ctx context.Context, ev filterapi.Event) error {
	kind, conn, secondary, dst := describe(ev)
	out := event{Kind: kind, Session: s.s.ID(), Secondary: secondary, Src: conn.Tuple().Src.String(), Dst: dst}
	f := s.f
	f.mu.Lock()
	f.counts[kind]++
	f.lastID++
	out.Event = f.lastID
	out.Conn = f.connID(conn)
	a := f.answers[kind]
	var wait chan answer
	if a.do == "hold" {
		wait = make(chan answer, 1)
		f.held[out.Event] = wait
	}
	if kind == "Terminating" {
		delete(f.conns, out.Conn)
		delete(f.ids, conn)
	}
	f.mu.Unlock()
	f.push(out)
	if wait != nil {
		select {
		case a = <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return f.act(a, conn)
}

// act does to a connection what the test has set for its event.
func (f *Filter) act(a answer, conn filterapi.Connection) error {
	switch a.do {
	case "deny":
		return conn.Deny()
	case "attach":
		p, ok := priorities[a.priority]
		if !ok {
			p = filterapi.PriorityMiddle
		}
		return conn.AttachDataFilter(&dataFilter{f: f, tag: a.chain}, p)
	case "fail":
		return errors.New("the test said: fail")
	case "panic":
		panic("the test said: panic")
	}
	return nil
}

var priorities = map[string]filterapi.Priority{
	"NAT": filterapi.PriorityNAT, "Internal": filterapi.PriorityInternal, "PostTrust": filterapi.PriorityPostTrust,
	"Middle": filterapi.PriorityMiddle, "PreTrust": filterapi.PriorityPreTrust,
	"External": filterapi.PriorityExternal, "Emulation": filterapi.PriorityEmulation,
}

func describe(ev filterapi.Event) (kind string, c filterapi.Connection, secondary bool, dst string) {
	switch e := ev.(type) {
	case *filterapi.ConnectEvent:
		return "ConnectTCP", e.Connection, e.Secondary, e.Target.String()
	case *filterapi.UDPDestinationEvent:
		return "UDPDestination", e.Connection, e.Secondary, e.Peer.String()
	case *filterapi.BindEvent:
		kind = "BindUDP"
		if e.TCP {
			kind = "BindTCP"
		}
		return kind, e.Connection, e.Secondary, e.External.String()
	case *filterapi.ListenEvent:
		return "Listen", e.Connection, e.Secondary, e.External.String()
	case *filterapi.AcceptEvent:
		return "Accepted", e.Connection, e.Secondary, e.Local.String()
	case *filterapi.TerminatingEvent:
		return "Terminating", e.Connection, false, e.Connection.Tuple().Dst.String()
	}
	panic(fmt.Sprintf("unknown event %T", ev))
}

// connID gives a connection's number; f.mu is held.
func (f *Filter) connID(c filterapi.Connection) uint64 {
	if id := f.ids[c]; id != 0 {
		return id
	}
	f.lastID++
	f.conns[f.lastID], f.ids[c] = c, f.lastID
	return f.lastID
}

// push sends an event to all tests.
func (f *Filter) push(e event) {
	f.mu.Lock()
	tests := make([]*test, 0, len(f.tests))
	for t := range f.tests {
		tests = append(tests, t)
	}
	f.mu.Unlock()
	for _, t := range tests {
		t.send(e)
	}
}

func parseAddrs(in []string) (out []netip.Addr, err error) {
	for _, s := range in {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}
