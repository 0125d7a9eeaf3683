package filtertest

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/filterapi"
)

func (c *connection) SetIPFilter(f *filterapi.IPFilter) error {
	if c.bind == nil || c.emulated {
		return filterapi.ErrNotSupported
	}
	g, p := c.gateway, c.bind
	if !suits(f, c.session.addr) {
		return fmt.Errorf("filter of bind %s: %w", p.external, filterapi.ErrInvalidArgument)
	}
	if p.isGone() {
		return fmt.Errorf("filter of bind %s: %w", p.external, filterapi.ErrTerminating)
	}
	g.journal.add(Entry{Asked, fmt.Sprintf("filter of %s", p.external)})
	g.acknowledge()
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.gone {
		return fmt.Errorf("filter of bind %s: %w", p.external, filterapi.ErrTerminating)
	}
	p.sources = f.Clone()
	p.startTimer()
	g.journal.add(Entry{Armed, p.String()})
	return nil
}

func (c *connection) IPFilter() *filterapi.IPFilter {
	if c.bind == nil {
		return nil
	}
	c.gateway.mu.Lock()
	defer c.gateway.mu.Unlock()
	return c.bind.sources.Clone()
}

func (c *connection) SetClientAddress(client netip.AddrPort) error {
	g, p := c.gateway, c.bind
	switch {
	case p == nil, !goodClient(c.session, client):
		return fmt.Errorf("client address %v: %w", client, filterapi.ErrInvalidArgument)
	case !reaches(g, p.ask.Flags, client.Addr(), c.session.addr):
		return fmt.Errorf("client address %v: %w", client, filterapi.ErrPolicyDenied)
	}
	g.mu.Lock()
	set, gone := p.client.IsValid(), p.gone
	if !set && !gone {
		p.client = client
	}
	g.mu.Unlock()
	switch {
	case gone:
		return fmt.Errorf("client address of bind %s: %w", p.external, filterapi.ErrTerminating)
	case set:
		return fmt.Errorf("client address of bind %s is set: %w", p.external, filterapi.ErrInvalidArgument)
	}
	g.journal.add(Entry{Asked, fmt.Sprintf("client of %s", p.external)})
	g.acknowledge()
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.gone {
		return fmt.Errorf("client address of bind %s: %w", p.external, filterapi.ErrTerminating)
	}
	p.waiting = false
	g.journal.add(Entry{Bound, p.String()})
	return nil
}

func (c *connection) SetExpiry(d time.Duration) error {
	g, p := c.gateway, c.bind
	switch {
	case p == nil:
		return fmt.Errorf("set expiry: %w", filterapi.ErrNotSupported)
	case d < 0:
		return fmt.Errorf("set expiry %v: %w", d, filterapi.ErrInvalidArgument)
	case p.isGone():
		return fmt.Errorf("expiry of bind %s: %w", p.external, filterapi.ErrTerminating)
	}
	g.journal.add(Entry{Asked, fmt.Sprintf("expiry of %s", p.external)})
	g.acknowledge()
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.gone {
		return fmt.Errorf("expiry of bind %s: %w", p.external, filterapi.ErrTerminating)
	}
	p.fixed = true
	p.expireAfter(d)
	g.journal.add(Entry{Dated, fmt.Sprintf("%s for %v", p, d)})
	return nil
}

func (c *connection) Expiry() (time.Time, bool) {
	if c.bind == nil {
		return time.Time{}, false
	}
	c.gateway.mu.Lock()
	defer c.gateway.mu.Unlock()
	return c.bind.expiry, !c.bind.expiry.IsZero()
}
