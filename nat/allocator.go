package nat

import (
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/sluicegw/sluice/flow"
)

// Quarantine is how long a returned port is not leased again, so that late
// packets of its former user reach nobody else (RFC 6888 REQ-8 asks for
// 120 s).
const Quarantine = 120 * time.Second

// Endpoint is an external address and port of one protocol.
type Endpoint struct {
	Proto flow.Proto
	Addr  netip.AddrPort
}

// Allocator leases external ports, each to one holder at a time. Ports are
// chosen at random (RFC 6056). Safe for concurrent use.
type Allocator struct {
	ports Range
	busy  func(Endpoint) bool
	now   func() time.Time

	mu      sync.Mutex
	leased  map[Endpoint]bool
	resting map[Endpoint]time.Time // until when
	sweep   time.Time
}

// NewAllocator leases from a range. busy says whether something on the
// gateway itself uses a port, which is then passed over; now is the clock.
func NewAllocator(ports Range, busy func(Endpoint) bool, now func() time.Time) *Allocator {
	return &Allocator{
		ports: ports, busy: busy, now: now,
		leased: make(map[Endpoint]bool), resting: make(map[Endpoint]time.Time),
	}
}

// Lease takes a free port of an external address; false: there is none.
func (a *Allocator) Lease(p flow.Proto, addr netip.Addr) (netip.AddrPort, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.wake()
	n := int(a.ports.Hi) - int(a.ports.Lo) + 1
	if n <= 0 {
		return netip.AddrPort{}, false
	}
	first := rand.IntN(n)
	for i := range n {
		port := a.ports.Lo + uint16((first+i)%n)
		e := Endpoint{p, netip.AddrPortFrom(addr, port)}
		if a.leased[e] {
			continue
		}
		if _, rests := a.resting[e]; rests || a.busy(e) {
			continue
		}
		a.leased[e] = true
		return e.Addr, true
	}
	return netip.AddrPort{}, false
}

// Return gives a lease back; the port rests for Quarantine.
func (a *Allocator) Return(p flow.Proto, addr netip.AddrPort) {
	a.mu.Lock()
	defer a.mu.Unlock()
	e := Endpoint{p, addr}
	if a.leased[e] {
		delete(a.leased, e)
		a.resting[e] = a.now().Add(Quarantine)
	}
}

// wake ends the rest of the ports whose time has come, at most once a second.
func (a *Allocator) wake() {
	now := a.now()
	if now.Before(a.sweep) {
		return
	}
	a.sweep = now.Add(time.Second)
	for e, until := range a.resting {
		if !now.Before(until) {
			delete(a.resting, e)
		}
	}
}

// Leased is how many ports are out at lease.
func (a *Allocator) Leased() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.leased)
}
