package engine

import (
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// attachable and deniable are the events whose handlers may put a data filter
// on the connection, or refuse it.
const (
	attachable = filterapi.ConnectTCP | filterapi.UDPDestination | filterapi.Accepted | filterapi.BindUDP
	deniable   = attachable | filterapi.BindTCP
	inFactory  = filterapi.EventMask(1 << 15) // the New of a factory runs, which may refuse it, too
)

// handledBy says whether a filter's own handler of one of these events runs
// for the connection. c.mu is held.
func (c *connection) handledBy(r *registered, kinds filterapi.EventMask) bool {
	return r != nil && c.handler == r && c.handling&kinds != 0
}

func knownPriority(p filterapi.Priority) bool {
	return p >= filterapi.PriorityNAT && p <= filterapi.PriorityEmulation
}

// attachDataFilter is AttachDataFilter, called by a filter. What is put on a
// bind is put on the flow of each peer that it lets in.
func (c *connection) attachDataFilter(r *registered, df filterapi.DataFilter, class filterapi.Priority) error {
	if df == nil || !knownPriority(class) {
		return filterapi.ErrInvalidArgument
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.mayAttach(r, attachable, class); err != nil {
		return err
	}
	c.link(Link{Filter: df, Name: r.filter.Name(), Priority: class, owner: r})
	return nil
}

// mayAttach says what speaks against a data filter. c.mu is held.
func (c *connection) mayAttach(r *registered, kinds filterapi.EventMask, class filterapi.Priority) error {
	switch {
	case c.ended || c.killed:
		return filterapi.ErrTerminating
	case !c.handledBy(r, kinds):
		return filterapi.ErrBadContext
	case class == filterapi.PriorityEmulation && c.emulated:
		return filterapi.ErrAlreadyEmulated
	}
	return nil
}

// link puts a data filter in its place in the chain. One on a bind has the
// bind's flows come to user space. c.mu is held.
func (c *connection) link(l Link) {
	at := len(c.links)
	for at > 0 && c.links[at-1].Priority > l.Priority {
		at--
	}
	c.links = slices.Insert(c.links, at, l)
	if p := c.bind; p != nil {
		p.mu.Lock()
		p.is.set(toUser, true)
		p.mu.Unlock()
	}
}

// dropLinks takes off again what a failed filter has put on.
func (c *connection) dropLinks(r *registered) {
	c.mu.Lock()
	defer c.mu.Unlock()
	kept := c.links[:0:0]
	for _, l := range c.links {
		if l.owner != r {
			kept = append(kept, l)
		}
	}
	c.links = kept
	if c.emulated && c.emulator == r {
		c.setEmulated(nil, false)
	}
}

// chain is the data filters of a flow as userpath gets them.
func (c *connection) chain() []Link {
	c.mu.Lock()
	links := slices.Clone(c.links)
	c.mu.Unlock()
	for i, l := range links {
		links[i].Filter = ownHandle{l.Filter, c.handle(l.owner)}
	}
	return links
}

// deny is Deny, called by a filter, for the connection or for a destination.
func (c *connection) deny(r *registered, kinds filterapi.EventMask) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.handledBy(r, kinds) {
		return filterapi.ErrBadContext
	}
	c.denied = true
	return nil
}

// destination is the peer of a UDPDestinationEvent, for one filter. It
// implements filterapi.Destination.
type destination struct {
	c *connection
	r *registered
}

// Deny implements filterapi.Destination.
func (d destination) Deny() error { return d.c.deny(d.r, filterapi.UDPDestination) }

// maxBuffer bounds SetBufferSize, in bytes.
const maxBuffer = 1 << 20

// setBufferSize is SetBufferSize, called by a filter.
func (c *connection) setBufferSize(r *registered, bytes int) error {
	if bytes <= 0 || bytes > maxBuffer {
		return filterapi.ErrInvalidArgument
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.handledBy(r, deniable|filterapi.Listen) {
		return filterapi.ErrBadContext
	}
	c.buffer = bytes
	return nil
}

// far is the far end of a flow, seen from the client.
func (c *connection) far() netip.AddrPort {
	switch {
	case c.inbound():
		return c.tuple.Src
	case c.perm != nil && c.perm.near.isValid():
		return c.perm.target()
	}
	return c.target()
}

// inbound says whether a permission let the flow in towards the client.
func (c *connection) inbound() bool { return c.perm != nil && c.perm.inbound() }

// attachWithDestination is AttachDataFilterWithDestination, called by a
// filter.
func (c *connection) attachWithDestination(r *registered, df filterapi.DataFilter, class filterapi.Priority, peer netip.AddrPort) error {
	if df == nil || !knownPriority(class) || c.tuple.Proto != flow.UDP ||
		peer.Port() == 0 || !peer.Addr().IsValid() || peer.Addr().Is4() != c.tuple.Dst.Addr().Is4() {
		return filterapi.ErrInvalidArgument
	}
	l := Link{Filter: df, Name: r.name(), Priority: class, owner: r, peer: peer}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.mayAttach(r, filterapi.UDPDestination|filterapi.BindUDP, class); err != nil {
		return err
	}
	if c.bind != nil {
		c.link(l)
		return nil
	}
	if c.number == 0 {
		c.number = c.e.nextID()
	}
	keep := remembered{l, c.number}
	if c.inbound() {
		c.perm.object().remember(keep)
	} else {
		c.session.remember(peerKey{c.tuple.Src, peer}, keep)
	}
	if peer == c.far() {
		c.links = slices.DeleteFunc(c.links, func(x Link) bool { return x.inherited && x.owner == r && x.peer == peer })
		c.link(l)
	}
	return nil
}

// inheritLinks puts on a UDP flow what stands ready for its peer: on the bind
// that let it in, or remembered for the client's socket.
func (c *connection) inheritLinks() {
	if c.tuple.Proto != flow.UDP {
		return
	}
	far := c.far()
	var ready []Link
	add := func(l Link) {
		if !l.peer.IsValid() || l.peer == far {
			l.inherited = true
			ready = append(ready, l)
		}
	}
	if c.inbound() {
		b := c.perm.object()
		b.mu.Lock()
		for _, l := range b.links {
			add(l)
		}
		for _, m := range b.peers {
			add(m.link)
		}
		c.buffer = b.buffer
		b.mu.Unlock()
	} else {
		c.session.mu.Lock()
		for _, m := range c.session.peers[peerKey{c.tuple.Src, far}] {
			add(m.link)
		}
		c.session.mu.Unlock()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range ready {
		c.link(l)
	}
}
