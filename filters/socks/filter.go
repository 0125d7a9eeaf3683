// Package socks serves clients that ask the gateway for connections: SOCKS 4,
// 4a and 5 (RFC 1928, RFC 1929), with CONNECT, BIND and UDP ASSOCIATE. It
// listens on addresses of the inside, and what a client asks for runs in a
// private session, under the rules for the client's address and user.
package socks

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// Name is what the log calls the filter.
const Name = "socks"

// Settings are the part of the configuration that concerns the filter.
type Settings struct {
	// Listen are the gateway's addresses where clients are served; none:
	// nowhere.
	Listen []netip.AddrPort
	// Sources bounds who may connect; nil: everybody who reaches an address.
	Sources *filterapi.IPFilter
	// Serves says whether an address is one of the clients'; nil: every one is.
	Serves func(netip.Addr) bool
	// Authenticate says whether a password is the user's; nil: nobody is asked.
	// It may take a while.
	Authenticate func(user, password string) bool
	// Has says whether there still is a user; nil: there is.
	Has func(user string) bool
	// ApproveBinds opens BINDs at once to the host that the client has a
	// connection to; else they discard until a filter allows them.
	ApproveBinds bool
	// Resolvers are asked for names; none: those of the system.
	Resolvers []netip.Addr
	// PerClient is how many connections one client may have.
	PerClient int
	// Handshake is the time for a request to arrive, Connect for its target to
	// answer, Bind for a peer to come.
	Handshake, Connect, Bind time.Duration
}

// Filter serves SOCKS where Configure says. It implements filterapi.Filter, and
// registers for no events: it only makes sessions.
type Filter struct {
	fw  filterapi.Firewall
	log *zap.Logger

	change sync.Mutex // one Configure at a time

	mu        sync.Mutex
	settings  *Settings
	listeners map[netip.AddrPort]filterapi.Listener
	clients   map[*client]struct{}
	counts    map[netip.Addr]*tally
	stopped   bool

	count    counters
	sessions sessions
	running  sync.WaitGroup
}

// tally is what a client has of what is bounded.
type tally struct {
	connections int // under Filter.mu
	// checking is held while a password is looked at: one of each client at a
	// time, so that who guesses has nobody else wait long.
	checking chan struct{}
}

// New makes the filter.
func New() *Filter {
	return &Filter{
		listeners: make(map[netip.AddrPort]filterapi.Listener),
		clients:   make(map[*client]struct{}), counts: make(map[netip.Addr]*tally),
	}
}

// Name implements filterapi.Filter.
func (f *Filter) Name() string { return Name }

// Init implements filterapi.Filter.
func (f *Filter) Init(fw filterapi.Firewall) (filterapi.Events, error) {
	f.fw, f.log = fw, fw.Logger()
	f.sessions.init(fw)
	return filterapi.Events{}, nil
}

// AttachToSession implements filterapi.Filter.
func (f *Filter) AttachToSession(filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	return nil, filterapi.Events{}, nil
}

// Shutdown implements filterapi.Filter.
func (f *Filter) Shutdown() {
	_ = f.Configure(Settings{}) // closing does not fail
	f.mu.Lock()
	f.stopped = true
	all := f.all(func(*client) bool { return true })
	f.mu.Unlock()
	for _, c := range all {
		c.stop(errStopping)
	}
	f.running.Wait()
	f.sessions.close()
}

var errStopping = errors.New("the gateway stops")

// all are the clients of a kind. mu is held.
func (f *Filter) all(is func(*client) bool) (list []*client) {
	for c := range f.clients {
		if is(c) {
			list = append(list, c)
		}
	}
	return list
}

// Configure serves as the settings say from now on. Living connections go on,
// but for those of users that are no more. The error joins what could not be
// opened; the rest is. Safe for concurrent use, after Init.
func (f *Filter) Configure(s Settings) error {
	f.change.Lock()
	defer f.change.Unlock()
	wanted := make(map[netip.AddrPort]bool)
	for _, at := range s.Listen {
		wanted[at] = true
	}
	f.mu.Lock()
	f.settings = &s
	var over []filterapi.Listener
	for at, l := range f.listeners {
		if !wanted[at] {
			over = append(over, l)
			delete(f.listeners, at)
		}
	}
	gone := f.all(func(c *client) bool { return c.user != "" && s.Has != nil && !s.Has(c.user) })
	f.mu.Unlock()
	for _, l := range over {
		_ = l.Close() // nothing is left to be done about it
	}
	for _, c := range gone {
		c.stop(errors.New("the user is no more"))
	}
	var errs []error
	for at := range wanted {
		if err := f.serve(at, s.Sources); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// serve opens an address, or has an open one admit others.
func (f *Filter) serve(at netip.AddrPort, sources *filterapi.IPFilter) error {
	sources = family(sources, at.Addr().Is4())
	f.mu.Lock()
	l := f.listeners[at]
	f.mu.Unlock()
	if l != nil {
		if err := l.SetIPFilter(sources); err != nil {
			return fmt.Errorf("serve at %v: %w", at, err)
		}
		return nil
	}
	l, err := f.fw.Listen(at, sources)
	if err != nil {
		return fmt.Errorf("serve at %v: %w", at, err)
	}
	f.mu.Lock()
	stopped := f.stopped
	if !stopped {
		f.listeners[at] = l
	}
	f.mu.Unlock()
	if stopped {
		return l.Close()
	}
	f.running.Go(func() { f.accept(l) })
	return nil
}

// family is the part of a filter that is of one address family.
func family(x *filterapi.IPFilter, is4 bool) *filterapi.IPFilter {
	if x == nil {
		return nil
	}
	out := x.Clone()
	for _, p := range x.Prefixes() {
		if p.Addr().Is4() != is4 {
			other := new(filterapi.IPFilter)
			_ = other.IncludeRange(p.Addr(), last(p)) // a range of one family
			_ = out.ExcludeFilter(other)
		}
	}
	return out
}

// last is the highest address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := range b {
		host := max(0, min(8, 8*(i+1)-p.Bits()))
		b[i] |= byte(1<<host - 1)
	}
	a, _ := netip.AddrFromSlice(b) // 4 or 16 bytes
	return a
}

// accept takes clients until the listener is closed.
func (f *Filter) accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) || errors.Is(err, filterapi.ErrTerminating) {
			return
		}
		if err != nil {
			// Out of descriptors: nothing tells when there are some again.
			time.Sleep(50 * time.Millisecond)
			continue
		}
		c, err := f.admit(conn)
		if err != nil {
			if errors.Is(err, errTooMany) {
				f.count.over.Add(1)
			}
			f.log.Debug("client refused", zap.Stringer("client", conn.RemoteAddr()), zap.Error(err))
			_ = conn.Close()
			continue
		}
		f.running.Go(func() {
			defer f.leave(c)
			c.serve()
		})
	}
}

// The bounds of all clients together.
const maxClients = 65536

var (
	errTooMany   = errors.New("the client has too many connections")
	errNotServed = errors.New("not a client of a network that is served")
)

// admit makes a client of a connection. On an error that is still the caller's.
func (f *Filter) admit(conn net.Conn) (*client, error) {
	at, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil {
		return nil, err
	}
	local, err := netip.ParseAddrPort(conn.LocalAddr().String())
	if err != nil {
		return nil, err
	}
	at = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
	f.mu.Lock()
	s := f.settings
	f.mu.Unlock()
	if s.Serves != nil && !s.Serves(at.Addr()) {
		return nil, errNotServed
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	has := f.counts[at.Addr()]
	switch {
	case f.stopped:
		return nil, errStopping
	case has != nil && has.connections >= s.PerClient, len(f.clients) >= maxClients:
		return nil, errTooMany
	case has == nil:
		has = &tally{checking: make(chan struct{}, 1)}
		f.counts[at.Addr()] = has
	}
	c := &client{f: f, set: s, conn: conn, at: at, local: local.Addr().Unmap(), has: has}
	c.ctx, c.stop = context.WithCancelCause(context.Background())
	f.clients[c] = struct{}{}
	has.connections++
	return c, nil
}

// leave ends a client's stay.
func (f *Filter) leave(c *client) {
	c.stop(nil)
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.clients, c)
	if c.has.connections--; c.has.connections == 0 {
		delete(f.counts, c.at.Addr())
	}
}
