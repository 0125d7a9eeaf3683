package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// Listen implements filterapi.Network.
func (n network) Listen(at netip.AddrPort, f *filterapi.IPFilter) (filterapi.Listener, error) {
	fail := func(err error) (filterapi.Listener, error) { return nil, fmt.Errorf("listen at %v: %w", at, err) }
	if err := n.checkListen(at, f); err != nil {
		return fail(err)
	}
	l, err := n.e.user.Listen(at)
	if err != nil {
		return fail(inUse(err))
	}
	r, err := n.open(flow.TCP, at, l.Addr(), l, f)
	if err != nil {
		return fail(err)
	}
	return listener{l, r}, nil
}

// ListenPacket implements filterapi.Network.
func (n network) ListenPacket(at netip.AddrPort, f *filterapi.IPFilter) (filterapi.PacketConn, error) {
	fail := func(err error) (filterapi.PacketConn, error) {
		return nil, fmt.Errorf("listen for datagrams at %v: %w", at, err)
	}
	if err := n.checkListen(at, f); err != nil {
		return fail(err)
	}
	c, err := n.e.user.ListenPacket(at)
	if err != nil {
		return fail(inUse(err))
	}
	r, err := n.open(flow.UDP, at, c.LocalAddr(), c, f)
	if err != nil {
		return fail(err)
	}
	return &packetConn{PacketConn: c, restricted: r}, nil
}

func (n network) checkListen(at netip.AddrPort, f *filterapi.IPFilter) error {
	switch {
	case !at.Addr().IsValid() || at.Addr().IsUnspecified() || at.Addr().Zone() != "" || !n.e.own(at.Addr()) || !suits(f, at.Addr()):
		return filterapi.ErrInvalidArgument
	case n.e.user == nil:
		return filterapi.ErrNotSupported
	case n.s != nil && !n.s.lives():
		return filterapi.ErrTerminating
	}
	return nil
}

// inUse says of an address that somebody has it.
func inUse(err error) error {
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%w: %w", filterapi.ErrAlreadyExists, err)
	}
	return err
}

// open lets the kernel know of a listening socket, and the session. On error
// the socket is closed.
func (n network) open(p flow.Proto, at netip.AddrPort, got net.Addr, c io.Closer, f *filterapi.IPFilter) (*restricted, error) {
	if bound, err := netip.ParseAddrPort(got.String()); err == nil {
		at = netip.AddrPortFrom(at.Addr(), bound.Port())
	}
	r := &restricted{e: n.e, socket: c, s: n.s, form: nat.Permission{
		ID: n.e.nextID(), Direction: nat.Local, Proto: p, External: at, Multiple: true,
	}}
	if n.s != nil {
		// Whoever may talk to the address may have a socket there.
		if err := r.ruling(); err != nil {
			return nil, errors.Join(err, c.Close())
		}
	}
	if err := r.SetIPFilter(f); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	if n.s != nil {
		if err := n.s.adopt(r); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// restricted is a listening socket with the kernel's permission for it. It
// implements filterapi.Restrictable and io.Closer.
type restricted struct {
	e      *Engine
	s      *session // nil: nobody's
	socket io.Closer

	mu     sync.Mutex // held across kernel changes
	form   nat.Permission
	filter *filterapi.IPFilter
	held   bool // the kernel has it
	closed bool
}

// tuple is what the rules are asked about: may the client talk to it?
func (r *restricted) tuple() flow.Tuple {
	return flow.Tuple{Proto: r.form.Proto, Src: netip.AddrPortFrom(r.s.addr, 0), Dst: r.form.External}
}

// ruling implements sessionSocket.
func (r *restricted) ruling() error { return r.s.ruling(r.tuple(), "") }

// SetIPFilter implements filterapi.Restrictable. After an error nobody may
// come.
func (r *restricted) SetIPFilter(f *filterapi.IPFilter) error {
	if !suits(f, r.form.External.Addr()) {
		return fmt.Errorf("set IP filter: %w", filterapi.ErrInvalidArgument)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return fmt.Errorf("set IP filter: %w", filterapi.ErrTerminating)
	}
	r.filter, r.form.AnySource, r.form.Sources = f.Clone(), f == nil, f.Prefixes()
	if f != nil && len(r.form.Sources) == 0 {
		return r.drop()
	}
	r.held = true // perhaps, also after an error
	if err := r.e.kernel.Install(context.Background(), r.form); err != nil {
		r.filter = new(filterapi.IPFilter)
		return fmt.Errorf("set IP filter: %w", err)
	}
	return nil
}

// drop has the kernel let nobody in. r.mu is held.
func (r *restricted) drop() error {
	if !r.held {
		return nil
	}
	if err := r.e.kernel.Remove(context.Background(), r.form); err != nil {
		return err
	}
	r.held = false
	return nil
}

// IPFilter implements filterapi.Restrictable.
func (r *restricted) IPFilter() *filterapi.IPFilter {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.filter.Clone()
}

// Close closes the socket; the kernel lets nobody in any more.
func (r *restricted) Close() error {
	if r.s != nil {
		r.s.disown(r)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed && r.held {
		r.e.withdraw(r.form)
	}
	r.closed = true
	return r.socket.Close()
}

// listener implements filterapi.Listener.
type listener struct {
	net.Listener
	*restricted
}

// Accept implements net.Listener. What a session accepts is closed with it.
func (l listener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil || l.s == nil {
		return conn, err
	}
	c := &socket{Closer: conn, s: l.s, tuple: l.tuple()}
	if err := l.s.adopt(c); err != nil {
		return nil, err
	}
	return sessionConn{conn, c}, nil
}

// Close implements net.Listener.
func (l listener) Close() error { return l.restricted.Close() }

// packetConn implements filterapi.PacketConn.
type packetConn struct {
	net.PacketConn
	*restricted

	last   sync.Mutex
	rules  any // the policy that was asked last
	allows netip.AddrPort
}

// Close implements net.PacketConn.
func (c *packetConn) Close() error { return c.restricted.Close() }

// WriteTo implements net.PacketConn. To whom a session may not talk, its
// socket does not.
func (c *packetConn) WriteTo(b []byte, to net.Addr) (int, error) {
	if c.s != nil {
		if err := c.maySend(to); err != nil {
			return 0, fmt.Errorf("send to %v: %w", to, err)
		}
	}
	return c.PacketConn.WriteTo(b, to)
}

func (c *packetConn) maySend(to net.Addr) error {
	peer, err := netip.ParseAddrPort(to.String())
	if err != nil {
		return filterapi.ErrInvalidArgument
	}
	rules := c.e.Policy()
	c.last.Lock()
	known := c.rules == any(rules) && c.allows == peer
	c.last.Unlock()
	if known {
		return nil
	}
	if err := c.s.ruling(flow.Tuple{Proto: flow.UDP, Src: netip.AddrPortFrom(c.s.addr, 0), Dst: peer}, ""); err != nil {
		return err
	}
	c.last.Lock()
	c.rules, c.allows = rules, peer
	c.last.Unlock()
	return nil
}
