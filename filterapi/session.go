package filterapi

import (
	"context"
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/flow"
)

// Flags qualify a permission. Each call names those that it takes; any other,
// and one that does not fit the protocol, is ErrInvalidArgument.
type Flags uint16

const (
	// AllowMultiple: any number of connections; the default is exactly one.
	AllowMultiple Flags = 1 << iota
	// Timeout: the permission must be used soon and expires otherwise. A
	// connection that was made before runs on.
	Timeout
	// NoKernelMode: each connection goes through user space, whether it needs
	// to or not.
	NoKernelMode
	// AddressBased: the permission belongs to the client's address. By default
	// it belongs to the session, and another session of the same address has
	// no use of it.
	AddressBased
	// Bidirectional, for UDP: the client may answer the peers that sent to the
	// bind. By default its answers are lost.
	Bidirectional
	// IncreaseReceiveBuffer: where user space carries the flow, a burst of
	// 64 KiB of UDP payload waits without loss. TCP holds its sender back
	// instead, and takes the flag without effect.
	IncreaseReceiveBuffer
	// EvenPort: the lowest external port of a bind is even, as RTP wants it
	// (RFC 3550, section 11). Where nothing is translated it has no effect.
	EvenPort
	// Discarding: the bind holds its address and discards what comes, until
	// RetroactiveAllowBind allows it. This is what a bind is that a client
	// makes without anybody having approved of it.
	Discarding
	// Preferred: the port of Bind.External is a wish. Another one is given
	// where it cannot be had.
	Preferred
	// SameSource: what a client's address of a bind sends by itself leaves from
	// the external address, while the bind is allowed, so that all its peers
	// see one and the same. Where nothing is translated it has no effect.
	SameSource
	// ToSameNet widens the allowed targets (or, for BindForClient, the client
	// addresses) to the /24 (IPv4) or /64 (IPv6) of the primary connection's
	// peer (or of the client). By default only that very host is allowed.
	ToSameNet
	// ToSameNetwork widens them to its network in the configuration.
	ToSameNetwork
	// ToAll allows any.
	ToAll
)

// DefaultTimeout is how long a permission with the Timeout flag waits for its
// use unless the call says otherwise.
const DefaultTimeout = 60 * time.Second

// SessionFlags tell what kind of session it is.
type SessionFlags uint8

const (
	// SessionNAT: the client does not know of the gateway; its packets pass
	// through it, translated or routed. (FWX_SESSION_NAT)
	SessionNAT SessionFlags = 1 << iota
	// SessionPrivate: a filter made it. (FWX_SESSION_PRIVATE)
	SessionPrivate
	// SessionAuthenticated: it has a user. (FWX_SESSION_AUTHENTICATED)
	SessionAuthenticated
	// SessionTerminated: it has ended. (FWX_SESSION_TERMINATED)
	SessionTerminated
)

// Session is everything that one client address does through the gateway. It
// begins with the first flow and ends with the last; one that came from
// Firewall.ClientSession or PrivateSession lives at least until Close. Safe
// for concurrent use.
//
// The permission calls block until the kernel has acknowledged the change, so
// that what announces the permission may be sent at once when they return; do
// not hold a lock across them that your event handler needs. They ask the
// access rules when they are called, not when the permission is used; a reload
// voids what the new rules refuse. (IFWXSession)
type Session interface {
	// ID is unique while the gateway runs.
	ID() uint64
	// ClientAddr is the client's address.
	ClientAddr() netip.Addr
	// User is the name that a private session was made with, else empty. Rules
	// may be for users: they match what such a session asks for, and no flow that
	// passes through the gateway by itself.
	User() string
	// Flags tells what kind of session it is, and whether it has ended.
	Flags() SessionFlags
	// AttachFilter has a filter's AttachToSession called now, before any
	// event; nothing happens if it is attached already. ErrNotFound: there is
	// no such filter, or it did not start; ErrTerminating.
	AttachFilter(name string) error
	// HostAccessCheck asks the access rules whether the client may open a
	// connection, and changes nothing. nil: it may; ErrPolicyDenied,
	// ErrNetworkDenied, ErrInvalidArgument.
	HostAccessCheck(HostAccess) error
	// ExternalAddr is where BindForClient opens a bind that has neither a
	// primary connection nor an address of its own to ask for: at the gateway's
	// address that hides the client, or, where nothing is translated, at the
	// client's own. It changes nothing. protocol is the protocol definition by
	// which the access rules are asked. ErrPolicyDenied, ErrNetworkDenied,
	// ErrInvalidArgument (no such protocol, or nothing tells the address),
	// ErrTerminating.
	ExternalAddr(protocol string) (netip.Addr, error)
	// Network makes sockets of the gateway that belong to this session and to
	// which the access rules apply as if the client had made them.
	Network() Network
	// Close gives a session back that came from Firewall.ClientSession or
	// PrivateSession; on another, and the second time, it does nothing. With
	// it a private session's permissions are void and its sockets closed; it
	// ends when the connections that it let in have.
	Close()

	// RedirectConnections gives the client addresses of the gateway's inside,
	// each of which leads to one target: target i is reached at the returned
	// address with its port + i, and by action i it is cancelled.
	// The filters that watch connects to the targets are told at the call, as
	// a secondary connection, which is over when the call returns; if one
	// denies, the call fails with ErrPolicyDenied; if one attaches a data
	// filter, the connections go through user space and each raises the event
	// again.
	// Flags: AllowMultiple, Timeout, NoKernelMode, IncreaseReceiveBuffer.
	// Errors: ErrInvalidArgument, ErrPolicyDenied, ErrNetworkDenied,
	// ErrNoPorts (then nothing is installed), ErrQuota, ErrTerminating,
	// ErrAlreadyExists (see AllowFutureConnect).
	RedirectConnections(Redirect) (inside netip.AddrPort, actions []Action, err error)

	// AllowFutureConnect lets the client open a secondary connection.
	// Flags: AllowMultiple, Timeout, NoKernelMode, AddressBased, ToSameNet,
	// ToSameNetwork, ToAll.
	// Errors: ErrInvalidArgument, ErrPolicyDenied, ErrNetworkDenied, ErrQuota,
	// ErrTerminating, ErrAlreadyExists (another permission is for the same
	// client and target, and differs in where its connections leave from or in
	// whether filters are asked about each).
	AllowFutureConnect(FutureConnect) (Action, error)

	// BindForClient opens an external address of the gateway for each of the
	// clients' addresses, on consecutive ports, or, where the path is routed
	// and no external address is asked for, pinholes at the clients' own
	// addresses. Connection.ExternalName says which. It stays open until it is
	// used up, expires, is closed, or the session ends. With an empty IPFilter
	// it is only reserved; SetIPFilter arms it.
	// Flags: AllowMultiple, Timeout, NoKernelMode, Bidirectional,
	// IncreaseReceiveBuffer, EvenPort, Discarding, Preferred, SameSource,
	// ToSameNet, ToSameNetwork, ToAll.
	// Errors: ErrInvalidArgument, ErrPolicyDenied, ErrNetworkDenied,
	// ErrNoPorts (then nothing is open), ErrQuota, ErrTerminating,
	// ErrAlreadyExists (an address that another bind has, or that leads
	// elsewhere for some of the sources).
	BindForClient(Bind) ([]Connection, error)

	// RetroactiveAllowBind allows a bind of this session that discards so far.
	// The external addresses that its client has got by a network rule that maps
	// endpoints are such binds, unless their filtering lets everybody in.
	// already: it was allowed before, and nothing has changed. On an error it
	// goes on as it was.
	// Flags: Bidirectional, IncreaseReceiveBuffer.
	// Errors: ErrInvalidArgument, ErrNotFound, ErrTerminating (the bind is
	// closing), ErrPolicyDenied, ErrNetworkDenied, ErrAlreadyExists (see
	// BindForClient).
	RetroactiveAllowBind(AllowBind) (already bool, err error)

	// SetDataFilterFactory attaches data filters to connections to come,
	// without an event: for each one, New is called with the time of a handler.
	// It lasts until it is cancelled or the session ends.
	// Flags: AddressBased.
	// Errors: ErrInvalidArgument, ErrTerminating, ErrQuota, ErrAlreadyExists (a
	// permission for the same client and target has its connections leave from
	// an address of its own).
	SetDataFilterFactory(DataFilterFactory) (Action, error)

	// ConnectForClient connects in the name of a client that has asked the
	// caller to, in a private session. A permission of the session for the
	// target lets it through; else the access rules and network rules are asked,
	// for the client's address, the session's user and the target. Filters get
	// the ConnectEvent, while nobody has been dialled. Then the target is dialled,
	// from the address that the network rule hides the client behind; where it
	// hides nobody, and for IPv6, from the one of the gateway that the route
	// prefers, never from the client's own. A filter may play the server
	// (EmulateForConnect), and nobody is dialled. ctx bounds all of it. On an
	// error there is nothing left of the flow but its record in the log.
	// Errors: ErrInvalidArgument, ErrNotSupported (the session is not private),
	// ErrTerminating, ErrPolicyDenied (by the rules, or by a filter),
	// ErrNetworkDenied, or the network's own: ECONNREFUSED, EHOSTUNREACH,
	// ENETUNREACH, ETIMEDOUT.
	ConnectForClient(ctx context.Context, c Connect) (Leg, error)

	// ListenForClient opens an address of the gateway's outside for a client
	// that has asked the caller to, in a private session. It is BindForClient,
	// but the end of the bind is a socket of the gateway, from which the caller
	// serves the client: also on a routed path and for IPv6 the address is the
	// gateway's. Clients is one address: where the client asked from, or, while
	// nobody can say that yet, the zero value, which waits for SetClientAddress.
	// With Discarding the bind never fails because of the rules, and discards.
	// The caller closes the result. Events and errors are those of
	// BindForClient, and so are the flags, but for EvenPort and SameSource;
	// ErrNotSupported: the session is not private.
	ListenForClient(Bind) (ClientListener, error)

	// EmulateClientBind makes a bind that a filter emulates: the events of a
	// bind are raised, nothing is opened, and EmulateConnection on the result
	// connects to the client.
	// Errors: ErrInvalidArgument, ErrPolicyDenied, ErrNetworkDenied, ErrQuota,
	// ErrTerminating.
	EmulateClientBind(EmulatedBind) (Connection, error)
}

// Negotiated is what the calls have in common that permit a secondary
// connection.
type Negotiated struct {
	// Primary is the connection that negotiated it: the new flow runs under its
	// rule, or with another Protocol under the one that allows that. When it
	// ends the permission stays: cancel it. Nil is allowed where Protocol is
	// set; then the rules are asked about the client and the target, or, for a
	// bind, whether they allow the client that protocol at all.
	Primary Connection
	// Protocol is the protocol definition that the flow is part of, by which
	// the access rules are asked; empty: that of Primary.
	Protocol string
	// Proto is flow.TCP or flow.UDP.
	Proto flow.Proto
	// Flags are those that the call takes.
	Flags Flags
	// Expiry replaces DefaultTimeout with the Timeout flag; 0 keeps it.
	Expiry time.Duration
	// Notify, a SessionFilter of this session, gets an EstablishedEvent with
	// Context for each connection; nil: nobody does.
	Notify  SessionFilter
	Context any
}

// Redirect asks for addresses of the gateway that lead to targets.
type Redirect struct {
	Negotiated
	// Targets are the real addresses.
	Targets []netip.AddrPort
	// External is the gateway's address that the connections leave from; port
	// 0: any port, the zero value: whatever the rules say. With AllowMultiple
	// the port must be 0.
	External netip.AddrPort
}

// FutureConnect asks for a secondary outbound connection.
type FutureConnect struct {
	Negotiated
	// Target is the exact address and port that the client will go to. Without
	// a wider flag its host is the peer of Primary.
	Target netip.AddrPort
	// External is as in Redirect.
	External netip.AddrPort
}

// Bind asks for secondary inbound addresses.
type Bind struct {
	Negotiated
	// Clients are where inbound connections are sent. Their addresses are the
	// session's own unless a flag widens that. A single one with the
	// unspecified address, or the zero value, waits for SetClientAddress.
	Clients []netip.AddrPort
	// External is the gateway's address to open, with the lowest port; port 0:
	// any, the zero value: the address that Primary's client is hidden behind,
	// or without Primary the one that the network rule names or that leads to
	// the first source of IPFilter, or else to the network that the rules allow
	// the protocol to. The unspecified address with a port is that port of the
	// same address, or of the client's own where nothing is translated: then no
	// other than its own can be had. The ports that the kernel's translation
	// chooses from cannot be had in this way.
	// The ExternalName of Primary itself may be given: what then comes to it
	// from elsewhere, within the IPFilter, is sent to the client. Any number of
	// binds to that client may have it.
	External netip.AddrPort
	// IPFilter says which sources may use it; nil: all, empty: none.
	IPFilter *IPFilter
}

// AllowBind names a bind to allow.
type AllowBind struct {
	// Proto is flow.TCP or flow.UDP.
	Proto flow.Proto
	// Address is the external address of the bind; an unspecified address
	// with the port matches any.
	Address netip.AddrPort
	// Protocol is the protocol definition by which the access rules are asked;
	// empty: that of the bind.
	Protocol string
	Flags    Flags
	// IPFilter says which sources may use it; nil: all, empty: none.
	IPFilter *IPFilter
}

// DataFilterFactory asks for data filters on connections to come.
type DataFilterFactory struct {
	// Event is one of ConnectTCP, UDPDestination, Accepted, BindUDP. The
	// connections of BindUDP are the flows of each peer of such a bind.
	Event EventMask
	// Address is the remote address for ConnectTCP and UDPDestination, and the
	// external one for the others. Port 0 is any port and an unspecified
	// address any address; such a factory sees only the flows that their rule,
	// or another filter, brings to user space.
	Address netip.AddrPort
	// New makes the data filter of one connection; nil without an error: none,
	// and the kernel may carry it. With Connection.Deny it refuses the
	// connection. An error and a panic go by the filter's FailMode.
	New      func(Connection) (DataFilter, error)
	Priority Priority
	Flags    Flags
}

// EmulatedBind asks for a bind that a filter emulates.
type EmulatedBind struct {
	// Client is where the client listens.
	Client netip.AddrPort
	// External is what the events say of the bind.
	External netip.AddrPort
	// Proto is flow.TCP or flow.UDP.
	Proto flow.Proto
	// Protocol is the protocol definition by which the access rules are asked.
	Protocol string
	// InternalAddressTranslation sets that flag of the connection.
	InternalAddressTranslation bool
}

// HostAccess is a question to the access rules.
type HostAccess struct {
	// Protocol is the protocol definition.
	Protocol string
	// Target is the server; its port decides nothing if Protocol is given. The
	// unspecified address asks whether the client may use Protocol at all, as
	// the calls without a primary connection do.
	Target netip.AddrPort
	// Proto with Target's port stands for an empty Protocol.
	Proto flow.Proto
	// Publishing asks the other way round: whether a rule that publishes lets
	// Target come to the session's client, by Protocol, or at the published port
	// that stands in Target. Target is then one host.
	Publishing bool
}

// Action is a permission that waits for its use. (IFWXFirewallAction)
type Action interface {
	// Cancel voids the permission; a living connection made by it goes on.
	// ErrTerminating when it was used up, has expired or was cancelled.
	// Safe for concurrent use.
	Cancel() error
}
