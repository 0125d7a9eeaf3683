package nat

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/flow"
)

// reserve leases for a request without asking whether a port is busy. a.mu is
// held.
func (a *Allocator) reserve(r *Request, busy busyPorts) (netip.AddrPort, error) {
	if len(r.Addrs) == 0 {
		return netip.AddrPort{}, fmt.Errorf("no external address: %w", ErrUnavailable)
	}
	c := a.client(r.Holder)
	defer a.dismiss(c)
	account := c.account(r.Proto)
	if c.limited() && account.leased+r.N > a.c.Quota {
		return netip.AddrPort{}, ErrQuota
	}
	var err error
	for _, addr := range a.choose(c, r) {
		var at netip.AddrPort
		if at, err = a.reserveAt(c, addr, r, busy); err == nil {
			return at, nil
		}
	}
	return netip.AddrPort{}, err
}

// reserveAt leases ports of one address.
func (a *Allocator) reserveAt(c *client, addr netip.Addr, r *Request, busy busyPorts) (netip.AddrPort, error) {
	s := a.space(r.Proto, addr)
	defer a.discard(s)
	if r.Preferred != 0 {
		err := a.mayHave(c, s, r, busy)
		if err == nil {
			return a.take(c, s, int(r.Preferred), r.N), nil
		}
		if r.Strict {
			return netip.AddrPort{}, err
		}
	}
	find := search{a, c, s, r, busy}
	look := find.anywhere
	if a.c.Block > 0 {
		look = find.inBlocks
	}
	port, err := look()
	if err != nil {
		return netip.AddrPort{}, err
	}
	return a.take(c, s, port, r.N), nil
}

// choose gives the external addresses to look at: the one that the holder has
// already, else all of them, with the fewest ports in use first.
func (a *Allocator) choose(c *client, r *Request) []netip.Addr {
	if len(r.Addrs) == 1 {
		return r.Addrs
	}
	if c.limited() {
		if i := c.paired(r.Addrs); i >= 0 {
			return r.Addrs[i : i+1]
		}
	}
	list := slices.Clone(r.Addrs)
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	slices.SortStableFunc(list, func(x, y netip.Addr) int { return a.inUse(r.Proto, x) - a.inUse(r.Proto, y) })
	return list
}

func (a *Allocator) inUse(p flow.Proto, addr netip.Addr) int {
	if s := a.spaces[spaceKey{p, addr}]; s != nil {
		return len(s.ports)
	}
	return 0
}

// room says whether a holder may have n more of fresh ports beside those that
// rest after it: up to its quota together, or up to twice that.
func (a *Allocator) room(c *client, p flow.Proto, n, times int) bool {
	account := c.account(p)
	return !c.limited() || account.leased+len(account.resting)+n <= times*a.c.Quota
}

// search looks for ports for one request.
type search struct {
	a    *Allocator
	c    *client
	s    *space
	r    *Request
	busy busyPorts
}

// want is one thing that would do.
type want struct {
	spans  []Range
	parity parity
}

// wants are what would do, the best first. classes are the places to look in,
// in this order.
func (f search) wants(classes ...[]Range) []want {
	list := make([]want, 0, 4)
	for _, spans := range classes {
		switch {
		case f.r.Even:
			list = append(list, want{spans, even})
		case f.r.Like != 0 && f.r.N == 1:
			list = append(list, want{spans, parityOf(int(f.r.Like))}, want{spans, anyParity})
		default:
			list = append(list, want{spans, anyParity})
		}
	}
	return list
}

// anywhere looks in the ranges: for a fresh port while the holder's quota has
// room for it beside those that rest, then among these, and at last for one
// more.
func (f search) anywhere() (int, error) {
	a := f.a
	classes := [][]Range{a.c.Leases}
	if f.r.Like != 0 && f.r.Like < firstUnprivileged && a.c.WellKnown != (Range{}) {
		classes = [][]Range{{a.c.WellKnown}, a.c.Leases}
	}
	wants := f.wants(classes...)
	if !a.room(f.c, f.r.Proto, f.r.N, 1) {
		if port, ok := f.own(wants); ok {
			return port, nil
		}
		if !a.room(f.c, f.r.Proto, f.r.N, 2) {
			return 0, ErrQuota
		}
	}
	if port, ok := f.fresh(wants); ok {
		return port, nil
	}
	return 0, ErrExhausted
}

// firstUnprivileged ends the well-known ports (RFC 4787 section 4.2.2).
const firstUnprivileged = 1024

// fresh finds ports that are free.
func (f search) fresh(wants []want) (int, bool) {
	for _, w := range wants {
		port, ok := 0, false
		if f.r.N == 1 {
			port, ok = f.s.pick(w.spans, w.parity, f.busy)
		} else {
			port, ok = f.s.run(w.spans, f.r.N, w.parity, f.busy)
		}
		if ok {
			return port, true
		}
	}
	return 0, false
}

// own finds ports that rest after the holder itself.
func (f search) own(wants []want) (int, bool) {
	list := f.c.account(f.r.Proto).resting
	if !f.c.limited() || len(list) == 0 {
		return 0, false
	}
	for _, w := range wants {
		fits := func(x ref) bool {
			port := int(x.port)
			return x.s == f.s && inside(w.spans, port, 1) && !f.busy.has(f.s.addr, port)
		}
		if f.r.N > 1 {
			if port, ok := ownRun(list, f.r.N, w, fits); ok {
				return port, true
			}
			continue
		}
		first := rand.IntN(len(list))
		for i := range list {
			x := list[(first+i)%len(list)]
			if w.parity.fits(int(x.port)) && fits(x) {
				return int(x.port), true
			}
		}
	}
	return 0, false
}

// ownRun finds n consecutive ports in a list.
func ownRun(list []ref, n int, w want, fits func(ref) bool) (int, bool) {
	ports := make([]int, 0, len(list))
	for _, x := range list {
		if fits(x) {
			ports = append(ports, int(x.port))
		}
	}
	slices.Sort(ports)
	for i := 0; i+n <= len(ports); i++ {
		if ports[i+n-1] == ports[i]+n-1 && w.parity.fits(ports[i]) && inside(w.spans, ports[i], n) {
			return ports[i], true
		}
	}
	return 0, false
}

// mayHave says whether a request may have exactly the ports that it prefers.
func (a *Allocator) mayHave(c *client, s *space, r *Request, busy busyPorts) error {
	port := int(r.Preferred)
	spans := a.c.Leases
	if a.c.Block == 0 && a.c.WellKnown != (Range{}) && r.Preferred < firstUnprivileged {
		spans = []Range{a.c.WellKnown}
	}
	if r.Even && port%2 != 0 || !inside(spans, port, r.N) {
		return fmt.Errorf("port %d: %w", port, ErrUnavailable)
	}
	if a.c.Block > 0 {
		if err := a.mayHaveBlock(c, s.addr, port, r.N); err != nil {
			return err
		}
	}
	fresh := false
	for i := range r.N {
		if busy.has(s.addr, port+i) {
			return fmt.Errorf("port %d: %w", port+i, ErrUnavailable)
		}
		mine, err := s.had(port+i, c)
		if err != nil {
			return err
		}
		fresh = fresh || !mine
	}
	if fresh && a.c.Block == 0 && !a.room(c, r.Proto, r.N, 2) {
		return ErrQuota
	}
	return nil
}

// reserveExact leases ports by their numbers. a.mu is held.
func (a *Allocator) reserveExact(holder netip.Addr, p flow.Proto, at netip.AddrPort, n int) error {
	c := a.client(holder)
	defer a.dismiss(c)
	if c.limited() && c.account(p).leased+n > a.c.Quota {
		a.stats.OverQuota++
		return ErrQuota
	}
	s := a.space(p, at.Addr())
	defer a.discard(s)
	for i := range n {
		port := int(at.Port()) + i
		if _, err := s.had(port, c); err != nil {
			return err
		}
		if b := a.blockAt(s.addr, port); b != nil && b.client != c {
			return fmt.Errorf("port %d is in a block of another: %w", port, ErrLeased)
		}
	}
	a.take(c, s, int(at.Port()), n)
	return nil
}

// had says whether a port can be leased to a client; mine: it rests after it.
func (s *space) had(port int, c *client) (mine bool, err error) {
	h, held := s.holding(uint16(port))
	switch {
	case !held:
		return false, nil
	case !h.resting():
		return false, fmt.Errorf("%v: %w", netip.AddrPortFrom(s.addr, uint16(port)), ErrLeased)
	case h.client != c.id || !c.limited():
		return false, fmt.Errorf("%v rests: %w", netip.AddrPortFrom(s.addr, uint16(port)), ErrUnavailable)
	}
	return true, nil
}
