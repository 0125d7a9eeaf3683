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
//
// There may be very many that wait, so the record has nothing but what differs
// between two of them, in 112 bytes (a size class of Go's allocator): what they
// have in common is their ground, what only binds have is in bind, and what
// begins with the first flow is in use.
type permission struct {
	*ground       // never another one, never changed
	bind    *bind // nil: it is none; never another one

	mu     sync.Mutex
	change sync.Mutex // held across kernel changes of this permission

	id  uint64
	use *usage // nil: no flow has come, and it has not been closed; under mu

	openSince int64 // when the kernel first let flows in, by the Unix clock, ns; 0: never; under mu
	expiry    int64 // as deadline.at; 0: it has none; under mu

	ends // those of a bind change under permissions.mu and mu together

	due    int32        // its place among the deadlines, from 1; 0: none; under deadlines.mu
	state  permState    // under mu
	is     conditions   // under mu
	holds  inKernel     // under change
	did    kernelEvents // under change
	leased bool         // an end that is the gateway's comes from the allocator
	listed bool         // it counts against the client's quota; under permissions.mu
}

// ground is what the permissions that are asked for in the same way have in
// common. It never changes.
type ground struct {
	session      *session
	primary      *connection // nil: there was none
	direction    nat.Direction
	proto        flow.Proto
	multiple     bool
	addressBased bool            // it belongs to the client's address, not to the session
	reach        filterapi.Flags // how far the client's address may be from the session's
	timeout      time.Duration   // 0: it has none
	source       netip.AddrPort  // the gateway's address that its flows leave from; invalid: any

	judged  judged  // at the call
	notify  *hearer // hears of established flows; nil: nobody
	context any     // for it
	by      string  // the filter that asked for it; else what of the configuration
}

// judged is what the rules are asked about a permission, and what they said.
type judged struct {
	basis basis
	// aimed: basis lacks its destination, which is the permission's target.
	aimed bool
	standing
}

// noKernelMode says whether the rule, if there is one, wants flows in user space.
func (s standing) noKernelMode() bool { return s.rule != nil && s.rule.NoKernelMode }

// ends are the two addresses of a permission beside the client's own.
type ends struct {
	// far is the target of an outbound one, else the external address; invalid:
	// it waits for its client's.
	far compactAddr
	// near is the gateway's address that leads to the target, or invalid; else
	// where a bind's flows are sent to, or invalid as long as that is not known.
	near compactAddr
}

// compactAddr is an address and port in half of the room of a netip.AddrPort. The
// zero value is the zero AddrPort.
type compactAddr struct {
	addr [16]byte // of IPv4 in the form of RFC 4291, section 2.5.5.2
	port uint16
}

func compactOf(a netip.AddrPort) compactAddr {
	if !a.Addr().IsValid() {
		return compactAddr{}
	}
	return compactAddr{a.Addr().As16(), a.Port()}
}

func (x compactAddr) addrPort() netip.AddrPort {
	if !x.isValid() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(netip.AddrFrom16(x.addr).Unmap(), x.port)
}

func (x compactAddr) isValid() bool { return x.addr != [16]byte{} }

// bind is what only a bind has.
type bind struct {
	object      *connection
	publication string // the rule that publishes; empty: a call made it
	leaves      string // the network rule by which its client leaves from its address; empty: none
	fromGateway bool
	mapping     *mapping // that it is, or whose address it borrows; nil: none
	borrows     bool
	deepen      func()        // makes room for a burst at its socket; nil: it has none, or no need
	gone        chan struct{} // closed when a bind whose end is a socket of the gateway lets nobody in any more; nil: another one

	// Under the permission's mu.
	allowed    *judged // when it was allowed; nil: at the call
	filter     *filterapi.IPFilter
	sources    []netip.Prefix // those of filter
	anySource  bool
	oneWay     bool
	awaiting   bool // it has no client's address
	discarding bool // nobody has allowed it yet
	yields     bool // a mapping's, to the bind that borrows its address
	emulated   bool // a filter plays the gateway's end: nothing is opened
}

// usage is what there is of a permission from its first flow on, or its end.
type usage struct {
	flows     int                      // living flows that it let in
	severed   int                      // those that were cut
	unsettled int                      // those that are not established yet
	pending   int                      // those whose first packet user space holds
	early     map[flow.Tuple]time.Time // established, and not known yet
	openUntil int64                    // when the kernel let no more in, as openSince; 0: it does
}

type permState uint8

const (
	permWaiting permState = iota // reserved or armed
	permUsed
	permVoid
)

// conditions of a permission, beside its state.
type conditions uint8

const (
	granted conditions = 1 << iota // the call may open it: filters and the quota have had their say
	late                           // void a moment ago: the kernel's word of earlier flows counts
	forced                         // its flows stay in user space
	toUser                         // they come to user space
	fixed                          // its expiry stays, whatever is set later
	burst                          // a burst of datagrams waits for user space
)

func (c conditions) has(x conditions) bool { return c&x != 0 }

func (c *conditions) set(x conditions, on bool) {
	*c &^= x
	if on {
		*c |= x
	}
}

// inKernel is what the kernel holds of a permission.
type inKernel uint8

const (
	holdsNothing inKernel = iota
	holdsTranslation
	holdsOpening
	holdsWhatItHas // no change: a packet on its way may still need it
	holdsUnknown   // a change failed
)

// kernelEvents are what the kernel was asked about a permission.
type kernelEvents uint8

const (
	wasOpened  kernelEvents = 1 << iota // to let flows in
	isWatched                           // to report established flows
	wasAllDone                          // nothing more; its port was returned
)

// judgement is that in force. p.mu is held.
func (p *permission) judgement() *judged {
	if p.bind != nil && p.bind.allowed != nil {
		return p.bind.allowed
	}
	return &p.ground.judged
}

// basisLocked is what the rules are asked about a permission. p.mu is held.
func (p *permission) basisLocked() basis {
	j := p.judgement()
	b := j.basis
	if j.aimed {
		b.tuple.Dst = p.target()
	}
	return b
}

// form is the permission as a value, as it was asked for. p.mu is held.
func (p *permission) form() nat.Permission {
	out := nat.Permission{
		ID: p.id, Direction: p.direction, Proto: p.proto, Source: p.source,
		Multiple: p.multiple, ToUser: p.is.has(toUser), Timeout: p.timeout,
	}
	b := p.bind
	if b == nil {
		out.Client = netip.AddrPortFrom(p.session.addr, 0)
		out.Target, out.Via = p.target(), p.via()
		return out
	}
	out.External, out.Client = p.external(), p.near.addrPort()
	out.Sources, out.AnySource, out.Leaves, out.OneWay, out.FromGateway = b.sources, b.anySource, b.leaves, b.oneWay, b.fromGateway
	return out
}

// target is where the flows of an outbound permission get to.
func (p *permission) target() netip.AddrPort { return p.far.addrPort() }

// via is the gateway's address that leads there; invalid: none does.
func (p *permission) via() netip.AddrPort { return p.near.addrPort() }

// external is the address of a bind.
func (p *permission) external() netip.AddrPort { return p.far.addrPort() }

// used is the usage, made if there is none. p.mu is held.
func (p *permission) used() *usage {
	if p.use == nil {
		p.use = &usage{}
	}
	return p.use
}

// living are the flows that it let in and that have not ended. p.mu is held.
func (p *permission) living() int {
	if p.use == nil {
		return 0
	}
	return p.use.flows
}
