package nat

import (
	"errors"
	"fmt"
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
	return a.LeaseRun(p, addr, 1, false)
}

// LeaseRun takes n consecutive free ports of an address and gives the lowest,
// which is even if that is asked for; false: there is no such run. Each port is
// returned by itself.
func (a *Allocator) LeaseRun(p flow.Proto, addr netip.Addr, n int, even bool) (netip.AddrPort, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.wake()
	lo, last := int(a.ports.Lo), int(a.ports.Hi)-n+1 // where a run may begin
	if n <= 0 || last < lo {
		return netip.AddrPort{}, false
	}
	busy := map[Endpoint]bool{} // the question costs a system call
	free := func(port int) bool {
		e := Endpoint{p, netip.AddrPortFrom(addr, uint16(port))}
		if a.leased[e] {
			return false
		}
		if _, rests := a.resting[e]; rests {
			return false
		}
		if _, asked := busy[e]; !asked {
			busy[e] = a.busy(e)
		}
		return !busy[e]
	}
	random := lo + rand.IntN(last-lo+1)
	port, ok := firstRun(random, last, n, even, free)
	if !ok {
		port, ok = firstRun(lo, random-1, n, even, free)
	}
	if !ok {
		return netip.AddrPort{}, false
	}
	at := netip.AddrPortFrom(addr, uint16(port))
	a.take(p, at, n)
	return at, true
}

// firstRun finds the first n free ports in a row that begin between from and
// to.
func firstRun(from, to, n int, even bool, free func(port int) bool) (int, bool) {
	for port := from; port <= to; {
		if even && port%2 != 0 {
			port++
			continue
		}
		length := 0
		for length < n && free(port+length) {
			length++
		}
		if length == n {
			return port, true
		}
		port += length + 1
	}
	return 0, false
}

var (
	// ErrLeased: the port is out at lease.
	ErrLeased = errors.New("port is leased to another")
	// ErrUnavailable: the port is used by something else on the gateway, rests
	// after a former lease, or does not exist.
	ErrUnavailable = errors.New("port is not available")
)

// LeaseExact takes n consecutive ports of an address from a given one on, also
// outside of the allocator's range: who asks for a port by its number knows
// why. On an error nothing is taken.
func (a *Allocator) LeaseExact(p flow.Proto, at netip.AddrPort, n int) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.wake()
	if n <= 0 || at.Port() == 0 || int(at.Port())+n-1 > 65535 {
		return fmt.Errorf("%v and %d more: %w", at, n-1, ErrUnavailable)
	}
	for i := range n {
		e := Endpoint{p, netip.AddrPortFrom(at.Addr(), at.Port()+uint16(i))}
		if a.leased[e] {
			return fmt.Errorf("%v: %w", e.Addr, ErrLeased)
		}
		if _, rests := a.resting[e]; rests || a.busy(e) {
			return fmt.Errorf("%v: %w", e.Addr, ErrUnavailable)
		}
	}
	a.take(p, at, n)
	return nil
}

func (a *Allocator) take(p flow.Proto, at netip.AddrPort, n int) {
	for i := range n {
		a.leased[Endpoint{p, netip.AddrPortFrom(at.Addr(), at.Port()+uint16(i))}] = true
	}
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

// Unlease gives a lease back at which nobody could ever be reached: the port
// need not rest.
func (a *Allocator) Unlease(p flow.Proto, addr netip.AddrPort) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.leased, Endpoint{p, addr})
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
