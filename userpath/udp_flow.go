package userpath

import (
	"context"
	"net/netip"
	"sync/atomic"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// udpKey names a flow as its initiator's datagrams do.
type udpKey struct{ src, dst netip.AddrPort }

// udpControl is the engine's side of a flow; *engine.Takeover is one, and
// tests have another.
type udpControl interface {
	Conn() filterapi.Connection
	Connected(name, peer netip.AddrPort)
	Killed() <-chan struct{}
	Ended(c flow.Counts, r flow.Result, reason string)
}

// udpRequest is a takeover with its control made exchangeable.
type udpRequest struct {
	tuple    flow.Tuple
	dial     engine.Dial
	chain    []engine.Link
	external bool // the initiator is on the external side
	buffer   int  // bytes
	control  udpControl
}

// udpFlow is one initiator socket and one peer.
//
//	opening --(sockets stand, Connected)--> carrying --(idle, killed, filter
//	done or failed, replaced, stop)--> ended (Ended, once)
type udpFlow struct {
	udpRequest
	key    udpKey
	pump   *udpPump
	reply  *udpReply
	kill   <-chan struct{}
	ctx    context.Context // over with the flow
	cancel context.CancelFunc

	toTarget, toInitiator udpSockaddr

	// chain is nil when no data filter holds the flow (any more).
	chain atomic.Pointer[udpChain]
	// filters is the chain that was started, or nil.
	filters *udpChain

	last                  atomic.Int64 // UDP.now of the last datagram
	outBytes, inBytes     atomic.Uint64
	outPackets, inPackets atomic.Uint64
	lastError             atomic.Uint32 // errno of the last ICMP error
	ended                 atomic.Bool
}

// hop is the socket and the address that a datagram of this direction leaves
// by.
func (f *udpFlow) hop(dir udpDirection) (*udpSocket, *udpSockaddr) {
	if dir == udpOutward {
		return f.pump.sock, &f.toTarget
	}
	return f.reply.sock, &f.toInitiator
}

func (f *udpFlow) killed() bool {
	select {
	case <-f.kill:
		return true
	default:
		return false
	}
}

func (f *udpFlow) counts() flow.Counts {
	return flow.Counts{
		OutBytes: f.outBytes.Load(), InBytes: f.inBytes.Load(),
		OutPackets: f.outPackets.Load(), InPackets: f.inPackets.Load(),
	}
}

// far is the external side's address, which data filters see on both sides.
func (f *udpFlow) far() netip.AddrPort {
	if f.external {
		return f.tuple.Src
	}
	return f.dial.Target
}

// silence says how a flow ends that carried nothing for too long.
func (f *udpFlow) silence() (flow.Result, string) {
	if f.inPackets.Load() > 0 {
		return flow.Closed, ""
	}
	switch udpErrno(f.lastError.Load()) {
	case udpErrNone:
		return flow.Closed, ""
	case udpErrPort:
		return flow.Refused, "port unreachable"
	}
	return flow.Unreachable, "destination unreachable"
}

// carry passes a datagram on its way. Without data filters it only stands in
// line in out, which the caller flushes before data changes.
func (u *UDP) carry(f *udpFlow, dir udpDirection, data []byte, out *udpOut, now int64) {
	if f.ended.Load() || f.killed() {
		return
	}
	f.last.Store(now)
	if c := f.chain.Load(); c != nil {
		out.flush()
		c.enter(dir, data)
		return
	}
	out.add(f, dir, data)
}

// end is the one end of a flow; only the first call counts. Ended is called
// when the data filters have returned, or have been waited for long enough.
func (u *UDP) end(f *udpFlow, result flow.Result, reason string) {
	if f.ended.Swap(true) {
		return
	}
	f.cancel()
	u.mu.Lock()
	if u.flows[f.key] == f {
		delete(u.flows, f.key)
	}
	u.mu.Unlock()
	f.pump.remove(f)
	if f.filters == nil {
		u.letGo(f)
		f.control.Ended(f.counts(), result, reason)
		return
	}
	u.background(func() {
		f.filters.wait()
		u.letGo(f)
		f.control.Ended(f.counts(), result, reason)
	})
}

// letGo gives the flow's sockets back and closes those that nobody uses any
// more. The upstream socket of a translated client stays for a while.
func (u *UDP) letGo(f *udpFlow) {
	var pump *udpPump
	var reply *udpReply
	u.mu.Lock()
	if u.peers[f.key.src]--; u.peers[f.key.src] == 0 {
		delete(u.peers, f.key.src)
	}
	if f.reply.refs--; f.reply.refs == 0 {
		delete(u.replies, f.key.dst)
		reply = f.reply
	}
	f.pump.last = max(f.pump.last, f.last.Load())
	f.pump.refs--
	if f.pump.refs == 0 && (u.closed || !f.pump.lingers()) {
		delete(u.pumps, f.pump.key)
		pump = f.pump
	}
	u.mu.Unlock()
	if reply != nil {
		reply.close()
	}
	if pump != nil {
		pump.close()
	}
}
