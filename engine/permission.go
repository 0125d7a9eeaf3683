package engine

import (
	"net/netip"
	"sync"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// permission is what one call permits: one AllowFutureConnect, one target of a
// RedirectConnections or one client's address of a BindForClient.
//
//	waiting for an address --SetClientAddress---+
//	discarding --RetroactiveAllowBind-----------+
//	reserved --SetIPFilter----------------------+--> armed --first flow--> used
//	    |                                              |
//	    +----------------cancel, expiry----------------+--> void
//
// A bind is armed when nothing of what stands on the left is left to do. A
// single-use permission is used up by its first flow; what it holds (a leased
// port, the translation map's element) is given back when that flow has ended.
// One that allows many flows stays armed. A void one waits a moment for
// reports of flows that the kernel let in before.
//
// The state changes first, under mu, and enforce brings the kernel after it.
type permission struct {
	nat.Permission
	session *session
	primary *connection     // nil: there was none
	object  *connection     // of a bind
	lease   netip.AddrPort  // what comes from the allocator
	reach   filterapi.Flags // how far the client's address may be from the session's
	notify  *hearer         // hears of established flows; nil: nobody
	context any             // for it

	publication  string        // the rule that publishes; empty: a call made it
	addressBased bool          // it belongs to the client's address, not to the session
	deepen       func()        // makes room for a burst at its socket; nil: it has none, or no need
	gone         chan struct{} // closed when a bind whose end is a socket of the gateway lets nobody in any more; nil: another one

	mapping *mapping // that it is, or whose address it borrows; nil: none
	borrows bool

	by string // the filter that asked for it; else what of the configuration

	change   sync.Mutex // held across kernel changes of this permission
	inKernel inKernel   // under change
	freed    bool       // the leased port was returned; under change
	opened   bool       // the kernel has been asked to let flows in; under change
	watched  bool       // the kernel reports established flows for it; under change

	mu         sync.Mutex
	granted    bool // the call may open it: filters and the quota have had their say
	basis      basis
	standing   standing
	state      permState
	late       bool                     // void a moment ago: the kernel's word of earlier flows counts
	flows      int                      // living flows that it let in
	severed    int                      // those that were cut
	unsettled  int                      // those that are not established yet
	pending    int                      // those whose first packet user space holds
	early      map[flow.Tuple]time.Time // established, and not known yet
	filter     *filterapi.IPFilter
	awaiting   bool      // a bind without a client's address
	discarding bool      // a bind that nobody has allowed yet
	yields     bool      // a mapping's, to the bind that borrows its address
	forced     bool      // its flows stay in user space
	burst      bool      // a burst of datagrams waits for user space
	emulated   bool      // a bind that a filter emulates: nothing is opened
	openSince  time.Time // when the kernel first let flows in; zero: never
	openUntil  time.Time // and when no more; zero: it does
	timer      *time.Timer
	expiry     time.Time // zero: none
	fixed      bool      // it stays, whatever is set later

	counted bool // against the client's quota; under permissions.mu
}

type permState uint8

const (
	permWaiting permState = iota // reserved or armed
	permUsed
	permVoid
)

// inKernel is what the kernel holds of a permission.
type inKernel uint8

const (
	holdsNothing inKernel = iota
	holdsTranslation
	holdsOpening
	holdsWhatItHas // no change: a packet on its way may still need it
	holdsUnknown   // a change failed
)

// forSocketsAlone says that the client's own flows have no use of it: it is of
// a private session, for that session's sockets.
func (p *permission) forSocketsAlone() bool {
	return p.session.private && p.Direction == nat.Outbound && !p.Via.IsValid() && !p.addressBased
}

// inbound says whether it is a bind; what it lets in goes to a client, or to a
// socket of the gateway's that serves a client.
func (p *permission) inbound() bool { return p.Direction != nat.Outbound }

// atSocket says whether its end is a socket of the gateway.
func (p *permission) atSocket() bool { return p.Direction == nat.Local }

func (p *permission) ipFilter() *filterapi.IPFilter {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.filter.Clone()
}

// shut says whether a bind lets nobody in, whatever its filter says. p.mu is
// held.
func (p *permission) shut() bool { return p.awaiting || p.discarding || p.yields }

func (p *permission) currentBasis() basis {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.basis
}

func (p *permission) currentStanding() standing {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.standing
}

// carriage is how user space is to carry a flow: whether it must, and what
// the client's answers and bursts of datagrams get.
func (p *permission) carriage() (forced, oneWay, burst bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.forced || p.OneWay, p.OneWay, p.burst
}

// admits says whether a flow may come in now. late: the kernel says that it
// has, by what was in force a moment ago. p.mu is held.
func (p *permission) admits(src netip.Addr, late bool) bool {
	if p.shut() {
		return false
	}
	if late {
		return p.state != permVoid || p.late
	}
	return p.state == permWaiting && !p.emulated && !p.forSocketsAlone() && (!p.inbound() || p.filter.Includes(src))
}

// wanted is what the kernel is to hold, and the permission in that form. p.mu
// is held.
func (p *permission) wanted() (inKernel, nat.Permission) {
	out := p.Permission
	if p.fixed {
		out.Timeout = p.left()
	}
	out.OneWay = p.OneWay && !p.ToUser // else user space sees to it
	if p.atSocket() {
		// Whoever has the socket sees to all that, and counts the uses: a peer
		// whose handshake never ends uses up nothing.
		out.OneWay, out.ToUser, out.Multiple = false, false, true
	}
	if !p.granted || p.emulated || p.forSocketsAlone() {
		return holdsNothing, out
	}
	if p.state == permWaiting && !p.shut() && (!p.inbound() || p.AnySource || len(p.Sources) > 0) {
		return holdsOpening, out
	}
	if p.flows == 0 || p.atSocket() {
		return holdsNothing, out
	}
	// Nobody new comes in. What a flow on its way may need stays.
	out.Timeout, out.Leaves = 0, ""
	switch {
	case p.ToUser && !p.inbound() && p.pending > p.severed:
		// A first packet that is sent again finds the way to the one that user
		// space holds; user space refuses all others.
		return holdsWhatItHas, out
	case p.inbound() && (p.External != p.Client || p.FromGateway):
		out.Sources, out.AnySource = nil, false
		return holdsTranslation, out
	case p.Via.IsValid():
		out.Client = netip.AddrPort{} // and others are still told no
		return holdsTranslation, out
	case p.flows <= p.severed:
		return holdsNothing, out
	case p.Source.IsValid() && p.state == permUsed:
		return holdsWhatItHas, out
	}
	return holdsNothing, out
}

// over says that nothing will come of the permission any more. p.mu is held.
func (p *permission) over() bool { return p.state != permWaiting && p.flows == 0 && !p.late }

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
	p.state, p.late, p.expiry = to, to == permVoid, time.Time{}
	if p.timer != nil {
		p.timer.Stop()
	}
	if p.gone != nil {
		close(p.gone)
	}
	return true
}

// left is the time until a fixed expiry; 0: it has none. p.mu is held.
func (p *permission) left() time.Duration {
	if p.expiry.IsZero() {
		return 0
	}
	return max(p.expiry.Sub(p.session.e.now()), time.Millisecond) // then its timer fires at once
}

func (p *permission) setSources(f *filterapi.IPFilter) {
	p.AnySource, p.Sources = f == nil, f.Prefixes()
}
