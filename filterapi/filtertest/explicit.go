package filtertest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// explicitLeg joins a flow of the machine with connections on the wire. It
// implements filterapi.Leg.
type explicitLeg struct {
	flow *Flow
	end  *End     // the client's
	far  net.Conn // nil: a filter plays the far end

	mu      sync.Mutex
	carried bool
}

func (l *explicitLeg) Connection() filterapi.Connection { return l.flow.conn }
func (l *explicitLeg) Done() <-chan struct{}            { return l.flow.over }

// take says whether the leg has no client yet.
func (l *explicitLeg) take() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	first := !l.carried
	l.carried = true
	return first
}

func (l *explicitLeg) Carry(client net.Conn) error {
	if _, ours := client.(*conn); !ours || !l.take() {
		_ = client.Close()
		return filterapi.ErrInvalidArgument
	}
	select {
	case <-l.flow.over:
		_ = client.Close()
		return filterapi.ErrTerminating
	default:
	}
	bridge(l.end, client)
	return nil
}

func (l *explicitLeg) Close() {
	if l.take() {
		l.flow.kill()
		if l.far != nil {
			_ = l.far.Close()
		}
	}
}

// bridge has a connection on the wire be an end of a flow.
func bridge(e *End, c net.Conn) {
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := c.Read(b)
			if n > 0 && e.Offer(string(b[:n])) != nil {
				return
			}
			if errors.Is(err, io.EOF) {
				e.CloseWrite()
				return
			}
			if err != nil {
				e.Reset()
				return
			}
		}
	}()
	go func() {
		for {
			seg, err := e.leg.toEnd.take(1<<20, false, nil)
			if err == nil {
				_, err = c.Write(seg.data)
			}
			if err != nil {
				_ = c.Close()
				return
			}
		}
	}()
}

// ConnectForClient implements filterapi.Session. The target is one of World's.
func (s *session) ConnectForClient(ctx context.Context, x filterapi.Connect) (filterapi.Leg, error) {
	g := s.gateway
	fail := func(err error) (filterapi.Leg, error) {
		return nil, fmt.Errorf("connect for client %v to %v: %w", x.Client, x.Target, err)
	}
	switch {
	case x.Client.Addr() != s.addr, x.Client.Port() == 0, !goodPeer(s, x.Target), x.Target.Addr().IsLoopback(), x.Target.Addr().IsMulticast():
		return fail(filterapi.ErrInvalidArgument)
	case !s.private:
		return fail(filterapi.ErrNotSupported)
	case !s.lives():
		return fail(filterapi.ErrTerminating)
	case g.owns(x.Target.Addr()):
		return fail(filterapi.ErrPolicyDenied)
	}
	if err := s.ask(flow.TCP, x.Protocol, x.Target); err != nil {
		return fail(err)
	}
	fl := g.newFlow(s, flow.Tuple{Proto: flow.TCP, Src: x.Client, Dst: x.Target}, x.Client, x.Target)
	refusal := g.raise(fl.conn, fl.conn.connectEvent(x.Target))
	l := &explicitLeg{flow: fl, end: fl.Client}
	if refusal == nil && !fl.conn.isEmulated() {
		far, err := g.wire.dialTCP(ctx, s, netip.AddrPortFrom(g.external(x.Target.Addr()), 0), x.Target)
		if err != nil {
			fl.refuse()
			return fail(err)
		}
		l.far = far
	}
	if err := fl.start(refusal); err != nil {
		return fail(fmt.Errorf("%w: %w", filterapi.ErrPolicyDenied, err))
	}
	if l.far != nil {
		fl.conn.connect(netip.MustParseAddrPort(l.far.LocalAddr().String()), x.Target)
		bridge(fl.Server, l.far)
	}
	return l, nil
}

// ask asks the rules unless a permission of the session is there.
func (s *session) ask(p flow.Proto, protocol string, target netip.AddrPort) error {
	if s.gateway.usePrivate(s, p, target) || s.gateway.Access == nil {
		return nil
	}
	return s.gateway.Access(s.addr, filterapi.HostAccess{Protocol: protocol, Proto: p, Target: target})
}

// clientListener implements filterapi.ClientListener.
type clientListener struct {
	p       *permission
	stream  *listener
	packets *packetConn

	mu    sync.Mutex
	peers map[netip.AddrPort]*Flow
}

// ListenForClient implements filterapi.Session. Peers are World's.
func (s *session) ListenForClient(b filterapi.Bind) (filterapi.ClientListener, error) {
	g := s.gateway
	fail := func(err error) (filterapi.ClientListener, error) {
		return nil, fmt.Errorf("listen for client %v: %w", b.Clients, err)
	}
	if !s.private {
		return fail(filterapi.ErrNotSupported)
	}
	if len(b.Clients) != 1 || b.Flags&(filterapi.EvenPort|filterapi.SameSource) != 0 || !suits(b.IPFilter, s.addr) || !g.goodBind(s, b.External, b.Flags) {
		return fail(filterapi.ErrInvalidArgument)
	}
	n := b.Negotiated
	discards := n.Flags&filterapi.Discarding != 0
	if n.Primary == nil && n.Protocol == "" && discards {
		n.Protocol = g.filter.Name() // it may stand for none yet
	}
	c, err := s.check(n, bindFlags)
	if err != nil {
		return fail(err)
	}
	if err := s.allowed(c, n, netip.AddrPort{}); err != nil && !discards {
		return fail(err)
	}
	client := b.Clients[0]
	waiting := !client.IsValid() || client.Addr().IsUnspecified()
	if !waiting && (!goodClient(s, client) || client.Addr() != s.addr) {
		return fail(filterapi.ErrInvalidArgument)
	}
	if b.Proto == flow.UDP {
		n.Flags |= filterapi.AllowMultiple
	}
	if !b.External.IsValid() {
		b.External = netip.AddrPortFrom(g.external(s.addr), 0)
	}
	p := g.newPermission(s, inbound, n, c)
	p.client, p.waiting, p.sources, p.discarding = client, waiting, b.IPFilter.Clone(), discards
	if waiting {
		p.client = netip.AddrPort{}
	}
	if err := g.open(b.External, p); err != nil {
		return fail(err)
	}
	l := &clientListener{p: p, peers: make(map[netip.AddrPort]*Flow)}
	if b.Proto == flow.TCP {
		if l.stream, err = g.wire.listenTCP(s, p.external, nil, quiet); err == nil {
			l.stream.gate = l.admits
		}
	} else {
		l.packets, err = g.wire.listenUDP(s, p.external, nil, quiet)
	}
	if err != nil {
		p.end(Cancelled)
		return fail(err)
	}
	return l, nil
}

func (l *clientListener) admits(a netip.Addr) bool {
	g := l.p.gateway
	g.mu.Lock()
	defer g.mu.Unlock()
	return !l.p.gone && !l.p.discarding && !l.p.waiting && l.p.sources.Includes(a)
}

func (l *clientListener) Bind() filterapi.Connection { return l.p.object }

func (l *clientListener) Close() error {
	l.p.end(Killed)
	if l.stream != nil {
		_ = l.stream.Close() // it may be closed already
	}
	if l.packets != nil {
		_ = l.packets.Close()
	}
	return nil
}

func (l *clientListener) Accept(ctx context.Context) (filterapi.Leg, error) {
	if l.stream == nil {
		return nil, filterapi.ErrNotSupported
	}
	for {
		if l.p.isGone() {
			return nil, filterapi.ErrTerminating
		}
		select {
		case c := <-l.stream.queue:
			fl, err := l.p.gateway.Inbound(flow.TCP, netip.MustParseAddrPort(c.RemoteAddr().String()), l.p.external)
			if err != nil {
				_ = c.Close()
				continue
			}
			if !l.p.multiple() {
				_ = l.stream.Close()
			}
			bridge(fl.Server, c)
			return &explicitLeg{flow: fl, end: fl.Client, far: c}, nil
		case <-l.stream.done:
			return nil, filterapi.ErrTerminating
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// peer is the flow of a peer that lives; nil: there is none.
func (l *clientListener) peer(a netip.AddrPort) *Flow {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := l.peers[a]
	if f == nil {
		return nil
	}
	select {
	case <-f.over:
		delete(l.peers, a)
		return nil
	default:
		return f
	}
}

func (l *clientListener) keep(a netip.AddrPort, f *Flow) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.peers[a] = f
}

func (l *clientListener) Recv(b []byte) (int, netip.AddrPort, error) {
	if l.packets == nil {
		return 0, netip.AddrPort{}, filterapi.ErrNotSupported
	}
	for {
		n, from, err := l.packets.ReadFrom(b)
		if err != nil {
			return 0, netip.AddrPort{}, filterapi.ErrTerminating
		}
		at := netip.MustParseAddrPort(from.String())
		if l.peer(at) != nil {
			return n, at, nil
		}
		if fl, err := l.p.gateway.Inbound(flow.UDP, at, l.p.external); err == nil {
			l.keep(at, fl)
			return n, at, nil
		}
	}
}

func (l *clientListener) Send(b []byte, to netip.AddrPort) error {
	g, s := l.p.gateway, l.p.session
	switch {
	case l.packets == nil:
		return filterapi.ErrNotSupported
	case !goodPeer(s, to) || to.Addr().IsLoopback() || to.Addr().IsMulticast():
		return filterapi.ErrInvalidArgument
	case l.p.isGone():
		return filterapi.ErrTerminating
	case g.owns(to.Addr()):
		return filterapi.ErrPolicyDenied
	}
	if f := l.peer(to); f == nil || f.deaf {
		if err := s.ask(flow.UDP, "", to); err != nil {
			return err
		}
		fl := g.newFlow(s, flow.Tuple{Proto: flow.UDP, Src: l.p.client, Dst: to}, l.p.client, to)
		if err := fl.start(g.raise(fl.conn, fl.conn.connectEvent(to))); err != nil {
			return fmt.Errorf("%w: %w", filterapi.ErrPolicyDenied, err)
		}
		l.keep(to, fl)
	}
	_, err := l.packets.WriteTo(b, net.UDPAddrFromAddrPort(to))
	return err
}
