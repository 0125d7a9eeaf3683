package nat

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
)

// blockKey names a block by its lowest port.
type blockKey struct {
	addr netip.Addr
	lo   uint16
}

// block is ports of an external address that are one client's for as long as
// it has one of them, of any protocol, resting ones among them.
type block struct {
	client *client
	blockKey
	used int
}

// CheckBlocks says what keeps clients from getting blocks of a size: a quota is
// so many whole ones, and the leases have at least one. Size 0: no blocks.
func CheckBlocks(leases []Range, quota, size int) error {
	switch {
	case size == 0:
	case quota%size != 0:
		return fmt.Errorf("a quota of %d ports is not a multiple of a block of %d", quota, size)
	case countBlocks(leases, size) == 0:
		return fmt.Errorf("a block of %d ports is larger than every range of leases", size)
	}
	return nil
}

func countBlocks(ranges []Range, size int) int {
	n := 0
	for _, r := range ranges {
		n += r.size() / size
	}
	return n
}

// nthBlock is the lowest port of a block by its number.
func nthBlock(ranges []Range, size, i int) int {
	for _, r := range ranges {
		n := r.size() / size
		if i < n {
			return int(r.Lo) + i*size
		}
		i -= n
	}
	return 0
}

// blockOf is the lowest port of the block that a port is in; false: it is in
// none.
func (a *Allocator) blockOf(port int) (int, bool) {
	for _, r := range a.c.Leases {
		if size := a.c.Block; int(r.Lo) <= port && port <= int(r.Hi) {
			lo := port - (port-int(r.Lo))%size
			return lo, lo+size-1 <= int(r.Hi)
		}
	}
	return 0, false
}

// blockAt is the block of somebody that a port is in, or nil.
func (a *Allocator) blockAt(addr netip.Addr, port int) *block {
	if a.c.Block == 0 {
		return nil
	}
	lo, ok := a.blockOf(port)
	if !ok {
		return nil
	}
	return a.blocks[blockKey{addr, uint16(lo)}]
}

// mayHaveBlock says whether n ports from one on lie in one block that is a
// client's or can become so.
func (a *Allocator) mayHaveBlock(c *client, addr netip.Addr, port, n int) error {
	lo, ok := a.blockOf(port)
	if !ok || port+n-1 > lo+a.c.Block-1 {
		return fmt.Errorf("port %d: %w", port, ErrUnavailable)
	}
	switch b := a.blocks[blockKey{addr, uint16(lo)}]; {
	case b != nil && b.client != c:
		return fmt.Errorf("port %d is in a block of another: %w", port, ErrLeased)
	case b == nil && !a.moreBlocks(c, addr):
		return ErrQuota
	}
	return nil
}

// moreBlocks says whether a client may have one more block of an address.
func (a *Allocator) moreBlocks(c *client, addr netip.Addr) bool {
	return !c.limited() || (len(c.blocksOf(addr))+1)*a.c.Block <= a.c.Quota
}

func (c *client) blocksOf(addr netip.Addr) []*block {
	var list []*block
	for _, b := range c.blocks {
		if b.addr == addr {
			list = append(list, b)
		}
	}
	return list
}

// inBlocks looks in the client's blocks, first for a fresh port, then for one
// that rests, and at last in a block more.
func (f search) inBlocks() (int, error) {
	a := f.a
	if f.r.N > a.c.Block {
		return 0, ErrExhausted
	}
	var spans []Range
	for _, b := range f.c.blocksOf(f.s.addr) {
		spans = append(spans, a.blockRange(b.lo))
	}
	if len(spans) > 0 {
		// Runs do not go from one block into the next one.
		wants := f.wants(spans)
		if port, ok := f.fresh(wants); ok {
			return port, nil
		}
		if port, ok := f.own(wants); ok {
			return port, nil
		}
	}
	if !a.moreBlocks(f.c, f.s.addr) {
		return 0, ErrQuota
	}
	return f.inFreeBlock()
}

// inFreeBlock looks in the blocks that are nobody's, from a random one on. One
// is passed over only where all that would do is busy.
func (f search) inFreeBlock() (int, error) {
	a := f.a
	total := countBlocks(a.c.Leases, a.c.Block)
	first := rand.IntN(total)
	for i := range total {
		lo := uint16(nthBlock(a.c.Leases, a.c.Block, (first+i)%total))
		if a.blocks[blockKey{f.s.addr, lo}] != nil {
			continue
		}
		if port, ok := f.fresh(f.wants([]Range{a.blockRange(lo)})); ok {
			return port, nil
		}
	}
	return 0, ErrExhausted
}

func (a *Allocator) blockRange(lo uint16) Range { return Range{lo, lo + uint16(a.c.Block-1)} }

// useBlock counts a port that a client takes in its block, which becomes its
// with the first one.
func (a *Allocator) useBlock(c *client, addr netip.Addr, port int) {
	if a.c.Block == 0 {
		return
	}
	lo, ok := a.blockOf(port)
	if !ok {
		return
	}
	k := blockKey{addr, uint16(lo)}
	b := a.blocks[k]
	if b == nil {
		b = &block{client: c, blockKey: k}
		a.blocks[k] = b
		c.blocks = append(c.blocks, b)
		a.tell(b, false)
	}
	b.used++
}

// leaveBlock counts a port that has become free.
func (a *Allocator) leaveBlock(addr netip.Addr, port int) {
	b := a.blockAt(addr, port)
	if b == nil {
		return
	}
	if b.used--; b.used == 0 {
		delete(a.blocks, b.blockKey)
		b.client.blocks = slices.DeleteFunc(b.client.blocks, func(x *block) bool { return x == b })
		a.tell(b, true)
	}
}

func (a *Allocator) tell(b *block, returned bool) {
	if a.c.OnBlock != nil {
		a.events = append(a.events, BlockEvent{b.client.holder, b.addr, a.blockRange(b.lo), returned})
	}
}
