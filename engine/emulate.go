package engine

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// setEmulated says who plays the far end, or the gateway's end of a bind.
// c.mu is held.
func (c *connection) setEmulated(r *registered, on bool) {
	c.emulated, c.emulator = on, r
	if p := c.bind; p != nil {
		p.mu.Lock()
		p.bind.emulated = on
		p.mu.Unlock()
	}
}

// emulateForConnect is EmulateForConnect, called by a filter. The filter's
// place in the chain is behind all others.
func (c *connection) emulateForConnect(r *registered, df filterapi.DataFilter) error {
	if df == nil {
		return filterapi.ErrInvalidArgument
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.ended || c.killed:
		return filterapi.ErrTerminating
	case c.inbound() || !c.handledBy(r, filterapi.ConnectTCP|filterapi.UDPDestination):
		return filterapi.ErrBadContext
	case c.emulated:
		return filterapi.ErrAlreadyEmulated
	}
	c.link(Link{Filter: df, Name: r.filter.Name(), Priority: filterapi.PriorityEmulation, owner: r})
	c.setEmulated(r, true)
	return nil
}

// emulateForBind is EmulateForBind, called by a filter. Nothing is opened for
// the bind from then on.
func (c *connection) emulateForBind(r *registered) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.ended:
		return filterapi.ErrTerminating
	case !c.handledBy(r, filterapi.BindTCP|filterapi.BindUDP):
		return filterapi.ErrBadContext
	case c.emulated:
		return filterapi.ErrAlreadyEmulated
	case c.bind.atSocket(), c.bind.mapping() != nil && !c.bind.borrows():
		return filterapi.ErrNotSupported // its client asked for a socket; or what it sends leaves from there
	}
	c.setEmulated(r, true)
	return nil
}

// emulateClientBind is EmulateClientBind, called by a filter. The access rules
// are asked whether the client may use the protocol at all.
func (s *session) emulateClientBind(r *registered, b filterapi.EmulatedBind) (*connection, error) {
	fail := func(err error) (*connection, error) {
		return nil, fmt.Errorf("emulate a bind of client %v: %w", b.Client, err)
	}
	if !s.reachable(b.Client) || b.Client.Addr() != s.addr || !s.reachable(b.External) {
		return fail(filterapi.ErrInvalidArgument)
	}
	n := filterapi.Negotiated{Protocol: b.Protocol, Proto: b.Proto, Flags: filterapi.AllowMultiple}
	t, err := s.checkCall(n, filterapi.AllowMultiple, netip.AddrPort{})
	if err != nil {
		return fail(err)
	}
	// The filters' handlers run in the session.
	if !s.ref() {
		return fail(filterapi.ErrTerminating)
	}
	defer s.e.release(s)
	p := s.newPermission(t, n, ground{direction: nat.Inbound, by: r.name()})
	p.far, p.near, p.bind = compactOf(b.External), compactOf(b.Client), &bind{emulated: true}
	p.makeObject(b.External)
	c := p.object()
	c.emulated, c.emulator, c.internalTranslation = true, r, b.InternalAddressTranslation
	if err := s.e.openBinds([]*permission{p}); err != nil {
		s.e.abandon(p)
		return fail(err)
	}
	return c, nil
}

// state gives what the calls on emulated connections ask first.
func (c *connection) state() (emulated, ended bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.emulated, c.ended
}

// originateWithin bounds the dial to the client.
const originateWithin = 30 * time.Second

// emulateConnection is EmulateConnection, called by a filter: a flow that
// nobody on the network has begun is made and carried to the client. Filters
// that watch accepted connections hear of it, but for the one that makes it.
func (c *connection) emulateConnection(r *registered, df filterapi.DataFilter, remote, local netip.AddrPort) (*connection, error) {
	emulated, ended := c.state()
	switch {
	case c.bind == nil || !emulated:
		return nil, fmt.Errorf("emulate connection: %w", filterapi.ErrNotEmulated)
	case ended:
		return nil, fmt.Errorf("emulate connection: %w", filterapi.ErrTerminating)
	case !c.bind.isGranted():
		return nil, fmt.Errorf("emulate connection before the bind is allowed: %w", filterapi.ErrBadContext)
	}
	if !local.IsValid() {
		local = c.bind.client()
	}
	if df == nil || !endpoint(remote, c.session.addr) || !endpoint(local, c.session.addr) {
		return nil, fmt.Errorf("emulate connection from %v to %v: %w", remote, local, filterapi.ErrInvalidArgument)
	}
	if c.e.user == nil {
		return nil, fmt.Errorf("emulate connection: %w", filterapi.ErrNotSupported)
	}
	t := flow.Tuple{Proto: c.bind.proto, Src: remote, Dst: c.bind.external()}
	if !c.e.flows.reserve(t) {
		return nil, fmt.Errorf("emulate connection from %v: %w", remote, filterapi.ErrAlreadyExists)
	}
	defer c.e.flows.unreserve(t)
	made, err := c.accept(r, df, remote)
	if err != nil {
		return nil, fmt.Errorf("emulate connection from %v: %w", remote, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), originateWithin)
	defer cancel()
	if err := made.originate(ctx, local); err != nil {
		return nil, fmt.Errorf("emulate connection from %v to %v: %w", remote, local, err)
	}
	return made, nil
}

// endpoint says whether an address can be one end of a flow of the client.
func endpoint(a netip.AddrPort, client netip.Addr) bool {
	x := a.Addr()
	return x.IsValid() && a.Port() != 0 && x.Is4() == client.Is4() && x.Zone() == "" && !x.Is4In6() &&
		!x.IsUnspecified() && !x.IsMulticast()
}

// accept makes the flow that came to an emulated bind. On error it has ended.
func (c *connection) accept(r *registered, df filterapi.DataFilter, remote netip.AddrPort) (*connection, error) {
	p := c.bind
	if !c.session.ref() {
		return nil, filterapi.ErrTerminating
	}
	if !c.e.useOwn(p) {
		c.e.release(c.session)
		return nil, filterapi.ErrTerminating
	}
	name, _ := c.ExternalName() // a bind has one
	made := &connection{
		e: c.e, session: c.session, held: true, start: c.e.now(),
		tuple: flow.Tuple{Proto: p.proto, Src: remote, Dst: p.external()},
		name:  name, peer: remote,
		internalTranslation: c.internalTranslation,
	}
	made.inherit(p)
	defer c.e.introduced(made)
	made.mu.Lock()
	made.link(Link{Filter: df, Name: r.name(), Priority: filterapi.PriorityEmulation, owner: r})
	made.setEmulated(r, true)
	made.mu.Unlock()
	if a := c.session.attachedTo(r); a != nil {
		made.told(r, a)
	}
	ctx, cancel := context.WithTimeout(context.Background(), c.e.answer)
	defer cancel()
	if err := c.e.raiseExcept(ctx, made, r); err != nil {
		c.e.refuse(made, refused{flow.Drop, flow.Denied, err.Error()})
		return nil, fmt.Errorf("%w: %w", filterapi.ErrPolicyDenied, err)
	}
	return made, nil
}

// originate carries a flow to the client that has no first packet.
func (c *connection) originate(ctx context.Context, local netip.AddrPort) error {
	t := &Takeover{Tuple: c.tuple, flow: c, kill: make(chan struct{}), Emulated: true, InitiatorExternal: true}
	t.Dial = Dial{Proto: c.tuple.Proto, Target: local, Source: c.tuple.Src, Transparent: true}
	t.fill(c)
	if !c.commit(Decision{Path: flow.User, Takeover: t}) {
		c.e.refuse(c, refused{flow.Drop, flow.CutByPolicy, "killed"})
		return filterapi.ErrTerminating
	}
	c.e.begin(c)
	return c.e.user.Originate(ctx, t)
}

// useOwn counts a flow that a filter makes by its own permission, without the
// network; false: the permission takes no more. For a flow of a bind, introduced
// follows, as after use.
func (e *Engine) useOwn(p *permission) bool {
	p.mu.Lock()
	if p.state != permWaiting {
		p.mu.Unlock()
		return false
	}
	usedUp := p.count(true)
	p.mu.Unlock()
	if usedUp {
		e.perms.discharge(p)
		e.tasks.run(func() { _ = e.enforce(p) }) // it logs
	}
	return true
}

// client is where the flows of a bind are sent to.
func (p *permission) client() netip.AddrPort {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.near.addrPort()
}

// isGranted says whether filters and the quota have had their say.
func (p *permission) isGranted() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.is.has(granted)
}

// IncrementBytesSent adds to what the log says was sent.
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

// SetSocketName says which address the binder is told.
func (c *connection) SetSocketName(a netip.AddrPort) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.bind == nil || !c.emulated:
		return filterapi.ErrNotEmulated
	case !a.Addr().IsValid() || a.Port() == 0:
		return filterapi.ErrInvalidArgument
	case c.named:
		return filterapi.ErrAlreadyExists
	}
	c.name, c.named = a, true
	return nil
}

// Flags tells what is special about the connection.
func (c *connection) Flags() filterapi.ConnectionFlags {
	if c.internalTranslation {
		return filterapi.InternalAddressTranslation
	}
	return 0
}
