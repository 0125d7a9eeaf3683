package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// A client that asks the gateway itself has a session of its own, which a
// filter made. Its flows are judged as those that pass through, but their
// packets are never seen: the client's end is a connection to the gateway, and
// all of them are in user space.

// leg is the external side of a flow whose client asked for it. It implements
// filterapi.Leg.
type leg struct {
	c     *connection
	r     *registered
	joint Joint
}

// Connection implements filterapi.Leg.
func (l *leg) Connection() filterapi.Connection { return l.c.handle(l.r) }

// Carry implements filterapi.Leg.
func (l *leg) Carry(conn net.Conn) error {
	if err := l.joint.Carry(conn); err != nil {
		return fmt.Errorf("carry %v: %w", l.c.tuple, err)
	}
	return nil
}

// Done implements filterapi.Leg.
func (l *leg) Done() <-chan struct{} { return l.c.done }

// Close implements filterapi.Leg.
func (l *leg) Close() { l.joint.Close() }

// explicit makes a flow of the session that no packet begins. It refers to the
// session: without a flow the caller releases it.
func (s *session) explicit(t flow.Tuple) (*connection, error) {
	switch {
	case !s.private, s.e.user == nil:
		return nil, filterapi.ErrNotSupported
	case !s.ref():
		return nil, filterapi.ErrTerminating
	}
	return &connection{
		e: s.e, session: s, held: true, tuple: t, start: s.e.now(), explicit: true, done: make(chan struct{}),
	}, nil
}

// connectForClient is ConnectForClient, called by a filter.
func (s *session) connectForClient(ctx context.Context, r *registered, x filterapi.Connect) (filterapi.Leg, error) {
	fail := func(err error) (filterapi.Leg, error) {
		return nil, fmt.Errorf("connect for client %v to %v: %w", x.Client, x.Target, err)
	}
	if x.Client.Addr() != s.addr || x.Client.Port() == 0 || !s.reachable(x.Target) || !aim(x.Target.Addr()) {
		return fail(filterapi.ErrInvalidArgument)
	}
	c, err := s.explicit(flow.Tuple{Proto: flow.TCP, Src: x.Client, Dst: x.Target})
	if err != nil {
		return fail(err)
	}
	rules := s.e.Policy()
	if reason, err := c.askRules(x.Protocol); err != nil {
		s.e.refuse(c, refused{flow.Reject, flow.Denied, reason})
		return fail(err)
	}
	t, err := s.e.enter(c, rules)
	if err != nil {
		return fail(err)
	}
	joint, err := s.e.user.Connect(ctx, t)
	if err != nil {
		return fail(err)
	}
	return &leg{c, r, joint}, nil
}

// aim says whether an address may be somebody outside of the gateway.
func aim(a netip.Addr) bool {
	return !a.IsLoopback() && !a.IsLinkLocalUnicast() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// askRules finds the permission that lets an explicit flow be, or else asks the
// rules. Nobody reaches the gateway's own services by way of the gateway: they
// would take him for one of its own. An error comes with the reason for the
// log.
func (c *connection) askRules(protocol string) (reason string, err error) {
	s := c.session
	if s.e.own(c.tuple.Dst.Addr()) {
		return "the gateway itself", fmt.Errorf("the target is the gateway itself: %w", filterapi.ErrPolicyDenied)
	}
	for _, p := range s.e.perms.find(c.tuple) {
		if (p.session == s || p.addressBased) && !p.inbound() && s.e.useOwn(p) {
			c.inherit(p)
			return "", nil
		}
	}
	c.asked = protocol
	v, err := s.e.judge(c.basis())
	c.rule, c.uses, c.protocol = v.Rule, v.Filters, protocolName(v)
	if reason = string(v.Reason); err != nil && reason == "" {
		reason = err.Error()
	}
	return reason, err
}

// enter asks the filters about an explicit flow and makes it one of the living.
// rules are those that it was judged by. On an error it has ended; else the
// takeover must be carried, or ended.
func (e *Engine) enter(c *connection, rules *policy.Policy) (*Takeover, error) {
	defer e.introduced(c)
	ctx, cancel := context.WithTimeout(context.Background(), e.answer)
	defer cancel()
	if err := e.raise(ctx, c); err != nil {
		r := refused{flow.Reject, flow.Failed, err.Error()}
		if errors.Is(err, errDeniedByFilter) {
			r.result = flow.Denied
		}
		e.refuse(c, r)
		return nil, fmt.Errorf("%w: %w", filterapi.ErrPolicyDenied, err)
	}
	d := e.takeOver(c)
	if !c.commit(d) {
		e.refuse(c, refused{flow.Reject, flow.CutByPolicy, "killed"})
		return nil, filterapi.ErrTerminating
	}
	e.begin(c)
	// Whoever changed the rules meanwhile found the flow among the living, or
	// it is judged once more.
	if e.Policy() != rules && !e.stillAllowed(c) {
		e.refuse(c, refused{flow.Reject, flow.CutByPolicy, "the rules changed meanwhile"})
		return nil, filterapi.ErrPolicyDenied
	}
	return d.Takeover, nil
}
