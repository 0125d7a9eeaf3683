package filterapi

import (
	"context"
	"net/netip"
	"time"

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

	// Flags tells what is special about the connection.
	Flags() ConnectionFlags

	// AttachDataFilter puts a data filter on the connection and thereby moves
	// it to user space. Only inside the handler of a ConnectEvent,
	// UDPDestinationEvent, AcceptEvent or, for UDP, BindEvent, else
	// ErrBadContext. On a UDP bind it is put on each peer's flow: Pump is then
	// called once for each of them, also at the same time. ErrTerminating when
	// the connection is over, ErrInvalidArgument for a nil filter or an
	// unknown class, ErrAlreadyEmulated for PriorityEmulation on a connection
	// that is emulated.
	AttachDataFilter(DataFilter, Priority) error
	// AttachDataFilterWithDestination is AttachDataFilter for the datagrams to
	// and from one peer of the client's socket, or of a UDP bind, alone. The
	// context of Pump is cancelled when the peer is forgotten; should the peer
	// come back, Pump is called again. Only inside the handler of a
	// UDPDestinationEvent or of a BindEvent for UDP. ErrInvalidArgument for a
	// TCP connection or a peer without a port. What the filter attached for the
	// same peer in an earlier event, it replaces. A few hundred peers are
	// remembered for each session and for each bind; for one more, those whose
	// flows are over are forgotten, or else the oldest. A living flow keeps its
	// data filters.
	AttachDataFilterWithDestination(f DataFilter, p Priority, peer netip.AddrPort) error
	// Deny refuses what the event asks for: the client of a connect gets a
	// reset, the peer of an accept too, datagrams to a denied UDP destination
	// are lost. Only inside the handler of such an event or of a BindEvent, or
	// in DataFilterFactory.New, else ErrBadContext.
	Deny() error

	// ExternalName and ExternalPeer are the addresses of the external side:
	// the gateway's (or, on a routed path, the client's own) and the far
	// end's. For a flow they are known from DataFilter.Pump on, before that
	// ErrBadContext; for a bind ExternalName is known at once.
	ExternalName() (netip.AddrPort, error)
	ExternalPeer() (netip.AddrPort, error)

	// SetIPFilter replaces the sources that may use a bind, and returns when
	// the kernel has acknowledged; nil: all, empty: none. ErrNotSupported on
	// a flow and on an emulated bind, ErrInvalidArgument for sources of the
	// other address family, ErrTerminating when the bind is used up, expired
	// or closed, ErrAlreadyExists when its address leads elsewhere for some of
	// them; then nobody may use it until it is set again.
	SetIPFilter(*IPFilter) error
	// IPFilter gives a copy of the current one; nil: everybody may.
	IPFilter() *IPFilter
	// SetClientAddress says where the flows of a bind are sent to that was
	// made without a client's address, and opens it. ErrInvalidArgument for a
	// bad address, when it was set before, and on anything but such a bind;
	// ErrPolicyDenied for an address that the flags of the bind do not allow;
	// ErrAlreadyExists when the external address leads elsewhere;
	// ErrTerminating when the bind is over.
	SetClientAddress(netip.AddrPort) error

	// SetExpiry ends a bind after d from now on, whatever its Timeout says and
	// whatever is set later; 0: never. Connections that it let in go on. It
	// returns when the kernel has acknowledged. ErrNotSupported on a flow,
	// ErrInvalidArgument for less than 0, ErrTerminating when the bind is over.
	// After the kernel's error the bind is closed.
	SetExpiry(d time.Duration) error
	// Expiry is when a bind will end by itself; false: it does not, is over
	// already, or is a flow.
	Expiry() (time.Time, bool)

	// EmulateForConnect lets a data filter play the server of an outbound
	// connection, or the peer of a UDP destination: nobody is dialled, and the
	// last socket of the chain, external, is nil in the filter's Pump. It
	// stands at PriorityEmulation. Only inside the handler of a ConnectEvent or
	// UDPDestinationEvent, else ErrBadContext; ErrAlreadyEmulated the second
	// time.
	EmulateForConnect(DataFilter) error
	// EmulateForBind lets the filter emulate a bind: no external address is
	// opened, and connections are made by EmulateConnection. Only inside the
	// handler of a BindEvent, else ErrBadContext; ErrAlreadyEmulated the
	// second time; ErrNotSupported for one of ListenForClient or of a
	// network rule.
	EmulateForBind() error
	// EmulateConnection, on an emulated bind, makes an inbound connection to
	// the client, which sees remote as its peer; the data filter gets its
	// internal socket alone. local is the client's address and port; invalid:
	// that of the bind. It returns when the client has accepted. ErrNotEmulated
	// on anything but an emulated bind, ErrBadContext in the handlers of its
	// BindEvent, when it may still be refused, ErrInvalidArgument,
	// ErrTerminating, ErrAlreadyExists while one from remote lives or is being
	// made, ErrPolicyDenied when another filter denies it, or the network's
	// error, for instance ECONNREFUSED.
	EmulateConnection(f DataFilter, remote, local netip.AddrPort) (Connection, error)
	// IncrementBytesSent adds to the bytes that the log says were sent on an
	// emulated connection. ErrNotEmulated on another, ErrTerminating after its
	// end.
	IncrementBytesSent(bytes uint64) error
	// SetSocketName is the address that a binder is told for an emulated bind.
	// ErrNotEmulated on another, ErrAlreadyExists the second time,
	// ErrInvalidArgument for an address without a port.
	SetSocketName(netip.AddrPort) error

	// SetBufferSize sets the receive buffer of a flow that data filters hold,
	// in bytes. Only in the event's handler, else ErrBadContext; a larger UDP
	// datagram is lost.
	SetBufferSize(bytes int) error

	// Kill ends the connection at once: both ends of a flow are reset, a bind
	// is closed. It may be repeated.
	Kill()
}

// ConnectionFlags tells what is special about a connection.
type ConnectionFlags uint8

// InternalAddressTranslation: the connection came in through a publishing rule
// that shows the server the gateway's own address instead of the client's.
// (FWX_CONNECTION_INTERNAL_ADDRESS_TRANSLATION)
const InternalAddressTranslation ConnectionFlags = 1

// DefaultBufferSize is the receive buffer of a flow that data filters hold, in
// bytes. It also bounds one chunk of a stream.
const (
	DefaultStreamBuffer   = 32 << 10
	DefaultDatagramBuffer = 4096
)

// Priority orders the data filters of one connection. The lowest is next to
// the client. Within a class the order is that of the gateway's list of filters.
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
	// close. ErrReleased: the filter gives the flow back, see below. Any other
	// error resets both ends and stands in the log.
	//
	// ErrReleased may come while other goroutines of the filter wait in Recv or
	// are on their way from Recv to Send. What has come and what still comes
	// then passes without the filter; nothing is lost and, within a direction,
	// nothing is overtaken:
	//
	//   - From the return of Pump on every Recv of the filter, also one that
	//     waits, returns ErrReleased and has received nothing.
	//   - A Buffer that a Recv gave out before remains the filter's, and what
	//     comes from that side waits behind it. The goroutine that has it sends
	//     it on, changed or not, or releases it if it shall not arrive, and
	//     ends. It has ReleaseGrace for that, which does not run while a Send in
	//     that direction waits for the far side. After that the Buffer is lost,
	//     and the log says so.
	//   - A Send that began before goes on, and what comes waits behind it. Other
	//     bytes are unknown to the gateway: those that the filter has made, or
	//     has copied out of a Buffer and released that, it sends before Pump
	//     returns.
	//   - When a direction has nothing left in the filter's hands, it goes on
	//     without the filter, whatever the other one does. From then on a Send
	//     in that direction fails with ErrReleased. Shutdown and Close do so from
	//     the return of Pump on.
	//   - Neither socket may have been closed. Each direction may have ended: an
	//     io.EOF or another error that a Recv returned is met again by whoever
	//     carries the flow on, so that a filter which releases need not pass it
	//     on.
	Pump(ctx context.Context, conn Connection, internal, external Socket) error
}

// ReleaseGrace is how long a goroutine of a filter may keep a Buffer after Pump
// has returned ErrReleased.
const ReleaseGrace = time.Second
