package filterapi

import (
	"context"
	"net"
	"net/netip"

	"github.com/sluicegw/sluice/flow"
)

// Network makes sockets of the gateway itself. The packet filter lets exactly
// their traffic through, for as long as they are open; a filter that opens
// sockets by itself finds them blocked. Those of Firewall are made whatever
// the access rules say, those of Session.Network only if they allow it. Safe
// for concurrent use. (IFWXNetworkSocket)
type Network interface {
	// Dial connects to an address. from, if valid, is an address of the
	// gateway to come from; port 0: any. ctx bounds the handshake. Errors:
	// ErrInvalidArgument, ErrPolicyDenied, ErrNetworkDenied, ErrTerminating when
	// the session is over, or the network's own. The caller closes the connection.
	Dial(ctx context.Context, p flow.Proto, from, to netip.AddrPort) (net.Conn, error)
	// Listen accepts TCP connections at an address of the gateway; port 0: any
	// free one. f says who may connect; nil: everybody. A session may listen
	// where the access rules let its client connect to. Errors:
	// ErrInvalidArgument for an address that is unspecified or not the
	// gateway's, ErrPolicyDenied, ErrNetworkDenied, ErrAlreadyExists,
	// ErrTerminating, or the network's own.
	Listen(at netip.AddrPort, f *IPFilter) (Listener, error)
	// ListenPacket is Listen for UDP. A session's socket sends only to whom the
	// access rules let its client send: ErrPolicyDenied, ErrNetworkDenied.
	ListenPacket(at netip.AddrPort, f *IPFilter) (PacketConn, error)
}

// Listener is a listening TCP socket of the gateway.
type Listener interface {
	net.Listener
	Restrictable
}

// PacketConn is a UDP socket of the gateway.
type PacketConn interface {
	net.PacketConn
	Restrictable
}

// Restrictable is a socket whose sources are bounded by the packet filter.
type Restrictable interface {
	// SetIPFilter replaces the sources and returns when the kernel has
	// acknowledged; nil: everybody, empty: nobody. ErrInvalidArgument for
	// sources of another family, ErrTerminating after Close. After the kernel's
	// error nobody may come until it is set again.
	SetIPFilter(*IPFilter) error
	// IPFilter gives a copy of the current one.
	IPFilter() *IPFilter
}
