package filtertest

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// firewall is the gateway as the filter gets it.
type firewall struct {
	filterapi.Network
	gateway *Gateway
	log     *zap.Logger
}

func (f firewall) Logger() *zap.Logger { return f.log }

// network makes sockets of the gateway's own. It implements filterapi.Network.
type network struct {
	gateway *Gateway
	session *session // nil: nobody's
}

func (g *Gateway) network(s *session) filterapi.Network { return network{g, s} }

// allowed asks the rules for a session's socket.
func (n network) allowed(p flow.Proto, target netip.AddrPort) error {
	if n.session == nil {
		return nil
	}
	if !n.session.lives() {
		return filterapi.ErrTerminating
	}
	if n.gateway.usePrivate(n.session, p, target) || n.gateway.Access == nil {
		return nil
	}
	return n.gateway.Access(n.session.addr, filterapi.HostAccess{Proto: p, Target: target})
}

func (n network) note(what What, format string, args ...any) {
	n.gateway.journal.add(Entry{what, fmt.Sprintf(format, args...)})
}

func (n network) closed(name string) func(netip.AddrPort) {
	return func(at netip.AddrPort) { n.note(Shut, "%s %s", name, at) }
}

func (n network) Dial(ctx context.Context, p flow.Proto, from, to netip.AddrPort) (net.Conn, error) {
	g := n.gateway
	fail := func(err error) (net.Conn, error) { return nil, fmt.Errorf("dial %s %v: %w", p, to, err) }
	if !knownProto(p) || !to.IsValid() || to.Port() == 0 || to.Addr().IsUnspecified() ||
		from.IsValid() && (!g.owns(from.Addr()) || from.Addr().Is4() != to.Addr().Is4()) {
		return fail(filterapi.ErrInvalidArgument)
	}
	if err := n.allowed(p, to); err != nil {
		return fail(err)
	}
	if !from.IsValid() {
		from = netip.AddrPortFrom(g.external(to.Addr()), 0)
	}
	var c net.Conn
	var err error
	if p == flow.UDP {
		c, err = g.wire.dialUDP(n.session, from, to, n.closed("udp"))
	} else {
		c, err = g.wire.dialTCP(ctx, n.session, from, to)
	}
	if err != nil {
		return fail(err)
	}
	n.note(Opened, "%s %s > %s", p, c.LocalAddr(), to)
	return c, nil
}

// goodAt says whether the gateway can listen at an address.
func (n network) goodAt(at netip.AddrPort) bool {
	return at.IsValid() && !at.Addr().IsUnspecified() && n.gateway.owns(at.Addr())
}

func (n network) Listen(at netip.AddrPort, f *filterapi.IPFilter) (filterapi.Listener, error) {
	if !n.goodAt(at) || !suits(f, at.Addr()) {
		return nil, fmt.Errorf("listen at %v: %w", at, filterapi.ErrInvalidArgument)
	}
	if err := n.allowed(flow.TCP, at); err != nil {
		return nil, fmt.Errorf("listen at %v: %w", at, err)
	}
	l, err := n.gateway.wire.listenTCP(n.session, at, f, n.closed("tcp"))
	if err != nil {
		return nil, fmt.Errorf("listen at %v: %w", at, err)
	}
	n.note(Opened, "tcp %s", l.at)
	return l, nil
}

func (n network) ListenPacket(at netip.AddrPort, f *filterapi.IPFilter) (filterapi.PacketConn, error) {
	if !n.goodAt(at) || !suits(f, at.Addr()) {
		return nil, fmt.Errorf("listen at %v: %w", at, filterapi.ErrInvalidArgument)
	}
	if err := n.allowed(flow.UDP, at); err != nil {
		return nil, fmt.Errorf("listen at %v: %w", at, err)
	}
	p, err := n.gateway.wire.listenUDP(n.session, at, f, n.closed("udp"))
	if err != nil {
		return nil, fmt.Errorf("listen at %v: %w", at, err)
	}
	n.note(Opened, "udp %s", p.at)
	return p, nil
}

// usePrivate uses a permission of a private session for its own socket.
func (g *Gateway) usePrivate(s *session, proto flow.Proto, target netip.AddrPort) bool {
	if !s.private {
		return false
	}
	_, err := g.use(proto, func(p *permission) bool {
		return p.session == s && p.kind == outbound && p.target == target
	}, target)
	return err == nil
}

// World is what is around the gateway, for the test to play: servers that a
// filter dials, and clients that connect to a filter's sockets. Every address
// may be used, and nobody is asked.
func (g *Gateway) World() filterapi.Network { return world{&g.wire} }

type world struct{ wire *wire }

func quiet(netip.AddrPort) {}

func (w world) Dial(ctx context.Context, p flow.Proto, from, to netip.AddrPort) (net.Conn, error) {
	if p == flow.UDP {
		return w.wire.dialUDP(nil, from, to, quiet)
	}
	return w.wire.dialTCP(ctx, nil, from, to)
}

func (w world) Listen(at netip.AddrPort, f *filterapi.IPFilter) (filterapi.Listener, error) {
	l, err := w.wire.listenTCP(nil, at, f, quiet)
	if err != nil {
		return nil, err // not a listener that is nil
	}
	return l, nil
}

func (w world) ListenPacket(at netip.AddrPort, f *filterapi.IPFilter) (filterapi.PacketConn, error) {
	p, err := w.wire.listenUDP(nil, at, f, quiet)
	if err != nil {
		return nil, err
	}
	return p, nil
}
