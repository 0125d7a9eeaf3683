package engine

import (
	"errors"
	"fmt"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

const allowFlags = filterapi.Bidirectional | filterapi.IncreaseReceiveBuffer

// RetroactiveAllowBind implements filterapi.Session.
func (s *session) RetroactiveAllowBind(a filterapi.AllowBind) (already bool, err error) {
	fail := func(err error) (bool, error) {
		return false, fmt.Errorf("allow bind at %v: %w", a.Address, err)
	}
	switch {
	case !a.Proto.HasPorts(), !a.Address.IsValid(), a.Address.Port() == 0, a.Address.Addr().Is4() != s.addr.Is4(),
		a.Flags&^allowFlags != 0, a.Proto != flow.UDP && a.Flags&udpFlags != 0, !suits(a.IPFilter, s.addr):
		return fail(filterapi.ErrInvalidArgument)
	}
	p, err := s.findBind(a)
	if errors.Is(err, filterapi.ErrNotFound) {
		p, err = s.mappedBind(a)
	}
	if err != nil {
		return fail(err)
	}
	b := p.currentBasis()
	named := a.Protocol != "" && a.Protocol != p.currentStanding().protocol
	if named {
		b.protocol = a.Protocol
	}
	v, err := s.e.judge(b)
	if err != nil {
		return fail(err)
	}
	stands := p.currentStanding()
	if stands.rule == nil || named {
		stands = standing{v.Rule, protocolName(v), v.Filters}
	}
	before, already, err := p.allow(a, b, stands, s.watches(stands.uses, p.primary != nil))
	if err != nil || already {
		if err != nil {
			return fail(err)
		}
		return true, nil
	}
	err = s.e.enforce(p)
	if err == nil && !s.e.stands(p) {
		err = filterapi.ErrPolicyDenied // the rules have changed meanwhile
	}
	if err != nil {
		p.disallow(before)
		s.e.tasks.run(func() { _ = s.e.enforce(p) }) // it logs and tries again
		return fail(err)
	}
	s.e.expireAfter(p, p.timeout)
	if !p.waits() {
		return fail(filterapi.ErrTerminating)
	}
	return false, nil
}

// findBind finds a bind of the session, of several the one that can still be
// allowed.
func (s *session) findBind(a filterapi.AllowBind) (*permission, error) {
	err := filterapi.ErrNotFound
	var found *permission
	for _, p := range s.e.perms.of(s) {
		p.mu.Lock()
		at, discards := p.external(), p.state == permWaiting && p.bind != nil && p.bind.discarding
		waits, fits := p.state == permWaiting, p.inbound() && p.proto == a.Proto
		p.mu.Unlock()
		if !fits || at != a.Address && (!a.Address.Addr().IsUnspecified() || at.Port() != a.Address.Port()) {
			continue
		}
		if !waits {
			err = filterapi.ErrTerminating
			continue
		}
		if found == nil || discards {
			found = p
		}
	}
	if found != nil {
		return found, nil
	}
	return nil, err
}

// discardingBind is a bind as it was before it was allowed.
type discardingBind struct {
	allowed *judged
	filter  *filterapi.IPFilter
	oneWay  bool
	is      conditions
}

// allow opens a bind that discards so far.
func (p *permission) allow(a filterapi.AllowBind, b basis, stands standing, watched bool) (before discardingBind, already bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != permWaiting {
		return before, false, filterapi.ErrTerminating
	}
	x := p.bind
	if !x.discarding {
		return before, true, nil
	}
	before = discardingBind{x.allowed, x.filter, x.oneWay, p.is}
	x.discarding = false
	x.allowed = &judged{basis: b, standing: stands}
	x.setFilter(a.IPFilter.Clone())
	x.oneWay = a.Proto == flow.UDP && a.Flags&filterapi.Bidirectional == 0
	p.is.set(burst, a.Flags&filterapi.IncreaseReceiveBuffer != 0)
	if p.is.has(burst) && x.deepen != nil {
		x.deepen()
	}
	if stands.rule.NoKernelMode {
		p.is.set(forced, true)
	}
	if p.is.has(forced) || watched {
		p.is.set(toUser, true)
	}
	return before, false, nil
}

// disallow takes allow back.
func (p *permission) disallow(b discardingBind) {
	p.mu.Lock()
	defer p.mu.Unlock()
	x := p.bind
	x.discarding, x.allowed, x.oneWay = true, b.allowed, b.oneWay
	x.setFilter(b.filter)
	p.is.set(burst|forced|toUser, false)
	p.is |= b.is & (burst | forced | toUser)
}
