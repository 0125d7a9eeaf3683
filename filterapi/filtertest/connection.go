package filtertest

import (
	"fmt"
	"net/netip"
	"sync"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// connection is the connection object of a flow.
type connection struct {
	flow *Flow

	mu       sync.Mutex
	handling bool // inside the event's handler
	pumping  bool
	denied   bool
	filters  []attached
	buffer   int
}

type attached struct {
	filter   filterapi.DataFilter
	priority filterapi.Priority
}

func (c *connection) Session() filterapi.Session { return c.flow.session }
func (c *connection) Tuple() flow.Tuple          { return c.flow.tuple }

func (c *connection) AttachDataFilter(f filterapi.DataFilter, prio filterapi.Priority) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !c.handling:
		return filterapi.ErrBadContext
	case f == nil, prio < filterapi.PriorityNAT, prio > filterapi.PriorityEmulation:
		return filterapi.ErrInvalidArgument
	}
	c.filters = append(c.filters, attached{f, prio})
	return nil
}

func (c *connection) Deny() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.handling {
		return filterapi.ErrBadContext
	}
	c.denied = true
	return nil
}

func (c *connection) ExternalName() (netip.AddrPort, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.pumping {
		return netip.AddrPort{}, filterapi.ErrBadContext
	}
	g, src := c.flow.gateway, c.flow.tuple.Src
	if g.Routed || src.Addr().Is6() {
		return src, nil
	}
	return netip.AddrPortFrom(g.External, src.Port()), nil
}

func (c *connection) ExternalPeer() (netip.AddrPort, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.pumping {
		return netip.AddrPort{}, filterapi.ErrBadContext
	}
	return c.flow.tuple.Dst, nil
}

func (c *connection) SetIPFilter(*filterapi.IPFilter) error { return filterapi.ErrNotSupported }
func (c *connection) IPFilter() *filterapi.IPFilter         { return nil }

func (c *connection) SetBufferSize(n int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !c.handling:
		return filterapi.ErrBadContext
	case n <= 0:
		return filterapi.ErrInvalidArgument
	}
	c.buffer = n
	return nil
}

func (c *connection) Kill() { c.flow.kill() }

// bound is the connection object of a bind.
type bound struct{ p *permission }

func (b *bound) Session() filterapi.Session { return b.p.session }

func (b *bound) Tuple() flow.Tuple {
	return flow.Tuple{Proto: b.p.proto, Dst: b.p.external}
}

func (b *bound) AttachDataFilter(filterapi.DataFilter, filterapi.Priority) error {
	return filterapi.ErrBadContext
}
func (b *bound) Deny() error                           { return filterapi.ErrBadContext }
func (b *bound) SetBufferSize(int) error               { return filterapi.ErrBadContext }
func (b *bound) ExternalName() (netip.AddrPort, error) { return b.p.external, nil }
func (b *bound) ExternalPeer() (netip.AddrPort, error) {
	return netip.AddrPort{}, filterapi.ErrBadContext
}
func (b *bound) Kill() { b.p.end(Killed) }

func (b *bound) SetIPFilter(f *filterapi.IPFilter) error {
	g := b.p.gateway
	g.mu.Lock()
	gone, name := b.p.gone, b.p.external
	g.mu.Unlock()
	if gone {
		return fmt.Errorf("filter of bind %s: %w", name, filterapi.ErrTerminating)
	}
	g.journal.add(Entry{Asked, fmt.Sprintf("filter of %s", name)})
	g.acknowledge()
	g.mu.Lock()
	defer g.mu.Unlock()
	if b.p.gone {
		return fmt.Errorf("filter of bind %s: %w", name, filterapi.ErrTerminating)
	}
	b.p.sources = f.Clone()
	b.p.startTimer()
	g.journal.add(Entry{Armed, b.p.String()})
	return nil
}

func (b *bound) IPFilter() *filterapi.IPFilter {
	b.p.gateway.mu.Lock()
	defer b.p.gateway.mu.Unlock()
	return b.p.sources.Clone()
}
