package filtertest

import (
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/sluicegw/sluice/filterapi"
)

// wire is what joins the gateway's own sockets with the machines around it, in
// memory. A connection is a net.Pipe: a write returns when it was read.
type wire struct {
	mu    sync.Mutex
	tcp   map[netip.AddrPort]*listener
	udp   map[netip.AddrPort]*packetConn
	conns map[*conn]struct{}
	next  uint16
}

func (w *wire) init() {
	w.tcp = make(map[netip.AddrPort]*listener)
	w.udp = make(map[netip.AddrPort]*packetConn)
	w.conns = make(map[*conn]struct{})
}

// close closes whatever is open still.
func (w *wire) close() { w.closeIf(func(*session) bool { return true }) }

// closeOf closes the sockets of a session.
func (w *wire) closeOf(s *session) { w.closeIf(func(o *session) bool { return o == s }) }

func (w *wire) closeIf(mine func(*session) bool) {
	w.mu.Lock()
	var all []interface{ Close() error }
	for _, l := range w.tcp {
		if mine(l.owner) {
			all = append(all, l)
		}
	}
	for _, p := range w.udp {
		if mine(p.owner) {
			all = append(all, p)
		}
	}
	for c := range w.conns {
		if mine(c.owner) {
			all = append(all, c)
		}
	}
	w.mu.Unlock()
	for _, c := range all {
		_ = c.Close() // it may be closed already
	}
}

// free gives an address a port if it has none. wire.mu is held.
func (w *wire) free(a netip.AddrPort) netip.AddrPort {
	for a.Port() == 0 || w.tcp[a] != nil || w.udp[a] != nil {
		w.next++
		a = netip.AddrPortFrom(a.Addr(), 60000+w.next%5000)
	}
	return a
}

// restricted is what listening sockets have in common.
type restricted struct {
	owner   *session
	mu      sync.Mutex
	sources *filterapi.IPFilter
	closed  bool
	done    chan struct{}
	onClose func()
	gate    func(netip.Addr) bool // instead of sources; nil: none
}

func (r *restricted) SetIPFilter(f *filterapi.IPFilter) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return filterapi.ErrTerminating
	}
	r.sources = f.Clone()
	return nil
}

func (r *restricted) IPFilter() *filterapi.IPFilter {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sources.Clone()
}

func (r *restricted) admits(a netip.Addr) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.gate != nil {
		return !r.closed && r.gate(a)
	}
	return !r.closed && r.sources.Includes(a)
}

func (r *restricted) Close() error {
	r.mu.Lock()
	closed := r.closed
	r.closed = true
	r.mu.Unlock()
	if closed {
		return net.ErrClosed
	}
	close(r.done)
	r.onClose()
	return nil
}

// listener is a listening TCP socket.
type listener struct {
	restricted
	at    netip.AddrPort
	queue chan net.Conn
}

func (l *listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.at) }

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.done:
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.Addr(), Err: net.ErrClosed}
	}
}

// conn is one end of a TCP connection, or a UDP socket with one peer.
type conn struct {
	net.Conn
	wire          *wire
	owner         *session
	local, remote net.Addr
}

func (c *conn) LocalAddr() net.Addr  { return c.local }
func (c *conn) RemoteAddr() net.Addr { return c.remote }

func (c *conn) Close() error {
	c.wire.mu.Lock()
	delete(c.wire.conns, c)
	c.wire.mu.Unlock()
	return c.Conn.Close()
}

func refusedAt(op string, to netip.AddrPort, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Addr: net.TCPAddrFromAddrPort(to), Err: os.NewSyscallError("connect", err)}
}

// dialTCP connects two ends. A listener that does not admit the source is
// silent.
func (w *wire) dialTCP(ctx context.Context, owner *session, from, to netip.AddrPort) (net.Conn, error) {
	w.mu.Lock()
	from = w.free(from)
	l := w.tcp[to]
	w.mu.Unlock()
	if l == nil {
		return nil, refusedAt("dial", to, syscall.ECONNREFUSED)
	}
	if !l.admits(from.Addr()) {
		<-ctx.Done()
		return nil, refusedAt("dial", to, syscall.ETIMEDOUT)
	}
	a, b := net.Pipe()
	src, dst := net.TCPAddrFromAddrPort(from), net.TCPAddrFromAddrPort(to)
	near := &conn{Conn: a, wire: w, owner: owner, local: src, remote: dst}
	far := &conn{Conn: b, wire: w, owner: l.owner, local: dst, remote: src}
	w.mu.Lock()
	w.conns[near], w.conns[far] = struct{}{}, struct{}{}
	w.mu.Unlock()
	var err error
	select {
	case l.queue <- far:
		return near, nil
	case <-l.done:
		err = syscall.ECONNREFUSED
	case <-ctx.Done():
		err = syscall.ETIMEDOUT
	}
	_, _ = near.Close(), far.Close() // nobody has seen them
	return nil, refusedAt("dial", to, err)
}

func (w *wire) listenTCP(owner *session, at netip.AddrPort, f *filterapi.IPFilter, onClose func(netip.AddrPort)) (*listener, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if at.Port() != 0 && w.tcp[at] != nil {
		return nil, filterapi.ErrAlreadyExists
	}
	if at.Port() == 0 {
		at = w.free(at)
	}
	l := &listener{at: at, queue: make(chan net.Conn, 16)}
	l.restricted = restricted{owner: owner, sources: f.Clone(), done: make(chan struct{}), onClose: func() {
		w.mu.Lock()
		delete(w.tcp, at)
		w.mu.Unlock()
		onClose(at)
	}}
	w.tcp[at] = l
	return l, nil
}

func (w *wire) listenUDP(owner *session, at netip.AddrPort, f *filterapi.IPFilter, onClose func(netip.AddrPort)) (*packetConn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if at.Port() != 0 && w.udp[at] != nil {
		return nil, filterapi.ErrAlreadyExists
	}
	if at.Port() == 0 {
		at = w.free(at)
	}
	p := &packetConn{wire: w, at: at, queue: make(chan segment, 256), deadline: newDeadline()}
	p.restricted = restricted{owner: owner, sources: f.Clone(), done: make(chan struct{}), onClose: func() {
		w.mu.Lock()
		delete(w.udp, at)
		w.mu.Unlock()
		onClose(at)
	}}
	w.udp[at] = p
	return p, nil
}

// packetConn is a UDP socket.
type packetConn struct {
	restricted
	wire     *wire
	at       netip.AddrPort
	queue    chan segment
	deadline *deadline
}

func (p *packetConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(p.at) }

func (p *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case s := <-p.queue:
		return copy(b, s.data), net.UDPAddrFromAddrPort(s.addr), nil
	case <-p.done:
		return 0, nil, &net.OpError{Op: "read", Net: "udp", Addr: p.LocalAddr(), Err: net.ErrClosed}
	case <-p.deadline.passed():
		return 0, nil, &net.OpError{Op: "read", Net: "udp", Addr: p.LocalAddr(), Err: os.ErrDeadlineExceeded}
	}
}

// WriteTo sends a datagram; it is lost where nobody listens, or is not admitted.
func (p *packetConn) WriteTo(b []byte, to net.Addr) (int, error) {
	at, err := netip.ParseAddrPort(to.String())
	if err != nil {
		return 0, &net.OpError{Op: "write", Net: "udp", Addr: to, Err: err}
	}
	select {
	case <-p.done:
		return 0, &net.OpError{Op: "write", Net: "udp", Addr: to, Err: net.ErrClosed}
	default:
	}
	p.wire.mu.Lock()
	q := p.wire.udp[at]
	p.wire.mu.Unlock()
	if q != nil && q.admits(p.at.Addr()) {
		select {
		case q.queue <- segment{slices.Clone(b), p.at}:
		default: // full, as a socket's buffer may be
		}
	}
	return len(b), nil
}

func (p *packetConn) SetDeadline(t time.Time) error     { p.deadline.set(t); return nil }
func (p *packetConn) SetReadDeadline(t time.Time) error { p.deadline.set(t); return nil }
func (p *packetConn) SetWriteDeadline(time.Time) error  { return nil }

// deadline is one that can be moved.
type deadline struct {
	mu    sync.Mutex
	ch    chan struct{}
	timer *time.Timer
}

func newDeadline() *deadline { return &deadline{ch: make(chan struct{})} }

func (d *deadline) passed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ch
}

// set moves the deadline; a reader that waits already keeps the old one unless
// that passes first.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
	}
	select {
	case <-d.ch:
		d.ch = make(chan struct{})
	default:
	}
	if t.IsZero() {
		return
	}
	ch := d.ch
	if wait := time.Until(t); wait > 0 {
		d.timer = time.AfterFunc(wait, func() { closeOnce(ch, &d.mu) })
		return
	}
	close(ch)
}

func closeOnce(ch chan struct{}, mu *sync.Mutex) {
	mu.Lock()
	defer mu.Unlock()
	select {
	case <-ch:
	default:
		close(ch)
	}
}

// peerConn is a UDP socket with one peer.
type peerConn struct {
	*packetConn
	peer netip.AddrPort
}

func (c peerConn) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(c.peer) }

func (c peerConn) Read(b []byte) (int, error) {
	for {
		n, from, err := c.ReadFrom(b)
		if err != nil || from.String() == c.RemoteAddr().String() {
			return n, err
		}
	}
}

func (c peerConn) Write(b []byte) (int, error) { return c.WriteTo(b, c.RemoteAddr()) }

func (w *wire) dialUDP(owner *session, from, to netip.AddrPort, onClose func(netip.AddrPort)) (net.Conn, error) {
	p, err := w.listenUDP(owner, from, filterapi.OnlyFrom(to.Addr()), onClose)
	if err != nil {
		return nil, err
	}
	return peerConn{p, to}, nil
}
