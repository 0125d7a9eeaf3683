package nat

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/sluicegw/sluice/flow"
)

// Quarantine is how long a returned port is not leased again unless another
// time is configured, so that late packets of its former user reach nobody
// else (RFC 6888 REQ-8 asks for 120 s).
const Quarantine = 120 * time.Second

// Endpoint is an external address and port of one protocol; for ICMP the port
// is the identifier of a query.
type Endpoint struct {
	Proto flow.Proto
	Addr  netip.AddrPort
}

// AllocatorConfig is what an Allocator is made of.
type AllocatorConfig struct {
	// Leases are where ports come from, and ICMP identifiers.
	Leases []Range
	// WellKnown is where a client's port below 1024 finds its like (RFC 4787
	// REQ-3a); the zero Range: there is no such place.
	WellKnown Range
	// Quota is how many ports of each protocol one holder may have at lease.
	Quota int
	// Quarantine is how long a returned port rests; 0: not at all.
	Quarantine time.Duration
	// Block is how many ports a holder gets to itself at a time, of all
	// protocols alike; 0: ports are leased one by one. (RFC 6888 REQ-14)
	Block int
	// OnBlock hears of every block that begins or ends to be a holder's, in
	// their order. It is called on the goroutine of some other call, with no
	// lock that calls of the allocator wait for. nil: nobody.
	OnBlock func(BlockEvent)
	// Busy says whether something on the gateway itself uses a port, which is
	// then passed over. It costs a system call and is asked about nothing but
	// what is about to be leased.
	Busy func(Endpoint) bool
	// Now is the clock.
	Now func() time.Time
}

// BlockEvent says that a block has become a holder's, or is not any more.
type BlockEvent struct {
	Holder   netip.Addr // invalid: the gateway itself
	External netip.Addr
	Ports    Range
	Returned bool
}

// Request is what Take is asked for.
type Request struct {
	// Holder is the client that it is for: its quota counts. The zero Addr is
	// the gateway itself, which has none.
	Holder netip.Addr
	Proto  flow.Proto
	// Addrs are the external addresses that it may come from, at least one. A
	// holder that has ports of one of them gets no other (paired pooling, RFC
	// 4787 REQ-2). The slice is not kept.
	Addrs []netip.Addr
	// N consecutive ports; 0 is 1.
	N int
	// Even: the lowest of them is even.
	Even bool
	// Like is the inside port that one is leased for: its class (below 1024,
	// or not) and its parity are kept while there are such ports. 0: anything.
	Like uint16
	// Preferred is the lowest port that is wanted, inside of the ranges. Another
	// one is given if it cannot be had, unless Strict is set.
	Preferred uint16
	Strict    bool
}

// Why there is no lease.
var (
	// ErrQuota: the holder has as many ports as it may have.
	ErrQuota = errors.New("the client has all the ports that one may have")
	// ErrExhausted: no port that would do is left.
	ErrExhausted = errors.New("no external port is left")
	// ErrLeased: the port is out at lease.
	ErrLeased = errors.New("port is leased to another")
	// ErrUnavailable: the port is used by something else on the gateway, rests
	// after a former lease, or does not exist.
	ErrUnavailable = errors.New("port is not available")
)

// Allocator leases external ports, each to one holder at a time, at random
// (RFC 6056). A port is free, leased, or resting:
//
//	free --Take, LeaseExact--> leased --Return--> resting --the quarantine--> free
//	                             ^ '--Unlease--> what it was before   |
//	                             '------- Take of the same holder ----'
//
// A port that rests counts for its last holder still. Nobody gets it, but that
// holder when its quota has no room for another one beside those that rest: late
// packets then reach nobody else (RFC 6888 REQ-8). So a holder that leases and
// returns without an end leaves the others their ports. It has at most Quota
// ports at lease and, when those that rest do not fit what it asks for, as many
// again.
//
// Memory is for ports that are leased or rest, and for bitmaps of those parts
// of the ranges where they are. Safe for concurrent use.
type Allocator struct {
	c     AllocatorConfig
	epoch time.Time

	emitting sync.Mutex // around calls of OnBlock; before mu

	mu      sync.Mutex
	spaces  map[spaceKey]*space
	clients map[netip.Addr]*client
	byID    []*client // nil: free
	idle    []uint32  // the free ones
	due     dueQueue
	blocks  map[blockKey]*block
	events  []BlockEvent
	stats   AllocatorStats
}

// AllocatorStats are counts of the present, and since the start those of
// requests that got nothing.
type AllocatorStats struct {
	Leased, Resting, Holders, Blocks int
	OverQuota, Exhausted             uint64
}

// minQuota is the least that NewAllocator gives one holder.
const minQuota = 64

// NewAllocator leases from one range, at most an eighth of it to one holder,
// with the usual quarantine. busy and now are those of AllocatorConfig.
func NewAllocator(ports Range, busy func(Endpoint) bool, now func() time.Time) *Allocator {
	return NewAllocatorWith(AllocatorConfig{
		Leases: []Range{ports}, Quota: max(minQuota, ports.size()/8), Quarantine: Quarantine, Busy: busy, Now: now,
	})
}

// NewAllocatorWith makes an allocator. The configuration has been checked; see
// CheckBlocks.
func NewAllocatorWith(c AllocatorConfig) *Allocator {
	a := &Allocator{
		c: c, epoch: c.Now(),
		spaces: make(map[spaceKey]*space), clients: make(map[netip.Addr]*client), blocks: make(map[blockKey]*block),
	}
	return a
}

// Lease takes a free port of an external address; false: there is none.
func (a *Allocator) Lease(p flow.Proto, addr netip.Addr) (netip.AddrPort, bool) {
	return a.LeaseRun(p, addr, 1, false)
}

// LeaseRun takes n consecutive free ports of an address and gives the lowest,
// which is even if that is asked for; false: there is no such run. Each port is
// returned by itself.
func (a *Allocator) LeaseRun(p flow.Proto, addr netip.Addr, n int, even bool) (netip.AddrPort, bool) {
	return a.LeaseFor(netip.Addr{}, p, addr, n, even)
}

// LeaseFor is LeaseRun for a holder with a quota.
func (a *Allocator) LeaseFor(holder netip.Addr, p flow.Proto, addr netip.Addr, n int, even bool) (netip.AddrPort, bool) {
	if n <= 0 {
		return netip.AddrPort{}, false
	}
	at, err := a.Take(Request{Holder: holder, Proto: p, Addrs: []netip.Addr{addr}, N: n, Even: even})
	return at, err == nil
}

// Take leases what is asked for and gives the address with the lowest port.
// Each port is returned by itself. The error is ErrQuota or ErrExhausted; for a
// Strict request also ErrLeased or ErrUnavailable.
func (a *Allocator) Take(r Request) (netip.AddrPort, error) {
	r.N = max(r.N, 1)
	var busy busyPorts
	for {
		a.lock()
		at, err := netip.AddrPort{}, ErrExhausted
		if len(busy) < maxBusy {
			at, err = a.reserve(&r, busy)
		}
		switch {
		case errors.Is(err, ErrQuota):
			a.stats.OverQuota++
		case errors.Is(err, ErrExhausted):
			a.stats.Exhausted++
		}
		a.unlock()
		if err != nil {
			return netip.AddrPort{}, err
		}
		if !a.askBusy(r.Proto, at, r.N, &busy) {
			return at, nil
		}
		a.undo(r.Proto, at, r.N)
	}
}

// Pair gives the external address of a pool, which is not empty, that belongs to
// a holder: the first that it has ports of, else the first of all.
func (a *Allocator) Pair(holder netip.Addr, addrs []netip.Addr) netip.Addr {
	a.lock()
	defer a.unlock()
	if c := a.clients[holder]; c != nil {
		if i := c.paired(addrs); i >= 0 {
			return addrs[i]
		}
	}
	return addrs[0]
}

// Reconfigure changes where ports come from, and how many one holder may have,
// for requests to come; what is leased stays so. Not for an allocator with
// blocks, whose places these are.
func (a *Allocator) Reconfigure(leases []Range, wellKnown Range, quota int) {
	a.lock()
	defer a.unlock()
	if a.c.Block == 0 {
		a.c.Leases, a.c.WellKnown, a.c.Quota = leases, wellKnown, quota
	}
}

// Covers says whether a port is in the ranges.
func (a *Allocator) Covers(port uint16) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return inside(a.c.Leases, int(port), 1) || a.c.WellKnown != (Range{}) && inside([]Range{a.c.WellKnown}, int(port), 1)
}

// LeaseExact takes n consecutive ports of an address from a given one on, also
// outside of the allocator's ranges: who asks for a port by its number knows
// why. On an error, ErrLeased or ErrUnavailable, nothing is taken.
func (a *Allocator) LeaseExact(p flow.Proto, at netip.AddrPort, n int) error {
	return a.LeaseExactFor(netip.Addr{}, p, at, n)
}

// LeaseExactFor is LeaseExact for a holder: its quota counts, with ErrQuota,
// and a port that rests after it is its again.
func (a *Allocator) LeaseExactFor(holder netip.Addr, p flow.Proto, at netip.AddrPort, n int) error {
	if n <= 0 || at.Port() == 0 || int(at.Port())+n-1 > maxPort {
		return fmt.Errorf("%v and %d more: %w", at, n-1, ErrUnavailable)
	}
	a.lock()
	err := a.reserveExact(holder, p, at, n)
	a.unlock()
	if err != nil {
		return err
	}
	var busy busyPorts
	if a.askBusy(p, at, n, &busy) {
		a.undo(p, at, n)
		return fmt.Errorf("%v and %d more: %w", at, n-1, ErrUnavailable)
	}
	return nil
}

// maxBusy is how many ports one request finds busy before it gives up: then
// nearly all are, or the address is not the gateway's any more.
const maxBusy = 256

// busyPorts are what Busy said yes to during one call.
type busyPorts map[netip.AddrPort]struct{}

func (b busyPorts) has(addr netip.Addr, port int) bool {
	if len(b) == 0 {
		return false
	}
	_, is := b[netip.AddrPortFrom(addr, uint16(port))]
	return is
}

// askBusy asks for each of n ports until one is busy, which it notes. No lock
// is held: the ports are reserved, and nobody else asks for them.
func (a *Allocator) askBusy(p flow.Proto, at netip.AddrPort, n int, seen *busyPorts) bool {
	for i := range n {
		x := netip.AddrPortFrom(at.Addr(), at.Port()+uint16(i))
		if a.c.Busy(Endpoint{p, x}) {
			if *seen == nil {
				*seen = busyPorts{}
			}
			(*seen)[x] = struct{}{}
			return true
		}
	}
	return false
}

func (a *Allocator) undo(p flow.Proto, at netip.AddrPort, n int) {
	a.lock()
	defer a.unlock()
	for i := range n {
		a.unlease(p, netip.AddrPortFrom(at.Addr(), at.Port()+uint16(i)))
	}
}

// Return gives a lease back; the port rests.
func (a *Allocator) Return(p flow.Proto, addr netip.AddrPort) {
	a.lock()
	defer a.unlock()
	s := a.spaces[spaceKey{p, addr.Addr()}]
	h, held := s.holding(addr.Port())
	switch {
	case !held || h.resting():
	case a.c.Quarantine <= 0:
		a.free(s, addr.Port(), h)
	default:
		h.rests = a.deadline(a.c.Quarantine)
		a.rest(s, addr.Port(), h)
		a.due.push(dueAt{s, addr.Port(), h.rests})
	}
}

// Unlease gives a lease back at which nobody could ever be reached: the port
// need not rest, or no longer than it was to rest before.
func (a *Allocator) Unlease(p flow.Proto, addr netip.AddrPort) {
	a.lock()
	defer a.unlock()
	a.unlease(p, addr)
}

func (a *Allocator) unlease(p flow.Proto, addr netip.AddrPort) {
	s := a.spaces[spaceKey{p, addr.Addr()}]
	h, held := s.holding(addr.Port())
	switch {
	case !held || h.resting():
	case h.rests > a.ticks():
		a.rest(s, addr.Port(), h) // it is in the queue still
	default:
		a.free(s, addr.Port(), h)
	}
}

// Leased is how many ports are out at lease.
func (a *Allocator) Leased() int { return a.Stats().Leased }

// Stats reads the counters.
func (a *Allocator) Stats() AllocatorStats {
	a.lock()
	defer a.unlock()
	s := a.stats
	s.Holders, s.Blocks = len(a.clients), len(a.blocks)
	return s
}

// Sweep frees the ports whose quarantine is over. Every call does; with blocks
// somebody should when there are no calls, so that OnBlock hears in time.
func (a *Allocator) Sweep() {
	a.lock()
	a.unlock()
}

// lock also ends the rest of ports whose time has come.
func (a *Allocator) lock() {
	a.mu.Lock()
	a.wake()
}

// unlock passes on what has happened to blocks.
func (a *Allocator) unlock() {
	happened := len(a.events) > 0
	a.mu.Unlock()
	if !happened {
		return
	}
	a.emitting.Lock()
	defer a.emitting.Unlock()
	a.mu.Lock()
	events := a.events
	a.events = nil
	a.mu.Unlock()
	for _, e := range events {
		a.c.OnBlock(e)
	}
}
