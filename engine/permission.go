package engine

import (
	"net/netip"
	"slices"
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

	addressBased bool // it belongs to the client's address, not to the session

	change   sync.Mutex // held across kernel changes of this permission
	inKernel inKernel   // under change
	freed    bool       // the leased port was returned; under change
	watched  bool       // the kernel reports established flows for it; under change

	mu         sync.Mutex
	basis      basis
	standing   standing
	state      permState
	late       bool                     // void a moment ago: the kernel's word of earlier flows counts
	flows      int                      // living flows that it let in
	severed    int                      // those that were cut
	unsettled  int                      // those that are not established yet
	early      map[flow.Tuple]time.Time // established, and not known yet
	filter     *filterapi.IPFilter
	awaiting   bool // a bind without a client's address
	discarding bool // a bind that nobody has allowed yet
	forced     bool // its flows stay in user space
	burst      bool // a burst of datagrams waits for user space
	emulated   bool // a bind that a filter emulates: nothing is opened
	timer      *time.Timer
	expiry     time.Time // zero: none

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

func (p *permission) inbound() bool { return p.Direction == nat.Inbound }

func (p *permission) ipFilter() *filterapi.IPFilter {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.filter.Clone()
}

// shut says whether a bind lets nobody in, whatever its filter says. p.mu is
// held.
func (p *permission) shut() bool { return p.awaiting || p.discarding }

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
	out.OneWay = p.OneWay && !p.ToUser // else user space sees to it
	if p.emulated || p.forSocketsAlone() {
		return holdsNothing, out
	}
	if p.state == permWaiting && !p.shut() && (!p.inbound() || p.AnySource || len(p.Sources) > 0) {
		return holdsOpening, out
	}
	if p.flows == 0 {
		return holdsNothing, out
	}
	// Nobody new comes in. What a flow on its way may need stays.
	out.Timeout = 0
	switch {
	case p.inbound() && p.External != p.Client:
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
	return true
}

// permKey finds the permissions of a flow by what the kernel's sets match too.
type permKey struct {
	proto  flow.Proto
	client netip.Addr // of an outbound one
	dst    netip.AddrPort
}

func (p *permission) key() permKey {
	if p.inbound() {
		return permKey{proto: p.Proto, dst: p.External}
	}
	if p.Via.IsValid() {
		return permKey{proto: p.Proto, client: p.Client.Addr(), dst: p.Via}
	}
	return permKey{proto: p.Proto, client: p.Client.Addr(), dst: p.Target}
}

// permissions are those that wait or whose flows live. Its lock is taken
// before that of a permission or a session, never after.
type permissions struct {
	mu       sync.Mutex
	byKey    map[permKey][]*permission // oldest first
	byClient map[netip.Addr]int        // that wait
	vias     map[permKey]int           // addresses that lead to targets, without the client
}

func (s *permissions) init() {
	s.byKey = make(map[permKey][]*permission)
	s.byClient = make(map[netip.Addr]int)
	s.vias = make(map[permKey]int)
}

// add takes the permissions of one call in, all of them or none, within the
// client's quota. An address that a living session has open is not given to
// another.
func (s *permissions) add(quota int, perms ...*permission) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	owner := perms[0].session
	if s.byClient[owner.addr]+len(perms) > quota {
		return filterapi.ErrQuota
	}
	for _, p := range perms {
		if s.taken(p, p.Client, p.External) {
			return filterapi.ErrAlreadyExists
		}
	}
	// A session that ends later finds the permissions in its list.
	if !owner.lives() {
		return filterapi.ErrTerminating
	}
	for _, p := range perms {
		p.counted = true
		s.byClient[owner.addr]++
		owner.perms[p] = struct{}{}
		s.list(p)
	}
	return nil
}

// room says whether a client may hold n more permissions. What needs ports asks
// before it leases them: a port that was leased rests before it is free again,
// and must not be had for nothing.
func (s *permissions) room(client netip.Addr, n, quota int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byClient[client]+n <= quota
}

// taken says whether another bind has the external address, of another session
// or for another client. mu is held.
func (s *permissions) taken(p *permission, client, external netip.AddrPort) bool {
	if !p.inbound() || !external.IsValid() || p.isEmulated() {
		return false
	}
	return slices.ContainsFunc(s.byKey[permKey{proto: p.Proto, dst: external}], func(old *permission) bool {
		return old != p && (old.session != p.session || old.Client != client) && old.waits() && !old.isEmulated() && old.session.lives()
	})
}

// list makes a permission known to find. mu is held.
func (s *permissions) list(p *permission) {
	s.byKey[p.key()] = append(s.byKey[p.key()], p)
	if p.Via.IsValid() {
		s.vias[permKey{proto: p.Proto, dst: p.Via}]++
	}
}

// unlist takes that back. mu is held.
func (s *permissions) unlist(p *permission) {
	key := p.key()
	i := slices.Index(s.byKey[key], p)
	if i < 0 {
		return
	}
	rest := append(s.byKey[key][:i:i], s.byKey[key][i+1:]...)
	if s.byKey[key] = rest; len(rest) == 0 {
		delete(s.byKey, key)
	}
	if !p.Via.IsValid() {
		return
	}
	via := permKey{proto: p.Proto, dst: p.Via}
	if s.vias[via]--; s.vias[via] == 0 {
		delete(s.vias, via)
	}
}

// address gives a bind the client's address that it waits for, and before what
// its external address was.
func (s *permissions) address(p *permission, client netip.AddrPort) (before netip.AddrPort, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.mu.Lock()
	awaiting, waits, before := p.awaiting, p.state == permWaiting, p.External
	p.mu.Unlock()
	switch {
	case !awaiting:
		return before, filterapi.ErrInvalidArgument
	case !waits:
		return before, filterapi.ErrTerminating
	}
	external := before
	if !external.IsValid() {
		external = client
	}
	if s.taken(p, client, external) {
		return before, filterapi.ErrAlreadyExists
	}
	s.move(p, client, external, false)
	return before, nil
}

// unaddress takes that back.
func (s *permissions) unaddress(p *permission, before netip.AddrPort) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.move(p, netip.AddrPort{}, before, true)
}

func (s *permissions) move(p *permission, client, external netip.AddrPort, awaiting bool) {
	_, listed := p.session.perms[p]
	s.unlist(p)
	p.mu.Lock()
	p.Client, p.External, p.awaiting = client, external, awaiting
	p.mu.Unlock()
	if listed {
		s.list(p)
	}
	p.object.mu.Lock()
	if !p.object.named {
		p.object.name = external
	}
	p.object.mu.Unlock()
}

// isEmulated says whether a filter plays the gateway's end, so that nothing is
// opened.
func (p *permission) isEmulated() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.emulated
}

func (p *permission) waits() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state == permWaiting
}

// discharge takes a permission that waits no more off the client's quota.
func (s *permissions) discharge(p *permission) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !p.counted {
		return
	}
	p.counted = false
	if s.byClient[p.session.addr]--; s.byClient[p.session.addr] == 0 {
		delete(s.byClient, p.session.addr)
	}
}

// drop takes a permission that is over off the list.
func (s *permissions) drop(p *permission) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(p.session.perms, p)
	s.unlist(p)
}

// leads says whether an address of the gateway leads to a target, for
// somebody.
func (s *permissions) leads(t flow.Tuple) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.vias[permKey{proto: t.Proto, dst: t.Dst}] > 0
}

// find gives the permissions that may have let a flow in, oldest first.
func (s *permissions) find(t flow.Tuple) []*permission {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.byKey[permKey{t.Proto, t.Src.Addr(), t.Dst}]
	in := s.byKey[permKey{proto: t.Proto, dst: t.Dst}]
	if len(in) == 0 {
		return out[:len(out):len(out)]
	}
	return append(out[:len(out):len(out)], in...)
}

func (s *permissions) all() []*permission {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*permission, 0, len(s.byKey))
	for _, same := range s.byKey {
		out = append(out, same...)
	}
	return out
}

func (s *permissions) of(owner *session) []*permission {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*permission, 0, len(owner.perms))
	for p := range owner.perms {
		out = append(out, p)
	}
	return out
}

func (p *permission) setSources(f *filterapi.IPFilter) {
	p.AnySource, p.Sources = f == nil, f.Prefixes()
}
