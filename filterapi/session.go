package filterapi

import (
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/flow"
)

// Flags qualify a permission. A flag that does not fit the call or the
// protocol is ErrInvalidArgument.
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

// Session is everything that one client address does through the gateway. It
// begins with the first flow and ends with the last. Safe for concurrent use.
// The permission calls block until the kernel has acknowledged the change, so
// that what announces the permission may be sent at once when they return; do
// not hold a lock across them that your event handler needs. (IFWXSession)
type Session interface {
	// ID is unique while the gateway runs.
	ID() uint64
	// ClientAddr is the client's address.
	ClientAddr() netip.Addr

	// AllowFutureConnect lets the client open a secondary connection.
	// Errors: ErrInvalidArgument, ErrPolicyDenied, ErrQuota, ErrTerminating.
	AllowFutureConnect(FutureConnect) (Action, error)

	// BindForClient opens an external address of the gateway for the client,
	// or, where the path is routed, a pinhole at the client's own address.
	// Connection.ExternalName says which. It stays open until it is used up,
	// expires, is closed, or the session ends. With an empty IPFilter it is
	// only reserved; SetIPFilter arms it.
	// Errors: ErrInvalidArgument, ErrPolicyDenied, ErrNoPorts, ErrQuota,
	// ErrTerminating, ErrAlreadyExists (a pinhole that another session has).
	BindForClient(Bind) (Connection, error)
}

// FutureConnect asks for a secondary outbound connection.
type FutureConnect struct {
	// Primary is the connection that negotiated it. It decides the rule that
	// the new flow runs under and, without a wider flag, the only host that
	// Target may name. When it ends the permission stays: cancel it.
	Primary Connection
	// Target is the exact address and port that the client will go to.
	Target netip.AddrPort
	// Proto is flow.TCP or flow.UDP.
	Proto flow.Proto
	// Flags: AllowMultiple, Timeout, NoKernelMode, ToSameNet, ToSameNetwork,
	// ToAll.
	Flags Flags
	// Expiry replaces DefaultTimeout with the Timeout flag; 0 keeps it.
	Expiry time.Duration
}

// Bind asks for a secondary inbound address.
type Bind struct {
	// Primary is the connection that negotiated it; see FutureConnect.
	Primary Connection
	// Client is where inbound connections are sent. Its address is the
	// session's own unless a flag widens that.
	Client netip.AddrPort
	// Proto is flow.TCP or flow.UDP.
	Proto flow.Proto
	// Flags: AllowMultiple, Timeout, NoKernelMode, ToSameNet, ToSameNetwork,
	// ToAll.
	Flags Flags
	// Expiry replaces DefaultTimeout with the Timeout flag; 0 keeps it. It
	// runs from the last SetIPFilter.
	Expiry time.Duration
	// IPFilter says which sources may use it; nil: all, empty: none.
	IPFilter *IPFilter
}

// Action is a permission that waits for its use. (IFWXFirewallAction)
type Action interface {
	// Cancel voids the permission; a living connection made by it goes on.
	// ErrTerminating when it was used up, has expired or was cancelled.
	// Safe for concurrent use.
	Cancel() error
}

// IPFilter is a set of source addresses. The zero value is the empty set. It
// is immutable after it was handed to the gateway. (IFWXIpFilter)
type IPFilter struct{ Addrs []netip.Addr }

// OnlyFrom makes the filter that admits exactly these hosts.
func OnlyFrom(addrs ...netip.Addr) *IPFilter { return &IPFilter{Addrs: addrs} }

// Includes says whether a source is in the set; a nil filter includes all.
func (f *IPFilter) Includes(a netip.Addr) bool {
	if f == nil {
		return true
	}
	for _, x := range f.Addrs {
		if x == a {
			return true
		}
	}
	return false
}

// Clone is a copy that the caller may change.
func (f *IPFilter) Clone() *IPFilter {
	if f == nil {
		return nil
	}
	return &IPFilter{Addrs: append([]netip.Addr(nil), f.Addrs...)}
}
