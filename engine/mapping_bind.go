package engine

import (
	"context"
	"net/netip"
	"slices"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// A mapping is a bind: an external endpoint that the gateway holds for a client.
// It becomes an object only where a filter has to do with it, because it hears
// of binds or of the flows that come in, or because it allows the mapping to
// others. Whom a network rule lets in by their address the kernel alone knows:
// these flows are shown to no filter.

// networkRuleWord begins the name of who asked for a mapping.
const networkRuleWord = "network rule "

// raiseBind tells the filters of a flow of the mapping that is made for it. The
// mapping is nobody else's yet.
func (e *Engine) raiseBind(ctx context.Context, m *mapping, c *connection) error {
	kind := filterapi.BindUDP
	switch {
	case !m.proto.HasPorts():
		return nil
	case m.proto == flow.TCP:
		kind = filterapi.BindTCP
	}
	s := c.session
	heard := slices.ContainsFunc(e.filters, func(r *registered) bool {
		_, ok := bound(s.wants(r), kind, r.filter.Name(), c.uses, false)
		return ok
	})
	shown := m.filtering == policy.FilterEndpointIndependent && s.watches(c.uses, false)
	if !heard && !shown {
		return nil
	}
	p, err := e.bindMapping(m, s, c.basis(), standing{c.rule, c.protocol, c.uses}, shown)
	if err != nil || !heard {
		return err
	}
	return e.notify(ctx, p.object(), kind, func(_ *registered, a filterapi.About) filterapi.Event {
		return &filterapi.BindEvent{About: a, TCP: m.proto == flow.TCP, External: p.external()}
	})
}

// bindMapping makes an object of a mapping, for a session, which lives as long
// as the mapping. shown: filters are shown each flow that comes in.
func (e *Engine) bindMapping(m *mapping, s *session, b basis, stands standing, shown bool) (*permission, error) {
	if !s.ref() {
		return nil, filterapi.ErrTerminating
	}
	x := &e.mappings
	x.mu.Lock()
	more := m.more()
	if more.bind != nil {
		p := more.bind
		x.mu.Unlock()
		e.release(s)
		return p, nil
	}
	p := &permission{id: e.nextID(), ground: &ground{
		session: s, direction: nat.Inbound, proto: m.proto, multiple: true, by: networkRuleWord + x.rules[m.rule].name,
		judged: judged{basis: b, standing: stands},
	}}
	p.far, p.near = compactOf(m.external.addrPort()), compactOf(m.inside.addrPort())
	p.bind = &bind{mapping: m, anySource: true, discarding: m.filtering != policy.FilterEndpointIndependent}
	p.is.set(toUser, shown)
	p.is.set(forced, stands.noKernelMode())
	p.makeObject(m.external.addrPort())
	more.bind, more.held = p, s
	x.mu.Unlock()
	e.perms.adopt(p)
	return p, nil
}

// closeBind ends what a mapping is to filters, with the mapping.
func (e *Engine) closeBind(m *mapping) {
	e.mappings.mu.Lock()
	var p *permission
	var s *session
	if m.extra != nil {
		p, s = m.extra.bind, m.extra.held
		m.extra.held = nil
	}
	e.mappings.mu.Unlock()
	if p != nil {
		_ = e.void(p) // a filter has closed it; or it logs
	}
	if s != nil {
		e.tasks.run(func() { e.release(s) })
	}
}

// mappedBind finds the mapping that a session's client has at an external
// address, as a bind of the session.
func (s *session) mappedBind(a filterapi.AllowBind) (*permission, error) {
	e := s.e
	x := &e.mappings
	var found *mapping
	fits := func(m *mapping) bool {
		return m != nil && m.proto == a.Proto && m.state != mappingOutlived && m.inside.addrPort().Addr() == s.addr
	}
	x.mu.Lock()
	if !a.Address.Addr().Is4() {
		x.mu.Unlock()
		return nil, filterapi.ErrNotFound
	}
	if m := x.byExternal[externalKey{a.Proto, packed(a.Address)}]; fits(m) {
		found = m
	} else if a.Address.Addr().IsUnspecified() {
		for _, m := range x.byExternal {
			if m.external.port == a.Address.Port() && fits(m) {
				found = m
			}
		}
	}
	var first netip.AddrPort
	var p *permission
	if found != nil {
		first, p = found.first.addrPort(), found.bind()
	}
	x.mu.Unlock()
	switch {
	case found == nil:
		return nil, filterapi.ErrNotFound
	case p != nil && p.session == s:
		return nil, filterapi.ErrTerminating // or findBind had found it
	case p != nil:
		return nil, filterapi.ErrNotFound
	}
	b := basis{tuple: flow.Tuple{Proto: a.Proto, Src: found.inside.addrPort(), Dst: first}}
	v, err := e.judge(b)
	if err != nil {
		return nil, err
	}
	return e.bindMapping(found, s, b, standing{v.Rule, protocolName(v), v.Filters}, false)
}

// yield has the kernel let in whom the mapping of a bind lets in by itself, or
// nobody, as long as a filter says who.
func (e *Engine) yield(p *permission) error {
	if p.mapping() == nil {
		return nil
	}
	return e.refit(p.mapping())
}

// refit brings the kernel to what has become of a mapping.
func (e *Engine) refit(m *mapping) error {
	x := &e.mappings
	x.mu.Lock()
	for m.state == mappingLive && (m.opened != m.opens() || m.shared != m.shares()) {
		if m.extra == nil || m.extra.change == nil {
			return e.installMapping(m) // unlocks
		}
		wait := m.extra.change
		x.mu.Unlock()
		<-wait
		x.mu.Lock()
	}
	x.mu.Unlock()
	return nil
}

// isDiscarding says whether a bind lets nobody in until a filter allows it.
func (p *permission) isDiscarding() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.bind.discarding && p.state == permWaiting
}

// MappingInfo counts mappings, for people.
type MappingInfo struct{ Living, Flows int }

// Mappings counts them.
func (e *Engine) Mappings() (i MappingInfo) {
	flows := e.living()
	e.mappings.mu.Lock()
	defer e.mappings.mu.Unlock()
	i.Living = len(e.mappings.byExternal)
	for _, m := range e.mappings.byExternal {
		i.Flows += flows.of(m)
	}
	return i
}

// mappedBinds lists the mappings as binds, without those that are objects.
func (e *Engine) mappedBinds() []PermissionInfo {
	x := &e.mappings
	flows := e.living()
	x.mu.Lock()
	defer x.mu.Unlock()
	out := make([]PermissionInfo, 0, len(x.byExternal))
	for _, m := range x.byExternal {
		if b := m.bind(); b != nil && b.waits() || m.rule < 0 || m.lent() {
			continue
		}
		i := PermissionInfo{
			Permission: x.permission(m), By: networkRuleWord + x.rules[m.rule].name, Owner: m.inside.addrPort().Addr(),
			State: "armed", Path: "kernel", Bind: true, Flows: flows.of(m),
		}
		switch {
		case m.state == mappingOutlived:
			i.State = "used"
		case !i.AnySource:
			i.State = "discarding"
		}
		out = append(out, i)
	}
	return out
}

// lent says whether a bind that borrows its address alone says who comes in to a
// mapping. mappings.mu is held.
func (m *mapping) lent() bool {
	if m.extra == nil || m.extra.borrower == nil || !m.extra.borrower.waits() {
		return false
	}
	return !m.extra.borrower.isDiscarding() || m.filtering == policy.FilterAddressAndPort
}

// lendMapping makes a bind the one that says who may come in to the mapping
// whose address it borrows.
func (e *Engine) lendMapping(p *permission) {
	if !p.borrows() {
		return
	}
	e.mappings.mu.Lock()
	more := p.mapping().more()
	more.borrower = p
	own := more.bind
	e.mappings.mu.Unlock()
	e.setYields(own, true)
}

// regain has the network rule say again who may come in to a mapping, when the
// bind that borrows its address lets nobody in any more.
func (e *Engine) regain(p *permission) {
	if !p.borrows() || p.waits() {
		return
	}
	e.mappings.mu.Lock()
	own, other := p.mapping().bind(), p.mapping().more().borrower != p
	e.mappings.mu.Unlock()
	if own == nil || other { // or another one borrows it by now
		return
	}
	own.mu.Lock()
	yields := own.bind.yields
	own.mu.Unlock()
	if yields {
		e.setYields(own, false)
	}
}

// setYields has the bind that a mapping is let nobody in, or whom it did before.
func (e *Engine) setYields(own *permission, on bool) {
	if own == nil {
		return
	}
	own.mu.Lock()
	own.bind.yields = on
	own.mu.Unlock()
	_ = e.enforce(own) // it logs
}

// giveMappingBack ends that: the network rule says so again.
func (e *Engine) giveMappingBack(p *permission) {
	if !p.borrows() {
		return
	}
	m := p.mapping()
	e.mappings.mu.Lock()
	more := m.more()
	if more.borrower == p {
		more.borrower = nil
	}
	more.inUser--
	e.count(m, -1)
	m.lean()
	e.mappings.mu.Unlock()
	if err := e.yield(p); err != nil {
		e.log.Error("a mapping lets nobody in", zap.Stringer("external", p.external()), zap.Error(err))
	}
}

// shareMapping prepares a mapping, if there is one, for a bind at the end of one
// of its flows.
func (e *Engine) shareMapping(p flow.Proto, at netip.AddrPort) error {
	m := e.mappingAt(p, at)
	if m == nil {
		return nil
	}
	e.mappings.mu.Lock()
	m.more().lent = true
	e.mappings.mu.Unlock()
	return e.refit(m)
}
