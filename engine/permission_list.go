package engine

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

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

// leavingKey finds the bind from which a client's flows leave by a network rule.
type leavingKey struct {
	networkRule string
	proto       flow.Proto
	client      netip.AddrPort
}

// leavesFrom is the bind that a flow leaves from by a network rule, if the kernel
// has that; else it is invalid.
func (s *permissions) leavesFrom(networkRule string, t flow.Tuple) netip.AddrPort {
	s.mu.Lock()
	all := s.leaving[leavingKey{networkRule, t.Proto, t.Src}]
	s.mu.Unlock()
	for _, p := range all {
		p.mu.Lock()
		want, form := p.wanted()
		p.mu.Unlock()
		if want == holdsOpening {
			return form.External
		}
	}
	return netip.AddrPort{}
}

// permissions are those that wait or whose flows live. Its lock is taken
// before that of a permission or a session, never after.
type permissions struct {
	mu       sync.Mutex
	byKey    map[permKey][]*permission    // oldest first
	byClient map[netip.Addr]int           // that wait
	leaving  map[leavingKey][]*permission // where what clients send leaves from a bind; oldest first
	vias     map[permKey]int              // addresses that lead to targets, without the client
	count    atomic.Int64                 // of byKey
}

func (s *permissions) init() {
	s.byKey = make(map[permKey][]*permission)
	s.byClient = make(map[netip.Addr]int)
	s.vias = make(map[permKey]int)
	s.leaving = make(map[leavingKey][]*permission)
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
		p.mu.Lock()
		p.granted = true
		p.mu.Unlock()
		s.byClient[owner.addr]++
		owner.perms[p] = struct{}{}
		s.list(p)
	}
	return nil
}

// adopt takes a bind in that is a mapping: it counts as nobody's, and has its
// address already.
func (s *permissions) adopt(p *permission) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.mu.Lock()
	p.granted = true
	p.mu.Unlock()
	p.session.perms[p] = struct{}{}
	s.list(p)
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
// or for another client, or borrows the same mapping. mu is held.
func (s *permissions) taken(p *permission, client, external netip.AddrPort) bool {
	if !p.inbound() || !external.IsValid() || p.isEmulated() {
		return false
	}
	return slices.ContainsFunc(s.byKey[permKey{proto: p.Proto, dst: external}], func(old *permission) bool {
		same := old.Client == client && (old.session == p.session || p.borrows && old.mapping == p.mapping) && !(p.borrows && old.borrows)
		return old != p && !same && old.waits() && !old.isEmulated() && old.session.lives()
	})
}

// list makes a permission known to find. mu is held.
func (s *permissions) list(p *permission) {
	s.byKey[p.key()] = append(s.byKey[p.key()], p)
	s.count.Add(1)
	if p.Leaves != "" {
		at := leavingKey{p.Leaves, p.Proto, p.Client}
		s.leaving[at] = append(s.leaving[at], p)
	}
	if p.Via.IsValid() {
		s.vias[permKey{proto: p.Proto, dst: p.Via}]++
	}
}

// unlist takes that back. mu is held.
func (s *permissions) unlist(p *permission) {
	if !without(s.byKey, p.key(), p) {
		return
	}
	s.count.Add(-1)
	without(s.leaving, leavingKey{p.Leaves, p.Proto, p.Client}, p)
	if !p.Via.IsValid() {
		return
	}
	via := permKey{proto: p.Proto, dst: p.Via}
	if s.vias[via]--; s.vias[via] == 0 {
		delete(s.vias, via)
	}
}

// without takes a permission off one of the lists, which are never changed in
// place; false: it is not there.
func without[K comparable](lists map[K][]*permission, key K, p *permission) bool {
	i := slices.Index(lists[key], p)
	if i < 0 {
		return false
	}
	if len(lists[key]) == 1 {
		delete(lists, key)
		return true
	}
	lists[key] = append(lists[key][:i:i], lists[key][i+1:]...)
	return true
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

// concern says whether any permission has to do with a flow.
func (s *permissions) concern(t flow.Tuple) bool {
	if s.count.Load() == 0 {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	any := permKey{proto: t.Proto, dst: t.Dst}
	return s.vias[any] > 0 || len(s.byKey[any]) > 0 || len(s.byKey[permKey{t.Proto, t.Src.Addr(), t.Dst}]) > 0
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
