package nat

import (
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/flow"
)

// client is a holder with ports. The one with the zero address is the gateway
// itself.
type client struct {
	id     uint32
	holder netip.Addr
	of     [kinds]account
	addrs  []addrUse // external addresses that it has ports of
	blocks []*block
}

// account is a client's ports of one protocol.
type account struct {
	leased  int
	resting []ref
}

// ref names a port.
type ref struct {
	s    *space
	port uint16
}

// addrUse is how many ports a client has of an address, with those that rest.
type addrUse struct {
	addr netip.Addr
	n    int
}

// Each of these protocols is counted by itself.
const (
	kindTCP = iota
	kindUDP
	kindQuery
	kindOther
	kinds
)

func (c *client) account(p flow.Proto) *account {
	switch p {
	case flow.TCP:
		return &c.of[kindTCP]
	case flow.UDP:
		return &c.of[kindUDP]
	case flow.ICMP, flow.ICMPv6:
		return &c.of[kindQuery]
	}
	return &c.of[kindOther]
}

func (c *client) limited() bool { return c.holder.IsValid() }

func (a *Allocator) client(holder netip.Addr) *client {
	c := a.clients[holder]
	if c != nil {
		return c
	}
	c = &client{holder: holder}
	if n := len(a.idle); n > 0 {
		c.id, a.idle = a.idle[n-1], a.idle[:n-1]
		a.byID[c.id] = c
	} else {
		c.id = uint32(len(a.byID))
		a.byID = append(a.byID, c)
	}
	a.clients[holder] = c
	return c
}

// dismiss forgets a client without ports.
func (a *Allocator) dismiss(c *client) {
	if len(c.addrs) == 0 && a.byID[c.id] == c {
		delete(a.clients, c.holder)
		a.byID[c.id] = nil
		a.idle = append(a.idle, c.id)
	}
}

// paired is the place of the first address in a pool that the client has ports
// of; -1: it has none.
func (c *client) paired(pool []netip.Addr) int {
	return slices.IndexFunc(pool, func(a netip.Addr) bool {
		return slices.ContainsFunc(c.addrs, func(u addrUse) bool { return u.addr == a })
	})
}

// use counts ports of an address.
func (c *client) use(addr netip.Addr, n int) {
	i := slices.IndexFunc(c.addrs, func(u addrUse) bool { return u.addr == addr })
	if i < 0 {
		c.addrs = append(c.addrs, addrUse{addr: addr})
		i = len(c.addrs) - 1
	}
	if c.addrs[i].n += n; c.addrs[i].n == 0 {
		c.addrs = slices.Delete(c.addrs, i, i+1)
	}
}

// take leases n ports that are free or rest after the client. a.mu is held.
func (a *Allocator) take(c *client, s *space, port, n int) netip.AddrPort {
	account := c.account(s.proto)
	for x := port; x < port+n; x++ {
		h, held := s.ports[uint16(x)]
		if held {
			a.rouse(account, h.at)
			h.at = 0
		} else {
			h = holding{client: c.id}
			s.mark(x)
			c.use(s.addr, 1)
			a.useBlock(c, s.addr, x)
		}
		s.ports[uint16(x)] = h
		account.leased++
		a.stats.Leased++
	}
	return netip.AddrPortFrom(s.addr, uint16(port))
}

// rouse takes a port off its client's list of resting ones.
func (a *Allocator) rouse(of *account, at uint32) {
	last := len(of.resting) - 1
	if moved := of.resting[last]; int(at) != last+1 {
		of.resting[at-1] = moved
		h := moved.s.ports[moved.port]
		h.at = at
		moved.s.ports[moved.port] = h
	}
	of.resting[last] = ref{}
	if of.resting = of.resting[:last]; last == 0 {
		of.resting = nil
	}
	a.stats.Resting--
}

// rest makes a leased port rest until the tick that h says.
func (a *Allocator) rest(s *space, port uint16, h holding) {
	account := a.byID[h.client].account(s.proto)
	account.leased--
	a.stats.Leased--
	account.resting = append(account.resting, ref{s, port})
	h.at = uint32(len(account.resting))
	s.ports[port] = h
	a.stats.Resting++
}

// free makes a port nobody's.
func (a *Allocator) free(s *space, port uint16, h holding) {
	c := a.byID[h.client]
	account := c.account(s.proto)
	if h.resting() {
		a.rouse(account, h.at)
	} else {
		account.leased--
		a.stats.Leased--
	}
	delete(s.ports, port)
	s.unmark(int(port))
	a.leaveBlock(s.addr, int(port))
	c.use(s.addr, -1)
	a.dismiss(c)
	a.discard(s)
}
