package filterapi

import "net/netip"

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
)

// Events is a registration: what a filter wants to hear of.
// (FwxFilterHookEvents)
type Events struct {
	// Types are the kinds of events. None means: none.
	Types EventMask
	// AnyProtocol asks for all flows that come to user space, not only those
	// of the protocols and rules that name the filter. (fwxAnyProtocol)
	AnyProtocol bool
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
	Peer netip.AddrPort
}

// BindEvent is raised before the external address is opened.
// (FwxBindEvent)
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
