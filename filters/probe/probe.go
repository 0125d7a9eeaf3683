// Package probe is an application filter that does what a test tells it over
// a Unix socket. It is part of the test build of the gateway only (build tag
// "probe"). What goes over the socket is described in test/netns/lab/probe.go.
package probe

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// socketVariable names the socket of the first probe in the environment; the
// name of a further one follows from it. Without it the filters register for
// nothing.
const socketVariable = "SLUICE_PROBE_SOCKET"

// Filter is one probe. Safe for concurrent use.
type Filter struct {
	name     string
	path     string // of the socket; empty: nobody drives it
	setup    setup
	setupErr error
	fw       filterapi.Firewall
	log      *zap.Logger
	listener net.Listener

	mu       sync.Mutex
	answers  map[string]answer // by kind of event
	counts   map[string]int
	sessions map[uint64]filterapi.Session
	attached map[uint64]*sessionFilter
	conns    map[uint64]filterapi.Connection
	ids      map[filterapi.Connection]uint64 // conns, the other way round
	actions  map[uint64]filterapi.Action
	sockets  map[uint64]socket
	held     map[uint64]chan answer // by number of event
	controls map[filterapi.Connection]*control
	tests    map[*test]bool
	lastID   uint64

	manyMu sync.Mutex
	many   many // under manyMu
}

// socket is one of the gateway's own that a test has asked for.
type socket interface {
	io.Closer
	filterapi.Restrictable
}

// New makes a probe. name tells several ones apart: "probe" has the socket that
// the environment names, any other one the same path with its own name for the
// last element.
func New(name string) *Filter {
	f := &Filter{
		name:    name,
		answers: map[string]answer{}, counts: map[string]int{},
		sessions: map[uint64]filterapi.Session{}, attached: map[uint64]*sessionFilter{},
		conns: map[uint64]filterapi.Connection{}, ids: map[filterapi.Connection]uint64{},
		actions: map[uint64]filterapi.Action{}, sockets: map[uint64]socket{},
		held:     map[uint64]chan answer{},
		controls: map[filterapi.Connection]*control{}, tests: map[*test]bool{},
	}
	f.path = socketOf(os.Getenv(socketVariable), name)
	f.setup, f.setupErr = readSetup(f.path, name)
	return f
}

// Name implements filterapi.Filter.
func (f *Filter) Name() string { return f.name }

// FailMode implements filterapi.FailModer.
func (f *Filter) FailMode() filterapi.FailMode {
	if f.setup.FailOpen {
		return filterapi.FailOpen
	}
	return filterapi.FailClosed
}

// options are those of a rule.
type options struct {
	Text string `yaml:"text"`
	// Pass has every TCP connection get a data filter that passes its bytes on,
	// as long as no test says otherwise: for the bench.
	Pass bool `yaml:"pass"`
}

// ParseOptions implements filterapi.OptionsParser.
func (f *Filter) ParseOptions(decode func(into any) error) (any, error) {
	var o options
	err := decode(&o)
	return o, err
}

// Init implements filterapi.Filter.
func (f *Filter) Init(fw filterapi.Firewall) (filterapi.Events, error) {
	f.fw, f.log = fw, fw.Logger()
	if f.path == "" {
		return filterapi.Events{}, nil
	}
	if f.setupErr != nil {
		return filterapi.Events{}, f.setupErr
	}
	switch {
	case f.setup.InitPanic:
		panic("the test said: panic at the start")
	case f.setup.InitError != "":
		return filterapi.Events{}, errors.New(f.setup.InitError)
	}
	_ = os.Remove(f.path) // of an earlier run
	l, err := net.Listen("unix", f.path)
	if err != nil {
		return filterapi.Events{}, fmt.Errorf("probe socket: %w", err)
	}
	f.listener = l
	go f.serve()
	return f.setup.Init.events(), nil
}

// Shutdown implements filterapi.Filter.
func (f *Filter) Shutdown() {
	if f.listener != nil {
		_ = f.listener.Close()
	}
	f.mu.Lock()
	open := f.sockets
	f.sockets = map[uint64]socket{}
	f.mu.Unlock()
	for _, s := range open {
		_ = s.Close()
	}
}

// AttachToSession implements filterapi.Filter.
func (f *Filter) AttachToSession(s filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	f.mu.Lock()
	sf := &sessionFilter{f, s}
	f.sessions[s.ID()], f.attached[s.ID()] = s, sf
	f.mu.Unlock()
	f.push(event{Event: f.next(), Kind: "Attach", Session: s.ID(), Src: s.ClientAddr().String()})
	return sf, f.setup.Session.events(), nil
}

// next gives a number that was not given before.
func (f *Filter) next() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lastID++
	return f.lastID
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

// numbered is connID for who does not hold the lock.
func (f *Filter) numbered(c filterapi.Connection) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.connID(c)
}

// forget drops a connection that has ended.
func (f *Filter) forget(c filterapi.Connection) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns, f.ids[c])
	delete(f.ids, c)
	delete(f.controls, c)
}

// ipFilter reads sources: addresses and ranges LO-HI; "!" before one takes it
// away again. nil is the filter that lets everybody in.
func ipFilter(sources []string) (*filterapi.IPFilter, error) {
	if sources == nil {
		return nil, nil
	}
	out := filterapi.OnlyFrom()
	for _, s := range sources {
		change := out.IncludeRange
		if s != "" && s[0] == '!' {
			change, s = out.ExcludeRange, s[1:]
		}
		lo, hi, err := addressRange(s)
		if err == nil {
			err = change(lo, hi)
		}
		if err != nil {
			return nil, fmt.Errorf("source %q: %w", s, err)
		}
	}
	return out, nil
}

func parseAddrPorts(in []string) ([]netip.AddrPort, error) {
	var out []netip.AddrPort
	for _, s := range in {
		a, err := addrPort(s)
		if err != nil {
			return nil, err
		}
		out = append(out, a)
	}
	return out, nil
}

// addrPort is netip.ParseAddrPort with the zero value for no text, and for an
// address alone the port 0.
func addrPort(s string) (netip.AddrPort, error) {
	if s == "" {
		return netip.AddrPort{}, nil
	}
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(a, 0), nil
	}
	return netip.ParseAddrPort(s)
}
