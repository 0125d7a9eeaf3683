package userpath

import (
	"context"
	"net/netip"
	"sync/atomic"
	"time"

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
	Established()
	Killed() <-chan struct{}
	Ended(c flow.Counts, r flow.Result, reason string)
}

// udpRequest is a takeover with its control made exchangeable.
type udpRequest struct {
	tuple    flow.Tuple
	dial     engine.Dial
	chain    []engine.Link
	external bool          // the initiator is on the external side
	emulated bool          // the last filter stands in for the external side
	oneWay   bool          // what the client sends is lost
	burst    bool          // 64 KiB of payload wait without loss
	idle     time.Duration // 0: as the configuration says
	buffer   int           // bytes
	control  udpControl
}

// originated says that no initiator's datagram began the flow.
func (q *udpRequest) originated() bool { return q.emulated && q.external }

// upstream says that the flow has an upstream socket.
func (q *udpRequest) upstream() bool { return !q.emulated || q.external }

// fromClient is the direction of what the client sends.
func (q *udpRequest) fromClient() udpDirection {
	if q.external {
		return udpInward
	}
	return udpOutward
}

// udpFlow is one initiator socket and one peer.
//
//	opening --(sockets stand, Connected)--> carrying --(idle, killed, filter
//	done or failed, replaced, stop)--> ended (Ended, once)
type udpFlow struct {
	udpRequest
	key    udpKey
	pump   *udpPump  // nil without an upstream socket
	reply  *udpReply // nil without an initiator
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
	passed                atomic.Bool   // a datagram was, and the engine knows
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
	switch {
	case f.external:
		return f.tuple.Src
	case f.emulated:
		return f.tuple.Dst
	}
	return f.dial.Target
}

// established tells the engine of the first datagram that was passed.
func (f *udpFlow) established() {
	if !f.passed.Load() && !f.passed.Swap(true) {
		f.control.Established()
	}
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
	if f.ended.Load() || f.killed() || u.loses(f, dir) {
		return
	}
	f.last.Store(now)
	if c := f.chain.Load(); c != nil {
		out.flush()
		c.enter(dir == f.fromClient(), data)
		return
	}
	out.add(f, dir, data)
}

// loses says whether datagrams of this direction go nowhere.
func (u *UDP) loses(f *udpFlow, dir udpDirection) bool {
	switch {
	case f.oneWay && dir == f.fromClient():
		u.stats.oneWay.Add(1)
		return true
	case dir == udpOutward && f.originated():
		// Somebody has the address of a peer that a filter emulates.
		u.stats.noFlow.Add(1)
		return true
	}
	return false
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
	if f.pump != nil {
		f.pump.remove(f)
	}
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
	if f.reply != nil {
		if f.reply.refs--; f.reply.refs == 0 {
			delete(u.replies, f.key.dst)
			reply = f.reply
		}
	}
	if f.pump != nil {
		f.pump.until = max(f.pump.until, f.last.Load()+int64(u.idle(f, u.config.SocketIdle)))
		f.pump.refs--
		if f.pump.refs == 0 && (u.closed || !f.pump.lingers()) {
			delete(u.pumps, f.pump.key)
			pump = f.pump
		}
	}
	u.mu.Unlock()
	if reply != nil {
		reply.close()
	}
	if pump != nil {
		pump.close()
	}
}
