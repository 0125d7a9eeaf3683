package pcp

import (
	"net/netip"
	"slices"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// maxFilters bounds the FILTERs of one mapping.
const maxFilters = 16

// lowestWish is the lowest external port that a client gets by asking for it:
// below, services of the gateway may be started later.
const lowestWish = 1024

// answer is the response to a datagram; nil: none.
func (h *host) answer(b []byte) []byte {
	switch {
	case len(b) < 2 || b[1]&responseBit != 0:
		return nil // RFC 6887, section 8.2; RFC 6886, section 3.5
	case b[0] == natpmpVersion && h.config.NATPMP && h.addr.Is4():
		return h.answerPMP(b)
	case b[0] != version:
		h.s.counts.note(unsuppVersion)
		return refusal(b, unsuppVersion, h.s.epoch())
	}
	r, res := parse(b, h.addr)
	if res == success && r.opcode == opAnnounce {
		return announcement(h.s.epoch())
	}
	var lifetime uint32
	var external netip.AddrPort
	if res == success {
		lifetime, external, res = h.ask(r)
	}
	h.s.counts.note(res)
	if res != success {
		return refusal(b, res, h.s.epoch())
	}
	return grant(b, r, lifetime, h.s.epoch(), external)
}

// ask does what MAP or PEER asks for.
func (h *host) ask(r request) (lifetime uint32, external netip.AddrPort, res result) {
	var protos []flow.Proto
	switch {
	case r.proto == 0 && r.internal != 0:
		return 0, external, malformedRequest // RFC 6887, section 11.3
	case r.lifetime == 0 && r.opcode == opMap && r.internal == 0 && r.proto == 0:
		protos = []flow.Proto{flow.TCP, flow.UDP}
	case flow.Proto(r.proto).HasPorts():
		protos = []flow.Proto{flow.Proto(r.proto)}
	default:
		return 0, external, unsuppProtocol
	}
	if r.opcode == opMap && r.lifetime == 0 {
		external, res = h.unmap(protos, r.internal, r.nonce, false)
		return 0, external, res
	}
	if r.internal == 0 {
		return 0, external, unsuppProtocol // all ports of a host are not mapped
	}
	at := endpoint{protos[0], r.internal}
	if r.opcode == opPeer {
		return h.peer(at, r)
	}
	filters, res := h.filters(at, r)
	if res != success {
		return 0, external, res
	}
	return h.mapping(at, r, filters, false)
}

// filters are those of a mapping after the options of a request.
func (h *host) filters(at endpoint, r request) (out []source, res result) {
	if m := h.find(at); m != nil && m.owner != nil {
		out = slices.Clone(m.filters)
	}
	for _, f := range r.filters {
		if f.clear {
			out = nil
		} else if !slices.Contains(out, f.source) {
			out = append(out, f.source)
		}
	}
	if len(out) > maxFilters {
		return nil, excessiveRemotePeers
	}
	return out, success
}

// granted is the lifetime of a mapping that is asked for.
func (h *host) granted(seconds uint32) time.Duration {
	return min(max(time.Duration(seconds)*time.Second, h.config.MinLifetime), h.config.MaxLifetime)
}

// may says whether the host may have a port mapped at all.
func (h *host) may(at endpoint) result {
	if !slices.ContainsFunc(h.config.Ports, func(p [2]uint16) bool { return p[0] <= at.port && at.port <= p[1] }) {
		return notAuthorized
	}
	s, err := h.open()
	if err == nil {
		// A bind that discards is made for everybody; who may have it is asked here.
		err = s.HostAccessCheck(filterapi.HostAccess{Protocol: Name, Target: netip.AddrPortFrom(unspecified(h.addr), 0)})
	}
	if err != nil {
		return h.failed(err, false)
	}
	return success
}

// mapping makes the mapping of MAP, or renews it.
func (h *host) mapping(at endpoint, r request, filters []source, pmp bool) (uint32, netip.AddrPort, result) {
	fail := func(res result) (uint32, netip.AddrPort, result) { return 0, netip.AddrPort{}, res }
	m := h.find(at)
	if m != nil && m.owner != nil && !m.owner.same(r.nonce, pmp) {
		return fail(notAuthorized)
	}
	if res := h.may(at); res != success {
		return fail(res)
	}
	if res := h.insists(m, r); res != success {
		return fail(res)
	}
	if (m == nil || m.owner == nil) && h.held() >= h.config.Quota {
		return fail(userExQuota)
	}
	lifetime := h.granted(r.lifetime)
	owner := &claim{nonce: r.nonce, pmp: pmp, until: time.Now().Add(lifetime)}
	if m == nil {
		m = &mapping{owner: owner, filters: filters, peers: make(map[netip.AddrPort]*claim)}
		if res := h.make(at, m, wish(r), r.preferFailure); res != success {
			return fail(res)
		}
		return seconds(lifetime), m.external, success
	}
	m.owner, m.filters = owner, filters
	if err := h.settle(at, m); err != nil {
		h.end(at)
		return fail(h.failed(err, false))
	}
	return seconds(lifetime), m.external, success
}

func seconds(d time.Duration) uint32 { return uint32(d / time.Second) }

// wish is the external port that a client asks for, as far as it may.
func wish(r request) uint16 {
	if r.suggested.Port() < lowestWish {
		return 0
	}
	return r.suggested.Port()
}

// insists says whether PREFER_FAILURE can be met: no other external address or
// port than the suggested one (RFC 6887, section 13.2).
func (h *host) insists(m *mapping, r request) result {
	if !r.preferFailure {
		return success
	}
	addr, port := r.suggested.Addr(), r.suggested.Port()
	if m != nil {
		if port != 0 && port != m.external.Port() || !addr.IsUnspecified() && addr != m.external.Addr() {
			return cannotProvideExternal
		}
		return success
	}
	if port != 0 && port < lowestWish {
		return cannotProvideExternal
	}
	if addr.IsUnspecified() {
		return success
	}
	s, err := h.open()
	if err != nil {
		return h.failed(err, false)
	}
	if own, err := s.ExternalAddr(Name); err != nil {
		return h.failed(err, false)
	} else if own != addr {
		return cannotProvideExternal
	}
	return success
}

// unmap ends mappings that were made by MAP; port 0: all of the protocols. What
// is not there is no error.
func (h *host) unmap(protos []flow.Proto, port uint16, n nonce, pmp bool) (external netip.AddrPort, res result) {
	external = netip.AddrPortFrom(unspecified(h.addr), 0)
	for at, m := range h.mappings {
		if !slices.Contains(protos, at.proto) || port != 0 && port != at.port || m.owner == nil {
			continue
		}
		if !m.owner.same(n, pmp) {
			if port != 0 {
				return external, notAuthorized
			}
			continue
		}
		if port != 0 {
			external = m.external
		}
		m.owner, m.filters = nil, nil
		if len(m.peers) == 0 || h.settle(at, m) != nil {
			h.end(at)
		}
	}
	return external, success
}

// peer makes or renews a mapping that lets one peer in, by PEER. What the host
// sends to it leaves from the same external address and port.
func (h *host) peer(at endpoint, r request) (uint32, netip.AddrPort, result) {
	fail := func(res result) (uint32, netip.AddrPort, result) { return 0, netip.AddrPort{}, res }
	if r.remote.Port() == 0 || r.remote.Addr().Is4() != h.addr.Is4() || r.remote.Addr().IsUnspecified() || r.remote.Addr().IsMulticast() {
		return fail(malformedRequest) // RFC 6887, section 12.3
	}
	m := h.find(at)
	var before *claim
	if m != nil {
		before = m.peers[r.remote]
	}
	if before != nil && before.nonce != r.nonce {
		return fail(notAuthorized)
	}
	if r.lifetime == 0 {
		return h.unpeer(at, m, r)
	}
	if res := h.may(at); res != success {
		return fail(res)
	}
	if before == nil && h.held() >= h.config.Quota {
		return fail(userExQuota)
	}
	lifetime := h.granted(r.lifetime)
	c := &claim{nonce: r.nonce, until: time.Now().Add(lifetime)}
	if m == nil {
		m = &mapping{peers: map[netip.AddrPort]*claim{r.remote: c}}
		if res := h.make(at, m, wish(r), false); res != success {
			return fail(res)
		}
		return seconds(lifetime), m.external, success
	}
	m.peers[r.remote] = c
	if err := h.settle(at, m); err != nil {
		h.end(at)
		return fail(h.failed(err, false))
	}
	return seconds(lifetime), m.external, success
}

// unpeer ends what PEER has made for one peer.
func (h *host) unpeer(at endpoint, m *mapping, r request) (uint32, netip.AddrPort, result) {
	if m == nil || m.peers[r.remote] == nil {
		return 0, netip.AddrPortFrom(unspecified(h.addr), 0), success
	}
	delete(m.peers, r.remote)
	if m.owner == nil && len(m.peers) == 0 || h.settle(at, m) != nil {
		h.end(at)
	}
	return 0, m.external, success
}

// answerPMP is the response to a datagram of NAT-PMP.
func (h *host) answerPMP(b []byte) []byte {
	switch b[1] {
	case pmpAddress:
		s, err := h.open()
		if err != nil {
			return pmpExternal(netip.Addr{}, pmpCode(h.failed(err, false)), h.s.epoch())
		}
		external, err := s.ExternalAddr(Name)
		if err != nil {
			return pmpExternal(netip.Addr{}, pmpCode(h.failed(err, false)), h.s.epoch())
		}
		return pmpExternal(external, pmpSuccess, h.s.epoch())
	case pmpUDP, pmpTCP:
	default:
		h.s.counts.note(unsuppOpcode)
		return pmpUnsupported(b, h.s.epoch())
	}
	r, ok := parsePMP(b)
	if !ok {
		h.s.counts.note(malformedRequest)
		return nil // no request to map, and no error says so
	}
	if r.lifetime == 0 {
		_, res := h.unmap([]flow.Proto{r.proto}, r.internal, nonce{}, true)
		h.s.counts.note(res)
		return pmpGrant(b, pmpCode(res), h.s.epoch(), 0, 0)
	}
	ask := request{
		lifetime: r.lifetime, internal: r.internal,
		suggested: netip.AddrPortFrom(netip.IPv4Unspecified(), r.external),
	}
	lifetime, external, res := h.mapping(endpoint{r.proto, r.internal}, ask, nil, true)
	h.s.counts.note(res)
	return pmpGrant(b, pmpCode(res), h.s.epoch(), external.Port(), lifetime)
}
