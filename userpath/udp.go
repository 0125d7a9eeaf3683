package userpath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// The defaults of UDPConfig.
const (
	DefaultUDPPeerIdle   = 120 * time.Second
	DefaultUDPSocketIdle = 300 * time.Second
	DefaultUDPSockets    = 8192
	DefaultUDPPeers      = 1024
	DefaultUDPFlows      = 32768
)

// Bytes of payload that sockets may hold for us; the kernel doubles them to
// cover its overhead.
const (
	udpSocketBuffer   = 512 << 10
	udpListenerBuffer = 8 << 20
)

// UDPConfig is what a UDP is made of. Zero fields take the default.
type UDPConfig struct {
	Marks flow.Marks
	Log   *zap.Logger
	// Port of the listeners on 127.0.0.1 and ::1; 0: one that is free.
	Port uint16
	// Steer is that of TCPConfig.
	Steer func() error
	// PeerIdle ends a flow that carried nothing for that long.
	PeerIdle time.Duration
	// SocketIdle closes the upstream socket of a client socket that carried
	// nothing for that long. Until then its next peer sees the same external
	// port, though the flows may have ended before. (RFC 4787, REQ-5)
	SocketIdle time.Duration
	// MaxSockets bounds the client sockets, MaxPeers the peers of one of
	// them, MaxFlows all peers of all of them. A flow costs one descriptor
	// for its peer's address; a client socket costs one more, on the routed
	// path one for each of its flows.
	MaxSockets, MaxPeers, MaxFlows int
	// Decide judges a datagram that comes to the listener for a flow that is
	// not known any more: conntrack may remember a flow that was idle here
	// for too long. nil: such datagrams are lost. It may block; at most
	// a bounded number of calls run at a time.
	Decide func(context.Context, flow.Packet) engine.Decision
}

func (c *UDPConfig) fill() {
	if c.PeerIdle <= 0 {
		c.PeerIdle = DefaultUDPPeerIdle
	}
	if c.SocketIdle <= 0 {
		c.SocketIdle = DefaultUDPSocketIdle
	}
	if c.MaxSockets <= 0 {
		c.MaxSockets = DefaultUDPSockets
	}
	if c.MaxPeers <= 0 {
		c.MaxPeers = DefaultUDPPeers
	}
	if c.MaxFlows <= 0 {
		c.MaxFlows = DefaultUDPFlows
	}
}

// UDPStats are counters since the start, but for Flows and Sockets, which
// count what is alive.
type UDPStats struct {
	Flows, Sockets int
	// UnknownPeer: datagrams from upstream that no client asked for.
	UnknownPeer uint64
	// NoFlow: datagrams at the listener without a flow, and none was made.
	NoFlow uint64
	// OneWay: datagrams of clients that may not answer.
	OneWay uint64
	// Oversize: datagrams larger than the buffer of their data filters.
	Oversize uint64
	// LinkFull: datagrams lost because a data filter did not keep up.
	LinkFull uint64
	// SendLost: datagrams that the kernel did not take.
	SendLost uint64
	// Refused: flows that could not be carried.
	Refused uint64
	// ErrorsSent and ErrorsLimited: ICMP errors passed on, and those held
	// back by the rate limit.
	ErrorsSent, ErrorsLimited uint64
}

// UDP carries the UDP flows that were taken over. A client socket has one
// pump, with one upstream socket and any number of peers; on the routed path
// it has an upstream socket for each peer, all with the client's own port:
//
//	client --TPROXY--> listener --------------> upstream socket --> peers
//	client <--- reply socket, one per peer <--- upstream socket <-- peers
//
// The listener's goroutine and a few pollers move all datagrams; a flow has
// goroutines of its own only while data filters hold it. Safe for concurrent
// use.
type UDP struct {
	marks  flow.Marks
	log    *zap.Logger
	config UDPConfig
	port   uint16

	listeners []*udpListener
	pollers   []*udpPoller
	icmp      *udpICMP
	asks      *udpAsks
	outs      sync.Pool // *udpOut, for data filters
	buffers   bufferPools
	start     time.Time
	stats     udpStats
	nextID    atomic.Uint64

	mu      sync.RWMutex
	closed  bool
	flows   map[udpKey]*udpFlow
	opening int // flows that hold a place but are not in flows yet
	pumps   map[udpPumpKey]*udpPump
	replies map[netip.AddrPort]*udpReply
	peers   map[netip.AddrPort]int // flows of each initiator socket

	// tasks are the goroutines of flows that data filters hold; calm is told
	// when there are none left, and when no flow is opening.
	tasks int
	calm  *sync.Cond
}

// NewUDP opens the listeners, so that Port is known and nothing is lost
// between the first rule and Run. The caller runs Run, which closes them.
func NewUDP(c UDPConfig) (*UDP, error) {
	if c.Log == nil {
		return nil, errors.New("make UDP pump: no logger")
	}
	c.fill()
	u := &UDP{
		marks: c.Marks, log: c.Log, config: c, start: time.Now(),
		flows:   make(map[udpKey]*udpFlow),
		pumps:   make(map[udpPumpKey]*udpPump),
		replies: make(map[netip.AddrPort]*udpReply),
		peers:   make(map[netip.AddrPort]int),
	}
	u.calm = sync.NewCond(&u.mu)
	u.outs.New = func() any { return newUDPOut(u) }
	u.asks = newUDPAsks(u)
	if err := u.open(); err != nil {
		u.closeAll()
		return nil, err
	}
	return u, nil
}

func (u *UDP) open() (err error) {
	if u.listeners, err = udpListen(u, u.config.Port); err != nil {
		return fmt.Errorf("open UDP listeners: %w", err)
	}
	u.port = u.listeners[0].sock.local.Port()
	if u.icmp, err = newUDPICMP(u); err != nil {
		return err
	}
	for range min(runtime.GOMAXPROCS(0), 4) {
		p, err := newUDPPoller(u)
		if err != nil {
			return err
		}
		u.pollers = append(u.pollers, p)
	}
	return nil
}

// Port is where TPROXY sends datagrams: on 127.0.0.1 and ::1.
func (u *UDP) Port() uint16 { return u.port }

// Stats is a snapshot.
func (u *UDP) Stats() UDPStats {
	u.mu.RLock()
	flows, sockets := len(u.flows), len(u.pumps)
	u.mu.RUnlock()
	s := &u.stats
	return UDPStats{
		Flows: flows, Sockets: sockets,
		UnknownPeer: s.unknownPeer.Load(), NoFlow: s.noFlow.Load(),
		OneWay: s.oneWay.Load(), Oversize: s.oversize.Load(), LinkFull: s.linkFull.Load(),
		SendLost: s.sendLost.Load(), Refused: s.refused.Load(),
		ErrorsSent: s.icmpSent.Load(), ErrorsLimited: s.icmpLimited.Load(),
	}
}

// Run carries datagrams until ctx is cancelled, which is no error; then every
// flow is ended. It is called once.
func (u *UDP) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var tasks sync.WaitGroup
	task := func(run func() error) {
		tasks.Go(func() {
			if err := run(); err != nil && !errors.Is(err, os.ErrClosed) {
				cancel(err)
			}
		})
	}
	for _, l := range u.listeners {
		task(l.run)
	}
	for _, p := range u.pollers {
		task(p.run)
	}
	for _, r := range u.icmp.readers {
		task(r.run)
	}
	task(func() error { u.sweep(ctx); return nil })
	task(func() error { u.asks.run(ctx); return nil })
	<-ctx.Done()
	u.closeAll()
	tasks.Wait()
	u.wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("carry UDP: %w", err)
	}
	return nil
}

// background runs a task of a flow, which wait waits for.
func (u *UDP) background(task func()) {
	u.mu.Lock()
	u.tasks++
	u.mu.Unlock()
	go func() {
		task()
		u.mu.Lock()
		defer u.mu.Unlock()
		if u.tasks--; u.tasks == 0 {
			u.calm.Broadcast()
		}
	}()
}

// wait returns when every flow has been reported.
func (u *UDP) wait() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for u.tasks > 0 || u.opening > 0 {
		u.calm.Wait()
	}
}

// closeAll ends every flow and closes every socket. It may be repeated.
func (u *UDP) closeAll() {
	u.mu.Lock()
	u.closed = true
	flows := make([]*udpFlow, 0, len(u.flows))
	for _, f := range u.flows {
		flows = append(flows, f)
	}
	u.mu.Unlock()
	for _, f := range flows {
		u.end(f, flow.CutByPolicy, "gateway stops")
	}
	u.mu.Lock()
	var idle []*udpPump
	for _, p := range u.pumps {
		if p.refs == 0 {
			delete(u.pumps, p.key)
			idle = append(idle, p)
		}
	}
	u.mu.Unlock()
	for _, p := range idle {
		p.close()
	}
	for _, l := range u.listeners {
		l.sock.close()
	}
	for _, p := range u.pollers {
		p.close()
	}
	if u.icmp != nil {
		u.icmp.close()
	}
}

// now is nanoseconds since the start, never 0.
func (u *UDP) now() int64 { return int64(time.Since(u.start)) + 1 }

// udpSweepInterval is how soon a killed flow's sockets are closed; its datagrams
// stop at once.
const udpSweepInterval = 100 * time.Millisecond

// sweep ends what was killed and what is idle. No flow has a timer.
func (u *UDP) sweep(ctx context.Context) {
	tick := time.NewTicker(min(udpSweepInterval, u.config.PeerIdle/4+1, u.config.SocketIdle/4+1))
	defer tick.Stop()
	var killed, idle []*udpFlow
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		killed, idle = killed[:0], idle[:0]
		now := u.now()
		u.mu.RLock()
		for _, f := range u.flows {
			switch {
			case f.killed():
				killed = append(killed, f)
			case f.last.Load() < now-int64(u.idle(f, u.config.PeerIdle)):
				idle = append(idle, f)
			}
		}
		u.mu.RUnlock()
		for _, f := range killed {
			u.end(f, flow.CutByPolicy, "")
		}
		for _, f := range idle {
			result, reason := f.silence()
			u.end(f, result, reason)
		}
		u.sweepPumps()
		clear(killed)
		clear(idle)
	}
}

// idle is how long a flow may carry nothing: its own time, or else d.
func (u *UDP) idle(f *udpFlow, d time.Duration) time.Duration {
	if f.idle != 0 {
		return f.idle
	}
	return d
}

// sweepPumps closes the upstream sockets that have had no peer for too long.
func (u *UDP) sweepPumps() {
	now := u.now()
	var idle []*udpPump
	u.mu.Lock()
	for key, p := range u.pumps {
		if p.refs == 0 && p.until < now {
			delete(u.pumps, key)
			idle = append(idle, p)
		}
	}
	u.mu.Unlock()
	for _, p := range idle {
		p.close()
	}
}
