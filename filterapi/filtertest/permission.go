package filtertest

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// permission is one future connect or one bind, from the call to its end. All
// fields are guarded by Gateway.mu.
type permission struct {
	gateway  *Gateway
	session  *session
	proto    flow.Proto
	client   netip.AddrPort // for a future connect the port is 0
	target   netip.AddrPort // of a future connect
	external netip.AddrPort // of a bind
	sources  *filterapi.IPFilter
	multiple bool
	expiry   time.Duration
	timer    *time.Timer
	live     bool // the kernel has acknowledged it
	gone     bool
}

func (p *permission) bind() bool { return p.external.IsValid() }

func (p *permission) String() string {
	if !p.bind() {
		return fmt.Sprintf("%s %s > %s", p.proto, p.client.Addr(), p.target)
	}
	from := "everybody"
	if p.sources != nil {
		from = fmt.Sprint(hosts(p.sources))
	}
	return fmt.Sprintf("%s %s > %s from %s", p.proto, p.external, p.client, from)
}

// hosts are the sources of a filter; a range is its prefix.
func hosts(f *filterapi.IPFilter) []string {
	out := []string{}
	for _, p := range f.Prefixes() {
		if p.IsSingleIP() {
			out = append(out, p.Addr().String())
		} else {
			out = append(out, p.String())
		}
	}
	return out
}

// startTimer (re)starts the expiry of a permission. Gateway.mu is held.
func (p *permission) startTimer() {
	if p.expiry == 0 {
		return
	}
	if p.timer != nil {
		p.timer.Stop()
	}
	p.timer = time.AfterFunc(p.expiry, func() { p.end(Expired) })
}

// end closes the permission once; false: it was gone.
func (p *permission) end(how What) bool {
	g := p.gateway
	g.mu.Lock()
	if p.gone {
		g.mu.Unlock()
		return false
	}
	p.endLocked()
	text := p.String()
	g.mu.Unlock()
	g.journal.add(Entry{how, text})
	return true
}

func (p *permission) endLocked() {
	p.gone = true
	if p.timer != nil {
		p.timer.Stop()
	}
	g := p.gateway
	g.living = slices.DeleteFunc(g.living, func(q *permission) bool { return q == p })
}

// action is what AllowFutureConnect returns.
type action struct{ p *permission }

func (a action) Cancel() error {
	if !a.p.end(Cancelled) {
		return filterapi.ErrTerminating
	}
	return nil
}

// Dial uses a future connect, as a client's secondary connection does: true if
// it is let through. It is always decided without waiting.
func (g *Gateway) Dial(proto flow.Proto, client netip.Addr, target netip.AddrPort) bool {
	return g.use(proto, func(p *permission) bool {
		return !p.bind() && p.client.Addr() == client && p.target == target
	}) != nil
}

// Arrive uses a bind, as a connection from source to an external address does:
// where it is sent, and whether it is let in.
func (g *Gateway) Arrive(proto flow.Proto, source netip.Addr, external netip.AddrPort) (client netip.AddrPort, in bool) {
	p := g.use(proto, func(p *permission) bool {
		return p.external == external && p.sources.Includes(source)
	})
	if p == nil {
		return netip.AddrPort{}, false
	}
	return p.client, true
}

func (g *Gateway) use(proto flow.Proto, fits func(*permission) bool) *permission {
	g.mu.Lock()
	i := slices.IndexFunc(g.living, func(p *permission) bool { return p.live && p.proto == proto && fits(p) })
	if i < 0 {
		g.mu.Unlock()
		return nil
	}
	p := g.living[i]
	text := p.String()
	if !p.multiple {
		p.endLocked()
	}
	g.mu.Unlock()
	if !p.multiple {
		g.journal.add(Entry{Used, text})
	}
	return p
}

// Open lists the permissions in force, reserved ones included.
func (g *Gateway) Open() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := []string{}
	for _, p := range g.living {
		if p.live {
			out = append(out, p.String())
		}
	}
	return out
}
