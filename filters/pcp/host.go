package pcp

import (
	"errors"
	"net/netip"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// host is one that has mappings, or asks for some. One worker alone uses it.
type host struct {
	s       *Server
	config  *Config
	addr    netip.Addr
	session filterapi.Session // nil: none yet

	mappings map[endpoint]*mapping
	making   atomic.Pointer[mapping] // whose bind is being made; nil: none
}

// endpoint is a port of the host's.
type endpoint struct {
	proto flow.Proto
	port  uint16
}

// mapping is a bind for an endpoint, with those who have asked for it: one by
// MAP, for all who may come, and any number by PEER, for that peer.
//
//	MAP ----> owner, with its filters --.
//	PEER ---> one of peers -------------+--> who may come, and until when
//	NAT-PMP > owner --------------------'
type mapping struct {
	bind     filterapi.Connection
	external netip.AddrPort
	over     atomic.Bool // the bind has ended

	owner   *claim
	filters []source // of the owner; nil: everybody may come
	peers   map[netip.AddrPort]*claim
	gate    gate

	sources *filterapi.IPFilter // what was asked of the bind
	bound   *filterapi.IPFilter // what another filter has narrowed it to
	narrow  bool                // one has
}

// claim is a request that was granted.
type claim struct {
	nonce nonce
	pmp   bool // by NAT-PMP, which has no nonces
	until time.Time
}

// same says whether a request comes from who has made the claim.
func (c *claim) same(n nonce, pmp bool) bool { return c.nonce == n && c.pmp == pmp }

// open gives the host's session, which is made with its first use. While the
// host has mappings it is theirs.
func (h *host) open() (filterapi.Session, error) {
	if h.session != nil && h.session.Flags()&filterapi.SessionTerminated == 0 {
		return h.session, nil
	}
	h.close()
	s, err := h.s.fw.PrivateSession(h.addr, "")
	if err != nil {
		return nil, err
	}
	h.session = s
	h.s.mine.Store(s.ID(), h)
	if err := s.AttachFilter(Name); err != nil {
		h.close()
		return nil, err
	}
	return s, nil
}

// close gives the session back; what is left of its mappings ends with it.
func (h *host) close() {
	if h.session == nil {
		return
	}
	h.session.Close()
	h.s.mine.Delete(h.session.ID())
	h.session = nil
}

// forget ends all mappings.
func (h *host) forget() {
	for at := range h.mappings {
		h.end(at)
	}
}

// recheck ends the mappings that the host may not have any more. Those that
// discard the gateway leaves to whoever may allow them.
func (h *host) recheck() {
	for at := range h.mappings {
		if h.may(at) == notAuthorized {
			h.end(at)
		}
	}
}

// drop takes a mapping off the list.
func (h *host) drop(at endpoint) {
	h.mappings[at].gate.close()
	delete(h.mappings, at)
	h.s.counts.mappings.Add(-1)
}

// end ends one mapping. Connections that it has let in go on.
func (h *host) end(at endpoint) {
	m := h.mappings[at]
	h.s.binds.Delete(m.bind)
	m.bind.Kill()
	h.drop(at)
	h.s.log.Info("mapping ended", zap.Stringer("client", h.addr), zap.Stringer("proto", at.proto),
		zap.Uint16("port", at.port), zap.Stringer("external", m.external))
}

// tidy forgets what is over.
func (h *host) tidy(now time.Time) {
	ended := h.session != nil && h.session.Flags()&filterapi.SessionTerminated != 0
	for at, m := range h.mappings {
		if ended || m.over.Load() {
			h.s.binds.Delete(m.bind)
			h.drop(at)
			continue
		}
		if !m.expire(now) {
			continue
		}
		if m.owner == nil && len(m.peers) == 0 {
			h.end(at)
		} else if err := h.settle(at, m); err != nil {
			h.end(at) // it would let in who may not come any more
		}
	}
}

// expire takes away claims whose time is over.
func (m *mapping) expire(now time.Time) (changed bool) {
	if m.owner != nil && !now.Before(m.owner.until) {
		m.owner, m.filters, changed = nil, nil, true
	}
	for peer, c := range m.peers {
		if !now.Before(c.until) {
			delete(m.peers, peer)
			changed = true
		}
	}
	return changed
}

// find gives the living mapping of an endpoint; nil: there is none.
func (h *host) find(at endpoint) *mapping {
	m := h.mappings[at]
	if m == nil || !m.over.Load() {
		return m
	}
	h.drop(at)
	return nil
}

// held is how many claims the host has.
func (h *host) held() (n int) {
	for _, m := range h.mappings {
		n += len(m.peers)
		if m.owner != nil {
			n++
		}
	}
	return n
}

// wanted is who may come by all claims together, and until when.
func (m *mapping) wanted() (*filterapi.IPFilter, time.Time) {
	var until time.Time
	if m.owner != nil {
		until = m.owner.until
	}
	f := &filterapi.IPFilter{}
	for _, x := range m.filters {
		lo, hi := bounds(x.prefix)
		_ = f.IncludeRange(lo, hi) // a prefix is a range
	}
	for peer, c := range m.peers {
		_ = f.IncludeRange(peer.Addr(), peer.Addr())
		if until.Before(c.until) {
			until = c.until
		}
	}
	if m.owner != nil && m.filters == nil {
		f = nil
	}
	return f, until
}

// settle has the bind let in who may come, and end when it shall. What another
// filter has narrowed it to is not widened again.
func (h *host) settle(at endpoint, m *mapping) error {
	now := m.bind.IPFilter()
	if !now.Equal(m.sources) {
		m.bound, m.narrow = now, true
	}
	f, until := m.wanted()
	if m.narrow {
		f = both(f, m.bound)
	}
	m.sources = f
	// Nobody comes in by an address whose port is not looked at yet.
	if err := m.keepGate(m.bind.Session(), at.proto, m.external); err != nil {
		return err
	}
	if !f.Equal(now) {
		if err := m.bind.SetIPFilter(f); err != nil {
			return err
		}
	}
	if !m.byPort() {
		m.gate.remove()
	}
	if err := m.bind.SetExpiry(max(time.Until(until), time.Millisecond)); err != nil {
		return err
	}
	return nil
}

// both are the sources that two filters have in common.
func both(a, b *filterapi.IPFilter) *filterapi.IPFilter {
	switch {
	case a == nil:
		return b.Clone()
	case b == nil:
		return a.Clone()
	}
	out, rest := a.Clone(), a.Clone()
	_ = rest.ExcludeFilter(b) // both are sets of addresses
	_ = out.ExcludeFilter(rest)
	return out
}

// make opens a bind for an endpoint and keeps it as a mapping that has its
// claims already. exact: it is the wish or nothing.
func (h *host) make(at endpoint, m *mapping, wish uint16, exact bool) result {
	if h.s.counts.mappings.Load() >= int64(h.s.most) {
		return noResources
	}
	s, err := h.open()
	if err != nil {
		return h.failed(err, exact)
	}
	var until time.Time
	m.sources, until = m.wanted()
	b := filterapi.Bind{
		Negotiated: filterapi.Negotiated{
			Protocol: Name, Proto: at.proto, Flags: filterapi.AllowMultiple | filterapi.SameSource,
		},
		Clients:  []netip.AddrPort{netip.AddrPortFrom(h.addr, at.port)},
		IPFilter: m.sources,
	}
	if at.proto == flow.UDP {
		b.Flags |= filterapi.Bidirectional
	}
	if !exact {
		b.Flags |= filterapi.Preferred
	}
	if !h.config.Approve {
		b.Flags |= filterapi.Discarding
	}
	if wish != 0 {
		b.External = netip.AddrPortFrom(unspecified(h.addr), wish)
	}
	h.making.Store(m)
	binds, err := s.BindForClient(b)
	h.making.Store(nil)
	if err != nil {
		if failure := m.gate.close(); failure != nil {
			err = failure // the bind was refused because of it
		}
		return h.failed(err, exact)
	}
	m.bind = binds[0]
	h.s.binds.Store(m.bind, m)
	if m.external, err = m.bind.ExternalName(); err == nil {
		err = m.keepGate(s, at.proto, m.external) // as a rule the bind's event has made it
	}
	if err == nil {
		err = m.bind.SetExpiry(max(time.Until(until), time.Millisecond))
	}
	if err != nil {
		h.s.binds.Delete(m.bind)
		m.bind.Kill()
		m.gate.close()
		return h.failed(err, exact)
	}
	h.mappings[at] = m
	h.s.counts.mappings.Add(1)
	h.s.log.Info("mapping made", zap.Stringer("client", h.addr), zap.Stringer("proto", at.proto),
		zap.Uint16("port", at.port), zap.Stringer("external", m.external), zap.Time("until", until))
	return success
}

func unspecified(of netip.Addr) netip.Addr {
	if of.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// failed is the result for an error of the gateway's. exact: a certain external
// port was asked for.
func (h *host) failed(err error, exact bool) result {
	h.s.log.Debug("request refused", zap.Stringer("client", h.addr), zap.Error(err))
	switch {
	case errors.Is(err, filterapi.ErrPolicyDenied), errors.Is(err, filterapi.ErrNetworkDenied):
		return notAuthorized
	case errors.Is(err, filterapi.ErrQuota):
		return userExQuota
	case exact && (errors.Is(err, filterapi.ErrNoPorts) || errors.Is(err, filterapi.ErrAlreadyExists)):
		return cannotProvideExternal
	case errors.Is(err, filterapi.ErrNoPorts), errors.Is(err, filterapi.ErrAlreadyExists), errors.Is(err, filterapi.ErrTerminating):
		return noResources
	}
	return networkFailure
}
