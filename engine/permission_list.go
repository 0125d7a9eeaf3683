package engine

import (
	"hash/maphash"
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
	dst    compactAddr
	client compactAddr // without a port; zero where dst is an address of the gateway
}

// toGateway is the key of what leads on from an address of the gateway, for
// whomever.
func toGateway(proto flow.Proto, dst netip.AddrPort) permKey {
	return permKey{proto: proto, dst: compactOf(dst)}
}

// toTarget is the key of what lets a client go to a target as it is.
func toTarget(proto flow.Proto, client netip.Addr, dst netip.AddrPort) permKey {
	return permKey{proto, compactOf(dst), compactOf(netip.AddrPortFrom(client, 0))}
}

func (p *permission) key() permKey {
	if !p.inbound() && !p.near.isValid() {
		return toTarget(p.proto, p.session.addr, p.target())
	}
	return toGateway(p.proto, p.at())
}

// at is the gateway's address that flows come to; invalid: they go to their
// target.
func (p *permission) at() netip.AddrPort {
	if p.inbound() {
		return p.external()
	}
	return p.via()
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
	byKey    keyed
	byClient map[netip.Addr]int           // that wait
	leaving  map[leavingKey][]*permission // where what clients send leaves from a bind; oldest first
	count    atomic.Int64                 // of byKey
}

func (s *permissions) init() {
	s.byKey.init()
	s.byClient = make(map[netip.Addr]int)
	s.leaving = make(map[leavingKey][]*permission)
}

// keyed are permissions by their keys. A key is kept as its hash alone, since
// the permission has it; and nearly always one permission has a key.
type keyed struct {
	seed  maphash.Seed
	first map[uint64]*permission   // the oldest one of a hash
	later map[uint64][]*permission // the others, oldest first
}

func (k *keyed) init() {
	k.seed = maphash.MakeSeed()
	k.first, k.later = make(map[uint64]*permission), make(map[uint64][]*permission)
}

func (k *keyed) hash(key permKey) uint64 { return maphash.Comparable(k.seed, key) }

func (k *keyed) add(p *permission) {
	h := k.hash(p.key())
	if k.first[h] == nil {
		k.first[h] = p
		return
	}
	k.later[h] = append(k.later[h], p)
}

// remove says whether the permission was there.
func (k *keyed) remove(p *permission) bool {
	h := k.hash(p.key())
	if k.first[h] != p {
		return without(k.later, h, p)
	}
	if later := k.later[h]; len(later) > 0 {
		k.first[h] = later[0]
		return without(k.later, h, later[0])
	}
	delete(k.first, h)
	return true
}

// appendTo adds those of a key to a list, oldest first.
func (k *keyed) appendTo(list []*permission, key permKey) []*permission {
	h := k.hash(key)
	if p := k.first[h]; p != nil && p.key() == key {
		list = append(list, p)
	}
	for _, p := range k.later[h] {
		if p.key() == key {
			list = append(list, p)
		}
	}
	return list
}

// has says whether any permission has a key. Where two keys have one hash it may
// say so of both.
func (k *keyed) has(key permKey) bool { return k.first[k.hash(key)] != nil }

func (k *keyed) all() []*permission {
	out := make([]*permission, 0, len(k.first))
	for _, p := range k.first {
		out = append(out, p)
	}
	for _, same := range k.later {
		out = append(out, same...)
	}
	return out
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
		if p.inbound() && s.taken(p, p.near, p.far) {
			return filterapi.ErrAlreadyExists
		}
	}
	// A session that ends later finds the permissions in its list.
	if !owner.lives() {
		return filterapi.ErrTerminating
	}
	for _, p := range perms {
		p.listed = true
		p.mu.Lock()
		p.is.set(granted, true)
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
	p.is.set(granted, true)
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
func (s *permissions) taken(p *permission, client, external compactAddr) bool {
	if !external.isValid() || !p.opens() {
		return false
	}
	return slices.ContainsFunc(s.byKey.appendTo(nil, permKey{proto: p.proto, dst: external}), func(old *permission) bool {
		same := old.near == client && (old.session == p.session || p.borrows() && old.mapping() == p.mapping()) && !(p.borrows() && old.borrows())
		return old.inbound() && old != p && !same && old.waits() && old.opens() && old.session.lives()
	})
}

// list makes a permission known to find. mu is held.
func (s *permissions) list(p *permission) {
	s.byKey.add(p)
	s.count.Add(1)
	if at, leaves := p.leavingKey(); leaves {
		s.leaving[at] = append(s.leaving[at], p)
	}
}

func (p *permission) leavingKey() (at leavingKey, leaves bool) {
	if p.bind == nil || p.bind.leaves == "" {
		return leavingKey{}, false
	}
	return leavingKey{p.bind.leaves, p.proto, p.near.addrPort()}, true
}

// unlist takes that back. mu is held.
func (s *permissions) unlist(p *permission) {
	if !s.byKey.remove(p) {
		return
	}
	s.count.Add(-1)
	if at, leaves := p.leavingKey(); leaves {
		without(s.leaving, at, p)
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
	awaiting, waits, before := p.bind.awaiting, p.state == permWaiting, p.external()
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
	if s.taken(p, compactOf(client), compactOf(external)) {
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
	p.near, p.far, p.bind.awaiting = compactOf(client), compactOf(external), awaiting
	p.mu.Unlock()
	if listed {
		s.list(p)
	}
	c := p.object()
	c.mu.Lock()
	if !c.named {
		c.name = external
	}
	c.mu.Unlock()
}

// opens is false where a filter plays the gateway's end.
func (p *permission) opens() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.isEmulated()
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
	if !p.listed {
		return
	}
	p.listed = false
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
	return slices.ContainsFunc(s.byKey.appendTo(nil, toGateway(t.Proto, t.Dst)), func(p *permission) bool { return !p.inbound() })
}

// concern says whether any permission has to do with a flow.
func (s *permissions) concern(t flow.Tuple) bool {
	if s.count.Load() == 0 {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byKey.has(toGateway(t.Proto, t.Dst)) || s.byKey.has(toTarget(t.Proto, t.Src.Addr(), t.Dst))
}

// find gives the permissions that may have let a flow in, oldest first.
func (s *permissions) find(t flow.Tuple) []*permission {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := s.byKey.appendTo(nil, toTarget(t.Proto, t.Src.Addr(), t.Dst))
	outbound := len(list)
	list = s.byKey.appendTo(list, toGateway(t.Proto, t.Dst))
	if len(list) == outbound {
		return list
	}
	return slices.DeleteFunc(list, func(p *permission) bool { return !p.inbound() && p.session.addr != t.Src.Addr() })
}

func (s *permissions) all() []*permission {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.byKey.all()
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
