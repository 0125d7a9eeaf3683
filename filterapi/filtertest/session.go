package filtertest

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// session is one client's.
type session struct {
	gateway *Gateway
	id      uint64
	addr    netip.Addr
	private bool
	user    string
	ended   bool // guarded by Gateway.mu
	refs    int  // calls of ClientSession without their Close; guarded by Gateway.mu

	attaching sync.Mutex // held while the filter is asked
	mu        sync.Mutex
	part      *attachment
}

// attachment is the filter's part in a session.
type attachment struct {
	filter filterapi.SessionFilter // nil: not interested
	events filterapi.Events
}

// handle is a session that a filter asked for; it is given back once.
type handle struct {
	*session
	once sync.Once
}

// session finds or makes the transparent session of a client.
func (g *Gateway) session(client netip.Addr) *session {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.sessionOf(client)
}

// sessionOf is session. Gateway.mu is held.
func (g *Gateway) sessionOf(client netip.Addr) *session {
	for _, s := range g.sessions {
		if s.addr == client && !s.ended && !s.private {
			return s
		}
	}
	return g.newSession(client)
}

// newSession makes one. Gateway.mu is held.
func (g *Gateway) newSession(client netip.Addr) *session {
	s := &session{gateway: g, id: uint64(len(g.sessions) + 1), addr: client}
	g.sessions = append(g.sessions, s)
	return s
}

func (s *session) attached() *attachment {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.part
}

// attach asks the filter once; after an error it is asked again the next time.
func (s *session) attach() (*attachment, error) {
	s.attaching.Lock()
	defer s.attaching.Unlock()
	if a := s.attached(); a != nil {
		return a, nil
	}
	a := &attachment{}
	f, ev, err := s.gateway.filter.AttachToSession(s)
	if err != nil {
		return nil, fmt.Errorf("attach to session: %w", err)
	}
	a.filter, a.events = f, ev
	s.mu.Lock()
	s.part = a
	s.mu.Unlock()
	return a, nil
}

// EndSession ends the sessions of a client as a disconnect does: their flows
// are cut, their permissions are void, calls fail with ErrTerminating, and when
// the filter has heard of all that it is detached. It returns then, or at once
// while the kernel is held.
func (g *Gateway) EndSession(client netip.Addr) {
	g.mu.Lock()
	all := slices.Clone(g.sessions)
	g.mu.Unlock()
	for _, s := range all {
		if s.addr == client {
			g.endSession(s)
		}
	}
}

func (g *Gateway) endSession(s *session) {
	g.mu.Lock()
	if s.ended {
		g.mu.Unlock()
		return
	}
	void, cut := g.endLocked(s)
	g.mu.Unlock()
	for _, p := range void {
		p.end(Cancelled)
	}
	for _, f := range cut {
		f.kill()
	}
	g.wire.closeOf(s)
	last := func() {
		for _, f := range cut {
			<-f.over
		}
		s.detach()
	}
	if g.gates.gate() != nil {
		go last()
		return
	}
	last()
}

// endIdle ends a session that nothing belongs to any more.
func (g *Gateway) endIdle(s *session) {
	g.mu.Lock()
	busy := s.ended || s.refs > 0 ||
		slices.ContainsFunc(g.flows, func(f *Flow) bool { return f.session == s && !f.gone }) ||
		slices.ContainsFunc(g.living, func(p *permission) bool { return p.session == s && p.explicit })
	if busy {
		g.mu.Unlock()
		return
	}
	void, _ := g.endLocked(s)
	g.mu.Unlock()
	for _, p := range void {
		p.end(Cancelled)
	}
	g.wire.closeOf(s)
	s.detach()
}

// endLocked marks a session as over and gives what has to end with it.
// Gateway.mu is held.
func (g *Gateway) endLocked(s *session) (void []*permission, cut []*Flow) {
	s.ended = true
	for _, p := range g.living {
		if p.session == s {
			void = append(void, p)
		}
	}
	for _, f := range g.flows {
		if f.session == s && !f.gone {
			cut = append(cut, f)
		}
	}
	g.factories = slices.DeleteFunc(g.factories, func(f *factory) bool { return f.session == s })
	return void, cut
}

// detach ends the filter's part in the session.
func (s *session) detach() {
	if a := s.attached(); a != nil && a.filter != nil {
		a.filter.Detach()
	}
}

// lives is false once the session has ended.
func (s *session) lives() bool {
	s.gateway.mu.Lock()
	defer s.gateway.mu.Unlock()
	return !s.ended
}

func (s *session) source() filterapi.Sources {
	if s.private {
		return filterapi.Explicit
	}
	return filterapi.Transparent
}

func (s *session) ID() uint64             { return s.id }
func (s *session) ClientAddr() netip.Addr { return s.addr }
func (s *session) User() string           { return s.user }
func (s *session) Close()                 {}

func (s *session) Flags() filterapi.SessionFlags {
	f := filterapi.SessionNAT
	if s.private {
		f = filterapi.SessionPrivate
	}
	if s.user != "" {
		f |= filterapi.SessionAuthenticated
	}
	if !s.lives() {
		f |= filterapi.SessionTerminated
	}
	return f
}

// AttachFilter implements filterapi.Session. The machine has one filter.
func (s *session) AttachFilter(name string) error {
	switch {
	case name != s.gateway.filter.Name():
		return fmt.Errorf("filter %q: %w", name, filterapi.ErrNotFound)
	case !s.lives():
		return filterapi.ErrTerminating
	}
	_, err := s.attach()
	return err
}

// HostAccessCheck implements filterapi.Session.
func (s *session) HostAccessCheck(q filterapi.HostAccess) error {
	switch {
	case !q.Target.IsValid(), q.Target.Addr().Is4() != s.addr.Is4(),
		q.Protocol == "" && (!q.Proto.HasPorts() || q.Target.Port() == 0):
		return fmt.Errorf("host access check of %v: %w", q.Target, filterapi.ErrInvalidArgument)
	case q.Target.Addr().IsUnspecified() && q.Protocol == "":
		return fmt.Errorf("host access check of %v: %w", q.Target, filterapi.ErrInvalidArgument)
	case !s.lives():
		return filterapi.ErrTerminating
	case s.gateway.Access == nil:
		return nil
	}
	if q.Target.Addr().IsUnspecified() {
		q.Target = netip.AddrPort{} // as for a bind
	}
	return s.gateway.Access(s.addr, q)
}

// ExternalAddr implements filterapi.Session.
func (s *session) ExternalAddr(protocol string) (netip.Addr, error) {
	g := s.gateway
	if !s.lives() {
		return netip.Addr{}, filterapi.ErrTerminating
	}
	if protocol == "" {
		return netip.Addr{}, fmt.Errorf("external address: %w", filterapi.ErrInvalidArgument)
	}
	if err := g.access(s.addr, protocol, flow.UDP, netip.AddrPort{}); err != nil {
		return netip.Addr{}, fmt.Errorf("external address: %w", err)
	}
	if !g.hidden(s.addr) {
		return s.addr, nil
	}
	return g.external(s.addr), nil
}

// Network implements filterapi.Session.
func (s *session) Network() filterapi.Network { return s.gateway.network(s) }

// Close implements filterapi.Session.
func (h *handle) Close() {
	h.once.Do(func() {
		g := h.gateway
		g.mu.Lock()
		h.refs--
		g.mu.Unlock()
		if h.private {
			g.endSession(h.session)
			return
		}
		g.endIdle(h.session)
	})
}

// client says whether an address may have a session.
func (g *Gateway) client(a netip.Addr) error {
	if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Is4In6() || a.Zone() != "" || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || g.owns(a) {
		return fmt.Errorf("session of %v: %w", a, filterapi.ErrInvalidArgument)
	}
	return nil
}

func (f firewall) ClientSession(client netip.Addr) (filterapi.Session, error) {
	if err := f.gateway.client(client); err != nil {
		return nil, err
	}
	g := f.gateway
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.sessionOf(client)
	s.refs++
	return &handle{session: s}, nil
}

func (f firewall) PrivateSession(client netip.Addr, user string) (filterapi.Session, error) {
	if err := f.gateway.client(client); err != nil {
		return nil, err
	}
	g := f.gateway
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.newSession(client)
	s.private, s.user, s.refs = true, user, 1
	return &handle{session: s}, nil
}

// knownProto says whether a protocol has ports, so that it can be permitted.
func knownProto(p flow.Proto) bool { return p == flow.TCP || p == flow.UDP }
