package engine

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// ClientSession implements filterapi.Firewall.
func (f firewall) ClientSession(client netip.Addr) (filterapi.Session, error) {
	if !f.e.isClient(client) {
		return nil, fmt.Errorf("session of %v: %w", client, filterapi.ErrInvalidArgument)
	}
	return f.e.lend(f.e.acquire(client), f.r), nil
}

// PrivateSession implements filterapi.Firewall.
func (f firewall) PrivateSession(client netip.Addr, user string) (filterapi.Session, error) {
	if !f.e.isClient(client) {
		return nil, fmt.Errorf("private session of %v: %w", client, filterapi.ErrInvalidArgument)
	}
	f.e.sessions.mu.Lock()
	s := f.e.newSession(client)
	s.private, s.user = true, user
	f.e.sessions.mu.Unlock()
	return f.e.lend(s, f.r), nil
}

// isClient says whether an address can be that of a client: one host that is
// not the gateway.
func (e *Engine) isClient(a netip.Addr) bool {
	if !a.IsValid() || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() ||
		a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return false
	}
	_, _, local, err := e.routes.Lookup(a)
	return err == nil && !local
}

// lend gives a filter a session whose reference the caller holds, until it
// gives it back.
func (e *Engine) lend(s *session, r *registered) *sessionHandle {
	h := s.handle(r)
	s.mu.Lock()
	h.owed++
	s.mu.Unlock()
	return h
}

// giveBack is Session.Close. A private session takes nothing new from then on,
// and has ended when its last flow has.
func (e *Engine) giveBack(h *sessionHandle) {
	s := h.s
	s.mu.Lock()
	owed := h.owed > 0
	if owed {
		h.owed--
	}
	s.mu.Unlock()
	if !owed {
		return
	}
	if s.private {
		e.shut(s)
	}
	e.release(s)
}

// User is the name that a private session was made with.
func (s *session) User() string { return s.user }

// Flags tells what kind of session it is, and whether it has ended.
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

// AttachFilter has a filter attached now, before any event of the session.
func (s *session) AttachFilter(name string) error {
	for _, r := range s.e.filters {
		if r.filter.Name() != name {
			continue
		}
		if !s.ref() {
			return fmt.Errorf("attach filter %q: %w", name, filterapi.ErrTerminating)
		}
		defer s.e.release(s)
		ctx, cancel := context.WithTimeout(context.Background(), lastWords)
		defer cancel()
		if _, err := s.e.attach(ctx, s, r); err != nil {
			return fmt.Errorf("attach filter %q: %w", name, err)
		}
		return nil
	}
	return fmt.Errorf("attach filter %q: %w", name, filterapi.ErrNotFound)
}

// HostAccessCheck asks the access rules, and changes nothing.
func (s *session) HostAccessCheck(a filterapi.HostAccess) error {
	t := flow.Tuple{Proto: a.Proto, Src: netip.AddrPortFrom(s.addr, 0), Dst: a.Target}
	if !t.Dst.Addr().IsValid() || t.Dst.Addr().Is4() != s.addr.Is4() {
		return fmt.Errorf("host access check of %v: %w", a.Target, filterapi.ErrInvalidArgument)
	}
	if a.Protocol == "" && (!t.Proto.HasPorts() || t.Dst.Port() == 0) {
		return fmt.Errorf("host access check of %v %v: %w", a.Proto, a.Target, filterapi.ErrInvalidArgument)
	}
	if a.Publishing {
		if t.Dst.Addr().IsUnspecified() {
			return fmt.Errorf("host access check of %v: %w", a.Target, filterapi.ErrInvalidArgument)
		}
		if err := s.publishes(a); err != nil {
			return fmt.Errorf("publishing check of %v: %w", a.Target, err)
		}
		return nil
	}
	if t.Dst.Addr().IsUnspecified() {
		if a.Protocol == "" {
			return fmt.Errorf("host access check of %v: %w", a.Target, filterapi.ErrInvalidArgument)
		}
		t.Dst = netip.AddrPort{} // anybody
	}
	if err := s.ruling(t, a.Protocol); err != nil {
		return fmt.Errorf("host access check of %v: %w", a.Target, err)
	}
	return nil
}

// ExternalAddr is where a bind without a primary connection is opened.
func (s *session) ExternalAddr(protocol string) (netip.Addr, error) {
	fail := func(err error) (netip.Addr, error) {
		return netip.Addr{}, fmt.Errorf("external address of %v: %w", s.addr, err)
	}
	if !s.lives() {
		return fail(filterapi.ErrTerminating)
	}
	n := filterapi.Negotiated{Protocol: protocol, Proto: flow.UDP}
	t, err := s.checkCall(n, 0, netip.AddrPort{})
	if err != nil {
		return fail(err)
	}
	addr, hidden, err := s.behind(filterapi.Bind{Negotiated: n}, t)
	switch {
	case err != nil:
		return fail(err)
	case !hidden:
		return s.addr, nil
	}
	return addr, nil
}

// ruling asks the rules about a flow of the session, by its ports or as part of
// a protocol.
func (s *session) ruling(t flow.Tuple, protocol string) error {
	_, err := s.e.judge(basis{tuple: t, protocol: protocol, user: s.user})
	return err
}
