package filtertest

import (
	"net/netip"
	"slices"
	"sync"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// connection is the connection object of a flow, or (bind != nil) of an
// address that is open for inbound flows.
type connection struct {
	gateway   *Gateway
	session   *session
	tuple     flow.Tuple
	flow      *Flow       // nil: a bind, or an event made by hand
	bind      *permission // of a bind
	perm      *permission // that let a flow in; nil: a primary connection
	protocol  string
	secondary bool
	flags     filterapi.ConnectionFlags

	mu       sync.Mutex
	handling filterapi.EventMask // inside the handler of this event
	denied   bool
	heard    bool // the filter knows of it
	told     bool // of its end
	ended    bool
	filters  []attached
	buffer   int
	name     netip.AddrPort // of the external side, once connected
	peer     netip.AddrPort
	emulated bool
	sent     uint64
	named    bool // by SetSocketName
}

type attached struct {
	filter   filterapi.DataFilter
	priority filterapi.Priority
	emulates bool // it is the far end
}

func (g *Gateway) newConnection(s *session, t flow.Tuple) *connection {
	c := &connection{gateway: g, session: s, tuple: t, protocol: g.filter.Name(), buffer: filterapi.DefaultStreamBuffer}
	if t.Proto == flow.UDP {
		c.buffer = filterapi.DefaultDatagramBuffer
	}
	return c
}

// about is what the events of a connection have in common.
func (c *connection) about() filterapi.About {
	about := filterapi.About{
		Connection: c, Protocol: c.protocol, Rule: "test", Secondary: c.secondary, Source: c.session.source(),
	}
	if !c.gateway.Unnamed {
		about.Options = c.gateway.options
	}
	return about
}

// open and shut bracket the handler of an event.
func (c *connection) open(kind filterapi.EventMask) {
	c.mu.Lock()
	c.handling, c.heard = kind, true
	c.mu.Unlock()
}

// during is open for what is no event.
func (c *connection) during(kind filterapi.EventMask) {
	c.mu.Lock()
	c.handling = kind
	c.mu.Unlock()
}

func (c *connection) shut() (denied bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.handling = 0
	return c.denied
}

func (c *connection) dropFilters() {
	c.mu.Lock()
	c.filters = nil
	c.mu.Unlock()
}

// connect makes the names of the external side known.
func (c *connection) connect(name, peer netip.AddrPort) {
	c.mu.Lock()
	c.name, c.peer = name, peer
	c.mu.Unlock()
}

// finish ends the connection; true: the filter has to be told.
func (c *connection) finish() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	tell := c.heard && !c.told
	c.ended, c.told = true, true
	return tell
}

func (c *connection) Session() filterapi.Session       { return c.session }
func (c *connection) Tuple() flow.Tuple                { return c.tuple }
func (c *connection) Flags() filterapi.ConnectionFlags { return c.flags }

// may says whether a call is made inside the handler of one of these events.
// c.mu is held.
func (c *connection) may(kinds filterapi.EventMask) error {
	switch {
	case c.ended:
		return filterapi.ErrTerminating
	case c.handling&kinds == 0:
		return filterapi.ErrBadContext
	}
	return nil
}

const carried = filterapi.ConnectTCP | filterapi.UDPDestination | filterapi.Accepted | filterapi.BindUDP

func (c *connection) AttachDataFilter(f filterapi.DataFilter, prio filterapi.Priority) error {
	if f == nil || prio < filterapi.PriorityNAT || prio > filterapi.PriorityEmulation {
		return filterapi.ErrInvalidArgument
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.may(carried); err != nil {
		return err
	}
	if c.emulated && prio == filterapi.PriorityEmulation {
		return filterapi.ErrAlreadyEmulated
	}
	c.filters = append(c.filters, attached{filter: f, priority: prio})
	return nil
}

// destination is a data filter of one peer of a client's socket, or of a bind.
type destination struct {
	session *session
	by      *connection // in whose event it was attached
	socket  netip.AddrPort
	peer    netip.AddrPort
	attached
}

func (c *connection) AttachDataFilterWithDestination(f filterapi.DataFilter, prio filterapi.Priority, peer netip.AddrPort) error {
	if f == nil || prio < filterapi.PriorityNAT || prio > filterapi.PriorityEmulation ||
		c.tuple.Proto != flow.UDP || !goodPeer(c.session, peer) {
		return filterapi.ErrInvalidArgument
	}
	c.mu.Lock()
	err := c.may(filterapi.UDPDestination | filterapi.BindUDP)
	c.mu.Unlock()
	if err != nil {
		return err
	}
	g := c.gateway
	g.mu.Lock()
	defer g.mu.Unlock()
	// One that was attached in an earlier event gives way.
	socket := c.ownSocket()
	g.destinations = slices.DeleteFunc(g.destinations, func(d destination) bool {
		return d.session == c.session && d.socket == socket && d.peer == peer && d.by != c
	})
	g.destinations = append(g.destinations, destination{c.session, c, socket, peer, attached{filter: f, priority: prio}})
	return nil
}

// ownSocket is what the peers of one socket have in common: the client's
// address, or the external one of the bind that they came through.
func (c *connection) ownSocket() netip.AddrPort {
	switch {
	case c.bind != nil:
		return c.tuple.Dst
	case c.perm != nil && c.perm.kind == inbound:
		return c.perm.external
	}
	return c.tuple.Src
}

// destinationFilters are the data filters that wait for a flow's peer.
func (g *Gateway) destinationFilters(c *connection, peer netip.AddrPort) (out []attached) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, d := range g.destinations {
		if d.session == c.session && d.socket == c.ownSocket() && d.peer == peer {
			out = append(out, d.attached)
		}
	}
	return out
}

func (c *connection) Deny() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.handling&(carried|filterapi.BindTCP|inFactory) == 0 {
		return filterapi.ErrBadContext
	}
	c.denied = true
	return nil
}

func (c *connection) ExternalName() (netip.AddrPort, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.name.IsValid() {
		return netip.AddrPort{}, filterapi.ErrBadContext
	}
	return c.name, nil
}

func (c *connection) ExternalPeer() (netip.AddrPort, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.peer.IsValid() {
		return netip.AddrPort{}, filterapi.ErrBadContext
	}
	return c.peer, nil
}

// maxBuffer bounds SetBufferSize, as the gateway does.
const maxBuffer = 1 << 20

func (c *connection) SetBufferSize(n int) error {
	if n <= 0 || n > maxBuffer {
		return filterapi.ErrInvalidArgument
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.handling&(carried|filterapi.BindTCP|filterapi.Listen) == 0 {
		return filterapi.ErrBadContext
	}
	c.buffer = n
	return nil
}

func (c *connection) Kill() {
	switch {
	case c.bind != nil:
		c.bind.end(Killed)
	case c.flow != nil:
		c.flow.kill()
	}
}

// chain is the data filters of the connection by their priority, with those
// that others attach to it.
func (c *connection) chain(others ...attached) []attached {
	c.mu.Lock()
	all := append(slices.Clone(c.filters), others...)
	c.mu.Unlock()
	slices.SortStableFunc(all, func(a, b attached) int { return int(a.priority) - int(b.priority) })
	return all
}
