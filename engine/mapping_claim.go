package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/policy"
)

// A bind whose client shall leave from its external address borrows that of the
// mapping of this endpoint, where a network rule maps endpoints: of the one that
// is there, or one that is made for it. So both have one external address,
// whichever was first (RFC 6887, section 11: an implicit mapping becomes an
// explicit one), also while the bind lets nobody in. The mapping lives as long
// as the bind.

// claimsMapping says whether the bind of a call has its place at a mapping, and
// by which network rule.
func claimsMapping(b filterapi.Bind, t terms) (*policy.NetworkRule, bool) {
	r := t.verdict.NetworkRule
	one := len(b.Clients) == 1 && b.Clients[0].Addr().Is4() && !b.Clients[0].Addr().IsUnspecified() && b.Flags&filterapi.EvenPort == 0
	return r, b.Flags&filterapi.SameSource != 0 && one && r != nil && !t.verdict.Reverse && r.Maps(b.Proto)
}

// claim finds or makes the mapping of a bind's client, and holds it. port is the
// external one that is asked for, or 0.
func (s *session) claim(b filterapi.Bind, r *policy.NetworkRule, addr netip.Addr, port uint16) (place, error) {
	e, x := s.e, &s.e.mappings
	for {
		x.mu.Lock()
		key := insideKey{x.numberOf(r.Name), b.Proto, packed(b.Clients[0])}
		m := x.byInside[key]
		if m == nil {
			return s.claimNew(b, r, key, addr, port) // unlocks
		}
		x.mu.Unlock()
		switch err := e.revive(context.Background(), m); {
		case errors.Is(err, errGone):
			continue
		case err != nil:
			return place{}, err
		}
		x.mu.Lock()
		if x.byInside[key] != m {
			x.mu.Unlock()
			continue
		}
		at, err := m.suits(b, port)
		if err == nil {
			e.pin(m)
		}
		x.mu.Unlock()
		return place{first: at, mapping: m}, err
	}
}

// suits says whether a bind can be at a mapping. mappings.mu is held.
func (m *mapping) suits(b filterapi.Bind, port uint16) (netip.AddrPort, error) {
	at, a := m.external.addrPort(), b.External.Addr()
	other := m.extra != nil && m.extra.borrower != nil && m.extra.borrower.waits()
	switch {
	case other, a.IsValid() && !a.IsUnspecified() && a != at.Addr():
		return at, fmt.Errorf("%v is mapped to %v: %w", b.Clients[0], at, filterapi.ErrAlreadyExists)
	case port != 0 && port != at.Port() && b.Flags&filterapi.Preferred == 0:
		return at, fmt.Errorf("%v is mapped to %v: %w", b.Clients[0], at, filterapi.ErrNoPorts)
	}
	return at, nil
}

// claimNew makes a mapping for a bind. x.mu is held, and is not when it returns.
func (s *session) claimNew(b filterapi.Bind, r *policy.NetworkRule, key insideKey, addr netip.Addr, port uint16) (place, error) {
	e, x := s.e, &s.e.mappings
	m := &mapping{
		id: e.nextID(), inside: key.at, proto: key.proto, filtering: r.Filtering, rule: key.rule,
		since: e.now().UnixNano(), extra: &mappingExtra{change: make(chan struct{})},
	}
	x.byInside[key] = m
	x.mu.Unlock()
	at, err := s.leaseFor(b, addr, port)
	x.mu.Lock()
	if err == nil && at.mapping == nil {
		m.external = packed(at.first)
		x.byExternal[m.externalKey()] = m
		e.pin(m)
		if err = e.putMapping(m); err == nil { // unlocks
			return place{first: at.first, mapping: m}, nil
		}
		x.mu.Lock()
		x.forgetExternal(m)
	}
	delete(x.byInside, key)
	e.changed(m)
	x.mu.Unlock()
	if at.mapping != nil {
		return at, nil // it is what was
	}
	if at.leased {
		e.ports.Unlease(b.Proto, at.first)
	}
	return place{}, err
}

// reclaim gives a bind the external address that its client's endpoint has had:
// flows that began by it live on, after a restart for instance, and keep it from
// everybody else.
func (s *session) reclaim(b filterapi.Bind, at netip.AddrPort) (place, bool) {
	if b.Flags&filterapi.SameSource == 0 || len(b.Clients) != 1 || !at.Addr().Is4() || !b.Clients[0].Addr().Is4() {
		return place{}, false
	}
	x := &s.e.mappings
	x.mu.Lock()
	defer x.mu.Unlock()
	m := x.byExternal[externalKey{b.Proto, packed(at)}]
	if m == nil || m.state != mappingOutlived || m.inside != packed(b.Clients[0]) || m.extra != nil && (m.extra.change != nil || m.extra.borrower != nil) {
		return place{}, false
	}
	s.e.pin(m)
	return place{first: at, mapping: m}, true
}

// pin has a mapping live though nothing flows, until giveMappingBack.
// mappings.mu is held.
func (e *Engine) pin(m *mapping) {
	m.more().inUser++
	e.count(m, 1)
}
