package engine

import (
	"errors"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// established notes that a connection stands, and tells the session filter
// that waits for it. false: it was noted before, or the connection is over. It
// does not block.
func (e *Engine) established(c *connection) bool {
	p := c.perm
	var told chan struct{}
	c.mu.Lock()
	if c.stands || c.ended {
		c.mu.Unlock()
		return false
	}
	c.stands = true
	if p != nil && p.notify != nil && c.held {
		told = make(chan struct{})
		c.announced = told
		c.toldLocked(p.notify.r, p.notify.a)
	}
	c.mu.Unlock()
	if p == nil {
		return true
	}
	e.passed(c)
	p.mu.Lock()
	p.used().unsettled--
	quiet := p.quiet()
	p.mu.Unlock()
	if quiet {
		e.tasks.run(func() { _ = e.enforce(p) }) // it logs
	}
	if told != nil {
		e.tasks.run(func() {
			defer close(told)
			e.tellEstablished(c)
		})
	}
	return true
}

// tellEstablished calls the session filter that the permission named.
func (e *Engine) tellEstablished(c *connection) {
	if !c.session.lives() {
		return
	}
	h := c.perm.notify
	ctx := within(lastWords)
	defer ctx.End()
	_, err := ask(ctx, e.code(h.r, kindNames[filterapi.Established], c), func() (struct{}, error) {
		return struct{}{}, h.a.filter.HandleEvent(ctx, &filterapi.EstablishedEvent{
			Connection: c.handle(h.r), Proto: c.tuple.Proto, Context: c.perm.context,
		})
	})
	if err != nil && !errors.Is(err, filterapi.ErrNotSupported) {
		h.r.failed("established handler", err, c)
	}
}

// farewells waits until the last of what was told of a living connection has
// been heard.
func (c *connection) farewells() {
	c.mu.Lock()
	told := c.announced
	c.mu.Unlock()
	if told != nil {
		<-told
	}
}

// KernelEstablished takes conntrack's word that a kernel flow is established:
// for TCP the handshake is complete, for UDP the first packet was passed. It
// does not block.
func (e *Engine) KernelEstablished(t flow.Tuple) {
	if c := e.flows.find(t); c != nil && c.inKernel() && e.established(c) {
		return
	}
	// The word that a permission let it in may still be on its way, and which
	// one of several did.
	heard := false
	for _, p := range e.perms.find(t) {
		if p.notify != nil {
			p.heardEarly(t, e.now())
			heard = true
		}
	}
	if !heard {
		return
	}
	if c := e.flows.find(t); c != nil && c.inKernel() && e.established(c) {
		e.wasEarly(t)
	}
}

// wasEarly says whether a flow was established before it was known, and
// forgets it.
func (e *Engine) wasEarly(t flow.Tuple) (early bool) {
	for _, p := range e.perms.find(t) {
		if p.notify != nil && p.wasEarly(t, e.now()) {
			early = true
		}
	}
	return early
}

// maxEarly bounds the flows of one permission that are established before they
// are known.
const maxEarly = 1024

func (p *permission) heardEarly(t flow.Tuple, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u := p.used()
	for x, at := range u.early {
		if at.Add(lateReports).Before(now) {
			delete(u.early, x)
		}
	}
	if len(u.early) >= maxEarly {
		return
	}
	if u.early == nil {
		u.early = make(map[flow.Tuple]time.Time)
	}
	u.early[t] = now
}

// wasEarly is Engine.wasEarly for one permission.
func (p *permission) wasEarly(t flow.Tuple, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.use == nil {
		return false
	}
	at, ok := p.use.early[t]
	delete(p.use.early, t)
	return ok && !at.Add(lateReports).Before(now)
}

// listens says whether the kernel's word of established flows is needed.
// p.mu is held.
func (p *permission) listens(want inKernel) bool {
	return p.notify != nil && !p.is.has(forced) && !p.isEmulated() && !p.forSocketsAlone() &&
		(want == holdsOpening || p.is.has(late) || p.use != nil && p.use.unsettled > 0)
}

// quiet says whether the kernel's word of established flows may be needed no
// more now that one of its flows has settled. Who else is let in is waited for
// in any case. p.mu is held.
func (p *permission) quiet() bool {
	want, _ := p.wanted()
	return p.notify != nil && want != holdsOpening
}

// watch brings the kernel's reports of established flows after what a
// permission needs. p.change is held.
func (e *Engine) watch(p *permission, on bool) error {
	if (p.did&isWatched != 0) == on {
		return nil
	}
	if err := e.kernel.WatchEstablished(on); err != nil {
		return err
	}
	p.did ^= isWatched
	return nil
}
