package engine

import (
	"errors"
	"sync"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// lateReports is how long the kernel's report of a flow may be on its way when
// its permission is void already.
const lateReports = 2 * time.Second

// grant takes the permissions of one call in and lets the kernel know of them.
// When it returns, they are in force. A bind that is not armed is kept from the
// kernel. After an error the caller abandons them all.
func (e *Engine) grant(perms ...*permission) error {
	if err := e.perms.add(e.quota, perms...); err != nil {
		return err
	}
	for _, p := range perms {
		e.lendMapping(p)
	}
	errs := make([]error, len(perms))
	var changes sync.WaitGroup // the kernel gets them together
	for i, p := range perms {
		changes.Go(func() { errs[i] = e.enforce(p) })
	}
	changes.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, p := range perms {
		// The rules may have changed since the call began. Whoever changed
		// them found the permission in the list, or it is found here.
		if !e.stands(p) {
			return filterapi.ErrPolicyDenied
		}
		e.expireAfter(p, p.timeout)
	}
	for _, p := range perms {
		p.mu.Lock()
		state := p.state
		p.mu.Unlock()
		if state == permVoid {
			return filterapi.ErrTerminating
		}
	}
	return nil
}

// stands says whether the rules in force still let a permission be. A bind
// that discards waits for somebody to allow it.
func (e *Engine) stands(p *permission) bool {
	p.mu.Lock()
	b, discarding := p.basisLocked(), p.bind != nil && p.bind.discarding
	p.mu.Unlock()
	if e.inTheWay(p) {
		return false
	}
	if discarding {
		return true
	}
	v, err := e.judge(b)
	if err != nil {
		return false
	}
	if p.inbound() {
		return p.bind.leaves == "" || v.NetworkRule != nil && v.NetworkRule.Name == p.bind.leaves
	}
	return p.primary.answers(p.target()) || p.session.joined(p.proto, p.target())
}

// abandon voids what a call that failed has made.
func (e *Engine) abandon(perms ...*permission) {
	for _, p := range perms {
		_ = e.void(p) // it logs
	}
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
	e.expireAfter(p, p.timeout)
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
	if p.state != permWaiting || was != nil && p.bind.filter != was {
		return false
	}
	p.bind.setFilter(f)
	return true
}

// usePermission finds the permission that lets a flow in and counts the flow;
// a single-use one is used up. nil: there is none. kernel: the flow is in by
// the kernel's word, which holds also against one that has become void since.
func (e *Engine) usePermission(t flow.Tuple, kernel bool) *permission {
	all := e.perms.find(t)
	for _, wasIn := range []bool{false, true} {
		if wasIn && !kernel {
			break
		}
		for _, p := range all {
			if e.use(p, t, wasIn, kernel) {
				return p
			}
		}
	}
	return nil
}

// use counts one flow; false: the permission does not let it in. Whoever makes
// the flow's connection calls introduced once its events have been raised.
func (e *Engine) use(p *permission, t flow.Tuple, wasIn, kernel bool) bool {
	p.mu.Lock()
	if !p.admits(t.Src.Addr(), wasIn) {
		p.mu.Unlock()
		return false
	}
	usedUp := p.count(kernel)
	p.mu.Unlock()
	if usedUp {
		e.perms.discharge(p)
		// What would let a second flow in goes; the translation of a leased
		// address stays as long as its flow.
		e.tasks.run(func() { _ = e.enforce(p) }) // it logs
	}
	return true
}

// count counts one flow that has come; true: it was the last. known: user space
// does not hold its first packet. p.mu is held.
func (p *permission) count(known bool) (usedUp bool) {
	u := p.used()
	u.flows++
	u.unsettled++
	if !known {
		u.pending++
	}
	return !p.multiple && p.endLocked(permUsed)
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
	c.inherit(p)
	e.introduced(c)
	e.begin(c)
	if p.notify != nil && e.wasEarly(c.tuple) {
		e.established(c)
	}
	e.overtake(c)
}

// introduced follows the events of a flow. Only now a bind that it used up is
// over for the filters: the events name it.
func (e *Engine) introduced(c *connection) {
	p := c.perm
	if p == nil || p.object() == nil {
		return
	}
	p.mu.Lock()
	used := p.state == permUsed
	p.mu.Unlock()
	if used {
		e.closeObject(p)
	}
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
		p.is.set(late, false)
		p.mu.Unlock()
		_ = e.enforce(p) // it logs
	})
	return true
}

// sever notes that a client's flow has been cut, which is some time before its
// end: no packet of it needs a translation any more, and another flow to the
// same target may leave from another address at once.
func (e *Engine) sever(c *connection) {
	p := c.perm
	if p == nil || p.inbound() {
		return
	}
	c.mu.Lock()
	again := c.severed || c.ended
	c.severed = true
	c.mu.Unlock()
	if again {
		return
	}
	p.mu.Lock()
	p.used().severed++
	p.mu.Unlock()
	_ = e.enforce(p) // it logs
}

// settle notes the end of a flow that a permission let in.
func (e *Engine) settle(c *connection) {
	c.mu.Lock()
	stood := c.stands // it has ended: that stays
	if c.severed {
		defer func() {
			c.perm.mu.Lock()
			c.perm.used().severed--
			c.perm.mu.Unlock()
		}()
	}
	c.mu.Unlock()
	e.passed(c)
	if c.published() {
		e.leave(c)
		return
	}
	e.unuse(c.perm, stood)
}

// passed notes that user space does not hold the first packet of a flow any
// more: what is sent again goes by the mark of the flow.
func (e *Engine) passed(c *connection) {
	c.mu.Lock()
	pending := c.pending
	c.pending = false
	c.mu.Unlock()
	if !pending {
		return
	}
	p := c.perm
	p.mu.Lock()
	u := p.used()
	u.pending--
	last := u.pending == 0 && p.state != permWaiting && p.is.has(toUser)
	p.mu.Unlock()
	if last {
		e.tasks.run(func() { _ = e.enforce(p) }) // it logs
	}
}

// unuse gives one use of a permission back. stood: it was established.
func (e *Engine) unuse(p *permission, stood bool) {
	p.mu.Lock()
	u := p.used()
	u.flows--
	if !stood {
		u.unsettled--
	}
	last := u.flows == 0 && p.state != permWaiting
	quiet := !stood && p.quiet()
	p.mu.Unlock()
	if last || quiet {
		e.tasks.run(func() { _ = e.enforce(p) }) // it logs
	}
}

// closeObject tells the filters that a bind's address is open no more.
func (e *Engine) closeObject(p *permission) {
	if c := p.object(); c != nil {
		e.farewell(c)
	}
}

// farewell ends a connection that is no flow.
func (e *Engine) farewell(c *connection) {
	if !c.finish() || len(c.heard()) == 0 {
		return
	}
	held := c.session.ref()
	e.tasks.run(func() {
		e.terminating(c)
		if held {
			e.release(c.session)
		}
	})
}

// expireAfter starts or restarts the clock of a permission, unless its end was
// fixed.
func (e *Engine) expireAfter(p *permission, d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d == 0 || p.state != permWaiting || p.is.has(fixed) {
		return
	}
	e.expireLocked(p, d)
}

// expireAt fixes the end of a permission that waits; 0: it has none. false: it
// waits no more.
func (e *Engine) expireAt(p *permission, d time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != permWaiting {
		return false
	}
	p.is.set(fixed, true)
	e.expireLocked(p, d)
	return true
}

// expireLocked sets the clock; 0 stops it. p.mu is held.
func (e *Engine) expireLocked(p *permission, d time.Duration) {
	if d == 0 {
		p.expiry = 0
		e.deadlines.stop(p)
		return
	}
	p.expiry = e.deadlines.in(d)
	e.deadlines.start(p, p.expiry)
}

// expire ends a permission whose deadline has come.
func (e *Engine) expire(p *permission) {
	p.mu.Lock()
	due := p.expiry != 0 && !e.deadlines.has(p) // else the clock was started anew, or stopped
	p.mu.Unlock()
	if due {
		_ = e.void(p) // used up or cancelled meanwhile
	}
}

// action is a permission as its filter holds it: nothing is made for it.
type action permission

// Cancel implements filterapi.Action.
func (a *action) Cancel() error {
	p := (*permission)(a)
	return p.session.e.void(p)
}
