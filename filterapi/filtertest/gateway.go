// Package filtertest runs an application filter without a gateway: no kernel,
// no root, no network. A small machine stands behind the interfaces of
// filterapi and behaves as the real one does, also when it fails: permissions
// are single-use, expire, belong to their session, are refused by quota, ports
// and rules, and are in force only after an acknowledgement that a test can
// hold back. Streams keep the segment boundaries that the test chose, and a
// journal tells what was permitted and what was sent, in order.
//
// # Time
//
// Everything in the machine waits on package time. In a testing/synctest
// bubble the clock therefore is in the test's hands: time.Sleep(time.Minute)
// moves it by a minute at once, with every permission that expires on the way,
// and synctest.Wait returns when the filter has nothing left to do.
package filtertest

import (
	"bytes"
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
	// External and External6 are the gateway's addresses outside, Inside and
	// Inside6 those inside. By default 203.0.113.1, 2001:db8:b::1, 10.0.0.1
	// and fd00:a::1.
	External, External6, Inside, Inside6 netip.Addr
	// Own are more addresses of the gateway's, which a call may ask for.
	Own []netip.Addr
	// Networks are what ToSameNetwork means; none: the same as ToSameNet.
	Networks []netip.Prefix
	// Quota bounds the permissions of one client; 0: no bound.
	Quota int
	// Ports is how many external ports there are to lease, from 40000 on, and
	// as many inside, from 41000 on.
	Ports int
	// Refuse, if not nil, is the answer to every permission call.
	Refuse error
	// Access is the access rules: it answers for each flow and each permission
	// call, for instance with ErrPolicyDenied or ErrNetworkDenied. Protocol is
	// always set; a bind has no target. nil: everything is allowed.
	Access func(client netip.Addr, q filterapi.HostAccess) error
	// Unnamed: no rule names the filter, so that it hears of flows only with
	// Events.AnyProtocol.
	Unnamed bool
	// HandlerTime is what the handler of one event has; 5 s by default.
	HandlerTime time.Duration
	// Window is how many bytes a stream holds before a send blocks.
	Window int
	// ClientRefuses, if not nil, is the answer of clients that a filter
	// connects to with EmulateConnection, for instance syscall.ECONNREFUSED.
	ClientRefuses error
	// Log is what the filter logged.
	Log *observer.ObservedLogs

	tb      testing.TB
	filter  filterapi.Filter
	events  filterapi.Events
	options any
	journal journal
	gates   gates
	wire    wire

	mu           sync.Mutex
	sessions     []*session
	flows        []*Flow
	living       []*permission // wait for their use
	leases       map[lease]*permission
	retired      map[lease]time.Time // inside addresses that still refuse
	factories    []*factory
	destinations []destination
	nextPort     int
	nextVia      int
	nextClient   uint16
}

// New initialises a filter and gives it the options of one rule in YAML; empty:
// none. At the end of the test every session ends and the filter is shut down.
func New(tb testing.TB, f filterapi.Filter, options string) *Gateway {
	tb.Helper()
	core, logs := observer.New(zap.DebugLevel)
	g := &Gateway{
		External: netip.MustParseAddr("203.0.113.1"), External6: netip.MustParseAddr("2001:db8:b::1"),
		Inside: netip.MustParseAddr("10.0.0.1"), Inside6: netip.MustParseAddr("fd00:a::1"),
		Ports: 1000, Window: 64 << 10, HandlerTime: 5 * time.Second,
		Log: logs, tb: tb, filter: f,
		leases: make(map[lease]*permission), retired: make(map[lease]time.Time),
	}
	g.wire.init()
	var err error
	if g.options, err = ParseOptions(f, options); err != nil {
		tb.Fatalf("filtertest: options: %v", err)
	}
	if g.events, err = f.Init(firewall{g.network(nil), g, zap.New(core)}); err != nil {
		tb.Fatalf("filtertest: Init: %v", err)
	}
	tb.Cleanup(g.close)
	return g
}

// close ends everything as a gateway that stops.
func (g *Gateway) close() {
	g.gates.open()
	g.mu.Lock()
	all := slices.Clone(g.sessions)
	g.mu.Unlock()
	for _, s := range all {
		g.endSession(s)
	}
	g.filter.Shutdown()
	g.wire.close()
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

// external and inside are the gateway's addresses of a family.
func (g *Gateway) external(of netip.Addr) netip.Addr {
	if of.Is6() {
		return g.External6
	}
	return g.External
}

func (g *Gateway) inside(of netip.Addr) netip.Addr {
	if of.Is6() {
		return g.Inside6
	}
	return g.Inside
}

// owns says whether an address is one of the gateway's.
func (g *Gateway) owns(a netip.Addr) bool {
	return slices.Contains([]netip.Addr{g.External, g.External6, g.Inside, g.Inside6}, a) || slices.Contains(g.Own, a)
}

// hidden says whether a client is translated.
func (g *Gateway) hidden(client netip.Addr) bool { return !g.Routed && !client.Is6() }

// access asks the rules.
func (g *Gateway) access(client netip.Addr, protocol string, proto flow.Proto, target netip.AddrPort) error {
	if protocol == "" {
		protocol = g.filter.Name()
	}
	if g.Access == nil {
		return nil
	}
	return g.Access(client, filterapi.HostAccess{Protocol: protocol, Proto: proto, Target: target})
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
	return func() { g.gates.openIf(ch) }
}

// openIf lets those go on that wait at one gate.
func (s *gates) openIf(ch chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed == ch && ch != nil {
		s.closed = nil
		close(ch)
	}
}

func (s *gates) open() { s.openIf(s.gate()) }

func (s *gates) gate() chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// acknowledge returns when the kernel has answered.
func (g *Gateway) acknowledge() {
	if ch := g.gates.gate(); ch != nil {
		<-ch
	}
}
