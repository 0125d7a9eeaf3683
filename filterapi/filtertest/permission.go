package filtertest

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// kind is what a permission is for.
type kind uint8

const (
	outbound   kind = iota // a future connect
	inbound                // a bind
	redirected             // an inside address that leads to a target
)

// permission is one address that a call opened, from the call to its end. What
// changes is guarded by Gateway.mu.
type permission struct {
	gateway *Gateway
	session *session
	primary *connection // nil: none
	object  *connection // of a bind
	kind    kind
	ask     filterapi.Negotiated

	client   netip.AddrPort // the port of an outbound one is 0
	target   netip.AddrPort // of an outbound or redirected one
	via      netip.AddrPort // of a redirected one
	external netip.AddrPort // of a bind
	source   netip.AddrPort // the asked external address of the others
	leased   bool
	toUser   bool // flows go through user space
	explicit bool // a client made the bind, not the filter

	sources    *filterapi.IPFilter
	discarding bool
	waiting    bool // for a client address
	oneWay     bool // the client may not answer
	timer      *time.Timer
	expiry     time.Time // zero: none
	fixed      bool      // it stays, whatever is set later
	live       bool      // the kernel has acknowledged it
	opened     bool      // it was live
	emulated   bool      // a filter plays the bind: nothing is open
	gone       bool
	flows      int // living ones
}

func (g *Gateway) newPermission(s *session, k kind, n filterapi.Negotiated, primary *connection) *permission {
	return &permission{
		gateway: g, session: s, primary: primary, kind: k, ask: n,
		toUser: n.Flags&filterapi.NoKernelMode != 0,
		oneWay: k == inbound && n.Proto == flow.UDP && n.Flags&filterapi.Bidirectional == 0,
	}
}

func (p *permission) multiple() bool { return p.ask.Flags&filterapi.AllowMultiple != 0 }

func (p *permission) String() string {
	switch p.kind {
	case outbound:
		return fmt.Sprintf("%s %s > %s%s", p.ask.Proto, p.client.Addr(), p.target, p.asSource())
	case redirected:
		return fmt.Sprintf("%s %s > %s > %s%s", p.ask.Proto, p.client.Addr(), p.via, p.target, p.asSource())
	}
	from, to := "everybody", p.client.String()
	if p.sources != nil {
		from = fmt.Sprint(hosts(p.sources))
	}
	if p.waiting {
		to = "nobody yet"
	}
	return fmt.Sprintf("%s %s > %s from %s", p.ask.Proto, p.external, to, from)
}

func (p *permission) asSource() string {
	if !p.source.IsValid() {
		return ""
	}
	return fmt.Sprintf(" as %s", p.source)
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
	if p.ask.Flags&filterapi.Timeout == 0 || p.fixed {
		return
	}
	d := p.ask.Expiry
	if d == 0 {
		d = filterapi.DefaultTimeout
	}
	p.expireAfter(d)
}

// expireAfter sets the clock; 0 stops it. Gateway.mu is held.
func (p *permission) expireAfter(d time.Duration) {
	if p.timer != nil {
		p.timer.Stop()
	}
	p.timer, p.expiry = nil, time.Time{}
	if d == 0 {
		return
	}
	p.expiry = time.Now().Add(d)
	var mine *time.Timer
	mine = time.AfterFunc(d, func() {
		p.gateway.mu.Lock()
		current := p.timer == mine // else it was started anew while it fired
		p.gateway.mu.Unlock()
		if current {
			p.end(Expired)
		}
	})
	p.timer = mine
}

func (p *permission) isGone() bool {
	p.gateway.mu.Lock()
	defer p.gateway.mu.Unlock()
	return p.gone
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
	p.ended(how, text)
	return true
}

// ended says what has come of a permission.
func (p *permission) ended(how What, text string) {
	p.gateway.journal.add(Entry{how, text})
	if p.object != nil {
		p.gateway.terminating(p.object)
	}
}

// endLocked takes the permission out of force. Gateway.mu is held.
func (p *permission) endLocked() {
	p.gone, p.live, p.expiry = true, false, time.Time{}
	if p.timer != nil {
		p.timer.Stop()
	}
	g := p.gateway
	g.living = slices.DeleteFunc(g.living, func(q *permission) bool { return q == p })
	p.freeLocked()
}

// freeLocked gives a leased address back when nothing needs it any more.
// Gateway.mu is held.
func (p *permission) freeLocked() {
	if !p.gone || p.flows > 0 {
		return
	}
	g := p.gateway
	for l, owner := range g.leases {
		if owner != p {
			continue
		}
		delete(g.leases, l)
		if p.kind == redirected && p.opened {
			g.retired[l] = time.Now()
		}
	}
}

// refusing is how long the inside address of a redirection that is over still
// refuses whoever connects to it.
const refusing = 2 * time.Minute

// action is what cancels a permission.
type action struct{ p *permission }

func (a action) Cancel() error {
	if !a.p.end(Cancelled) {
		return filterapi.ErrTerminating
	}
	return nil
}

// Open lists the permissions in force, reserved ones included.
func (g *Gateway) Open() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := []string{}
	for _, p := range g.living {
		if p.live && !p.emulated {
			out = append(out, p.String())
		}
	}
	return out
}
