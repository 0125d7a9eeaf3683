package socks

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// connect serves CONNECT.
func (c *client) connect(s *shared, q request) {
	ctx, cancel := context.WithTimeout(c.ctx, c.set.Connect)
	defer cancel()
	unwatch := c.watch(cancel)
	leg, peer, err := c.reach(ctx, s, q.target)
	unwatch()
	if err == nil && c.ctx.Err() != nil {
		leg.Close()
		err = context.Cause(c.ctx)
	}
	if err != nil {
		c.deny(q, err)
		return
	}
	forget := s.add(peer, leg)
	defer forget()
	name, _ := leg.Connection().ExternalName() // a filter may play the peer: then there is none
	c.carry(q, leg, name)
}

// carry answers, hands the client's connection over and waits for the end.
func (c *client) carry(q request, leg filterapi.Leg, a netip.AddrPort) {
	if err := c.answer(q, a); err != nil {
		leg.Close()
		_ = c.conn.Close()
		return
	}
	if err := leg.Carry(c.conn); err != nil {
		leg.Close()
		c.f.log.Debug("not carried", zap.Stringer("client", c.at), zap.Stringer("target", q.target), zap.Error(err))
		return
	}
	stop := context.AfterFunc(c.ctx, leg.Connection().Kill)
	defer stop()
	<-leg.Done()
}

// reach connects to a target: of the addresses of a name to the first that can
// be had.
func (c *client) reach(ctx context.Context, s *shared, t target) (filterapi.Leg, netip.AddrPort, error) {
	addrs, err := c.addresses(ctx, t)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	var first error
	for _, a := range addrs {
		peer := netip.AddrPortFrom(a, t.port)
		leg, err := s.ConnectForClient(ctx, filterapi.Connect{Client: c.at, Target: peer})
		if err == nil {
			return leg, peer, nil
		}
		// What the rules refuse says less than what the network said.
		if first == nil || errors.Is(first, filterapi.ErrPolicyDenied) || errors.Is(first, filterapi.ErrNetworkDenied) {
			first = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, netip.AddrPort{}, first
}

// errFamily: an address of the other family than the client's own, by which the
// rules know it.
var errFamily = errors.New("not of the client's address family")

// addresses are those of a target, of the client's family.
func (c *client) addresses(ctx context.Context, t target) ([]netip.Addr, error) {
	is4 := c.at.Addr().Is4()
	if t.addr.IsValid() {
		if t.addr.Is4() != is4 {
			return nil, fmt.Errorf("%v: %w", t.addr, errFamily)
		}
		return []netip.Addr{t.addr}, nil
	}
	return c.resolve(ctx, t.name, is4)
}

// bind serves BIND: the first answer tells where the peer is awaited, the second
// who has come.
func (c *client) bind(s *shared, q request) {
	awaited, err := c.awaited(q.target)
	if err != nil {
		c.deny(q, err)
		return
	}
	b := filterapi.Bind{
		Negotiated: filterapi.Negotiated{Proto: flow.TCP, Flags: filterapi.Timeout, Expiry: c.set.Bind},
		Clients:    []netip.AddrPort{c.at},
	}
	if awaited.IsValid() {
		b.IPFilter = filterapi.OnlyFrom(awaited)
		b.Primary = s.primary(awaited, q.target.port)
	}
	if !c.set.ApproveBinds || b.Primary == nil {
		b.Flags |= filterapi.Discarding
	}
	l, err := s.ListenForClient(b)
	if errors.Is(err, filterapi.ErrTerminating) && b.Primary != nil {
		// The connection that it belongs to has just ended.
		b.Primary, b.Flags = nil, b.Flags|filterapi.Discarding
		l, err = s.ListenForClient(b)
	}
	if err != nil {
		c.deny(q, err)
		return
	}
	defer func() { _ = l.Close() }()
	name, err := l.Bind().ExternalName()
	if err == nil {
		err = c.answer(q, name)
	}
	if err != nil {
		_ = c.conn.Close()
		return
	}
	ctx, cancel := context.WithTimeout(c.ctx, c.set.Bind)
	defer cancel()
	unwatch := c.watch(cancel)
	leg, err := l.Accept(ctx)
	unwatch()
	if err == nil && c.ctx.Err() != nil {
		leg.Close()
		err = context.Cause(c.ctx)
	}
	if err != nil {
		if errors.Is(err, filterapi.ErrTerminating) && s.Flags()&filterapi.SessionTerminated == 0 {
			err = context.DeadlineExceeded // the bind's own clock was the first, or its only peer was denied
		}
		c.deny(q, err)
		return
	}
	peer, _ := leg.Connection().ExternalPeer() // it has one: it has come
	c.carry(q, leg, peer)
}

// awaited is the host that a BIND is for; invalid: any.
func (c *client) awaited(t target) (netip.Addr, error) {
	if t.addr.IsValid() && t.addr.IsUnspecified() {
		return netip.Addr{}, nil
	}
	ctx, cancel := context.WithTimeout(c.ctx, c.set.Connect)
	defer cancel()
	list, err := c.addresses(ctx, t)
	if err != nil {
		return netip.Addr{}, err
	}
	return list[0], nil
}
