package engine

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

const redirectFlags = commonFlags | filterapi.IncreaseReceiveBuffer

// RedirectConnections implements filterapi.Session.
func (s *session) RedirectConnections(r filterapi.Redirect) (netip.AddrPort, []filterapi.Action, error) {
	fail := func(err error) (netip.AddrPort, []filterapi.Action, error) {
		return netip.AddrPort{}, nil, fmt.Errorf("redirect connections to %v: %w", r.Targets, err)
	}
	perms, err := s.redirections(r)
	if err != nil {
		return fail(err)
	}
	// The filters' handlers run in the session.
	if !s.ref() {
		return fail(filterapi.ErrTerminating)
	}
	defer s.e.release(s)
	if !s.e.perms.room(s.addr, len(perms), s.e.quota) {
		return fail(filterapi.ErrQuota)
	}
	inside, err := s.leaseInside(r.Proto, perms)
	if err != nil {
		return fail(err)
	}
	if err := s.e.previewAll(perms); err != nil {
		s.e.abandon(perms...)
		return fail(err)
	}
	if err := s.e.grant(perms...); err != nil {
		s.e.abandon(perms...)
		return fail(err)
	}
	actions := make([]filterapi.Action, len(perms))
	for i, p := range perms {
		actions[i] = (*action)(p)
	}
	return inside, actions, nil
}

// redirections checks the call and makes a permission for each target.
func (s *session) redirections(r filterapi.Redirect) ([]*permission, error) {
	if len(r.Targets) == 0 {
		return nil, filterapi.ErrInvalidArgument
	}
	perms := make([]*permission, len(r.Targets))
	for i, target := range r.Targets {
		if !s.reachable(target) {
			return nil, filterapi.ErrInvalidArgument
		}
		t, err := s.checkCall(r.Negotiated, redirectFlags, target)
		if err != nil {
			return nil, err
		}
		if err := s.checkSource(r.External, r.Flags); err != nil {
			return nil, err
		}
		perms[i] = s.newPermission(t, r.Negotiated, ground{direction: nat.Outbound, source: r.External})
		perms[i].far = compactOf(target)
	}
	return perms, nil
}

// leaseInside gives the redirections consecutive ports of the address that
// the gateway has towards the client.
func (s *session) leaseInside(proto flow.Proto, perms []*permission) (netip.AddrPort, error) {
	inside, err := s.towards(perms[0].primary)
	if err != nil {
		return netip.AddrPort{}, err
	}
	first, err := s.lease(nat.Request{Proto: proto, Addrs: []netip.Addr{inside}, N: len(perms)})
	if err != nil {
		return netip.AddrPort{}, err
	}
	for i, p := range perms {
		p.near, p.leased = compactOf(netip.AddrPortFrom(inside, first.Port()+uint16(i))), true
	}
	return first, nil
}

// previewAll raises the events of all targets. The filters have for all of them
// together the time that a call waits.
func (e *Engine) previewAll(perms []*permission) error {
	ctx, cancel := context.WithTimeout(context.Background(), e.answer)
	defer cancel()
	for _, p := range perms {
		if err := e.preview(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// preview raises the event of the connections to come, with a connection that
// is over when the call returns. It settles whether the kernel may carry them:
// if a filter wants to hold this one, each of them comes to user space and
// raises the event again.
func (e *Engine) preview(ctx context.Context, p *permission) error {
	c := &connection{
		e: e, session: p.session, start: e.now(),
		tuple: flow.Tuple{Proto: p.proto, Src: netip.AddrPortFrom(p.session.addr, 0), Dst: p.via()},
	}
	c.inherit(p)
	err := e.raise(ctx, c)
	held := p.is.has(forced) || c.forUser()
	p.is.set(forced|toUser, held)
	c.mu.Lock()
	killed := c.killed
	c.mu.Unlock()
	e.farewell(c)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", filterapi.ErrPolicyDenied, err)
	case killed:
		return fmt.Errorf("killed: %w", filterapi.ErrPolicyDenied)
	}
	return nil
}
