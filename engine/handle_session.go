package engine

import (
	"context"
	"fmt"
	"net/netip"
	"sync/atomic"

	"github.com/sluicegw/sluice/filterapi"
)

// sessionHandle is a session as one filter holds it, the same one each time.
// It implements filterapi.Session.
type sessionHandle struct {
	s *session
	r *registered // nil: the gateway itself

	owed int         // references that Close gives back; under s.mu
	over atomic.Bool // r was detached from it
}

// handle is the session as a filter gets it.
func (s *session) handle(r *registered) *sessionHandle {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range s.handles {
		if h.r == r {
			return h
		}
	}
	h := &sessionHandle{s: s, r: r}
	s.handles = append(s.handles, h)
	return h
}

// checkObjects says whether what a permission call names is the caller's own.
func (h *sessionHandle) checkObjects(n filterapi.Negotiated) error {
	if n.Primary != nil {
		if err := belongs(n.Primary, h.r); err != nil {
			return err
		}
	}
	if n.Notify == nil {
		return nil
	}
	if l, ok := h.s.listener(n.Notify); !ok || l.r != h.r {
		return fmt.Errorf("a session filter that is not the caller's in this session: %w", filterapi.ErrInvalidArgument)
	}
	return nil
}

// ID implements filterapi.Session.
func (h *sessionHandle) ID() uint64 { return h.s.id }

// ClientAddr implements filterapi.Session.
func (h *sessionHandle) ClientAddr() netip.Addr { return h.s.addr }

// User implements filterapi.Session.
func (h *sessionHandle) User() string { return h.s.User() }

// Flags implements filterapi.Session.
func (h *sessionHandle) Flags() filterapi.SessionFlags { return h.s.Flags() }

// AttachFilter implements filterapi.Session.
func (h *sessionHandle) AttachFilter(name string) error {
	h.used("AttachFilter")
	return h.s.AttachFilter(name)
}

// HostAccessCheck implements filterapi.Session.
func (h *sessionHandle) HostAccessCheck(a filterapi.HostAccess) error { return h.s.HostAccessCheck(a) }

// ExternalAddr implements filterapi.Session.
func (h *sessionHandle) ExternalAddr(protocol string) (netip.Addr, error) {
	return h.s.ExternalAddr(protocol)
}

// Network implements filterapi.Session.
func (h *sessionHandle) Network() filterapi.Network { return h.s.e.network(h.s) }

// Close implements filterapi.Session.
func (h *sessionHandle) Close() { h.s.e.giveBack(h) }

// RedirectConnections implements filterapi.Session.
func (h *sessionHandle) RedirectConnections(r filterapi.Redirect) (netip.AddrPort, []filterapi.Action, error) {
	h.used("RedirectConnections")
	if err := h.checkObjects(r.Negotiated); err != nil {
		return netip.AddrPort{}, nil, fmt.Errorf("redirect connections: %w", err)
	}
	return h.s.RedirectConnections(r)
}

// AllowFutureConnect implements filterapi.Session.
func (h *sessionHandle) AllowFutureConnect(f filterapi.FutureConnect) (filterapi.Action, error) {
	h.used("AllowFutureConnect")
	if err := h.checkObjects(f.Negotiated); err != nil {
		return nil, fmt.Errorf("allow future connect: %w", err)
	}
	return h.s.AllowFutureConnect(f)
}

// BindForClient implements filterapi.Session.
func (h *sessionHandle) BindForClient(b filterapi.Bind) ([]filterapi.Connection, error) {
	h.used("BindForClient")
	if err := h.checkObjects(b.Negotiated); err != nil {
		return nil, fmt.Errorf("bind for client: %w", err)
	}
	binds, err := h.s.bindForClient(h.r.name(), b)
	if err != nil {
		return nil, err
	}
	out := make([]filterapi.Connection, 0, len(binds))
	for _, c := range binds {
		out = append(out, c.handle(h.r))
	}
	return out, nil
}

// RetroactiveAllowBind implements filterapi.Session.
func (h *sessionHandle) RetroactiveAllowBind(a filterapi.AllowBind) (bool, error) {
	h.used("RetroactiveAllowBind")
	return h.s.RetroactiveAllowBind(a)
}

// SetDataFilterFactory implements filterapi.Session.
func (h *sessionHandle) SetDataFilterFactory(f filterapi.DataFilterFactory) (filterapi.Action, error) {
	h.used("SetDataFilterFactory")
	return h.s.setDataFilterFactory(h.r, f)
}

// EmulateClientBind implements filterapi.Session.
func (h *sessionHandle) EmulateClientBind(b filterapi.EmulatedBind) (filterapi.Connection, error) {
	h.used("EmulateClientBind")
	c, err := h.s.emulateClientBind(h.r, b)
	if err != nil {
		return nil, err
	}
	return c.handle(h.r), nil
}

// ConnectForClient implements filterapi.Session.
func (h *sessionHandle) ConnectForClient(ctx context.Context, c filterapi.Connect) (filterapi.Leg, error) {
	h.used("ConnectForClient")
	return h.s.connectForClient(ctx, h.r, c)
}

// ListenForClient implements filterapi.Session.
func (h *sessionHandle) ListenForClient(b filterapi.Bind) (filterapi.ClientListener, error) {
	h.used("ListenForClient")
	if err := h.checkObjects(b.Negotiated); err != nil {
		return nil, fmt.Errorf("listen for client: %w", err)
	}
	return h.s.listenForClient(h.r, b)
}

// listener finds the part of a filter in a session by its session filter.
func (s *session) listener(sf filterapi.SessionFilter) (hearer, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for r, a := range s.attached {
		if a.done() && a.err == nil && sameFilter(a.filter, sf) {
			return hearer{r, a}, true
		}
	}
	return hearer{}, false
}

// sameFilter compares session filters, whose types may not be comparable.
func sameFilter(a, b filterapi.SessionFilter) (same bool) {
	defer func() { _ = recover() }() // then they cannot be told apart: not the same
	return a == b
}
