package engine

import (
	"net/netip"
	"sync"
	"weak"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/nat"
)

// grounds are those of the calls of late that named one connection, or none of
// their session's. What a filter asks for it asks for again: one ground does for
// all permissions that differ in their addresses alone. None is kept for its own
// sake.
type grounds struct {
	mu     sync.Mutex
	recent [4]weak.Pointer[ground] // a filter may ask by turns, for TCP and UDP for instance
	next   int                     // the place of the one that is made next
}

// share gives a ground that is the same; the caller changes neither.
func (x *grounds) share(g *ground) *ground {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, w := range x.recent {
		if have := w.Value(); have != nil && have.same(g) {
			return have
		}
	}
	x.recent[x.next] = weak.Make(g)
	x.next = (x.next + 1) % len(x.recent)
	return g
}

// groundsOf are those of the calls that name a primary connection, or none.
func (s *session) groundsOf(primary *connection) *grounds {
	if primary == nil {
		return &s.grounds
	}
	primary.mu.Lock()
	defer primary.mu.Unlock()
	if primary.grounds == nil {
		primary.grounds = &grounds{}
	}
	return primary.grounds
}

// same says whether two grounds are alike in everything.
func (g *ground) same(o *ground) bool {
	return g.session == o.session && g.primary == o.primary && g.direction == o.direction && g.proto == o.proto &&
		g.multiple == o.multiple && g.addressBased == o.addressBased && g.reach == o.reach && g.timeout == o.timeout &&
		g.source == o.source && g.by == o.by && g.judged.same(&o.judged) && g.hears(o)
}

func (j *judged) same(o *judged) bool {
	return j.basis == o.basis && j.aimed == o.aimed && j.rule == o.rule && j.protocol == o.protocol &&
		// The list is the rule's own, which does not change.
		len(j.uses) == len(o.uses) && (len(j.uses) == 0 || &j.uses[0] == &o.uses[0])
}

// hears says whether the same one hears of established flows, with the same
// context.
func (g *ground) hears(o *ground) bool {
	if g.notify == nil || o.notify == nil {
		return g.notify == o.notify && sameContext(g.context, o.context)
	}
	return *g.notify == *o.notify && sameContext(g.context, o.context)
}

// sameContext compares what filters gave, whose types may not be comparable.
func sameContext(a, b any) (same bool) {
	defer func() { _ = recover() }() // then they cannot be told apart: not the same
	return a == b
}

// newPermission is a permission without its ends, as far as all of the calls
// know it. g has what only this call knows of its ground.
func (s *session) newPermission(t terms, n filterapi.Negotiated, g ground) *permission {
	g.session, g.primary, g.notify, g.context, g.proto = s, t.primary, t.notify, t.context, n.Proto
	g.judged = judged{basis: t.basis, standing: t.standing}
	if g.direction == nat.Outbound && t.primary == nil {
		g.judged.aimed, g.judged.basis.tuple.Dst = true, netip.AddrPort{}
	}
	g.multiple = g.multiple || n.Flags&filterapi.AllowMultiple != 0
	if n.Flags&filterapi.Timeout != 0 {
		g.timeout = filterapi.DefaultTimeout
		if n.Expiry > 0 {
			g.timeout = n.Expiry
		}
	}
	p := &permission{id: s.e.nextID()}
	p.is.set(burst, n.Flags&filterapi.IncreaseReceiveBuffer != 0)
	p.is.set(forced, n.Flags&filterapi.NoKernelMode != 0 || t.noKernelMode())
	p.is.set(toUser, p.is.has(forced) || s.watches(t.uses, t.primary != nil))
	p.ground = s.groundsOf(t.primary).share(&g)
	return p
}
