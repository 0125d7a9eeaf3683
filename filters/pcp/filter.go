// Package pcp is a server for PCP (RFC 6887) and its predecessor NAT-PMP (RFC
// 6886): hosts of the networks that it serves ask for an external port, and get
// a bind. It is an application filter that no rule names: the configuration's
// section pcp says whom it serves, and the rules who of them may have what.
//
//	socket of an address ---.             .--- worker: hosts, each with its mappings
//	socket of an address ---+-- by host --+--- worker
//	...                  ---'             '--- ...
//	keeper: sockets follow the addresses, mappings the clock
//
// All requests of one host are answered by one worker, in the order in which
// they came, so that nothing of a host needs a lock.
package pcp

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// Name is the filter's, and that of the protocol definition by which the rules
// are asked.
const Name = "pcp"

// Port is where the server listens, clientPort where clients hear of news (RFC
// 6887, section 19.1).
const (
	Port       = 5351
	clientPort = 5350
)

// Config says whom the server serves and what it gives. The zero value serves
// nobody.
type Config struct {
	// Networks are served at the gateway's addresses of their interfaces.
	Networks []Network
	// NATPMP says whether requests of that protocol are answered, too.
	NATPMP bool
	// Approve: what a mapping lets in is not discarded until another filter
	// allows it.
	Approve bool
	// Ports of hosts that may be mapped, both ends included.
	Ports [][2]uint16
	// MinLifetime and MaxLifetime bound how long a mapping lasts.
	MinLifetime, MaxLifetime time.Duration
	// Quota is how many mappings one host may have.
	Quota int
}

// Network is one that is served. Without prefixes its hosts are those on the
// link.
type Network struct {
	Name       string
	Interfaces []string
	Prefixes   []netip.Prefix
}

// Server is the filter. Its methods are safe for concurrent use.
type Server struct {
	interfaces func(name string) ([]netip.Prefix, error)

	log *zap.Logger
	fw  filterapi.Firewall

	config atomic.Pointer[Config]
	wake   chan struct{}
	since  atomic.Pointer[time.Time] // when the state of mappings began

	counts  counts
	most    int // mappings of all hosts together
	workers []*worker
	mine    sync.Map // session ID -> its *host
	binds   sync.Map // filterapi.Connection -> its *mapping

	stop    context.CancelFunc
	running sync.WaitGroup
}

// New makes the filter. It serves nobody until Configure.
func New() *Server {
	return &Server{interfaces: addressesOf, wake: make(chan struct{}, 1), most: maxMappings}
}

// Name implements filterapi.Filter.
func (s *Server) Name() string { return Name }

// Init implements filterapi.Filter. The sessions of hosts are the server's own,
// to which it attaches itself: it asks for no events of others.
func (s *Server) Init(fw filterapi.Firewall) (filterapi.Events, error) {
	s.fw, s.log = fw, fw.Logger()
	var ctx context.Context
	ctx, s.stop = context.WithCancel(context.Background())
	for range workers {
		w := &worker{s: s, jobs: make(chan job, backlog), hosts: make(map[netip.Addr]*host), waiting: make(map[netip.Addr]int)}
		s.workers = append(s.workers, w)
		s.running.Go(func() { w.run(ctx) })
	}
	k := &keeper{s: s, open: make(map[netip.Addr]*socket)}
	s.running.Go(func() { k.run(ctx) })
	return filterapi.Events{}, nil
}

// Configure replaces what is served; it takes effect soon after. Mappings of
// hosts that are served no more end, and those that the configuration or the
// rules do not allow any more. It is to be called when these have changed.
func (s *Server) Configure(c Config) {
	s.config.Store(&c)
	select {
	case s.wake <- struct{}{}:
	default: // it is awake
	}
}

// serving is the configuration in force.
func (s *Server) serving() *Config {
	if c := s.config.Load(); c != nil {
		return c
	}
	return &Config{}
}

// Shutdown implements filterapi.Filter.
func (s *Server) Shutdown() {
	s.stop()
	s.running.Wait()
}

// AttachToSession implements filterapi.Filter.
func (s *Server) AttachToSession(x filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	h, ok := s.mine.Load(x.ID())
	if !ok {
		return nil, filterapi.Events{}, nil
	}
	// Whoever hears of a bind's beginning hears of its end.
	return &session{s, x, h.(*host)}, filterapi.Events{
		Types: filterapi.BindTCP | filterapi.BindUDP | filterapi.Terminating, AnyProtocol: true,
	}, nil
}

// session is the server's part in the session of a host.
type session struct {
	s *Server
	x filterapi.Session
	h *host
}

// HandleEvent implements filterapi.SessionFilter.
func (x *session) HandleEvent(_ context.Context, ev filterapi.Event) error {
	switch e := ev.(type) {
	case *filterapi.BindEvent:
		// It is not open yet.
		if m := x.h.making.Load(); m != nil {
			return m.keepGate(x.x, e.Connection.Tuple().Proto, e.External)
		}
	case *filterapi.TerminatingEvent:
		if m, ok := x.s.binds.LoadAndDelete(e.Connection); ok {
			m.(*mapping).over.Store(true)
		}
	}
	return nil
}

// Detach implements filterapi.SessionFilter.
func (x *session) Detach() {}

// epoch is the age of the state in seconds (RFC 6887, section 8.5).
func (s *Server) epoch() uint32 {
	since := s.since.Load()
	if since == nil {
		return 0
	}
	return uint32(time.Since(*since) / time.Second)
}

// begin resets the epoch.
func (s *Server) begin() {
	now := time.Now()
	s.since.Store(&now)
}

// serves says whether a host is in a network that is served, as far as its
// address tells.
func (c *Config) serves(a netip.Addr) bool {
	return slices.ContainsFunc(c.Networks, func(n Network) bool {
		return len(n.Prefixes) == 0 || slices.ContainsFunc(n.of(a), func(p netip.Prefix) bool { return p.Contains(a) })
	})
}

// of are the prefixes of the family of an address.
func (n Network) of(a netip.Addr) (out []netip.Prefix) {
	for _, p := range n.Prefixes {
		if p.Addr().Is4() == a.Is4() {
			out = append(out, p)
		}
	}
	return out
}

// closed says whether an error is that of a socket that was closed.
func closed(err error) bool {
	return errors.Is(err, net.ErrClosed) || errors.Is(err, filterapi.ErrTerminating)
}
