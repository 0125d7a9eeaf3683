package engine

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// rest lets a mapping without a flow be until a time. x.mu is held.
func (x *mappings) rest(m *mapping, until time.Time) {
	m.idle = max(m.idle, until.UnixNano())
	if !m.busy() {
		x.idle[m] = struct{}{}
	}
}

// rest does so, and sees to it that it goes after that. mappings.mu is held.
func (e *Engine) rest(m *mapping, until time.Time) {
	e.mappings.rest(m, until)
	e.sweepSoon()
}

// of gives the mappings that a kernel flow belongs to: that of who sent its
// first packet, and that of whom it was sent to. x.mu is held.
func (x *mappings) of(t flow.Tuple, tr flow.Translation) (sender, target *mapping) {
	if !t.Is4() {
		return nil, nil
	}
	if tr.Src.IsValid() {
		if m := x.byExternal[externalKey{t.Proto, packed(tr.Src)}]; m != nil && m.inside == packed(t.Src) {
			sender = m
		}
	}
	if tr.Dst.IsValid() {
		if m := x.byExternal[externalKey{t.Proto, packed(t.Dst)}]; m != nil && m.inside == packed(tr.Dst) {
			target = m
		}
	}
	return sender, target
}

// KernelBegan takes conntrack's word that a kernel flow has begun. It is called
// for every flow whose source or destination was translated, and does not
// block.
func (e *Engine) KernelBegan(t flow.Tuple, tr flow.Translation) { e.mapped(t, tr, 1) }

// mapped counts a kernel flow of mappings.
func (e *Engine) mapped(t flow.Tuple, tr flow.Translation, by int32) {
	x := &e.mappings
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.byExternal) == 0 {
		return
	}
	note(x.journal, t, tr, by)
	if x.survey != nil {
		note(x.survey.journal, t, tr, by)
	}
	sender, target := x.of(t, tr)
	if sender != nil {
		if sender.first == (socket4{}) {
			sender.first = packed(t.Dst) // it was made for a bind
		}
		e.count(sender, by)
		if sender.filtering == policy.FilterAddress {
			e.peer(sender, t.Dst.Addr(), by)
		}
	}
	if target != nil {
		e.count(target, by)
	}
}

// count changes the number of flows of a mapping. mappings.mu is held.
func (e *Engine) count(m *mapping, by int32) {
	m.flows += by
	if m.busy() {
		delete(e.mappings.idle, m)
		if m.state == mappingLeaving && !e.mappings.adopting && (m.extra == nil || m.extra.change == nil) {
			e.bringBack(m)
		}
		return
	}
	e.mappings.rest(m, e.now())
	e.sweepSoon()
}

// hold changes the number of flows in user space to, or from, a peer.
func (e *Engine) hold(m *mapping, peer netip.Addr, by int32) {
	e.mappings.mu.Lock()
	defer e.mappings.mu.Unlock()
	if m.filtering == policy.FilterAddress {
		e.peer(m, peer, by)
	}
	m.more().inUser += by
	m.lean()
	e.count(m, by)
}

// sweepSoon has those looked at that have no flow. mappings.mu is held.
func (e *Engine) sweepSoon() {
	x := &e.mappings
	if x.sweeping || len(x.idle) == 0 {
		return
	}
	x.sweeping = true
	e.later(sweepEvery, func() {
		e.tasks.run(func() {
			e.sweepMappings()
			x.mu.Lock()
			defer x.mu.Unlock()
			x.sweeping = false
			e.sweepSoon()
		})
	})
}

// sweepEvery is the pause between two looks at mappings without a flow.
const sweepEvery = 500 * time.Millisecond

// sweepMappings ends the mappings that have had no flow for as long as the word
// of one may be on its way: first the kernel's maps let go, and when nothing
// came in the same time again, the external endpoint is returned.
func (e *Engine) sweepMappings() {
	x := &e.mappings
	var idle, leave, over []*mapping
	var peers []nat.Peer
	x.mu.Lock()
	now := e.now().UnixNano()
	for m := range x.idle {
		switch {
		case m.busy():
			delete(x.idle, m)
		case x.over(m, now):
			idle = append(idle, m)
		}
	}
	x.mu.Unlock()
	idle, ok := e.unused(idle)
	if !ok {
		return
	}
	x.mu.Lock()
	for _, m := range idle {
		switch {
		case m.busy() || !x.over(m, now): // a packet has come
		case m.state == mappingLive:
			m.state, m.idle = mappingLeaving, now
			m.more().change = make(chan struct{})
			leave = append(leave, m)
		default:
			over = append(over, m)
			if m.extra != nil {
				for a := range m.extra.peers {
					peers = append(peers, nat.Peer{Proto: m.proto, Inside: m.inside.addrPort(), Addr: a})
				}
			}
		}
	}
	x.mu.Unlock()
	e.each(leave, e.takeOut)
	if len(peers) > 0 {
		e.forgetPeers(peers) // before the endpoint has another mapping
	}
	x.mu.Lock()
	over = slices.DeleteFunc(over, func(m *mapping) bool {
		again := m.state == mappingLive || m.busy() || !x.over(m, now) // a packet has come
		if !again {
			x.drop(m)
		}
		return again
	})
	x.mu.Unlock()
	for _, m := range over {
		e.closeBind(m)
		e.ports.Return(m.proto, m.external.addrPort())
	}
}

// over says whether a mapping without flows has waited for one long enough. x.mu
// is held.
func (x *mappings) over(m *mapping, now int64) bool {
	return (m.extra == nil || m.extra.change == nil) && now >= m.idle+int64(lateReports) && !m.attempted(now)
}

// drop forgets a mapping. x.mu is held.
func (x *mappings) drop(m *mapping) {
	delete(x.idle, m)
	x.forgetExternal(m)
	if x.byInside[m.insideKey()] == m {
		delete(x.byInside, m.insideKey())
	}
}

// takeOut takes a mapping out of the kernel. What came of it meanwhile brings
// it back.
func (e *Engine) takeOut(m *mapping) {
	x := &e.mappings
	x.mu.Lock()
	p := x.permission(m)
	x.mu.Unlock()
	err := e.kernel.Remove(context.Background(), p)
	x.mu.Lock()
	defer x.mu.Unlock()
	e.changed(m)
	switch {
	case err == nil:
		m.opened = false
		if m.busy() && m.state == mappingLeaving {
			e.bringBack(m)
		}
		return
	case m.state == mappingLeaving:
		m.state = mappingLive // and the next sweep sees it
		x.rest(m, e.now().Add(enforceAgain))
	default:
		m.more().change = make(chan struct{}) // it is nobody else's before
		e.later(enforceAgain, func() { e.takeOut(m) })
	}
	e.log.Error("taking a mapping out of the kernel failed; it is tried again", zap.Stringer("external", p.External), zap.Error(err))
}

// bringBack puts a mapping back that was about to go. mappings.mu is held.
func (e *Engine) bringBack(m *mapping) {
	e.tasks.run(func() {
		e.mappings.mu.Lock()
		if m.state != mappingLeaving || m.extra != nil && m.extra.change != nil {
			e.mappings.mu.Unlock()
			return
		}
		if err := e.installMapping(m); err != nil { // unlocks
			e.log.Error("putting a mapping back failed", zap.Stringer("external", m.external.addrPort()), zap.Error(err))
		}
	})
}

// remap ends, for flows to come, the mappings that the rules in force do not
// make any more, and has the kernel let in whom they say.
func (e *Engine) remap() {
	x := &e.mappings
	rules, inForce := map[string]policy.NetworkRule{}, e.Policy()
	for _, r := range inForce.NetworkRules() {
		rules[r.Name] = r
	}
	var end, put []*mapping
	x.mu.Lock()
	for _, m := range x.byInside {
		r, ok := rules[x.rules[m.rule].name]
		switch {
		case m.extra != nil && m.extra.change != nil: // whoever makes it looks at the rules after
		case !ok || !r.Maps(m.proto) || inForce.PublishedAt(m.proto, m.external.addrPort()) != nil || !r.LeavesFrom(m.external.addrPort().Addr()):
			end = append(end, m)
		case r.Filtering != m.filtering:
			m.filtering = r.Filtering
			if m.state == mappingLive {
				put = append(put, m)
			}
		}
	}
	e.retire(end)
	x.mu.Unlock()
	for _, m := range end {
		e.closeBind(m)
	}
	e.each(end, e.takeOut)
	e.each(put, func(m *mapping) {
		x.mu.Lock()
		if m.extra != nil && m.extra.change != nil {
			x.mu.Unlock() // a packet's: it goes by the same filtering
			return
		}
		if err := e.installMapping(m); err != nil { // unlocks
			e.log.Error("changing who comes in to a mapping failed", zap.Stringer("external", m.external.addrPort()), zap.Error(err))
		}
	})
}

// retire has mappings take nothing new; closeBind and takeOut must follow.
// mappings.mu is held.
func (e *Engine) retire(end []*mapping) {
	for _, m := range end {
		e.mappings.outlive(m)
		if !m.busy() {
			e.mappings.rest(m, e.now())
		}
	}
	e.sweepSoon()
}

// each does something to mappings, many at a time, so that the kernel gets them
// together.
func (e *Engine) each(all []*mapping, do func(*mapping)) {
	for some := range slices.Chunk(all, together) {
		var changes sync.WaitGroup
		for _, m := range some {
			changes.Go(func() { do(m) })
		}
		changes.Wait()
	}
}

// busy says whether a mapping has a flow, as far as is known: ends of untold flows
// may have taken flows below what user space holds. x.mu is held.
func (m *mapping) busy() bool { return m.flows > 0 || m.extra != nil && m.extra.inUser > 0 }
