package filtertest

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// errNobody is what the Server of an emulated flow sees.
var errNobody = errors.New("nobody is there: the flow is emulated")

// panicked is what a panic in Pump becomes.
type panicked struct{ value any }

func (p panicked) Error() string { return fmt.Sprintf("panic in Pump: %v", p.value) }

// EmulateForConnect implements filterapi.Connection.
func (c *connection) EmulateForConnect(f filterapi.DataFilter) error {
	if f == nil {
		return filterapi.ErrInvalidArgument
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.may(filterapi.ConnectTCP | filterapi.UDPDestination); err != nil {
		return err
	}
	if c.perm != nil && c.perm.kind == inbound {
		return filterapi.ErrBadContext
	}
	if c.emulated {
		return filterapi.ErrAlreadyEmulated
	}
	c.emulated = true
	c.filters = append(c.filters, attached{filter: f, priority: filterapi.PriorityEmulation, emulates: true})
	return nil
}

// EmulateForBind implements filterapi.Connection.
func (c *connection) EmulateForBind() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.may(filterapi.BindTCP | filterapi.BindUDP); err != nil {
		return err
	}
	if c.emulated {
		return filterapi.ErrAlreadyEmulated
	}
	c.emulated = true
	return nil
}

// isEmulated says whether a filter plays the far side of the connection.
func (c *connection) isEmulated() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.emulated
}

// EmulateClientBind implements filterapi.Session.
func (s *session) EmulateClientBind(b filterapi.EmulatedBind) (filterapi.Connection, error) {
	g := s.gateway
	fail := func(err error) (filterapi.Connection, error) {
		return nil, fmt.Errorf("emulate bind of %v: %w", b.Client, err)
	}
	n := filterapi.Negotiated{Proto: b.Proto, Protocol: b.Protocol, Flags: filterapi.AllowMultiple}
	if _, err := s.check(n, bindFlags); err != nil {
		return fail(err)
	}
	if !goodClient(s, b.Client) || b.Client.Addr() != s.addr || !goodPeer(s, b.External) {
		return fail(filterapi.ErrInvalidArgument)
	}
	if err := s.allowed(nil, n, netip.AddrPort{}); err != nil {
		return fail(err)
	}
	p := g.newPermission(s, inbound, n, nil)
	p.client, p.external, p.emulated, p.explicit = b.Client, b.External, true, true
	g.journal.add(Entry{Asked, fmt.Sprintf("%s emulated bind for %s", b.Proto, b.Client)})
	void := func(err error) (filterapi.Connection, error) {
		g.mu.Lock()
		p.endLocked()
		g.mu.Unlock()
		g.terminating(p.object)
		return fail(err)
	}
	c := g.bindObject(p)
	c.emulated = true
	if b.InternalAddressTranslation {
		c.flags = filterapi.InternalAddressTranslation
	}
	if err := g.announce(p); err != nil {
		return void(err)
	}
	if err := g.grant(Emulates, p); err != nil {
		return void(err)
	}
	if b.Proto == flow.TCP {
		_ = g.raise(c, &filterapi.ListenEvent{About: c.about(), External: b.External})
	}
	return c, nil
}

// EmulateConnection implements filterapi.Connection.
func (c *connection) EmulateConnection(f filterapi.DataFilter, remote, local netip.AddrPort) (filterapi.Connection, error) {
	g, p := c.gateway, c.bind
	fail := func(err error) (filterapi.Connection, error) {
		return nil, fmt.Errorf("emulate connection from %v: %w", remote, err)
	}
	switch {
	case p == nil || !c.isEmulated():
		return fail(filterapi.ErrNotEmulated)
	case p.isGone():
		return fail(filterapi.ErrTerminating)
	case !p.wasOpened():
		return fail(filterapi.ErrBadContext)
	case f == nil, !goodPeer(c.session, remote), local.IsValid() && !goodClient(c.session, local):
		return fail(filterapi.ErrInvalidArgument)
	}
	if !local.IsValid() {
		local = p.client
	}
	if !goodClient(c.session, local) {
		return fail(filterapi.ErrInvalidArgument)
	}
	if !g.useEmulated(p) {
		return fail(filterapi.ErrTerminating)
	}
	fl := g.newFlow(c.session, flow.Tuple{Proto: c.tuple.Proto, Src: remote, Dst: p.external}, local, remote)
	fl.conn.inherit(p)
	fl.conn.emulated = true
	fl.conn.filters = []attached{{filter: f, priority: filterapi.PriorityEmulation, emulates: true}}
	if err := fl.start(g.ClientRefuses); err != nil {
		return fail(err)
	}
	g.journal.add(Entry{Emulates, fl.tuple.String()})
	return fl.conn, nil
}

// wasOpened says whether the filters have let the bind be.
func (p *permission) wasOpened() bool {
	p.gateway.mu.Lock()
	defer p.gateway.mu.Unlock()
	return p.opened
}

// useEmulated counts a flow of an emulated bind, which is used up with it unless
// it is for many; false: it takes no more.
func (g *Gateway) useEmulated(p *permission) bool {
	g.mu.Lock()
	if p.gone {
		g.mu.Unlock()
		return false
	}
	p.flows++
	text := p.String()
	if !p.multiple() {
		p.endLocked()
	}
	g.mu.Unlock()
	if !p.multiple() {
		p.ended(Used, text)
	}
	return true
}

// IncrementBytesSent implements filterapi.Connection.
func (c *connection) IncrementBytesSent(n uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !c.emulated || c.bind != nil:
		return filterapi.ErrNotEmulated
	case c.ended:
		return filterapi.ErrTerminating
	}
	c.sent += n
	return nil
}

// SetSocketName implements filterapi.Connection.
func (c *connection) SetSocketName(a netip.AddrPort) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !c.emulated || c.bind == nil:
		return filterapi.ErrNotEmulated
	case !a.IsValid() || a.Port() == 0:
		return filterapi.ErrInvalidArgument
	case c.named:
		return filterapi.ErrAlreadyExists
	}
	c.name, c.named = a, true
	return nil
}

// SentBytes is what the filter has reported with IncrementBytesSent.
func (f *Flow) SentBytes() uint64 {
	f.conn.mu.Lock()
	defer f.conn.mu.Unlock()
	return f.conn.sent
}
