package policy

import (
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/flow"
)

// publication checks what a rule says of its server.
func (c *checker) publication(r *Rule) {
	if r.Action != Publish {
		if r.Publication != nil {
			c.add("server", -1, "only a rule that publishes has a server")
		}
		return
	}
	if len(r.Users) > 0 {
		c.add("users", -1, "who comes from outside has not said who he is")
	}
	if len(r.To) > 0 {
		c.add("to", -1, "a rule that publishes has a server instead")
	}
	x := r.Publication
	if x == nil {
		x = &Publication{}
	}
	c.servers(x)
	for i, a := range x.Addresses {
		switch {
		case !a.Is4() || a.IsUnspecified() || a.IsMulticast():
			c.add("address", i, "%s is no IPv4 address of a host", a)
		case slices.Contains(x.Addresses[:i], a):
			c.add("address", i, "%s stands there twice", a)
		case slices.Contains(x.Servers, a):
			c.add("address", i, "%s is the server's own; what needs no translation, a rule that allows lets pass", a)
		}
	}
	if len(x.Addresses) > 0 && !x.Server(false).IsValid() {
		c.add("address", -1, "an IPv6 server is reached at its own address")
	}
	c.publishedPorts(r, x)
}

func (c *checker) servers(x *Publication) {
	if len(x.Servers) == 0 {
		c.add("server", -1, "names no server")
	}
	for i, a := range x.Servers {
		switch {
		case !a.IsValid() || a.Is4In6() || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback():
			c.add("server", i, "%s is no address of a host", a)
		case i > 0 && slices.ContainsFunc(x.Servers[:i], func(b netip.Addr) bool { return b.Is4() == a.Is4() }):
			c.add("server", i, "a rule has one server of a family at the most")
		}
	}
}

// publishedPorts checks what is published.
func (c *checker) publishedPorts(r *Rule, x *Publication) {
	var matches []Match
	for i, name := range r.Protocols {
		if name == AnyProtocol {
			c.add("protocols", i, "what is published must be named")
			return
		}
		d := c.protocols[name]
		if d == nil {
			return // said already
		}
		if slices.ContainsFunc(d.Matches, func(m Match) bool { return m.Proto == flow.ICMP || m.Proto == flow.ICMPv6 }) {
			c.add("protocols", i, "%q has ICMP, which cannot be published", name)
		}
		if x.FromGateway && slices.ContainsFunc(d.Matches, func(m Match) bool { return !m.Proto.HasPorts() }) {
			c.add("protocols", i, "only TCP and UDP can show the server the gateway's address")
		}
		matches = append(matches, d.Matches...)
	}
	if x.ServerPort == 0 {
		return
	}
	ports, ok := oneRange(spansOf(matches))
	switch {
	case !ok:
		c.add("server_port", -1, "the rule's protocols have more than one range of ports")
	case int(x.ServerPort)+int(ports.Hi-ports.Lo) > 65535:
		c.add("server_port", -1, "%d ports do not fit from %d on", int(ports.Hi-ports.Lo)+1, x.ServerPort)
	case x.Server(true).IsValid():
		c.add("server_port", -1, "IPv6 is not translated: the port at the server is the published one")
	}
}
