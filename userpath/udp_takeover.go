package userpath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// Why a flow is not carried.
var (
	errUDPClosed  = errors.New("the UDP pump has stopped")
	errUDPSockets = errors.New("too many UDP client sockets")
	errUDPPeers   = errors.New("too many UDP peers of one client socket")
	errUDPFlows   = errors.New("too many UDP flows")
	errUDPTuple   = errors.New("not a UDP flow that can be carried")
)

// Takeover makes a flow ready to be carried while its first datagram is still
// held: the answer is the path for that datagram. flow.User: sockets stand,
// t.Connected was called, and the datagram may come to the listener.
// flow.Exhausted: there is no room or no port for it; flow.Drop: it cannot be
// carried for another reason; t.Ended was called. A takeover
// that is carried already is found again; another one of the same tuple
// replaces it. It never waits for the network.
func (u *UDP) Takeover(_ context.Context, t *engine.Takeover) flow.Path {
	return u.take(udpRequestOf(t))
}

func udpRequestOf(t *engine.Takeover) udpRequest {
	return udpRequest{
		tuple: t.Tuple, dial: t.Dial, chain: t.Chain,
		external: t.InitiatorExternal, emulated: t.Emulated, oneWay: t.OneWay, burst: t.Burst,
		idle: t.Idle, buffer: t.Buffer, control: t,
	}
}

func (u *UDP) take(q udpRequest) flow.Path {
	err := u.bring(q)
	switch {
	case err == nil:
		return flow.User
	case errors.Is(err, errUDPSockets), errors.Is(err, errUDPPeers), errors.Is(err, errUDPFlows),
		errors.Is(err, unix.EADDRINUSE) && q.dial.Source.Port() == 0: // no port is left
		return flow.Exhausted
	}
	return flow.Drop
}

// Originate makes a flow to a client in the name of a filter that emulates its
// peer, and returns when the socket stands: what is wrong with the client's
// end is known after the first datagram at the earliest. The filter gets the
// client's side as its internal socket, and no external. Originate owns the
// takeover from the call on and reports its end in any case.
func (u *UDP) Originate(_ context.Context, t *engine.Takeover) error {
	return u.originate(udpRequestOf(t))
}

func (u *UDP) originate(q udpRequest) error {
	q.emulated, q.external = true, true
	if err := u.bring(q); err != nil {
		return fmt.Errorf("dial %s from %s: %w", q.dial.Target, q.dial.Source, err)
	}
	return nil
}

// bring makes a flow. On error it has ended.
func (u *UDP) bring(q udpRequest) error {
	key := udpKey{q.tuple.Src, q.tuple.Dst}
	if old := u.find(key); old != nil {
		if old.control == q.control {
			return nil
		}
		u.end(old, flow.Closed, "begun anew")
	}
	f, err := u.prepare(q, key)
	if err != nil {
		u.stats.refused.Add(1)
		u.log.Debug("UDP flow not taken over", zap.Stringer("flow", q.tuple), zap.Error(err))
		q.control.Ended(flow.Counts{}, flow.Failed, err.Error())
		if f != nil {
			u.opened()
		}
		return err
	}
	if f.pump != nil { // else there is no external side to name
		q.control.Connected(f.pump.sock.local, q.dial.Target)
	}
	return u.begin(f)
}

func (u *UDP) find(key udpKey) *udpFlow {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return u.flows[key]
}

// prepare finds or opens the sockets of a flow. A flow that comes with an error
// had a place, which the caller gives back.
func (u *UDP) prepare(q udpRequest, key udpKey) (*udpFlow, error) {
	if err := u.check(q); err != nil {
		return nil, fmt.Errorf("take over %s: %w", q.tuple, err)
	}
	if u.config.Steer != nil {
		if err := u.config.Steer(); err != nil {
			return nil, fmt.Errorf("take over %s: %w", q.tuple, err)
		}
	}
	var pumpKey udpPumpKey
	if q.upstream() {
		var err error
		if pumpKey, err = u.pumpKey(q); err != nil {
			return nil, fmt.Errorf("find the source address towards %s: %w", q.dial.Target, err)
		}
	}
	if q.buffer <= 0 {
		q.buffer = filterapi.DefaultDatagramBuffer
	}
	f := &udpFlow{udpRequest: q, key: key, kill: q.control.Killed()}
	evicted, err := u.reserve(f, pumpKey)
	if evicted != nil {
		evicted.close()
	}
	if err != nil {
		return nil, err
	}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.toInitiator = udpEncode(key.src)
	if q.upstream() && !pumpKey.only.IsValid() { // a connected socket knows it
		f.toTarget = udpEncode(q.dial.Target)
	}
	f.last.Store(u.now())
	if err = f.open(); err != nil {
		u.letGo(f)
		f.cancel()
		return f, err
	}
	if q.burst {
		u.deepen(f)
	}
	return f, nil
}

// open opens the sockets that are not open yet.
func (f *udpFlow) open() error {
	if f.pump != nil {
		if err := f.pump.open(); err != nil {
			return err
		}
	}
	if f.reply != nil {
		return f.reply.open(f.key.dst)
	}
	return nil
}

// deepen lets the sockets that receive for a flow hold a burst. Where the
// kernel refuses, they hold what they held before.
func (u *UDP) deepen(f *udpFlow) {
	if f.pump != nil {
		f.pump.sock.deepen()
	}
	for _, l := range u.listeners {
		if l.sock.local.Addr().Is4() == f.tuple.Is4() {
			l.sock.deepen()
		}
	}
}

// check refuses what the sockets cannot express.
func (u *UDP) check(q udpRequest) error {
	is4 := q.tuple.Is4()
	ends := []netip.AddrPort{q.tuple.Src, q.tuple.Dst}
	switch {
	case q.emulated && len(q.chain) == 0:
		return errNoEmulation
	case q.upstream():
		ends = append(ends, q.dial.Target)
	}
	for _, ap := range ends {
		a := ap.Addr()
		if !a.IsValid() || a.Is4() != is4 || a.Is4In6() || a.Zone() != "" || ap.Port() == 0 {
			return fmt.Errorf("address %s: %w", ap, errUDPTuple)
		}
	}
	if s := q.dial.Source.Addr(); q.tuple.Proto != flow.UDP || s.IsValid() && s.Is4() != is4 {
		return errUDPTuple
	}
	if !u.listens(is4) {
		return fmt.Errorf("no listener of that family: %w", errUDPTuple)
	}
	return nil
}

// pumpKey says which upstream socket a flow shares. Flows whose answers could
// not be told apart by the peer's address have one of their own.
//
// So has every flow on the routed path. Its socket has the client's own
// address, and the table knows the upstream leg by that socket: unconnected it
// would draw everything that is sent to the client's port into the upstream
// leg's conntrack zone, also the flows that others begin. The client's port is
// kept with any number of sockets.
func (u *UDP) pumpKey(q udpRequest) (udpPumpKey, error) {
	k := udpPumpKey{src: q.tuple.Src, source: q.dial.Source, transparent: q.dial.Transparent}
	if !k.source.Addr().IsValid() {
		a, err := udpPreferred(q.dial.Target, u.marks.Value(flow.Own))
		if err != nil {
			return k, err
		}
		k.source, k.transparent = netip.AddrPortFrom(a, 0), false
	}
	if k.transparent || k.source.Port() != 0 || q.dial.Target != q.tuple.Dst {
		k.alone, k.only = q.tuple.Dst, q.dial.Target
	}
	return k, nil
}

// reserve takes a place for the flow and refers to its pump and its reply
// socket, which need not be open yet. A pump without peers may have to make
// room; the caller closes it.
func (u *UDP) reserve(f *udpFlow, key udpPumpKey) (evicted *udpPump, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	peers := u.peers[f.key.src]
	switch {
	case u.closed:
		return nil, errUDPClosed
	case len(u.flows)+u.opening >= u.config.MaxFlows:
		return nil, errUDPFlows
	case peers >= u.config.MaxPeers:
		return nil, errUDPPeers
	case peers == 0 && len(u.peers) >= u.config.MaxSockets:
		return nil, errUDPSockets
	}
	if f.upstream() {
		pump := u.pumps[key]
		if pump == nil {
			if len(u.pumps) >= u.config.MaxSockets {
				if evicted = u.longestIdle(); evicted != nil {
					delete(u.pumps, evicted.key)
				}
			}
			pump = newUDPPump(u, key)
			u.pumps[key] = pump
		}
		pump.refs++
		f.pump = pump
	}
	if !f.originated() {
		reply := u.replies[f.key.dst]
		if reply == nil {
			reply = &udpReply{}
			u.replies[f.key.dst] = reply
		}
		reply.refs++
		f.reply = reply
	}
	u.peers[f.key.src]++
	u.opening++
	return evicted, nil
}

// opened says that a flow has begun, or has been reported.
func (u *UDP) opened() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.opening--; u.opening == 0 {
		u.calm.Broadcast()
	}
}

// longestIdle is the pump without peers that would close first; nil if all have
// peers. The caller holds u.mu.
func (u *UDP) longestIdle() (found *udpPump) {
	for _, p := range u.pumps {
		if p.refs == 0 && (found == nil || p.until < found.until) {
			found = p
		}
	}
	return found
}

// begin puts a flow in its places, from where on it carries datagrams. The
// same tuple may have been taken over meanwhile: the later one stays. On error
// the flow has ended.
func (u *UDP) begin(f *udpFlow) error {
	defer u.opened()
	if len(f.udpRequest.chain) > 0 {
		f.filters = newUDPChain(u, f)
		f.chain.Store(f.filters)
		f.filters.start()
	}
	u.mu.Lock()
	closed := u.closed
	// A filter may have ended the flow, or a kill, and nobody would take it
	// out again. (end takes the flow out after it has set ended.)
	over := f.ended.Load()
	var old *udpFlow
	if !closed && !over {
		old = u.flows[f.key]
		u.flows[f.key] = f
		if f.pump != nil {
			f.pump.add(f)
		}
	}
	u.mu.Unlock()
	switch {
	case over:
		return filterapi.ErrTerminating
	case closed:
		u.end(f, flow.Failed, errUDPClosed.Error())
		return errUDPClosed
	case old != nil:
		u.end(old, flow.Closed, "begun anew")
	}
	return nil
}
