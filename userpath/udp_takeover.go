package userpath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"go.uber.org/zap"

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
// flow.Drop: the flow cannot be carried, and t.Ended was called. A takeover
// that is carried already is found again; another one of the same tuple
// replaces it. It never waits for the network.
func (u *UDP) Takeover(_ context.Context, t *engine.Takeover) flow.Path {
	return u.take(udpRequest{
		tuple: t.Tuple, dial: t.Dial, chain: t.Chain,
		external: t.InitiatorExternal, buffer: t.Buffer, control: t,
	})
}

func (u *UDP) take(q udpRequest) flow.Path {
	key := udpKey{q.tuple.Src, q.tuple.Dst}
	if old := u.find(key); old != nil {
		if old.control == q.control {
			return flow.User
		}
		u.end(old, flow.Closed, "begun anew")
	}
	f, err := u.prepare(q, key)
	if err != nil {
		u.stats.refused.Add(1)
		u.log.Debug("UDP flow not taken over", zap.Stringer("flow", q.tuple), zap.Error(err))
		q.control.Ended(flow.Counts{}, flow.Failed, err.Error())
		return flow.Drop
	}
	q.control.Connected(f.pump.sock.local, q.dial.Target)
	if !u.begin(f) {
		return flow.Drop
	}
	return flow.User
}

func (u *UDP) find(key udpKey) *udpFlow {
	u.mu.RLock()
	defer u.mu.RUnlock()
	return u.flows[key]
}

// prepare finds or opens the sockets of a flow.
func (u *UDP) prepare(q udpRequest, key udpKey) (*udpFlow, error) {
	if err := u.check(q); err != nil {
		return nil, fmt.Errorf("take over %s: %w", q.tuple, err)
	}
	pumpKey, err := u.pumpKey(q)
	if err != nil {
		return nil, fmt.Errorf("find the source address towards %s: %w", q.dial.Target, err)
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
	if !pumpKey.only.IsValid() { // a connected socket knows it
		f.toTarget = udpEncode(q.dial.Target)
	}
	f.last.Store(u.now())
	err = f.pump.open()
	if err == nil {
		err = f.reply.open(key.dst)
	}
	if err != nil {
		u.unreserve()
		u.letGo(f)
		f.cancel()
		return nil, err
	}
	return f, nil
}

// check refuses what the sockets cannot express.
func (u *UDP) check(q udpRequest) error {
	is4 := q.tuple.Is4()
	for _, ap := range []netip.AddrPort{q.tuple.Src, q.tuple.Dst, q.dial.Target} {
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
	pump, peers := u.pumps[key], u.peers[key.src]
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
	if pump == nil {
		if len(u.pumps) >= u.config.MaxSockets {
			if evicted = u.longestIdle(); evicted != nil {
				delete(u.pumps, evicted.key)
			}
		}
		pump = newUDPPump(u, key)
		u.pumps[key] = pump
	}
	reply := u.replies[f.key.dst]
	if reply == nil {
		reply = &udpReply{}
		u.replies[f.key.dst] = reply
	}
	u.peers[key.src]++
	pump.refs++
	reply.refs++
	u.opening++
	f.pump, f.reply = pump, reply
	return evicted, nil
}

func (u *UDP) unreserve() {
	u.mu.Lock()
	u.opening--
	u.mu.Unlock()
}

// longestIdle is the pump without peers that has been so for longest; nil if
// all have peers. The caller holds u.mu.
func (u *UDP) longestIdle() (found *udpPump) {
	for _, p := range u.pumps {
		if p.refs == 0 && (found == nil || p.last < found.last) {
			found = p
		}
	}
	return found
}

// begin puts a flow in its places, from where on it carries datagrams. The
// same tuple may have been taken over meanwhile: the later one stays.
func (u *UDP) begin(f *udpFlow) bool {
	if len(f.udpRequest.chain) > 0 {
		f.filters = newUDPChain(u, f)
		f.chain.Store(f.filters)
		f.filters.start()
	}
	u.mu.Lock()
	u.opening--
	closed := u.closed
	old := u.flows[f.key]
	if !closed {
		u.flows[f.key] = f
		f.pump.add(f)
	}
	u.mu.Unlock()
	if old != nil && !closed {
		u.end(old, flow.Closed, "begun anew")
	}
	if closed {
		u.end(f, flow.Failed, errUDPClosed.Error())
		return false
	}
	return true
}
