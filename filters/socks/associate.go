package socks

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// association is a UDP ASSOCIATE:
//
//	client -- head and datagram --> relay == bind -- datagram --> peers
//
// It lasts as long as the client's TCP connection.
type association struct {
	c     *client
	relay filterapi.PacketConn // inside
	bind  filterapi.ClientListener

	resolving chan struct{} // bounds the names that are asked for at a time

	mu    sync.Mutex
	from  netip.AddrPort // the client's end; invalid: not known yet
	known bool           // and the bind knows it
	names map[string]resolved
}

// resolved is what a name was found to be.
type resolved struct {
	addr  netip.Addr // invalid: nothing was found
	until time.Time
}

const (
	maxDatagram = 65535
	maxNames    = 256              // that an association remembers
	namesFor    = 60 * time.Second // and how long
	maxAsking   = 8                // names that are asked for at a time
)

// associate serves UDP ASSOCIATE.
func (c *client) associate(s *shared, q request) {
	a, err := c.newAssociation(s, q.target)
	if err != nil {
		c.deny(q, err)
		return
	}
	defer a.close()
	at, err := netip.ParseAddrPort(a.relay.LocalAddr().String())
	if err == nil {
		err = c.answer(q, at)
	}
	if err != nil {
		_ = c.conn.Close()
		return
	}
	var pumps sync.WaitGroup
	pumps.Go(a.outward)
	pumps.Go(a.inward)
	// It lasts until the client hangs up, or one of the sockets is closed: then
	// the deadline ends the wait.
	_, _ = io.Copy(io.Discard, c.conn)
	a.close()
	pumps.Wait()
	_ = c.conn.Close()
}

func (c *client) newAssociation(s *shared, t target) (*association, error) {
	a := &association{c: c, resolving: make(chan struct{}, maxAsking), names: make(map[string]resolved)}
	// The request may name the end that datagrams will come from. Only the port
	// says anything: the address is the client's own in any case.
	b := filterapi.Bind{
		Negotiated: filterapi.Negotiated{Proto: flow.UDP, Flags: filterapi.Discarding | filterapi.AllowMultiple},
		Clients:    []netip.AddrPort{{}},
	}
	if t.port != 0 && (!t.addr.IsValid() || t.addr.IsUnspecified() || t.addr == c.at.Addr()) {
		a.from, a.known = netip.AddrPortFrom(c.at.Addr(), t.port), true
		b.Clients[0] = a.from
	}
	var err error
	if a.bind, err = s.ListenForClient(b); err != nil {
		return nil, err
	}
	if a.relay, err = c.f.fw.ListenPacket(netip.AddrPortFrom(c.local, 0), filterapi.OnlyFrom(c.at.Addr())); err != nil {
		_ = a.bind.Close()
		return nil, err
	}
	return a, nil
}

// close ends the association. It may be called again.
func (a *association) close() {
	_ = a.relay.Close()
	_ = a.bind.Close()
	_ = a.c.conn.SetReadDeadline(time.Unix(1, 0))
}

// outward carries what the client sends.
func (a *association) outward() {
	defer a.close()
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := a.relay.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // of one datagram
		}
		at, err := netip.ParseAddrPort(from.String())
		if err != nil || !a.isClient(netip.AddrPortFrom(at.Addr().Unmap(), at.Port())) {
			continue
		}
		h, payload, err := cutDatagram(buf[:n])
		if err != nil || h.fragment != 0 {
			continue // fragments are not put together (RFC 1928, 7)
		}
		a.send(h.target, payload)
	}
}

// isClient says whether a datagram is the client's. The first one tells its end,
// if the request has not.
func (a *association) isClient(at netip.AddrPort) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if at.Addr() != a.c.at.Addr() || a.from.IsValid() && at != a.from {
		return false
	}
	if a.known {
		return true
	}
	if err := a.bind.Bind().SetClientAddress(at); err != nil {
		a.c.f.log.Debug("client's end refused", zap.Stringer("client", at), zap.Error(err))
		return false
	}
	a.from, a.known = at, true
	return true
}

// send sends a datagram to its target. For a name that must be asked for, that
// happens later.
func (a *association) send(t target, payload []byte) {
	if t.addr.IsValid() {
		a.sendTo(netip.AddrPortFrom(t.addr, t.port), payload)
		return
	}
	a.mu.Lock()
	r, ok := a.names[t.name]
	a.mu.Unlock()
	if ok && time.Now().Before(r.until) {
		if r.addr.IsValid() {
			a.sendTo(netip.AddrPortFrom(r.addr, t.port), payload)
		}
		return
	}
	select {
	case a.resolving <- struct{}{}:
	default:
		return // lost, as on any path that is full
	}
	kept := append([]byte(nil), payload...)
	a.c.f.running.Go(func() {
		defer func() { <-a.resolving }()
		if to := a.ask(t.name); to.IsValid() {
			a.sendTo(netip.AddrPortFrom(to, t.port), kept)
		}
	})
}

// ask resolves a name and remembers what came of it.
func (a *association) ask(name string) netip.Addr {
	ctx, cancel := context.WithTimeout(a.c.ctx, a.c.set.Connect)
	defer cancel()
	list, err := a.c.resolve(ctx, name, a.c.at.Addr().Is4())
	r := resolved{until: time.Now().Add(namesFor)}
	if err == nil {
		r.addr = list[0]
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.names) >= maxNames {
		clear(a.names)
	}
	a.names[name] = r
	return r.addr
}

// sendTo sends a datagram. What the rules refuse is lost.
func (a *association) sendTo(to netip.AddrPort, payload []byte) {
	if err := a.bind.Send(payload, to); err != nil && !errors.Is(err, filterapi.ErrTerminating) {
		a.c.f.log.Debug("datagram is lost", zap.Stringer("client", a.c.at), zap.Stringer("to", to), zap.Error(err))
	}
}

// inward carries what peers send.
func (a *association) inward() {
	defer a.close()
	buf := make([]byte, maxHead+maxDatagram)
	for {
		n, peer, err := a.bind.Recv(buf[maxHead:])
		if errors.Is(err, filterapi.ErrTerminating) || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // of one datagram
		}
		a.mu.Lock()
		to := a.from
		a.mu.Unlock()
		if !to.IsValid() {
			continue
		}
		head := appendHead(make([]byte, 0, maxHead), peer)
		at := maxHead - len(head)
		copy(buf[at:], head)
		// One that is too large for a datagram with its head is lost.
		_, _ = a.relay.WriteTo(buf[at:maxHead+n], net.UDPAddrFromAddrPort(to))
	}
}
