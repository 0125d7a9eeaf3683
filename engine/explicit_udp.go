package engine

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// datagrams is a UDP socket as the engine uses it.
type datagrams interface {
	io.Closer
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
	SetReadDeadline(time.Time) error
}

// maxPeers bounds the peers of one socket, those included that were denied.
const maxPeers = 1024

// udpPeers are the peers of a socket that serves an explicit client. Each is a
// flow of its own: begun by the client, if the rules let it, or by the peer, if
// the bind does.
type udpPeers struct {
	l *clientListener

	deciding sync.Mutex // one new peer at a time: filters may be slow
	mu       sync.Mutex
	m        map[netip.AddrPort]*udpPeer // nil: closed

	filtered passedOn // what data filters let pass to the client
}

// udpPeer is one of them, or the memory that it was denied.
type udpPeer struct {
	c    *connection
	t    *Takeover
	last atomic.Int64 // when it carried something, in Unix nanoseconds
	duct Duct         // nil: no data filter holds its datagrams

	denied error          // and nothing else is set, but
	rules  *policy.Policy // by which

	sent, sentBytes, got, gotBytes atomic.Uint64 // by the client, to the client
}

func (x *udpPeers) init(l *clientListener) { x.l, x.m = l, make(map[netip.AddrPort]*udpPeer) }

func (x *udpPeers) engine() *Engine { return x.l.p.session.e }

// find gives a peer whose flow lives, or that was denied and still would be.
func (x *udpPeers) find(a netip.AddrPort) *udpPeer {
	x.mu.Lock()
	p := x.m[a]
	x.mu.Unlock()
	switch {
	case p == nil:
	case p.denied != nil:
		if p.rules != x.engine().Policy() || x.stale(p) {
			return nil
		}
	case p.killed() || x.stale(p):
		x.end(a, p)
		return nil
	}
	return p
}

func (x *udpPeers) stale(p *udpPeer) bool {
	return x.engine().now().UnixNano()-p.last.Load() > int64(x.engine().idle)
}

// killed says whether the flow was cut, or its data filters have ended it.
func (p *udpPeer) killed() bool {
	if p.duct == nil {
		return p.t.isCut()
	}
	select {
	case <-p.duct.Over():
		return true
	default:
		return p.t.isCut()
	}
}

// keep remembers a peer; false: the socket is closed.
func (x *udpPeers) keep(a netip.AddrPort, p *udpPeer) (old *udpPeer, kept bool) {
	p.last.Store(x.engine().now().UnixNano())
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.m == nil {
		return nil, false
	}
	old = x.m[a]
	x.m[a] = p
	return old, true
}

// full says whether there is no room for one more. Those that were denied give
// way.
func (x *udpPeers) full() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.m) >= maxPeers {
		maps.DeleteFunc(x.m, func(_ netip.AddrPort, p *udpPeer) bool { return p.denied != nil })
	}
	return len(x.m) >= maxPeers
}

// end takes a peer off the list and reports the end of its flow.
func (x *udpPeers) end(a netip.AddrPort, p *udpPeer) {
	x.mu.Lock()
	mine := x.m[a] == p
	if mine {
		delete(x.m, a)
	}
	x.mu.Unlock()
	if mine {
		p.over()
	}
}

// over reports the end of a peer's flow.
func (p *udpPeer) over() {
	if p.denied != nil {
		return
	}
	n := flow.Counts{
		OutPackets: p.sent.Load(), OutBytes: p.sentBytes.Load(), InPackets: p.got.Load(), InBytes: p.gotBytes.Load(),
	}
	if p.c.inbound() {
		n = flow.Counts{OutPackets: n.InPackets, OutBytes: n.InBytes, InPackets: n.OutPackets, InBytes: n.OutBytes}
	}
	result, reason := flow.Closed, ""
	if p.t.isCut() {
		result, reason = flow.CutByPolicy, "killed"
	}
	if p.duct == nil {
		p.t.Ended(n, result, reason)
		return
	}
	p.c.e.tasks.run(func() { // the filters may take a moment
		if r, why := p.duct.Close(); result == flow.Closed {
			result, reason = r, why
		}
		p.t.Ended(n, result, reason)
	})
}

// sweep ends what was killed and what is idle, until the socket is closed.
func (x *udpPeers) sweep() {
	tick := time.NewTicker(min(time.Second, x.engine().idle/4+1))
	defer tick.Stop()
	for {
		select {
		case <-x.l.p.bind.gone:
			return
		case <-tick.C:
		}
		over := make(map[netip.AddrPort]*udpPeer)
		x.mu.Lock()
		for a, p := range x.m {
			if x.stale(p) || p.denied == nil && p.killed() {
				over[a] = p
			}
		}
		x.mu.Unlock()
		for a, p := range over {
			x.end(a, p)
		}
	}
}

// close ends them all.
func (x *udpPeers) close() {
	x.mu.Lock()
	all := x.m
	x.m = nil
	x.mu.Unlock()
	for _, p := range all {
		p.over()
	}
}

// send is ClientListener.Send.
func (x *udpPeers) send(b []byte, to netip.AddrPort) error {
	s, client := x.l.p.session, x.l.p.client()
	switch {
	case !endpoint(to, s.addr) || !aim(to.Addr()):
		return filterapi.ErrInvalidArgument
	case !client.IsValid():
		return fmt.Errorf("before the client's address is set: %w", filterapi.ErrBadContext)
	}
	p := x.find(to)
	if p == nil || p.denied == nil && p.c.inbound() && !x.mayAnswer() {
		x.deciding.Lock()
		if p = x.find(to); p == nil || p.denied == nil && p.c.inbound() {
			var err error
			if p, err = x.toPeer(client, to); err != nil {
				x.deciding.Unlock()
				return err
			}
		}
		x.deciding.Unlock()
	}
	if p.denied != nil {
		return p.denied
	}
	if p.duct != nil {
		p.duct.FromClient(b)
	} else if _, err := x.l.packets.WriteToUDPAddrPort(b, to); err != nil {
		return fmt.Errorf("send datagram: %w", err)
	}
	p.last.Store(x.engine().now().UnixNano())
	p.sent.Add(1)
	p.sentBytes.Add(uint64(len(b)))
	p.t.Established()
	return nil
}

// mayAnswer says whether the client may answer who has sent to the bind.
func (x *udpPeers) mayAnswer() bool {
	_, oneWay, _ := x.l.p.carriage()
	return !oneWay
}

// toPeer begins a flow from the client.
func (x *udpPeers) toPeer(client, to netip.AddrPort) (*udpPeer, error) {
	s, rules := x.l.p.session, x.engine().Policy()
	if x.full() {
		return nil, filterapi.ErrQuota
	}
	c, err := s.explicit(flow.Tuple{Proto: flow.UDP, Src: client, Dst: to})
	if err != nil {
		return nil, err
	}
	if reason, err := c.askRules(""); err != nil {
		s.e.refuse(c, refused{flow.Drop, flow.Denied, reason})
		return nil, x.deny(to, err, rules)
	}
	return x.begin(c, to, rules)
}

// deny remembers that a peer was denied, unless it has a flow of its own, and
// gives the error back.
func (x *udpPeers) deny(a netip.AddrPort, err error, rules *policy.Policy) error {
	p := &udpPeer{denied: err, rules: rules}
	p.last.Store(x.engine().now().UnixNano())
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.m != nil && x.m[a] == nil {
		x.m[a] = p
	}
	return err
}

// begin asks the filters about a peer and begins its flow.
func (x *udpPeers) begin(c *connection, far netip.AddrPort, rules *policy.Policy) (*udpPeer, error) {
	t, err := x.engine().enter(c, rules)
	if err != nil {
		return nil, x.deny(far, err, rules)
	}
	p := &udpPeer{c: c, t: t}
	t.Connected(x.l.p.external(), far)
	if len(t.Chain) > 0 {
		p.duct = x.engine().user.Filter(t, far, func(b []byte) { x.toClient(b, far) }, func(b []byte) {
			_, _ = x.l.packets.WriteToUDPAddrPort(b, far) // lost, as on any path
		})
	}
	old, kept := x.keep(far, p)
	if !kept {
		p.over()
		return nil, filterapi.ErrTerminating
	}
	if old != nil {
		old.over()
	}
	return p, nil
}

// recv is ClientListener.Recv.
func (x *udpPeers) recv(b []byte) (int, netip.AddrPort, error) {
	for {
		if n, from, ok := x.filtered.take(b); ok {
			return n, from, nil
		}
		n, from, err := x.l.packets.ReadFromUDPAddrPort(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			x.filtered.heard(x.l.packets)
			continue
		}
		if err != nil {
			select {
			case <-x.l.p.bind.gone:
				return 0, netip.AddrPort{}, filterapi.ErrTerminating
			default:
			}
			return 0, netip.AddrPort{}, fmt.Errorf("receive at %v: %w", x.l.p.external(), err)
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		p := x.find(from)
		if p == nil {
			x.deciding.Lock()
			if p = x.find(from); p == nil {
				p, err = x.fromPeer(from)
			}
			x.deciding.Unlock()
		}
		if err != nil || p.denied != nil {
			continue // lost, silently
		}
		p.last.Store(x.engine().now().UnixNano())
		p.got.Add(1)
		p.gotBytes.Add(uint64(n))
		p.t.Established()
		if p.duct == nil {
			return n, from, nil
		}
		p.duct.FromPeer(b[:n])
	}
}

// fromPeer begins a flow from a peer that the client has not sent to.
func (x *udpPeers) fromPeer(from netip.AddrPort) (*udpPeer, error) {
	bind, rules := x.l.p, x.engine().Policy()
	if x.full() {
		return nil, filterapi.ErrQuota
	}
	c, err := bind.session.explicit(flow.Tuple{Proto: flow.UDP, Src: from, Dst: bind.external()})
	if err != nil {
		return nil, err
	}
	if !x.engine().use(bind, c.tuple, false, true) {
		x.engine().release(bind.session)
		return nil, filterapi.ErrPolicyDenied
	}
	c.inherit(bind)
	return x.begin(c, from, rules)
}
