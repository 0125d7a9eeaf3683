package engine

import (
	"fmt"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// A rule that publishes a server is a bind that the administrator made: flows
// come in by it as by a filter's, and belong to the session of the server. It
// is not in the kernel's sets, where the rules themselves have it, counts
// against nobody's quota, and nobody but a reload closes it. Its object is made
// when the first flow of an external address comes, and goes with the last.

// publicationKey names the object of a published address in a session.
type publicationKey struct {
	rule  string
	proto flow.Proto
	at    netip.AddrPort
}

// admitPublished lets a flow in that the rules send to a server.
func (e *Engine) admitPublished(c *connection, v policy.Verdict) {
	c.session, c.held = e.acquire(v.Server.Addr()), true
	p := c.session.publication(c, v)
	c.perm, c.pending = p, true
	c.rule, c.uses, c.protocol = v.Rule, v.Filters, protocolName(v)
	c.internalTranslation = !e.seen(c).Transparent
}

// publication finds or makes the bind of a flow, and counts the flow.
func (s *session) publication(c *connection, v policy.Verdict) *permission {
	key := publicationKey{v.Rule.Name, c.tuple.Proto, c.tuple.Dst}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.published[key]
	if p == nil || p.near.addrPort() != v.Server {
		p = newPublication(s, c.tuple, v)
		if s.published == nil {
			s.published = make(map[publicationKey]*permission)
		}
		s.published[key] = p
	}
	p.mu.Lock()
	p.count(false)
	p.mu.Unlock()
	return p
}

func newPublication(s *session, t flow.Tuple, v policy.Verdict) *permission {
	p := &permission{id: s.e.nextID(), ground: &ground{
		session: s, direction: nat.Inbound, proto: t.Proto, multiple: true,
		judged: judged{standing: standing{v.Rule, protocolName(v), v.Filters}},
	}}
	p.far, p.near = compactOf(t.Dst), compactOf(v.Server)
	p.bind = &bind{publication: v.Rule.Name, anySource: true, fromGateway: v.Rule.Publication.FromGateway}
	p.makeObject(t.Dst)
	p.object().internalTranslation = p.bind.fromGateway
	return p
}

// published says whether a rule that publishes let the flow in.
func (c *connection) published() bool { return c.perm != nil && c.perm.publication() != "" }

// leave takes a flow off the bind that a rule made for it.
func (e *Engine) leave(c *connection) {
	p := c.perm
	key := publicationKey{p.publication(), p.proto, p.external()}
	c.session.mu.Lock()
	p.mu.Lock()
	u := p.used()
	u.flows--
	last := u.flows == 0
	p.mu.Unlock()
	if last && c.session.published[key] == p {
		delete(c.session.published, key)
	}
	c.session.mu.Unlock()
	if last {
		e.closeObject(p)
	}
}

// PublishedFlows are the living flows that user space let in to published
// servers, by rule.
func (e *Engine) PublishedFlows() map[string][]flow.Tuple {
	out := make(map[string][]flow.Tuple)
	for _, c := range e.flows.all() {
		if c.published() {
			out[c.perm.publication()] = append(out[c.perm.publication()], c.tuple)
		}
	}
	return out
}

// inTheWay says whether an address of the gateway that a call was given is one at
// which a server is published now.
func (e *Engine) inTheWay(p *permission) bool {
	p.mu.Lock()
	at, pinhole := p.at(), p.inbound() && p.far == p.near
	p.mu.Unlock()
	return at.IsValid() && !pinhole && e.Policy().PublishedAt(p.proto, at) != nil
}

// seen says from where an inbound flow reaches its client: as the peer itself,
// unless the client is to see the gateway, or its answers would take another way
// (see policy.Hairpin and policy.Seen). The kernel does the same.
func (e *Engine) seen(c *connection) Dial {
	d := Dial{Proto: c.tuple.Proto, Target: c.perm.client(), Source: c.tuple.Src, Transparent: true}
	hide := func(a netip.Addr) Dial {
		d.Source, d.Transparent = netip.AddrPortFrom(a, 0), false
		if !a.IsValid() {
			d.Source = netip.AddrPort{}
		}
		return d
	}
	if c.perm.bind.fromGateway {
		return hide(netip.Addr{})
	}
	server := d.Target.Addr()
	if c.perm.external().Addr() == server {
		return d // nothing is translated
	}
	to, _, _, err := e.routes.Lookup(server)
	if err != nil {
		return d
	}
	from := c.inIface
	if from == "" {
		if from, _, _, err = e.routes.Lookup(c.tuple.Src.Addr()); err != nil {
			return d
		}
	}
	rules := e.Policy()
	if rules.Hairpin(c.tuple.Src.Addr(), from, server, to) {
		return hide(c.tuple.Dst.Addr())
	}
	if r := rules.Seen(c.tuple.Src.Addr(), from, server, to); r != nil {
		return hide(r.Address)
	}
	return d
}

// towards is the gateway's address that a session's client knows it by: what the
// primary connection comes from where the client sees the gateway, else what the
// route to the client prefers.
func (s *session) towards(primary *connection) (netip.Addr, error) {
	if primary != nil && primary.inbound() {
		if d := s.e.seen(primary); d.Source.IsValid() && !d.Transparent {
			return d.Source.Addr(), nil
		}
	}
	_, inside, _, err := s.e.routes.Lookup(s.addr)
	if err != nil || !s.plain(inside) {
		return netip.Addr{}, fmt.Errorf("no address of the gateway towards the client: %w", filterapi.ErrNetworkDenied)
	}
	return inside, nil
}

// answers says whether a target is the peer that came to a published server:
// what it asked for leads back to it, whatever joins the networks.
func (c *connection) answers(target netip.AddrPort) bool {
	return c != nil && c.published() && target.Addr() == c.tuple.Src.Addr()
}

// leadsTo says whether the rules send a kernel flow to a server.
func (e *Engine) leadsTo(t flow.Tuple, server netip.Addr) bool {
	q, err := e.question(t, "")
	return err == nil && e.Policy().Judge(q).Server.Addr() == server
}

// publishes asks the rules whether they let a peer come to the session's client.
// By a protocol any address of the gateway will do.
func (s *session) publishes(a filterapi.HostAccess) error {
	t := flow.Tuple{Proto: a.Proto, Src: netip.AddrPortFrom(a.Target.Addr(), 0)}
	rules := s.e.Policy()
	err := filterapi.ErrPolicyDenied
	for _, r := range rules.Rules() {
		if r.Action != policy.Publish || r.Publication.Server(!s.addr.Is4()) != s.addr {
			continue
		}
		at := r.Publication.Addresses
		switch {
		case !s.addr.Is4():
			at = []netip.Addr{s.addr}
		case len(at) == 0:
			if _, own, _, err := s.e.routes.Lookup(a.Target.Addr()); err == nil {
				at = []netip.Addr{own}
			}
		}
		for _, addr := range at {
			t.Dst = netip.AddrPortFrom(addr, a.Target.Port())
			v, refused := s.e.judge(basis{tuple: t, protocol: a.Protocol})
			if refused == nil && v.Rule.Name == r.Name && v.Server.Addr() == s.addr {
				return nil
			}
			if v.Reason == policy.ReasonProtocol {
				return refused
			}
		}
	}
	return err
}
