package engine

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

const (
	// lateReports is how long the kernel's report of a flow may be on its way
	// when its permission is void already.
	lateReports = 2 * time.Second
	// enforceAgain is the pause after which a closing that the kernel refused
	// is tried again.
	enforceAgain = time.Second
)

// grant takes a permission in and lets the kernel know of it. When it
// returns, the permission is in force. A reserved bind is kept from the
// kernel until it is armed. After an error the caller voids it.
func (e *Engine) grant(p *permission) error {
	if err := e.perms.add(p, e.quota); err != nil {
		return err
	}
	e.bringToUser(p)
	if err := e.enforce(p); err != nil {
		return err
	}
	// The rules may have changed since the call began. Whoever changed them
	// found the permission in the list, or it is found here.
	if !e.stillAllowed(p.primary) {
		return filterapi.ErrPolicyDenied
	}
	e.expireAfter(p, p.Timeout)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == permVoid {
		return filterapi.ErrTerminating
	}
	return nil
}

// rearm replaces the sources of a bind, and starts its clock anew. On error
// nobody may use it until it is armed again.
func (e *Engine) rearm(p *permission, f *filterapi.IPFilter) error {
	if !p.setFilter(f, nil) {
		return filterapi.ErrTerminating
	}
	if err := e.enforce(p); err != nil {
		p.setFilter(&filterapi.IPFilter{}, f)
		e.tasks.run(func() { _ = e.enforce(p) }) // it logs and tries again
		return err
	}
	e.expireAfter(p, p.Timeout)
	if !p.waits() {
		return filterapi.ErrTerminating
	}
	return nil
}

// setFilter replaces the sources of a waiting bind; with was, only if that is
// still the filter.
func (p *permission) setFilter(f, was *filterapi.IPFilter) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != permWaiting || was != nil && p.filter != was {
		return false
	}
	p.filter = f
	p.setSources(f)
	return true
}

// usePermission finds the permission that lets a flow in and counts the flow;
// a single-use one is used up. nil: there is none. kernel: the flow is in by
// the kernel's word, which holds also against one that has become void since.
func (e *Engine) usePermission(t flow.Tuple, kernel bool) *permission {
	all := e.perms.find(t)
	for _, late := range []bool{false, true} {
		if late && !kernel {
			break
		}
		for _, p := range all {
			if e.use(p, t, late) {
				return p
			}
		}
	}
	return nil
}

func (e *Engine) use(p *permission, t flow.Tuple, late bool) bool {
	p.mu.Lock()
	if !p.admits(t.Src.Addr(), late) {
		p.mu.Unlock()
		return false
	}
	p.flows++
	usedUp := !p.Multiple && p.endLocked(permUsed)
	p.mu.Unlock()
	if usedUp {
		e.perms.discharge(p)
		e.closeObject(p)
		// What would let a second flow in goes; the translation of a leased
		// address stays as long as its flow.
		e.tasks.run(func() { _ = e.enforce(p) }) // it logs
	}
	return true
}

// KernelUsed takes the kernel's word that the first packet of a flow was let
// in by a permission, without user space. It does not block.
func (e *Engine) KernelUsed(first flow.Packet) {
	p := e.usePermission(first.Tuple, true)
	if p == nil {
		return // void for long, or of another run
	}
	c := &connection{e: e, session: p.session, tuple: first.Tuple, inIface: first.InIface, start: e.now(), path: flow.Kernel}
	c.held = p.session.ref() // else the session has just ended, and the flow lives on
	c.inherit(p.primary, p)
	e.begin(c)
}

// void ends a permission that waits, and returns when the kernel has
// acknowledged; one with living flows keeps what these need until they end.
func (e *Engine) void(p *permission) error {
	if !e.end(p) {
		return filterapi.ErrTerminating
	}
	e.closeObject(p)
	return e.enforce(p)
}

// end makes a waiting permission void in the engine; false: it waits no more.
// enforce must follow.
func (e *Engine) end(p *permission) bool {
	if !p.end(permVoid) {
		return false
	}
	e.perms.discharge(p)
	time.AfterFunc(lateReports, func() {
		p.mu.Lock()
		p.late = false
		p.mu.Unlock()
		_ = e.enforce(p) // it logs
	})
	return true
}

// settle notes the end of a flow that the permission let in.
func (e *Engine) settle(p *permission) {
	p.mu.Lock()
	p.flows--
	last := p.flows == 0 && p.state != permWaiting
	p.mu.Unlock()
	if last {
		e.tasks.run(func() { _ = e.enforce(p) }) // it logs
	}
}

// enforce brings the kernel to what the state of a permission asks for, and
// frees a permission that is over. Every change of state is followed by it; the
// last one to run sees the last state. A closing that fails is tried again
// until the kernel has acknowledged it, and the port is not free before.
func (e *Engine) enforce(p *permission) error {
	p.change.Lock()
	defer p.change.Unlock()
	p.mu.Lock()
	want, form := p.wanted()
	over := p.over()
	p.mu.Unlock()
	var err error
	switch {
	case want == holdsNothing && p.inKernel != holdsNothing:
		err = e.kernel.Remove(context.Background(), form)
	case want == holdsOpening, want == holdsTranslation && p.inKernel != holdsTranslation:
		err = e.kernel.Install(context.Background(), form)
	}
	if err != nil {
		p.inKernel = holdsUnknown
		if want != holdsOpening {
			e.log.Error("closing a permission failed; it is tried again", zap.Uint64("permission", p.ID), zap.Error(err))
			e.later(enforceAgain, func() { _ = e.enforce(p) }) // it logs
		}
		return err
	}
	p.inKernel = want
	if over && !p.freed {
		p.freed = true
		e.perms.drop(p)
		if p.leased {
			e.ports.Return(p.Proto, p.External)
		}
	}
	return nil
}

// closeObject tells the filters that a bind's address is open no more.
func (e *Engine) closeObject(p *permission) {
	if p.object == nil || !p.object.finish() || len(p.object.heard()) == 0 {
		return
	}
	held := p.session.ref()
	e.tasks.run(func() {
		e.terminating(p.object)
		if held {
			e.release(p.session)
		}
	})
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
	var mine *time.Timer
	mine = time.AfterFunc(d, func() {
		p.mu.Lock()
		current := p.timer == mine // else it was started anew while it fired
		p.mu.Unlock()
		if current {
			_ = e.void(p) // used up or cancelled meanwhile
		}
	})
	p.timer = mine
}

// action is a permission as its filter holds it.
type action struct {
	e *Engine
	p *permission
}

// Cancel implements filterapi.Action.
func (a action) Cancel() error { return a.e.void(a.p) }
