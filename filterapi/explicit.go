package filterapi

import (
	"context"
	"net"
	"net/netip"
)

// A client that asks the gateway itself, by SOCKS for instance, has no packets
// of its own on the way to its peer. The filter that understands its request
// makes a private session, and by it the external side:
//
//	request to connect   Session.ConnectForClient ── Leg ── answer ── Leg.Carry
//	request to listen    Session.ListenForClient ── ClientListener ── answer
//	                       TCP: Accept ── Leg ── second answer ── Leg.Carry
//	                       UDP: Recv and Send, for as long as it is asked for
//
// Everything that a flow through the gateway is asked and told holds for these
// as well: rules, by the user of the session, events with the source Explicit,
// data filters, Kill, the end of the session, reloads, and the one record in
// the log.

// Connect asks for a connection in the name of a client that has asked for it.
type Connect struct {
	// Client is where the client asked from, address and port: what the log
	// has as the source of the flow. The address is the session's.
	Client netip.AddrPort
	// Target is where it wants to go. The gateway itself is no target, nor is
	// a loopback, multicast or broadcast address.
	Target netip.AddrPort
	// Protocol is the protocol definition by which the access rules are asked;
	// empty: by the port of Target.
	Protocol string
}

// Leg is the external side of a TCP flow whose client has a connection to the
// gateway: it stands, and waits for the client's to be joined to it, half a
// minute at the most. Safe for concurrent use.
type Leg interface {
	// Connection is the flow. Its ExternalName and ExternalPeer are known,
	// unless a filter emulates the peer (ErrBadContext).
	Connection() Connection
	// Carry joins the client's connection to the leg. It returns at once; from
	// then on user space carries the flow, as any that it has taken over, and
	// closes both ends. conn is the gateway's in any case, also on an error, and
	// must be one that a Listener of Firewall or Session accepted. What has been
	// read from it is the caller's to have answered: read no further than the
	// request. ErrInvalidArgument for another connection and a second call,
	// ErrTerminating when the flow is over.
	Carry(conn net.Conn) error
	// Done is closed when the flow is over.
	Done() <-chan struct{}
	// Close ends a leg that is not carried, with a reset. On another it does
	// nothing.
	Close()
}

// ClientListener is an address of the gateway's outside at which somebody is
// awaited for a client that has asked for it. It is a bind like any other,
// whose end is a socket of the gateway: while it discards (Discarding), until
// RetroactiveAllowBind, and from sources outside of its IPFilter, nobody is
// answered. Safe for concurrent use.
type ClientListener interface {
	// Bind is the bind: ExternalName is the address, Kill closes it.
	Bind() Connection
	// Accept waits for the next peer, for TCP. Before it returns, the filters
	// that watch accepted connections have been asked, and those that one of
	// them denies are reset. A bind without AllowMultiple is over with the
	// first; its Leg lives on. The caller closes or carries the Leg.
	// ErrTerminating when the bind is over, ErrNotSupported for UDP, or why ctx
	// ended.
	Accept(ctx context.Context) (Leg, error)
	// Recv waits for the next datagram to the client, for UDP, and copies it
	// into b; what does not fit is lost. It is for one goroutine at a time.
	// ErrTerminating when the bind is over, ErrNotSupported for TCP.
	Recv(b []byte) (n int, peer netip.AddrPort, err error)
	// Send sends a datagram of the client's to a peer, for UDP. The access
	// rules are asked about each new peer, by its port, and filters get its
	// UDPDestinationEvent. Peers that have sent to the bind are answered without the
	// rules, if it is Bidirectional. ErrPolicyDenied and ErrNetworkDenied:
	// nothing was sent, and nothing need be said; ErrInvalidArgument for what is
	// no peer, ErrTerminating, ErrNotSupported for TCP.
	Send(b []byte, peer netip.AddrPort) error
	// Close closes the bind. Legs live on.
	Close() error
}
