package userpath

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// User is what the engine asks of user space: connections to clients in the
// name of emulating filters, and sockets of the gateway's own, which have the
// mark of flow.Own. It implements engine.User. Safe for concurrent use.
type User struct {
	tcp   *TCP
	udp   *UDP
	marks flow.Marks

	mu   sync.Mutex
	open map[closer]struct{} // nil: stopped
}

type closer interface{ Close() error }

var _ engine.User = (*User)(nil)

// NewUser joins what carries flows. Its own sockets are closed by Run, which
// the caller runs.
func NewUser(tcp *TCP, udp *UDP, marks flow.Marks) *User {
	return &User{tcp: tcp, udp: udp, marks: marks, open: make(map[closer]struct{})}
}

// Run waits until ctx is cancelled, and closes every socket that is left.
func (u *User) Run(ctx context.Context) error {
	<-ctx.Done()
	u.mu.Lock()
	open := u.open
	u.open = nil
	u.mu.Unlock()
	for c := range open {
		_ = c.Close() // nothing is left to be done about it
	}
	return nil
}

// Originate implements engine.User.
func (u *User) Originate(ctx context.Context, t *engine.Takeover) error {
	if t.Tuple.Proto == flow.UDP {
		return u.udp.Originate(ctx, t)
	}
	return u.tcp.Originate(ctx, t)
}

// Dial implements engine.User. The connection is the caller's to close; it has
// the methods of a *net.TCPConn or *net.UDPConn.
func (u *User) Dial(ctx context.Context, p flow.Proto, from, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{Control: u.mark}
	d.SetMultipathTCP(false)
	var network string
	switch p {
	case flow.TCP:
		network = "tcp"
		if from.IsValid() {
			d.LocalAddr = net.TCPAddrFromAddrPort(from)
		}
	case flow.UDP:
		network = "udp"
		if from.IsValid() {
			d.LocalAddr = net.UDPAddrFromAddrPort(from)
		}
	default:
		return nil, fmt.Errorf("dial %s: %w", to, filterapi.ErrInvalidArgument)
	}
	c, err := d.DialContext(ctx, network, to.String())
	if err != nil {
		return nil, err // it says what was tried
	}
	switch c := c.(type) {
	case *net.TCPConn:
		return keep[net.Conn](u, &ownTCPConn{TCPConn: c, user: u})
	case *net.UDPConn:
		return keep[net.Conn](u, &ownUDPConn{UDPConn: c, user: u})
	}
	_ = c.Close()
	return nil, fmt.Errorf("dial %s: neither TCP nor UDP: %w", to, filterapi.ErrInvalidArgument)
}

// Listen implements engine.User.
func (u *User) Listen(at netip.AddrPort) (net.Listener, error) {
	c := net.ListenConfig{Control: u.mark}
	c.SetMultipathTCP(false)
	l, err := c.Listen(context.Background(), "tcp", at.String())
	if err != nil {
		return nil, err
	}
	return keep[net.Listener](u, &ownListener{Listener: l, user: u})
}

// ListenPacket implements engine.User. The socket has the methods of a
// *net.UDPConn.
func (u *User) ListenPacket(at netip.AddrPort) (net.PacketConn, error) {
	c := net.ListenConfig{Control: u.mark}
	p, err := c.ListenPacket(context.Background(), "udp", at.String())
	if err != nil {
		return nil, err
	}
	conn, ok := p.(*net.UDPConn)
	if !ok {
		_ = p.Close()
		return nil, fmt.Errorf("listen on %s: %w", at, filterapi.ErrInvalidArgument)
	}
	return keep[net.PacketConn](u, &ownUDPConn{UDPConn: conn, user: u})
}

// mark gives a socket the mark before it is bound.
func (u *User) mark(_, _ string, raw syscall.RawConn) (err error) {
	use := raw.Control(func(fd uintptr) { err = setOwnMark(int(fd), u.marks) })
	if use != nil {
		return os.NewSyscallError("control", use)
	}
	return err
}

// keep remembers a socket until it is closed. After the end it closes it.
func keep[T closer](u *User, c T) (kept T, err error) {
	u.mu.Lock()
	stopped := u.open == nil
	if !stopped {
		u.open[c] = struct{}{}
	}
	u.mu.Unlock()
	if stopped {
		_ = c.Close()
		return kept, fmt.Errorf("the gateway stops: %w", filterapi.ErrTerminating)
	}
	return c, nil
}

func (u *User) forget(c closer) {
	u.mu.Lock()
	delete(u.open, c)
	u.mu.Unlock()
}

// The sockets leave the list when they are closed.
type (
	ownTCPConn struct {
		*net.TCPConn
		user *User
	}
	ownUDPConn struct {
		*net.UDPConn
		user *User
	}
	ownListener struct {
		net.Listener
		user *User
	}
)

// Close implements net.Conn.
func (c *ownTCPConn) Close() error {
	c.user.forget(c)
	return c.TCPConn.Close()
}

// Deepen makes room for a burst of 64 KiB of payload.
func (c *ownUDPConn) Deepen() {
	raw, err := c.SyscallConn()
	if err != nil {
		return // it is closed
	}
	// It only ever bounds what the kernel takes.
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, udpBurstBuffer)
	})
}

// Close implements net.Conn.
func (c *ownUDPConn) Close() error {
	c.user.forget(c)
	return c.UDPConn.Close()
}

// Close implements net.Listener. What it has accepted lives on.
func (l *ownListener) Close() error {
	l.user.forget(l)
	return l.Listener.Close()
}

// Accept implements net.Listener.
func (l *ownListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if t, ok := c.(*net.TCPConn); ok {
		return keep[net.Conn](l.user, &ownTCPConn{TCPConn: t, user: l.user})
	}
	return c, nil
}
