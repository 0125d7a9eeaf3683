package filterapi

import (
	"net/netip"

	"github.com/sluicegw/sluice/flow"
)

// EventMask names kinds of events, one bit each. (FwxFirewallEventType)
type EventMask uint16

const (
	// ConnectTCP: a client opens a TCP connection.
	ConnectTCP EventMask = 1 << iota
	// UDPDestination: a client's UDP socket has a new peer, whichever of the
	// two sent first; raised again when the peer was forgotten meanwhile.
	UDPDestination
	// BindTCP: a TCP listener at the gateway is being made for a client.
	BindTCP
	// BindUDP: the same for UDP.
	BindUDP
	// Listen follows BindTCP. It cannot be denied.
	Listen
	// Accepted: an inbound TCP connection arrived for a client.
	Accepted
	// Terminating: a connection, or a bind, is over; drop every reference to
	// it. Each filter that got an event of it gets this one once, also when
	// its handler failed. It never attaches a filter to a session, so register
	// it in AttachToSession.
	Terminating
	// Established: a connection that a permission call of this session filter
	// let in stands. It goes only to the SessionFilter that the call named in
	// Notify, once for each connection, whatever the registration says.
	Established
)

// Sources names where the flows of an event come from. Several may be joined.
// (FwxFirewallEventSource)
type Sources uint8

const (
	// Transparent: a client whose packets pass through the gateway and that
	// does not know of it. (fwxSourceNAT)
	Transparent Sources = 1 << iota
	// Explicit: somebody asked the gateway on the client's behalf: a protocol
	// such as SOCKS or PCP, or a filter with a private session.
	// (fwxSourceWSP)
	Explicit
)

// Events is a registration: what a filter wants to hear of.
// (FwxFilterHookEvents)
type Events struct {
	// Types are the kinds of events. None means: none.
	Types EventMask
	// AnyProtocol asks for all flows that come to user space, not only those
	// of the protocols and rules that name the filter. (fwxAnyProtocol)
	AnyProtocol bool
	// Sources bounds where the flows come from; 0: anywhere.
	Sources Sources
	// Secondary asks for connections that other connections negotiated, not
	// only for primary ones. (fwxAssociatedProtocolsAllConnections)
	Secondary bool
}

// Event is something that happened in a session, one of the *Event types of
// this package. It is valid until the handler returns; the Connection in it
// lives on.
type Event interface {
	// Kind is the bit of this event.
	Kind() EventMask
}

// About is what connect, destination, bind and accept events have in common.
type About struct {
	// Connection is the object to work with.
	Connection Connection
	// Protocol is the name of the protocol definition that matched, empty if
	// none did.
	Protocol string
	// Rule is the name of the access rule that allowed it.
	Rule string
	// Options is what the filter's ParseOptions made of that rule, or nil.
	Options any
	// Secondary is true for a connection that another one negotiated.
	Secondary bool
	// Source is where the flow comes from, one bit.
	Source Sources
}

// ConnectEvent is raised while the client's SYN is held: neither the server
// nor the client has heard of the connection yet. (FwxConnectEvent)
type ConnectEvent struct {
	About
	// Target is where the client wants to go.
	Target netip.AddrPort
}

// UDPDestinationEvent is raised while the first datagram to or from Peer is
// held. (FwxUdpDestination)
type UDPDestinationEvent struct {
	About
	Destination Destination
	Peer        netip.AddrPort
}

// Destination is one peer of a client's UDP socket, while its event is
// handled. (IFWXUdpDestination)
type Destination interface {
	// Deny loses the datagrams to and from this peer, silently; other peers of
	// the socket are not concerned. Only inside the handler of the event, else
	// ErrBadContext.
	Deny() error
}

// BindEvent is raised before the external address is opened: that of a call, or
// the one that a client gets with the first packet of an address and port, where
// a network rule maps endpoints and the packet's flow concerns the filter. Who
// denies that refuses the flow. (FwxBindEvent)
type BindEvent struct {
	About
	TCP bool
	// External is the gateway's address and port.
	External netip.AddrPort
}

// ListenEvent follows a BindEvent for TCP. (FwxListenEvent)
type ListenEvent struct {
	About
	External netip.AddrPort
}

// AcceptEvent is raised while the peer's SYN is held. Connection is the
// accepted one, Listener the one that it came to. (FwxAcceptEvent)
type AcceptEvent struct {
	About
	Listener      Connection
	Remote, Local netip.AddrPort
}

// EstablishedEvent says that a connection stands which a permission let in:
// for TCP the handshake is complete from end to end, for UDP the first
// datagram was passed. An error of its handler is logged and has no effect.
// (FwxEstablishedConnectionEvent)
type EstablishedEvent struct {
	Connection Connection
	Proto      flow.Proto
	// Context is what the permission call had in its Context.
	Context any
}

// TerminatingEvent is the last event of a connection.
// (FwxEndConnectionEvent)
type TerminatingEvent struct{ Connection Connection }

func (*ConnectEvent) Kind() EventMask        { return ConnectTCP }
func (*UDPDestinationEvent) Kind() EventMask { return UDPDestination }
func (e *BindEvent) Kind() EventMask {
	if e.TCP {
		return BindTCP
	}
	return BindUDP
}
func (*ListenEvent) Kind() EventMask      { return Listen }
func (*AcceptEvent) Kind() EventMask      { return Accepted }
func (*TerminatingEvent) Kind() EventMask { return Terminating }
func (*EstablishedEvent) Kind() EventMask { return Established }
