package engine

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// network makes sockets of the gateway for filters. It implements
// filterapi.Network.
type network struct {
	e *Engine
	s *session // whose they are; nil: nobody's
}

func (e *Engine) network(s *session) network { return network{e, s} }

// Dial implements filterapi.Network.
func (n network) Dial(ctx context.Context, p flow.Proto, from, to netip.AddrPort) (net.Conn, error) {
	fail := func(err error) (net.Conn, error) { return nil, fmt.Errorf("dial %v %v: %w", p, to, err) }
	if !p.HasPorts() || !endpoint(to, to.Addr()) || from.Addr().IsValid() && (from.Addr().Is4() != to.Addr().Is4() || !n.e.own(from.Addr())) {
		return fail(filterapi.ErrInvalidArgument)
	}
	if n.e.user == nil {
		return fail(filterapi.ErrNotSupported)
	}
	if n.s == nil {
		return n.e.user.Dial(ctx, p, from, to)
	}
	c := &socket{s: n.s, tuple: flow.Tuple{Proto: p, Src: netip.AddrPortFrom(n.s.addr, 0), Dst: to}}
	var err error
	if c.perm, err = n.s.mayDial(c.tuple); err != nil {
		return fail(err)
	}
	if c.perm != nil && !from.IsValid() {
		from = c.perm.source
	}
	conn, err := n.e.user.Dial(ctx, p, from, to)
	if err != nil {
		c.settle()
		return fail(err)
	}
	c.Closer = conn
	if err := n.s.adopt(c); err != nil {
		return fail(err)
	}
	return sessionConn{conn, c}, nil
}

// own says whether an address is the gateway's.
func (e *Engine) own(a netip.Addr) bool {
	_, _, local, err := e.routes.Lookup(a)
	return err == nil && local
}

// mayDial finds the permission that lets a private session connect, or one that
// lets its client, or else asks the rules.
func (s *session) mayDial(t flow.Tuple) (*permission, error) {
	if !s.lives() {
		return nil, filterapi.ErrTerminating
	}
	for _, p := range s.e.perms.find(t) {
		mine := p.session == s && s.private || p.addressBased
		if mine && !p.inbound() && s.e.useOwn(p) {
			return p, nil
		}
	}
	return nil, s.ruling(t, "")
}

// sessionSocket is what a session has open on the network.
type sessionSocket interface {
	io.Closer
	// ruling is what the rules in force say of it.
	ruling() error
}

// socket is one of a session's, which is closed at the session's end. It
// implements io.Closer.
type socket struct {
	io.Closer
	s     *session
	tuple flow.Tuple  // what the rules were asked about
	perm  *permission // that let it be, instead of the rules; may be nil
	once  sync.Once
}

// Close closes it, and gives back what it held.
func (c *socket) Close() error {
	c.s.disown(c)
	err := c.Closer.Close()
	c.settle()
	return err
}

// ruling implements sessionSocket: a permission may have let it be.
func (c *socket) ruling() error {
	if c.perm == nil {
		return c.s.ruling(c.tuple, "")
	}
	if !c.s.e.stands(c.perm) {
		return filterapi.ErrPolicyDenied
	}
	return nil
}

func (c *socket) settle() {
	if c.perm != nil {
		c.once.Do(func() { c.s.e.unuse(c.perm, false) })
	}
}

// adopt takes a socket in. When the session has ended it is closed, and also
// when the rules have changed since they were asked: whoever changed them found
// it among the session's, or it is found here.
func (s *session) adopt(c sessionSocket) error {
	s.mu.Lock()
	if s.ended || s.closing {
		s.mu.Unlock()
		_ = c.Close() // it was never used
		return filterapi.ErrTerminating
	}
	if s.sockets == nil {
		s.sockets = make(map[sessionSocket]struct{})
	}
	s.sockets[c] = struct{}{}
	s.mu.Unlock()
	if err := c.ruling(); err != nil {
		_ = c.Close() // it was never used
		return err
	}
	return nil
}

func (s *session) disown(c sessionSocket) {
	s.mu.Lock()
	delete(s.sockets, c)
	s.mu.Unlock()
}

// takeSockets gives the sockets of a session whose lock the caller holds; they
// are its no more.
func (s *session) takeSockets() []sessionSocket {
	out := slices.Collect(maps.Keys(s.sockets))
	s.sockets = nil
	return out
}

// recheckSockets closes those that the rules no longer allow.
func (e *Engine) recheckSockets() {
	for _, s := range e.sessions.all() {
		s.mu.Lock()
		all := slices.Collect(maps.Keys(s.sockets))
		s.mu.Unlock()
		for _, x := range all {
			if x.ruling() != nil {
				_ = x.Close() // nobody asks any more
			}
		}
	}
}

// sessionConn is a connection of a session.
type sessionConn struct {
	net.Conn
	socket *socket
}

// Close implements net.Conn.
func (c sessionConn) Close() error { return c.socket.Close() }

// CloseWrite ends the sending side of a TCP connection.
func (c sessionConn) CloseWrite() error {
	w, ok := c.Conn.(interface{ CloseWrite() error })
	if !ok {
		return filterapi.ErrNotSupported
	}
	return w.CloseWrite()
}
