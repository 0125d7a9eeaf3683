package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/flow"
)

// Section says which of New's lists a Problem is about.
type Section string

// The sections.
const (
	SectionNetworks     Section = "network"
	SectionNetworkRules Section = "network rule"
	SectionProtocols    Section = "protocol"
	SectionRules        Section = "rule"
)

// Problem is one thing that is wrong with what New was given, with its place,
// so that the reader of a configuration file can name the line.
type Problem struct {
	Section Section
	Index   int    // in New's list
	Name    string // of the entry
	// Field is the offending field in the words of the configuration file
	// ("from", "prefixes", "no_kernel_mode"); empty: the entry as a whole.
	Field string
	// Item is the place in the field's list; -1: the field as a whole.
	Item   int
	Reason string
}

func (p *Problem) Error() string {
	if p.Field == "" {
		return fmt.Sprintf("%s %q: %s", p.Section, p.Name, p.Reason)
	}
	return fmt.Sprintf("%s %q: %s: %s", p.Section, p.Name, p.Field, p.Reason)
}

// checker collects the problems of one entry after the other.
type checker struct {
	section  Section
	index    int
	name     string
	problems []error

	networks  map[string]bool
	bare      map[string]bool // networks without interfaces
	protocols map[string]*Protocol
}

func (c *checker) add(field string, item int, format string, args ...any) {
	c.problems = append(c.problems, &Problem{c.section, c.index, c.name, field, item, fmt.Sprintf(format, args...)})
}

// enter begins an entry and checks its name.
func (c *checker) enter(s Section, i int, name string, seen map[string]bool, reserved ...string) {
	c.section, c.index, c.name = s, i, name
	switch {
	case name == "":
		c.add("name", -1, "is empty")
	case slices.Contains(reserved, name):
		c.add("name", -1, "is built in and cannot be defined")
	case seen[name]:
		c.add("name", -1, "is defined twice")
	}
	seen[name] = true
}

func check(p *Policy) error {
	c := &checker{networks: map[string]bool{}, bare: map[string]bool{}, protocols: make(map[string]*Protocol, len(p.protocols))}
	for i := range p.networks {
		c.enter(SectionNetworks, i, p.networks[i].Name, c.networks, Any, Gateway)
		c.network(&p.networks[i])
		c.bare[p.networks[i].Name] = len(p.networks[i].Interfaces) == 0
	}
	c.networks[Any], c.networks[Gateway] = true, true
	seen := map[string]bool{}
	for i := range p.netRules {
		c.enter(SectionNetworkRules, i, p.netRules[i].Name, seen)
		c.networkRule(&p.netRules[i])
	}
	seen = map[string]bool{}
	for i := range p.protocols {
		c.enter(SectionProtocols, i, p.protocols[i].Name, seen, AnyProtocol)
		c.protocol(&p.protocols[i])
		c.protocols[p.protocols[i].Name] = &p.protocols[i]
	}
	c.protocols[AnyProtocol] = &Protocol{Name: AnyProtocol}
	seen = map[string]bool{}
	for i := range p.rules {
		c.enter(SectionRules, i, p.rules[i].Name, seen)
		c.rule(&p.rules[i])
	}
	return errors.Join(c.problems...)
}

func (c *checker) network(n *Network) {
	if len(n.Interfaces) == 0 && len(n.Prefixes) == 0 {
		c.add("", -1, "has neither interfaces nor prefixes")
	}
	for i, name := range n.Interfaces {
		if name == "" {
			c.add("interfaces", i, "an interface without a name")
		}
		if slices.Contains(n.Interfaces[:i], name) {
			c.add("interfaces", i, "%q stands there twice", name)
		}
	}
	for i, prefix := range n.Prefixes {
		switch {
		case !prefix.IsValid():
			c.add("prefixes", i, "invalid prefix")
		case prefix.Addr().Is4In6():
			c.add("prefixes", i, "%s: IPv4 is written as IPv4", prefix)
		case prefix != prefix.Masked():
			c.add("prefixes", i, "%s has host bits set; the network is %s", prefix, prefix.Masked())
		}
	}
}

func (c *checker) networkRule(r *NetworkRule) {
	c.side("from", r.From)
	c.side("to", r.To)
	if r.Relation != Route && r.Relation != NAT {
		c.add("relation", -1, "is neither route nor nat")
	}
	c.mapping(r)
	c.clamp(r)
	if len(r.More) > 0 && r.Mapping != MapEndpointIndependent {
		c.add("address", -1, "only mappings that are endpoint-independent leave from several addresses")
	}
	if r.Address == (netip.Addr{}) {
		return
	}
	if r.Relation == Route {
		c.add("address", -1, "only a nat rule hides addresses")
	}
	all := r.Addresses()
	for i, a := range all {
		if !a.Is4() || a.IsUnspecified() || a.IsMulticast() {
			c.add("address", i, "%s is no IPv4 address of a host", a)
		}
		if slices.Contains(all[:i], a) {
			c.add("address", i, "%s stands there twice", a)
		}
	}
}

// mapping checks what only a rule that maps endpoints can say.
func (c *checker) mapping(r *NetworkRule) {
	maps := r.Mapping == MapEndpointIndependent
	switch {
	case r.Mapping > MapEndpointIndependent:
		c.add("mapping", -1, "is unknown")
	case maps && r.Relation == Route:
		c.add("mapping", -1, "only a nat rule maps endpoints")
	case maps && r.From == Any:
		c.add("mapping", -1, "endpoint-independent needs a network as from, to tell the inside from the outside")
	}
	if r.Filtering > FilterEndpointIndependent {
		c.add("filtering", -1, "is unknown")
	} else if !maps && r.Filtering != FilterAddressAndPort {
		c.add("filtering", -1, "needs mapping: endpoint-independent")
	}
	if !maps && r.IgnoreInbound {
		c.add("refresh_inbound", -1, "needs mapping: endpoint-independent")
	}
}

// clamp checks that both sides of a rule that clamps are known by interfaces.
func (c *checker) clamp(r *NetworkRule) {
	for _, name := range []string{r.From, r.To} {
		if r.ClampMSS && c.bare[name] {
			c.add("mss", -1, "clamp needs the interfaces of network %q", name)
		}
	}
}

// side checks From or To of a network rule.
func (c *checker) side(field, network string) {
	switch {
	case network == Gateway:
		c.add(field, -1, "the gateway itself needs no network rule")
	case !c.networks[network]:
		c.add(field, -1, "unknown network %q", network)
	}
}

func (c *checker) protocol(d *Protocol) {
	if len(d.Matches) == 0 {
		c.add("", -1, "matches nothing")
	}
	carried, datagrams := false, false
	for _, m := range d.Matches {
		carried = carried || m.Proto.HasPorts()
		datagrams = datagrams || m.Proto == flow.UDP
		icmp := m.Proto == flow.ICMP || m.Proto == flow.ICMPv6
		switch {
		case m.Ports.Lo > m.Ports.Hi:
			c.add(m.Proto.String(), -1, "the range %d-%d is upside down", m.Ports.Lo, m.Ports.Hi)
		case icmp && m.Ports.Hi > 255:
			c.add(m.Proto.String(), -1, "%d is no ICMP type", m.Ports.Hi)
		case !m.Proto.HasPorts() && !icmp && m.Ports != (PortRange{0, 65535}):
			c.add("ip", -1, "protocol %s has no ports to choose from", m.Proto)
		}
	}
	if d.Filter != "" && !carried {
		c.add("filter", -1, "a filter sees TCP and UDP only, and the protocol has neither")
	}
	if d.Timeout != 0 && !datagrams {
		c.add("timeout", -1, "a timeout is for UDP, and the protocol has none")
	}
}

func (c *checker) rule(r *Rule) {
	if r.Action > Publish {
		c.add("action", -1, "is neither allow, deny nor publish")
	}
	if r.Refusal > RefuseDrop {
		c.add("refuse", -1, "is unknown")
	}
	c.names("from", r.From, "network", func(n string) bool { return c.networks[n] })
	if r.Action != Publish {
		c.names("to", r.To, "network", func(n string) bool { return c.networks[n] })
	}
	c.publication(r)
	c.names("protocols", r.Protocols, "protocol", func(n string) bool { return c.protocols[n] != nil })
	if i := slices.Index(r.From, Gateway); i >= 0 {
		c.add("from", i, "what the gateway itself sends is not subject to rules")
	}
	for i, use := range r.Filters {
		fits := func(name string) bool {
			d := c.protocols[name]
			return d != nil && d.Filter == use.Name
		}
		switch {
		case use.Name == "":
			c.add("filters", i, "a filter without a name")
		case slices.ContainsFunc(r.Filters[:i], func(u FilterUse) bool { return u.Name == use.Name }):
			c.add("filters", i, "filter %q stands there twice", use.Name)
		case !slices.ContainsFunc(r.Protocols, fits):
			c.add("filters", i, "filter %q fits none of the rule's protocols", use.Name)
		}
	}
	if r.Action != Deny && r.Refusal != RefuseAuto {
		c.add("refuse", -1, "only a rule that denies refuses")
	}
	if r.Action == Deny && r.FailOpen {
		c.add("fail", -1, "a rule that denies has no way to fail open")
	}
	for i, name := range r.Users {
		switch {
		case name == "":
			c.add("users", i, "a user without a name")
		case slices.Contains(r.Users[:i], name):
			c.add("users", i, "user %q stands there twice", name)
		}
	}
	c.userSpace(r)
}

// userSpace checks that a rule that wants user space can have it.
func (c *checker) userSpace(r *Rule) {
	reason := ""
	switch {
	case r.Action == Deny:
		reason = "a rule that denies carries nothing"
	case slices.Contains(r.To, Gateway):
		reason = "what reaches the gateway itself is never taken over; use a rule of its own for it"
	default:
		return
	}
	if len(r.Filters) > 0 {
		c.add("filters", -1, "%s", reason)
	}
	if r.NoKernelMode {
		c.add("no_kernel_mode", -1, "%s", reason)
	}
}

// names checks one list of names in a rule.
func (c *checker) names(field string, list []string, what string, known func(string) bool) {
	if len(list) == 0 {
		c.add(field, -1, "names no %s", what)
	}
	for i, name := range list {
		if !known(name) {
			c.add(field, i, "unknown %s %q", what, name)
		} else if slices.Contains(list[:i], name) {
			c.add(field, i, "%s %q stands there twice", what, name)
		}
	}
}
