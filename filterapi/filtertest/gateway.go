// Package filtertest runs an application filter without a gateway: no kernel,
// no root, no network. A small machine stands behind the interfaces of
// filterapi and behaves as the real one does, also when it fails: permissions
// are single-use, expire, belong to their session, are refused by quota, ports
// and rules, and are in force only after an acknowledgement that a test can
// hold back. Streams keep the segment boundaries that the test chose, and a
// journal tells what was permitted and what was sent, in order.
//
// It works inside a testing/synctest bubble, where the 60 seconds of a
// permission pass at once.
package filtertest

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// Gateway is the machine. Its exported fields are set before the first
// connection. Its methods may be called from any goroutine; those that fail
// the test only from the test's own.
type Gateway struct {
	// Routed: nothing is translated, external names are the clients' own. IPv6
	// always is.
	Routed bool
	// External is the gateway's external address; 203.0.113.1 by default.
	External netip.Addr
	// Quota bounds the permissions of one session; 0: no bound.
	Quota int
	// Ports is how many external ports there are to lease, from 40000 on.
	Ports int
	// Refuse, if not nil, is the answer to every permission call.
	Refuse error
	// Window is how many bytes a stream holds before a send blocks.
	Window int
	// Log is what the filter logged.
	Log *observer.ObservedLogs

	tb       testing.TB
	filter   filterapi.Filter
	events   filterapi.Events
	options  any
	journal  journal
	gates    gates
	mu       sync.Mutex
	sessions []*session
	living   []*permission
	nextPort int
}

// New initialises a filter and gives it the options of one rule in YAML; empty:
// none. At the end of the test the filter is shut down.
func New(tb testing.TB, f filterapi.Filter, options string) *Gateway {
	tb.Helper()
	core, logs := observer.New(zap.DebugLevel)
	g := &Gateway{
		External: netip.MustParseAddr("203.0.113.1"), Ports: 1000, Window: 64 << 10,
		Log: logs, tb: tb, filter: f,
	}
	var err error
	if g.options, err = ParseOptions(f, options); err != nil {
		tb.Fatalf("filtertest: options: %v", err)
	}
	if g.events, err = f.Init(firewall{log: zap.New(core)}); err != nil {
		tb.Fatalf("filtertest: Init: %v", err)
	}
	tb.Cleanup(f.Shutdown)
	return g
}

// ParseOptions gives a filter the options of a rule, in YAML, as the gateway
// and its check command do. An unknown key is an error.
func ParseOptions(f filterapi.Filter, options string) (any, error) {
	p, ok := f.(filterapi.OptionsParser)
	if !ok {
		if options != "" {
			return nil, fmt.Errorf("filter %q takes no options", f.Name())
		}
		return nil, nil
	}
	return p.ParseOptions(func(into any) error {
		if options == "" {
			return nil
		}
		return yaml.NewDecoder(bytes.NewReader([]byte(options)), yaml.Strict()).Decode(into)
	})
}

type firewall struct {
	network
	log *zap.Logger
}

func (f firewall) Logger() *zap.Logger { return f.log }

// session finds or makes the session of a client and attaches the filter.
func (g *Gateway) session(client netip.Addr) *session {
	g.mu.Lock()
	for _, s := range g.sessions {
		if s.addr == client && !s.ended {
			g.mu.Unlock()
			return s
		}
	}
	s := &session{gateway: g, id: uint64(len(g.sessions) + 1), addr: client}
	g.sessions = append(g.sessions, s)
	g.mu.Unlock()
	sf, events, err := g.filter.AttachToSession(s)
	if err != nil {
		g.tb.Fatalf("filtertest: AttachToSession: %v", err)
	}
	s.filter, s.events = sf, events
	return s
}

// EndSession ends a client's session as a disconnect does: its permissions are
// void, calls fail with ErrTerminating, and the filter is detached.
func (g *Gateway) EndSession(client netip.Addr) {
	g.mu.Lock()
	var ended []*session
	for _, s := range g.sessions {
		if s.addr == client && !s.ended {
			s.ended = true
			ended = append(ended, s)
		}
	}
	var void []*permission
	for _, p := range g.living {
		if slices.Contains(ended, p.session) {
			void = append(void, p)
		}
	}
	g.mu.Unlock()
	for _, p := range void {
		p.end(Cancelled)
	}
	for _, s := range ended {
		if s.filter != nil {
			s.filter.Detach()
		}
	}
}

// handle calls a session filter as the gateway does: with a deadline, and a
// panic is an error.
func (g *Gateway) handle(f filterapi.SessionFilter, ev filterapi.Event) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), handlerTime)
	defer cancel()
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic in handler: %v", p)
		}
	}()
	return f.HandleEvent(ctx, ev)
}

// handlerTime is what a handler has for one event.
const handlerTime = 800 * time.Millisecond

// raise offers an event to the filter and says what it made of the connection.
func (g *Gateway) raise(fl *Flow, ev filterapi.Event) error {
	s := fl.session
	if s.filter == nil || s.events.Types&ev.Kind() == 0 {
		return nil
	}
	fl.conn.setHandling(true)
	defer fl.conn.setHandling(false)
	return g.handle(s.filter, ev)
}

// Connect raises the event of a new TCP connection and, if the filter attached
// itself, starts its Pump. A denied connection fails the test; see Offer.
func (g *Gateway) Connect(client, server netip.AddrPort) *Flow {
	g.tb.Helper()
	fl, err := g.Offer(client, server)
	if err != nil {
		g.tb.Fatalf("filtertest: connect %s > %s: %v", client, server, err)
	}
	return fl
}

// Offer is Connect that returns what the filter said: ErrPolicyDenied when it
// denied the connection, or the error of its handler.
func (g *Gateway) Offer(client, server netip.AddrPort) (*Flow, error) {
	fl := g.newFlow(flow.TCP, client, server)
	err := g.raise(fl, &filterapi.ConnectEvent{About: g.about(fl), Target: server})
	return fl, fl.start(err)
}

// Associate raises the event of a new UDP destination and, if the filter
// attached itself, starts its Pump. A segment is a datagram.
func (g *Gateway) Associate(client, peer netip.AddrPort) (*Flow, error) {
	fl := g.newFlow(flow.UDP, client, peer)
	err := g.raise(fl, &filterapi.UDPDestinationEvent{About: g.about(fl), Peer: peer})
	return fl, fl.start(err)
}

func (g *Gateway) about(fl *Flow) filterapi.About {
	return filterapi.About{Connection: fl.conn, Protocol: g.filter.Name(), Rule: "test", Options: g.options}
}

// gates hold back the kernel's acknowledgements.
type gates struct {
	mu     sync.Mutex
	closed chan struct{} // nil: open
}

// HoldKernel holds back every acknowledgement from now on until release is
// called.
func (g *Gateway) HoldKernel() (release func()) {
	ch := make(chan struct{})
	g.gates.mu.Lock()
	g.gates.closed = ch
	g.gates.mu.Unlock()
	return sync.OnceFunc(func() {
		g.gates.mu.Lock()
		g.gates.closed = nil
		g.gates.mu.Unlock()
		close(ch)
	})
}

// acknowledge returns when the kernel has answered.
func (g *Gateway) acknowledge() {
	g.gates.mu.Lock()
	ch := g.gates.closed
	g.gates.mu.Unlock()
	if ch != nil {
		<-ch
	}
}
