package engine

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// listenFlags: a socket is no pair, and what its client sends leaves from it in
// any case.
const listenFlags = bindFlags &^ (filterapi.EvenPort | filterapi.SameSource)

// listenForClient is ListenForClient, called by a filter.
func (s *session) listenForClient(r *registered, b filterapi.Bind) (filterapi.ClientListener, error) {
	fail := func(err error) (filterapi.ClientListener, error) {
		return nil, fmt.Errorf("listen for client %v: %w", b.Clients, err)
	}
	if !s.private || s.e.user == nil {
		return fail(filterapi.ErrNotSupported)
	}
	p, err := s.newSocketBind(r, b)
	if err != nil {
		return fail(err)
	}
	// The filters' handlers run in the session.
	if !s.ref() {
		s.e.abandon(p)
		return fail(filterapi.ErrTerminating)
	}
	defer s.e.release(s)
	l := &clientListener{p: p, r: r}
	if err := l.open(); err != nil {
		s.e.abandon(p)
		return fail(err)
	}
	if err := s.e.openBinds([]*permission{p}); err != nil {
		s.e.abandon(p)
		l.closeSocket()
		return fail(err)
	}
	l.start()
	return l, nil
}

// newSocketBind makes the permission of a bind whose end is a socket. On an
// error nothing is leased.
func (s *session) newSocketBind(r *registered, b filterapi.Bind) (*permission, error) {
	waiting, err := s.checkClients(b)
	if err != nil || len(b.Clients) != 1 {
		return nil, orInvalid(err)
	}
	t, err := s.checkSocketBind(b.Negotiated)
	if err != nil {
		return nil, err
	}
	if !s.e.perms.room(s.addr, 1, s.e.quota) {
		return nil, filterapi.ErrQuota
	}
	if b.External == (netip.AddrPort{}) {
		addr, err := s.outside(b, t)
		if err != nil {
			return nil, err
		}
		b.External = netip.AddrPortFrom(addr, 0)
	}
	x, err := s.findPlace(b, terms{}) // no translation of a primary is lent
	if err != nil {
		return nil, err
	}
	x.waiting = waiting
	g := ground{direction: nat.Local, by: r.name(), multiple: b.Proto == flow.UDP} // a socket with many peers
	p := s.newBind(g, b, t, x, 0, b.Clients[0])
	p.bind.gone = make(chan struct{})
	return p, nil
}

func orInvalid(err error) error {
	if err == nil {
		err = filterapi.ErrInvalidArgument
	}
	return err
}

// checkSocketBind is checkCall for a bind that may stand for no protocol yet,
// because nobody has approved of it.
func (s *session) checkSocketBind(n filterapi.Negotiated) (terms, error) {
	if n.Primary != nil || n.Protocol != "" || n.Flags&filterapi.Discarding == 0 {
		return s.checkCall(n, listenFlags, netip.AddrPort{})
	}
	t := terms{basis: basis{tuple: flow.Tuple{Proto: n.Proto, Src: netip.AddrPortFrom(s.addr, 0)}, user: s.user}}
	return t, s.checkNegotiated(n, listenFlags, &t)
}

// outside is the gateway's address at which peers are awaited, where nobody has
// said which: that which they would see as the client's, or know as the
// gateway's.
func (s *session) outside(b filterapi.Bind, t terms) (netip.Addr, error) {
	far := netip.Addr{}
	if t.primary != nil {
		if name, err := t.primary.ExternalName(); err == nil && s.e.own(name.Addr()) {
			return name.Addr(), nil
		}
		far = t.primary.far().Addr()
	} else if list := b.IPFilter.Prefixes(); len(list) > 0 {
		far = list[0].Addr()
	}
	if !far.IsValid() {
		return s.anywhere()
	}
	to := flow.Tuple{Proto: b.Proto, Src: netip.AddrPortFrom(s.addr, 0), Dst: netip.AddrPortFrom(far, 0)}
	q, err := s.e.question(to, "")
	if err != nil {
		return far, fmt.Errorf("%w: %w", filterapi.ErrNetworkDenied, err)
	}
	v := s.e.Policy().Judge(q)
	switch {
	case v.NetworkRule == nil:
		return far, filterapi.ErrNetworkDenied
	case v.Translated(to) && v.NetworkRule.Address.IsValid():
		return s.e.ports.Pair(s.addr, v.NetworkRule.Addresses()), nil
	}
	_, source, _, err := s.e.routes.Lookup(far)
	if err != nil || !source.IsValid() {
		return far, fmt.Errorf("no address towards %v: %w", far, filterapi.ErrNetworkDenied)
	}
	return source, nil
}

// anywhere is the gateway's address of the client's family on the way that the
// first network rule opens for the client.
func (s *session) anywhere() (netip.Addr, error) {
	iface, _, _, err := s.e.routes.Lookup(s.addr)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%w: %w", filterapi.ErrNetworkDenied, err)
	}
	rules := s.e.Policy()
	from := rules.NetworksOf(s.addr, iface)
	for _, r := range rules.NetworkRules() {
		if !slices.Contains(from, r.From) {
			continue
		}
		if r.Address.IsValid() && s.addr.Is4() {
			return s.e.ports.Pair(s.addr, r.Addresses()), nil
		}
		if a, ok := s.e.facing(r.To, s.addr.Is6()); ok {
			return a, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("nothing tells the external address: %w", filterapi.ErrNetworkDenied)
}

// clientListener is a bind whose end is a socket of the gateway. It implements
// filterapi.ClientListener.
type clientListener struct {
	p *permission
	r *registered

	stream  net.Listener  // for TCP
	came    chan net.Conn // what it has accepted
	packets datagrams     // for UDP
	peers   udpPeers

	once sync.Once
}

// open opens the socket, at which nobody is let in yet.
func (l *clientListener) open() (err error) {
	user, at := l.p.session.e.user, l.p.external()
	if l.p.proto == flow.TCP {
		l.stream, err = user.Listen(at)
		return inUse(err)
	}
	conn, err := user.ListenPacket(at)
	if err != nil {
		return inUse(err)
	}
	var ok bool
	if l.packets, ok = conn.(datagrams); !ok {
		_ = conn.Close()
		return filterapi.ErrNotSupported
	}
	l.peers.init(l)
	if d, ok := conn.(interface{ Deepen() }); ok {
		l.p.bind.deepen = d.Deepen
	}
	if _, _, deep := l.p.carriage(); deep && l.p.bind.deepen != nil {
		l.p.bind.deepen()
	}
	return nil
}

// start follows the bind until it is over.
func (l *clientListener) start() {
	go func() {
		<-l.p.bind.gone
		l.closeSocket()
	}()
	if l.stream == nil {
		go l.peers.sweep()
		return
	}
	l.came = make(chan net.Conn)
	go l.accept()
}

// accept takes what comes to the socket, one at a time.
func (l *clientListener) accept() {
	for {
		conn, err := l.stream.Accept()
		if err != nil {
			return // closed
		}
		select {
		case l.came <- conn:
		case <-l.p.bind.gone:
			reset(conn)
		}
	}
}

func (l *clientListener) closeSocket() {
	l.once.Do(func() {
		if l.stream != nil {
			_ = l.stream.Close() // nothing is left to be done about it
		}
		if l.packets != nil {
			_ = l.packets.Close()
			l.peers.close()
		}
	})
}

// reset ends a connection that nobody wants.
func reset(conn net.Conn) {
	if c, ok := conn.(interface{ SetLinger(int) error }); ok {
		_ = c.SetLinger(0) // it is closed in any case
	}
	_ = conn.Close()
}

// Bind implements filterapi.ClientListener.
func (l *clientListener) Bind() filterapi.Connection { return l.p.object().handle(l.r) }

// Close implements filterapi.ClientListener.
func (l *clientListener) Close() error {
	_ = l.p.session.e.void(l.p) // used up or gone: nothing is left to close
	l.closeSocket()
	return nil
}

// Accept implements filterapi.ClientListener.
func (l *clientListener) Accept(ctx context.Context) (filterapi.Leg, error) {
	if l.stream == nil {
		return nil, filterapi.ErrNotSupported
	}
	for {
		select {
		case conn := <-l.came:
			x, err := l.received(conn)
			if err == nil {
				return x, nil
			}
			if !l.p.waits() {
				return nil, fmt.Errorf("accept at %v: %w", l.p.external(), filterapi.ErrTerminating)
			}
		case <-l.p.bind.gone:
			return nil, fmt.Errorf("accept at %v: %w", l.p.external(), filterapi.ErrTerminating)
		case <-ctx.Done():
			return nil, fmt.Errorf("accept at %v: %w", l.p.external(), context.Cause(ctx))
		}
	}
}

// received makes a flow of an accepted connection. On an error it was reset.
func (l *clientListener) received(conn net.Conn) (*leg, error) {
	p, s := l.p, l.p.session
	peer, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	if err != nil {
		reset(conn)
		return nil, err
	}
	c, err := s.explicit(flow.Tuple{Proto: flow.TCP, Src: peer, Dst: p.external()})
	if err != nil {
		reset(conn)
		return nil, err
	}
	rules := s.e.Policy()
	// The kernel lets in whom the permission names; the rules for the gateway
	// itself may let in others.
	if !s.e.use(p, c.tuple, false, true) {
		reset(conn)
		s.e.release(s)
		return nil, filterapi.ErrPolicyDenied
	}
	c.inherit(p)
	t, err := s.e.enter(c, rules)
	if err != nil {
		reset(conn)
		return nil, err
	}
	joint, err := s.e.user.Receive(t, conn)
	if err != nil {
		return nil, err
	}
	return &leg{c, l.r, joint}, nil
}

// Recv implements filterapi.ClientListener.
func (l *clientListener) Recv(b []byte) (int, netip.AddrPort, error) {
	if l.packets == nil {
		return 0, netip.AddrPort{}, filterapi.ErrNotSupported
	}
	return l.peers.recv(b)
}

// Send implements filterapi.ClientListener.
func (l *clientListener) Send(b []byte, peer netip.AddrPort) error {
	if l.packets == nil {
		return filterapi.ErrNotSupported
	}
	if err := l.peers.send(b, peer); err != nil {
		return fmt.Errorf("send for client to %v: %w", peer, err)
	}
	return nil
}
