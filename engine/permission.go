package engine

import (
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/nat"
)

// forSocketsAlone says that the client's own flows have no use of it: it is of
// a private session, for that session's sockets.
func (p *permission) forSocketsAlone() bool {
	return p.session.private && !p.inbound() && !p.near.isValid() && !p.addressBased
}

// inbound says whether it is a bind; what it lets in goes to a client, or to a
// socket of the gateway's that serves a client.
func (p *permission) inbound() bool { return p.direction != nat.Outbound }

// atSocket says whether its end is a socket of the gateway.
func (p *permission) atSocket() bool { return p.direction == nat.Local }

func (p *permission) ipFilter() *filterapi.IPFilter {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.bind.filter.Clone()
}

// shut says whether a bind lets nobody in, whatever its filter says. p.mu is
// held.
func (p *permission) shut() bool {
	return p.bind != nil && (p.bind.awaiting || p.bind.discarding || p.bind.yields)
}

// isEmulated says whether a filter plays the gateway's end, so that nothing is
// opened. p.mu is held.
func (p *permission) isEmulated() bool { return p.bind != nil && p.bind.emulated }

// oneWay says whether its client's answers are dropped. p.mu is held.
func (p *permission) oneWay() bool { return p.bind != nil && p.bind.oneWay }

// mapping is that whose address a bind has, or borrows; nil: none.
func (p *permission) mapping() *mapping {
	if p.bind == nil {
		return nil
	}
	return p.bind.mapping
}

// borrows says whether a bind has the address of a mapping of its client's.
func (p *permission) borrows() bool { return p.bind != nil && p.bind.borrows }

// object is a bind as filters know it; nil: it is none.
func (p *permission) object() *connection {
	if p.bind == nil {
		return nil
	}
	return p.bind.object
}

// publication is the rule that has published it; empty: a call made it.
func (p *permission) publication() string {
	if p.bind == nil {
		return ""
	}
	return p.bind.publication
}

func (p *permission) currentBasis() basis {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.basisLocked()
}

func (p *permission) currentStanding() standing {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.judgement().standing
}

// carriage is how user space is to carry a flow: whether it must, and what
// the client's answers and bursts of datagrams get.
func (p *permission) carriage() (mustUser, oneWay, deep bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	oneWay = p.oneWay()
	return p.is.has(forced) || oneWay, oneWay, p.is.has(burst)
}

// admits says whether a flow may come in now. wasIn: the kernel says that it
// has, by what was in force a moment ago. p.mu is held.
func (p *permission) admits(src netip.Addr, wasIn bool) bool {
	if p.shut() {
		return false
	}
	if wasIn {
		return p.state != permVoid || p.is.has(late)
	}
	return p.state == permWaiting && !p.isEmulated() && !p.forSocketsAlone() && (!p.inbound() || p.bind.filter.Includes(src))
}

// wanted is what the kernel is to hold, and the permission in that form. p.mu
// is held.
func (p *permission) wanted() (inKernel, nat.Permission) {
	out := p.form()
	if p.is.has(fixed) {
		out.Timeout = p.left()
	}
	out.OneWay = out.OneWay && !out.ToUser // else user space sees to it
	if p.atSocket() {
		// Whoever has the socket sees to all that, and counts the uses: a peer
		// whose handshake never ends uses up nothing.
		out.OneWay, out.ToUser, out.Multiple = false, false, true
	}
	if !p.is.has(granted) || p.isEmulated() || p.forSocketsAlone() {
		return holdsNothing, out
	}
	if p.state == permWaiting && !p.shut() && (!p.inbound() || out.AnySource || len(out.Sources) > 0) {
		return holdsOpening, out
	}
	if p.living() == 0 || p.atSocket() {
		return holdsNothing, out
	}
	// Nobody new comes in. What a flow on its way may need stays.
	out.Timeout, out.Leaves = 0, ""
	switch {
	case p.is.has(toUser) && !p.inbound() && p.use.pending > p.use.severed:
		// A first packet that is sent again finds the way to the one that user
		// space holds; user space refuses all others.
		return holdsWhatItHas, out
	case p.inbound() && (out.External != out.Client || out.FromGateway):
		out.Sources, out.AnySource = nil, false
		return holdsTranslation, out
	case out.Via.IsValid():
		out.Client = netip.AddrPort{} // and others are still told no
		return holdsTranslation, out
	case p.use.flows <= p.use.severed:
		return holdsNothing, out
	case out.Source.IsValid() && p.state == permUsed:
		return holdsWhatItHas, out
	}
	return holdsNothing, out
}

// over says that nothing will come of the permission any more. p.mu is held.
func (p *permission) over() bool { return p.state != permWaiting && p.living() == 0 && !p.is.has(late) }

// end moves a waiting permission on to used or void; false: it waits no more.
func (p *permission) end(to permState) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.endLocked(to)
}

func (p *permission) endLocked(to permState) bool {
	if p.state != permWaiting {
		return false
	}
	p.state, p.expiry = to, 0
	p.is.set(late, to == permVoid)
	p.session.e.deadlines.stop(p)
	if p.bind != nil && p.bind.gone != nil {
		close(p.bind.gone)
	}
	return true
}

// expires is when it ends unless it is used; false: it does not by itself. p.mu
// is held.
func (p *permission) expires() (time.Time, bool) {
	if p.expiry == 0 {
		return time.Time{}, false
	}
	return p.session.e.deadlines.time(p.expiry), true
}

// left is the time until a fixed expiry; 0: it has none. p.mu is held.
func (p *permission) left() time.Duration {
	if p.expiry == 0 {
		return 0
	}
	at, _ := p.expires()
	return max(at.Sub(p.session.e.now()), time.Millisecond) // then its deadline is at once
}

// setFilter says who may come in. p.mu is held.
func (b *bind) setFilter(f *filterapi.IPFilter) {
	b.filter, b.anySource, b.sources = f, f == nil, f.Prefixes()
}
