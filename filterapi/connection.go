package filterapi

import (
	"context"
	"net/netip"

	"github.com/sluicegw/sluice/flow"
)

// Connection is one flow, or one address opened for inbound flows. Safe for
// concurrent use. (IFWXConnection)
type Connection interface {
	// Session is the owner.
	Session() Session
	// Tuple is the flow as its initiator sent it; for a bind Src is invalid
	// and Dst is the external address.
	Tuple() flow.Tuple

	// AttachDataFilter puts a data filter on the connection and thereby moves
	// it to user space. Only inside the handler of a ConnectEvent,
	// UDPDestinationEvent or AcceptEvent, else ErrBadContext.
	AttachDataFilter(DataFilter, Priority) error
	// Deny refuses what the event asks for: the client of a connect gets a
	// reset, the peer of an accept too, datagrams to a denied UDP destination
	// are lost. Only inside the handler of such an event or of a BindEvent,
	// else ErrBadContext.
	Deny() error

	// ExternalName and ExternalPeer are the addresses of the external side:
	// the gateway's (or, on a routed path, the client's own) and the far
	// end's. For a flow they are known from DataFilter.Pump on, before that
	// ErrBadContext; for a bind ExternalName is known at once.
	ExternalName() (netip.AddrPort, error)
	ExternalPeer() (netip.AddrPort, error)

	// SetIPFilter replaces the sources that may use a bind, and returns when
	// the kernel has acknowledged; nil: all, empty: none. ErrNotSupported on
	// a flow, ErrTerminating when the bind is used up, expired or closed.
	SetIPFilter(*IPFilter) error
	// IPFilter gives a copy of the current one.
	IPFilter() *IPFilter

	// SetBufferSize sets the receive buffer of a flow that data filters hold,
	// in bytes. Only in the event's handler; a larger UDP datagram is lost.
	SetBufferSize(bytes int) error

	// Kill ends the connection at once: both ends of a flow are reset, a bind
	// is closed. It may be repeated.
	Kill()
}

// DefaultBufferSize is the receive buffer of a flow that data filters hold, in
// bytes. It also bounds one chunk of a stream.
const (
	DefaultStreamBuffer   = 32 << 10
	DefaultDatagramBuffer = 4096
)

// Priority orders the data filters of one connection. The lowest is next to
// the client. Within a class the order is that of the configuration.
// (FwxDataFilterPriorityClass)
type Priority uint8

const (
	PriorityNAT Priority = iota + 1
	PriorityInternal
	PriorityPostTrust
	PriorityMiddle
	PriorityPreTrust
	PriorityExternal
	PriorityEmulation
)

// DataFilter carries the bytes of one connection itself, in both directions.
// (IFWXDataFilter)
type DataFilter interface {
	// Pump is called once both ends are connected, on a goroutine of its own,
	// and owns the connection until it returns. internal leads to the client
	// or to the next filter on its side, external to the server. A cancelled
	// ctx means that the connection is over: both sockets fail from then on.
	//
	// nil: the filter is done and has closed both sockets or seen both ends
	// close. ErrReleased: see there. Any other error resets both ends and
	// stands in the log.
	Pump(ctx context.Context, conn Connection, internal, external Socket) error
}
