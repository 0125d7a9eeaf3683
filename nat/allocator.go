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
	share int // of one holder, with what rests
	busy  func(Endpoint) bool
	now   func() time.Time

	mu      sync.Mutex
	leased  map[Endpoint]rest // to whom, and how long it was to rest before
	resting map[Endpoint]rest
	had     map[netip.Addr]int // how many of these each holder has
	sweep   time.Time
}

// rest is the time of a port after its lease.
type rest struct {
	until time.Time
	of    netip.Addr // its last holder
}

// minShare is what one holder has in any case.
const minShare = 64

// NewAllocator leases from a range. busy says whether something on the
// gateway itself uses a port, which is then passed over; now is the clock.
func NewAllocator(ports Range, busy func(Endpoint) bool, now func() time.Time) *Allocator {
	return &Allocator{
		ports: ports, share: max(minShare, (int(ports.Hi)-int(ports.Lo)+1)/8), busy: busy, now: now,
		leased: make(map[Endpoint]rest), resting: make(map[Endpoint]rest), had: make(map[netip.Addr]int),
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
	return a.LeaseFor(netip.Addr{}, p, addr, n, even)
}

// LeaseFor is LeaseRun for a holder who shall not leave the others without
// ports. Who has had more than an eighth of them gets its own again: late
// packets of a former lease reach nobody else (RFC 6888 REQ-8 allows that).
func (a *Allocator) LeaseFor(holder netip.Addr, p flow.Proto, addr netip.Addr, n int, even bool) (netip.AddrPort, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.wake()
	had := a.had[holder]
	if !holder.IsValid() || had+n <= a.share {
		return a.lease(holder, p, addr, n, even, true, false)
	}
	at, ok := a.lease(holder, p, addr, n, even, false, true)
	if !ok && n > 1 && had+n <= 2*a.share { // single ports are no run
		return a.lease(holder, p, addr, n, even, true, true)
	}
	return at, ok
}

// lease takes ports that are fresh, or that rest after a lease of the same
// holder, or both. a.mu is held.
func (a *Allocator) lease(holder netip.Addr, p flow.Proto, addr netip.Addr, n int, even, fresh, own bool) (netip.AddrPort, bool) {
	lo, last := int(a.ports.Lo), int(a.ports.Hi)-n+1 // where a run may begin
	if n <= 0 || last < lo {
		return netip.AddrPort{}, false
	}
	busy := map[Endpoint]bool{} // the question costs a system call
	free := func(port int) bool {
		e := Endpoint{p, netip.AddrPortFrom(addr, uint16(port))}
		if _, out := a.leased[e]; out {
			return false
		}
		if r, rests := a.resting[e]; rests && (!own || r.of != holder) || !rests && !fresh {
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
	a.take(holder, p, at, n)
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
		if _, out := a.leased[e]; out {
			return fmt.Errorf("%v: %w", e.Addr, ErrLeased)
		}
		if _, rests := a.resting[e]; rests || a.busy(e) {
			return fmt.Errorf("%v: %w", e.Addr, ErrUnavailable)
		}
	}
	a.take(netip.Addr{}, p, at, n)
	return nil
}

func (a *Allocator) take(holder netip.Addr, p flow.Proto, at netip.AddrPort, n int) {
	for i := range n {
		e := Endpoint{p, netip.AddrPortFrom(at.Addr(), at.Port()+uint16(i))}
		before := a.resting[e] // zero: it was free
		a.rested(e)
		a.leased[e] = rest{before.until, holder}
		a.had[holder]++
	}
}

// rested ends the rest of a port.
func (a *Allocator) rested(e Endpoint) {
	if r, rests := a.resting[e]; rests {
		delete(a.resting, e)
		a.forget(r.of)
	}
}

// forget counts one port less of a holder.
func (a *Allocator) forget(holder netip.Addr) {
	if a.had[holder]--; a.had[holder] == 0 {
		delete(a.had, holder)
	}
}

// Return gives a lease back; the port rests for Quarantine.
func (a *Allocator) Return(p flow.Proto, addr netip.AddrPort) {
	a.mu.Lock()
	defer a.mu.Unlock()
	e := Endpoint{p, addr}
	if r, out := a.leased[e]; out {
		delete(a.leased, e)
		a.resting[e] = rest{a.now().Add(Quarantine), r.of}
	}
}

// Unlease gives a lease back at which nobody could ever be reached: the port
// need not rest, or no longer than it was to rest before.
func (a *Allocator) Unlease(p flow.Proto, addr netip.AddrPort) {
	a.mu.Lock()
	defer a.mu.Unlock()
	e := Endpoint{p, addr}
	r, out := a.leased[e]
	if !out {
		return
	}
	delete(a.leased, e)
	if r.until.After(a.now()) {
		a.resting[e] = r
	} else {
		a.forget(r.of)
	}
}

// wake ends the rest of the ports whose time has come, at most once a second.
func (a *Allocator) wake() {
	now := a.now()
	if now.Before(a.sweep) {
		return
	}
	a.sweep = now.Add(time.Second)
	for e, r := range a.resting {
		if !now.Before(r.until) {
			a.rested(e)
		}
	}
}

// Leased is how many ports are out at lease.
func (a *Allocator) Leased() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.leased)
}
