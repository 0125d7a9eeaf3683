package engine

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

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
// has ended. One that allows many flows stays armed.
type permission struct {
	nat.Permission
	session *session
	primary *connection
	object  *connection // of a bind
	leased  bool        // External comes from the allocator

	change    sync.Mutex // held across kernel changes of this permission
	installed bool       // the kernel holds something of it; under change

	mu     sync.Mutex
	state  permState
	flows  int // living flows that it let in
	filter *filterapi.IPFilter
	timer  *time.Timer
	expiry time.Time // zero: none
}

type permState uint8

const (
	permWaiting permState = iota // reserved or armed
	permUsed
	permVoid
)

func (p *permission) inbound() bool { return p.Direction == nat.Inbound }

func (p *permission) ipFilter() *filterapi.IPFilter {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.filter.Clone()
}

// permKey finds the permission of a flow by what the kernel's sets match too.
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

type permissions struct {
	mu       sync.Mutex
	byKey    map[permKey]*permission
	byClient map[netip.Addr]int // that wait
}

func (s *permissions) init() {
	s.byKey = make(map[permKey]*permission)
	s.byClient = make(map[netip.Addr]int)
}

// add takes a permission in, within the client's quota.
func (s *permissions) add(p *permission, quota int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	client := p.session.addr
	if s.byClient[client] >= quota {
		return filterapi.ErrQuota
	}
	if old := s.byKey[p.key()]; old != nil && old.session != p.session {
		return filterapi.ErrAlreadyExists
	}
	s.byClient[client]++
	s.byKey[p.key()] = p
	return nil
}

// leave takes a permission off the client's quota, and off the list if gone.
func (s *permissions) leave(p *permission, wasWaiting, gone bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if wasWaiting {
		if s.byClient[p.session.addr]--; s.byClient[p.session.addr] == 0 {
			delete(s.byClient, p.session.addr)
		}
	}
	if gone && s.byKey[p.key()] == p {
		delete(s.byKey, p.key())
	}
}

func (s *permissions) find(t flow.Tuple) *permission {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.byKey[permKey{t.Proto, t.Src.Addr(), t.Dst}]; p != nil {
		return p
	}
	return s.byKey[permKey{proto: t.Proto, dst: t.Dst}]
}

func (s *permissions) all() []*permission {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*permission, 0, len(s.byKey))
	for _, p := range s.byKey {
		out = append(out, p)
	}
	return out
}

func (s *permissions) of(owner *session) []*permission {
	var out []*permission
	for _, p := range s.all() {
		if p.session == owner {
			out = append(out, p)
		}
	}
	return out
}

// usePermission finds the waiting permission that lets a flow in and counts the flow;
// a single-use one is used up. nil: there is none.
func (e *Engine) usePermission(t flow.Tuple) *permission {
	p := e.perms.find(t)
	if p == nil {
		return nil
	}
	p.mu.Lock()
	if p.state != permWaiting || p.inbound() && !p.filter.Includes(t.Src.Addr()) {
		p.mu.Unlock()
		return nil
	}
	p.flows++
	usedUp := !p.Multiple
	if usedUp {
		p.state = permUsed
		p.stop()
	}
	p.mu.Unlock()
	if usedUp {
		e.perms.leave(p, true, false)
		go e.usedUp(p)
	}
	return p
}

// usedUp takes out of the kernel what would let a second flow in. The
// translation of a leased address stays as long as its flow.
func (e *Engine) usedUp(p *permission) {
	p.change.Lock()
	defer p.change.Unlock()
	if !p.installed {
		return
	}
	var err error
	if p.leased {
		err = e.kernel.Install(context.Background(), p.closed())
	} else {
		err = e.kernel.Remove(context.Background(), p.Permission)
		p.installed = false
	}
	if err != nil {
		e.log.Error("closing a used permission failed", zap.Error(err))
	}
}

// closed is the permission as it is when no more flows may come.
func (p *permission) closed() nat.Permission {
	out := p.Permission
	out.Sources, out.AnySource = nil, false
	return out
}

func (p *permission) stop() {
	if p.timer != nil {
		p.timer.Stop()
	}
	p.expiry = time.Time{}
}

// KernelUsed takes the kernel's word that the first packet of a flow was let
// in by a permission, without user space.
func (e *Engine) KernelUsed(first flow.Packet) {
	p := e.usePermission(first.Tuple)
	if p == nil || !p.session.ref() {
		return // cancelled or expired in the same moment: the kernel was first
	}
	c := &connection{e: e, session: p.session, tuple: first.Tuple, inIface: first.InIface, start: e.now(), path: flow.Kernel}
	c.inherit(p.primary, p)
	e.begin(c)
}

// void ends a permission that waits; one with living flows keeps what these
// need until they end.
func (e *Engine) void(p *permission) error {
	p.mu.Lock()
	if p.state != permWaiting {
		p.mu.Unlock()
		return filterapi.ErrTerminating
	}
	p.state = permVoid
	p.stop()
	idle := p.flows == 0
	p.mu.Unlock()
	e.perms.leave(p, true, idle)
	if idle {
		return e.giveBack(p)
	}
	p.change.Lock()
	defer p.change.Unlock()
	if p.leased {
		return e.kernel.Install(context.Background(), p.closed())
	}
	p.installed = false
	return e.kernel.Remove(context.Background(), p.Permission)
}

// settle notes the end of a flow that the permission let in.
func (e *Engine) settle(p *permission) {
	p.mu.Lock()
	p.flows--
	last := p.flows == 0 && p.state != permWaiting
	p.mu.Unlock()
	if last {
		e.perms.leave(p, false, true)
		if err := e.giveBack(p); err != nil {
			e.log.Error("removing a used permission failed", zap.Error(err))
		}
	}
}

// giveBack removes everything that the kernel holds for a permission and
// returns its port.
func (e *Engine) giveBack(p *permission) error {
	p.change.Lock()
	defer p.change.Unlock()
	var err error
	if p.installed {
		err = e.kernel.Remove(context.Background(), p.Permission)
		p.installed = false
	}
	if p.leased {
		e.ports.Return(p.Proto, p.External)
	}
	return err
}

// expireAfter starts or restarts the clock of a permission.
func (e *Engine) expireAfter(p *permission, d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d == 0 || p.state != permWaiting {
		return
	}
	if p.timer != nil {
		p.timer.Stop()
	}
	p.expiry = e.now().Add(d)
	p.timer = time.AfterFunc(d, func() {
		_ = e.void(p) // used up or cancelled meanwhile
	})
}

// action is a permission as its filter holds it.
type action struct {
	e *Engine
	p *permission
}

// Cancel implements filterapi.Action.
func (a action) Cancel() error { return a.e.void(a.p) }
