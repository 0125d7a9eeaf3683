// Package policy judges flows: networks, protocols, network rules and ordered
// access rules; the first that matches decides. It is pure: it opens nothing
// and changes nothing, and a Policy never changes after New.
package policy

import (
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/flow"
)

// Gateway is the name of the built-in network that is the gateway itself: an
// address that the kernel calls local.
const Gateway = "gateway"

// Any is the name of the built-in network that everything belongs to, the
// gateway excepted.
const Any = "any"

// AnyProtocol is the name of the built-in protocol that everything belongs to.
const AnyProtocol = "any"

// AnyUser, in the users of a rule, is whoever has proved who he is.
const AnyUser = "any"

// Network is a named set of hosts. A host belongs to it if it is reached
// through one of Interfaces (when there are any) and has an address in one of
// Prefixes (when there are any).
type Network struct {
	Name       string
	Interfaces []string
	Prefixes   []netip.Prefix
}

// PortRange is inclusive.
type PortRange struct{ Lo, Hi uint16 }

// Match is one line of a protocol definition. For TCP and UDP Ports are the
// destination ports. For ICMP and ICMPv6 Ports are the ICMP types (0..255).
// For other IP protocols Ports is 0..65535.
type Match struct {
	Proto flow.Proto
	Ports PortRange
}

// Protocol is a protocol definition.
type Protocol struct {
	Name    string
	Matches []Match
	// Filter is the name of the application filter that understands it, or
	// empty. The filter is asked only under a rule that names it.
	Filter string
	// Timeout is how many seconds a UDP flow of it may carry nothing; 0: as
	// long as others.
	Timeout uint32
}

// Relation says how two networks are joined.
type Relation uint8

const (
	// Route leaves addresses as they are and joins both directions.
	Route Relation = iota + 1
	// NAT hides the addresses of From behind the gateway's, IPv4 only; IPv6
	// is routed. For IPv4 it joins one direction, for IPv6 both.
	NAT
)

// NetworkRule joins two networks. Without one no flow passes between them,
// whatever the access rules say. The first that matches decides.
type NetworkRule struct {
	Name     string
	From, To string
	Relation Relation
	// Address is the gateway's address that hides From; if it is invalid, the
	// address that the route prefers is used.
	Address netip.Addr
	// More are further addresses that mappings leave from, each client's from
	// one of them all.
	More []netip.Addr
	// Mapping and Filtering are of NAT. IgnoreInbound: what comes from outside
	// does not keep a mapping alive (RFC 4787, REQ-6).
	Mapping       Mapping
	Filtering     Filtering
	IgnoreInbound bool
	// ClampMSS bounds TCP's segments to what the routes can carry, in both
	// directions. Both networks are Any or have interfaces.
	ClampMSS bool
}

// Mapping is what the external endpoint of a hidden flow depends on, in the
// words of RFC 4787, section 4.1.
type Mapping uint8

const (
	// MapAddressAndPort: on where the flow goes; the kernel chooses.
	MapAddressAndPort Mapping = iota
	// MapEndpointIndependent: on the inside endpoint (address, protocol and
	// port, or identifier of ICMP queries) alone.
	MapEndpointIndependent
)

// Filtering is who may come in to a mapping, in the words of RFC 4787, section
// 5.
type Filtering uint8

const (
	// FilterAddressAndPort: the endpoints that the inside has sent to.
	FilterAddressAndPort Filtering = iota
	// FilterAddress: the addresses that it has sent to.
	FilterAddress
	// FilterEndpointIndependent: everybody.
	FilterEndpointIndependent
)

// Addresses are those that mappings leave from; none: the one that the route
// prefers.
func (r *NetworkRule) Addresses() []netip.Addr {
	if !r.Address.IsValid() {
		return nil
	}
	return append([]netip.Addr{r.Address}, r.More...)
}

// LeavesFrom says whether a mapping may have an external address.
func (r *NetworkRule) LeavesFrom(a netip.Addr) bool {
	return !r.Address.IsValid() || r.Address == a || slices.Contains(r.More, a)
}

// Maps says whether the flows of a protocol that the rule hides are mapped
// endpoint-independently.
func (r *NetworkRule) Maps(p flow.Proto) bool {
	return r.Relation == NAT && r.Mapping == MapEndpointIndependent && (p.HasPorts() || p == flow.ICMP)
}

// Action of a rule. The zero value denies.
type Action uint8

const (
	Deny Action = iota
	Allow
	// Publish lets flows in to a server of the inside; see Publication.
	Publish
)

// Refusal is how a denied flow is told.
type Refusal uint8

const (
	// RefuseAuto rejects what comes from the From side of a network rule and
	// drops the rest.
	RefuseAuto Refusal = iota
	RefuseReject
	RefuseDrop
)

// FilterUse binds an application filter to a rule. It takes effect on the
// rule's protocols whose definition names that filter.
type FilterUse struct {
	Name    string
	Options any // what the filter's ParseOptions returned
}

// Publication is what a rule with the action Publish says of its server. Its
// From are those who may come, its Protocols name the external ports, and it has
// no To.
type Publication struct {
	// Addresses are the gateway's own IPv4 addresses at which the server is
	// reached; none: every one that it has.
	Addresses []netip.Addr
	// Servers are the server's addresses, one of a family at the most. IPv4 is
	// translated; an IPv6 server is reached at its own address.
	Servers []netip.Addr
	// ServerPort is where the one range of ports that the rule has begins at
	// an IPv4 server; 0: ports are kept.
	ServerPort uint16
	// FromGateway shows the server an address of the gateway as the source of
	// its flows, not the client's.
	FromGateway bool
}

// Server is the server's address of a family; invalid: it has none.
func (p *Publication) Server(is6 bool) netip.Addr {
	for _, a := range p.Servers {
		if a.Is6() == is6 {
			return a
		}
	}
	return netip.Addr{}
}

// Rule is one rule: of access, or one that publishes a server.
type Rule struct {
	Name      string
	Action    Action
	From, To  []string // network names
	Protocols []string // protocol names
	// Users are those whose flows the rule matches: names, or AnyUser. None:
	// every flow. A flow that passes through the gateway by itself has no user,
	// so that a rule with users is not in the compiled ruleset.
	Users []string
	// Publication is set for Publish, and for nothing else.
	Publication *Publication
	Filters     []FilterUse
	// NoKernelMode takes every flow of the rule over in user space.
	NoKernelMode bool
	// FailOpen lets new flows of the rule pass in the kernel, unfiltered, when
	// user space is gone or its queue is full.
	FailOpen bool
	Refusal  Refusal
	// NoLog keeps the rule's flows out of the log.
	NoLog bool
	// Line is where the rule stands in the configuration file, for messages.
	Line int
}

// Question is what is known about a flow when it is judged.
type Question struct {
	flow.Tuple
	// InIface is where it came from, OutIface where its destination is
	// reached; OutIface is ignored if ToGateway.
	InIface, OutIface string
	ToGateway         bool
	// User is the name that the client has proved to be; empty: nobody asked.
	User string
}

// Class is what the kernel does with the first packet of a flow. The zero
// value is the safe one.
type Class uint8

const (
	ClassDrop    Class = iota // drop it silently
	ClassReject               // reset, or ICMP administratively prohibited
	ClassKernel               // carry it; for the gateway itself: accept it
	ClassAsk                  // queue it: user space decides
	ClassAskOpen              // the same, on the queues that fail open
	ClassMap                  // carry it if its inside endpoint has a mapping; else queue it
	ClassMapOpen              // the same, on the queues that fail open
)

// Reason says why a flow was refused, for the log.
type Reason string

const (
	ReasonRule    Reason = "rule"    // a deny rule
	ReasonDefault Reason = "default" // no rule matched
	ReasonNetwork Reason = "network" // no network rule joins the two networks
	// ReasonProtocol: there is no such protocol; from JudgeProtocol alone.
	ReasonProtocol Reason = "protocol"
)

// Verdict is the answer to a Question.
type Verdict struct {
	// Class is exactly what the compiled ruleset makes the kernel do.
	Class Class
	// Rule is the one that matched; nil: none.
	Rule *Rule
	// Protocol is the definition that matched: of the rule's protocols the
	// first, or without a rule the first of all; nil if undefined.
	Protocol *Protocol
	// NetworkRule is the one that joins the networks; nil: none.
	NetworkRule *NetworkRule
	// Server is where a published flow is sent: its own destination for IPv6.
	// Invalid: the flow is not published.
	Server netip.AddrPort
	// Reverse is true if the flow runs against the direction of NetworkRule.
	Reverse bool
	// Filters are those of Rule whose protocol matched this flow.
	Filters []FilterUse
	Reason  Reason
}

// Translated says whether the source of the flow is hidden behind an address
// of the gateway.
func (v Verdict) Translated(t flow.Tuple) bool {
	return v.NetworkRule != nil && v.NetworkRule.Relation == NAT && t.Is4() && !v.Reverse
}

// Maps says whether the flow leaves by a mapping of its inside endpoint.
func (v Verdict) Maps(t flow.Tuple) bool { return v.Translated(t) && v.NetworkRule.Maps(t.Proto) }
