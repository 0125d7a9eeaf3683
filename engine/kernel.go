package engine

import (
	"context"
	"net"
	"net/netip"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// Kernel is what the engine asks of the kernel. kernelpath implements it.
// Every other method returns when the kernel has acknowledged. Safe for concurrent
// use; changes that wait together go out together.
type Kernel interface {
	// Install lets the flows of a permission in; one with the same ID is
	// replaced. On error nothing of it is in force; nat.ErrConflict: another
	// one has the same addresses and sends its flows elsewhere.
	Install(context.Context, nat.Permission) error
	// InstallLater is Install for who does not wait: done gets its error, on a
	// goroutine that must not be blocked and cannot ask the Kernel for anything.
	InstallLater(p nat.Permission, done func(error))
	// Remove voids a permission; one that is used up or gone is no error.
	Remove(context.Context, nat.Permission) error
	// Cut ends living kernel flows, named by the tuple of their first packet
	// before translation: both ends are reset at once, idle or not. A flow
	// that is gone is no error.
	Cut(context.Context, ...flow.Tuple) error
	// Peers adds to the addresses that inside endpoints have sent to, and takes
	// some away. One that is there, or is not, is no error.
	Peers(ctx context.Context, come, gone []nat.Peer) error
	// Living lists the flows that the kernel carries. One that begins or ends
	// meanwhile may be missed. take runs on the caller's goroutine.
	Living(ctx context.Context, take func(LivingFlow)) error
	// WatchEstablished has Engine.KernelEstablished called for every kernel
	// flow that is established, from the return on, until it was called with
	// false as often as with true.
	WatchEstablished(on bool) error
}

// User is what the engine asks of user space. userpath implements it.
type User interface {
	// Originate carries a takeover that has no initiator's packet: it dials
	// t.Dial, which leads to the client, and gives the chain that socket alone,
	// as the internal one. It returns when the connection stands, or why it
	// does not. It owns the takeover from the call on, and calls Ended in any
	// case. ctx bounds the dial alone.
	Originate(ctx context.Context, t *Takeover) error
	// Dial, Listen and ListenPacket make sockets of the gateway's own, with
	// its mark. from and at may have port 0.
	Dial(ctx context.Context, p flow.Proto, from, to netip.AddrPort) (net.Conn, error)
	Listen(at netip.AddrPort) (net.Listener, error)
	ListenPacket(at netip.AddrPort) (net.PacketConn, error)
	// Connect carries a takeover whose initiator has a connection to the
	// gateway: it dials t.Dial, or nobody if t is Emulated, and returns when
	// that stands, or why it does not. The flow goes on when its Joint gets the
	// initiator's connection. It owns the takeover as Originate does.
	Connect(ctx context.Context, t *Takeover) (Joint, error)
	// Receive carries a takeover whose initiator has connected to a socket of
	// Listen, and whose far end has a connection to the gateway. It owns the
	// takeover and conn.
	Receive(t *Takeover, conn net.Conn) (Joint, error)
	// Filter has the data filters of a takeover hold the datagrams of one peer,
	// which the caller receives and sends, and whose end the caller reports. What
	// they let pass is given to toClient and toPeer, which may be called at any
	// time, also at the same time, and do not keep it. far is the peer.
	Filter(t *Takeover, far netip.AddrPort, toClient, toPeer func([]byte)) Duct
}

// Duct is what data filters make of the datagrams of one peer.
type Duct interface {
	// FromClient and FromPeer take a datagram in; it is copied, and lost where
	// the filters do not keep up.
	FromClient(b []byte)
	FromPeer(b []byte)
	// Over is closed when the filters have ended the flow, or it was killed.
	Over() <-chan struct{}
	// Close ends it, and returns when the filters have, or have taken too long:
	// what became of the flow, and why.
	Close() (flow.Result, string)
}

// Joint is a TCP flow that has one end and waits for the other, half a minute
// at the most. Safe for concurrent use.
type Joint interface {
	// Carry gives it the other end: a connection that a socket of User.Listen
	// accepted, which belongs to the flow from the call on, also after an error.
	// filterapi.ErrInvalidArgument: another connection, or the second one;
	// filterapi.ErrTerminating: the flow is over.
	Carry(conn net.Conn) error
	// Close ends the flow if it has not got its other end.
	Close()
}

// Routes answers where an address is reached. kernelpath implements it.
type Routes interface {
	// Lookup gives the interface that leads to dst and the source address
	// that the route prefers; local says that dst is the gateway's own.
	Lookup(dst netip.Addr) (iface string, source netip.Addr, local bool, err error)
	// AddressOf gives the first address of an interface, of a family.
	AddressOf(iface string, is6 bool) (netip.Addr, error)
}

// CachedRoutes is what Routes may have besides: what is known of an address
// without asking the kernel. ok is false for what is not known, and for what
// has no route. DecideNow wants it.
type CachedRoutes interface {
	Known(dst netip.Addr) (iface string, local, ok bool)
}
