package engine

import (
	"net/netip"
	"sync"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// permission is one AllowFutureConnect or BindForClient.
//
//	reserved --SetIPFilter--> armed --first flow--> used
//	    |                       |
//	    +----cancel, expiry-----+---> void
//
// A single-use permission is used up by its first flow; what it holds (an
// external port, the translation map's element) is given back when that flow
// has ended. One that allows many flows stays armed. A void one waits a moment
// for reports of flows that the kernel let in before.
//
// The state changes first, under mu, and enforce brings the kernel after it.
type permission struct {
	nat.Permission
	session *session
	primary *connection
	object  *connection // of a bind
	leased  bool        // External comes from the allocator

	addressBased bool // it belongs to the client's address, not to the session

	change   sync.Mutex // held across kernel changes of this permission
	inKernel inKernel   // under change
	freed    bool       // the leased port was returned; under change

	mu       sync.Mutex
	state    permState
	late     bool // void a moment ago: the kernel's word of earlier flows counts
	flows    int  // living flows that it let in
	filter   *filterapi.IPFilter
	emulated bool // of a bind that a filter emulates: nothing is opened
	timer    *time.Timer
	expiry   time.Time // zero: none

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
	holdsUnknown // a change failed
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

// admits says whether a flow may come in now. late: the kernel says that it
// has, by what was in force a moment ago. p.mu is held.
func (p *permission) admits(src netip.Addr, late bool) bool {
	if late {
		return p.state != permVoid || p.late
	}
	return p.state == permWaiting && !p.emulated && !p.forSocketsAlone() && (!p.inbound() || p.filter.Includes(src))
}

// wanted is what the kernel is to hold, and the permission in that form. p.mu
// is held.
func (p *permission) wanted() (inKernel, nat.Permission) {
	out := p.Permission
	if p.emulated || p.forSocketsAlone() {
		return holdsNothing, out
	}
	if p.state == permWaiting && (!p.inbound() || p.AnySource || len(p.Sources) > 0) {
		return holdsOpening, out
	}
	if p.leased && p.flows > 0 {
		out.Sources, out.AnySource = nil, false
		return holdsTranslation, out
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
	return permKey{proto: p.Proto, client: p.Client.Addr(), dst: p.Target}
}

// permissions are those that wait or whose flows live. Its lock is taken
// before that of a permission or a session, never after.
type permissions struct {
	mu       sync.Mutex
	byKey    map[permKey][]*permission // oldest first
	byClient map[netip.Addr]int        // that wait
}

func (s *permissions) init() {
	s.byKey = make(map[permKey][]*permission)
	s.byClient = make(map[netip.Addr]int)
}

// add takes a permission in, within the client's quota. An address that a
// living session has open is not given to another.
func (s *permissions) add(p *permission, quota int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	client := p.session.addr
	if s.byClient[client] >= quota {
		return filterapi.ErrQuota
	}
	for _, old := range s.byKey[p.key()] {
		if p.inbound() && old.session != p.session && old.waits() && old.session.lives() {
			return filterapi.ErrAlreadyExists
		}
	}
	// A session that ends later finds the permission in its list.
	if !p.session.lives() {
		return filterapi.ErrTerminating
	}
	p.counted = true
	s.byClient[client]++
	s.byKey[p.key()] = append(s.byKey[p.key()], p)
	p.session.perms[p] = struct{}{}
	return nil
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
	key := p.key()
	for i, x := range s.byKey[key] {
		if x != p {
			continue
		}
		rest := append(s.byKey[key][:i:i], s.byKey[key][i+1:]...)
		if s.byKey[key] = rest; len(rest) == 0 {
			delete(s.byKey, key)
		}
		return
	}
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
