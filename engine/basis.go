package engine

import (
	"fmt"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// basis is what the access rules are asked about a flow, or about a permission
// and its flows, when it begins and whenever they change.
type basis struct {
	// tuple is that of the primary connection. Without one it is the client
	// and where it wants to go; an invalid destination is anybody.
	tuple   flow.Tuple
	inIface string
	// protocol is the definition by whose name they are asked; empty: by the
	// ports.
	protocol string
	// leads is where a published flow was sent; invalid: it was not published.
	leads netip.AddrPort
	// kernel: leads is where the kernel sent a flow that user space never saw,
	// published or not.
	kernel bool
	// user is that of the session; empty: it has none.
	user string
}

// standing is what the rules said of it.
type standing struct {
	rule     *policy.Rule // nil: none has allowed it yet
	protocol string
	uses     []policy.FilterUse
}

// basis is what the rules are asked about the connection.
func (c *connection) basis() basis {
	switch {
	case c.published():
		return basis{tuple: c.tuple, inIface: c.inIface, leads: c.perm.client()}
	case c.perm != nil:
		return c.perm.currentBasis()
	case c.bind != nil:
		return c.bind.currentBasis()
	}
	return basis{tuple: c.tuple, inIface: c.inIface, protocol: c.asked, user: c.session.user}
}

// judge asks the rules in force. The error says why not, in the words of the
// API.
func (e *Engine) judge(b basis) (policy.Verdict, error) {
	q, err := e.ask(b)
	if err != nil {
		return policy.Verdict{}, fmt.Errorf("%w: %w", filterapi.ErrNetworkDenied, err)
	}
	rules, v := e.Policy(), policy.Verdict{}
	if b.protocol == "" {
		v = rules.Judge(q)
	} else {
		v = rules.JudgeProtocol(q, b.protocol)
	}
	if v.Class != policy.ClassDrop && v.Class != policy.ClassReject {
		if b.leads.IsValid() && v.Server != b.leads && (v.Server.IsValid() || !b.kernel) {
			return v, fmt.Errorf("it leads to %v now: %w", v.Server, filterapi.ErrPolicyDenied)
		}
		return v, nil
	}
	switch v.Reason {
	case policy.ReasonProtocol:
		return v, fmt.Errorf("protocol %q: %w", b.protocol, filterapi.ErrInvalidArgument)
	case policy.ReasonNetwork:
		return v, filterapi.ErrNetworkDenied
	}
	return v, filterapi.ErrPolicyDenied
}

func (e *Engine) ask(b basis) (policy.Question, error) {
	if b.tuple.Dst.IsValid() {
		q, err := e.question(b.tuple, b.inIface)
		q.User = b.user
		return q, err
	}
	q := policy.Question{Tuple: b.tuple, InIface: b.inIface, User: b.user}
	var err error
	if q.InIface == "" {
		q.InIface, _, _, err = e.routes.Lookup(b.tuple.Src.Addr())
	}
	return q, err
}

// allowed says whether the rules in force let something go on.
func (e *Engine) allowed(b basis) bool {
	_, err := e.judge(b)
	return err == nil
}

// joined says whether a network rule joins the client and a target. What a
// primary connection negotiated may lead to another network than its own.
func (s *session) joined(p flow.Proto, target netip.AddrPort) bool {
	q, err := s.e.question(flow.Tuple{Proto: p, Src: netip.AddrPortFrom(s.addr, 0), Dst: target}, "")
	return err == nil && s.e.Policy().Judge(q).NetworkRule != nil
}

// target is where the initiator of a flow gets to: for one that a redirection
// let in not the address that it went to.
func (c *connection) target() netip.AddrPort {
	if c.perm != nil && !c.inbound() {
		return c.perm.target()
	}
	return c.tuple.Dst
}

// hidden is the gateway's address that a connection's client is hidden behind;
// false: it is not hidden.
func (e *Engine) hidden(c *connection) (addr netip.Addr, hidden bool) {
	if c.inbound() {
		return c.perm.external().Addr(), c.perm.external().Addr() != c.perm.client().Addr()
	}
	if name, err := c.ExternalName(); err == nil {
		return name.Addr(), name.Addr() != c.tuple.Src.Addr()
	}
	d := e.upstream(c)
	if d.Transparent {
		return netip.Addr{}, false
	}
	if d.Source.IsValid() {
		return d.Source.Addr(), true
	}
	_, source, _, err := e.routes.Lookup(d.Target.Addr())
	return source, err == nil && source.IsValid()
}
