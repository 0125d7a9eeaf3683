// Package nat is the arithmetic of translation: the disjoint port ranges, the
// allocator of external ports, and the permissions that let secondary flows
// in. It is pure but for the allocator's own state.
package nat

import (
	"errors"
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/flow"
)

// Direction of the flows that a Permission lets pass.
type Direction uint8

const (
	// Outbound: from the client to one exact target.
	Outbound Direction = iota + 1
	// Inbound: from a source to the external address that stands for the
	// client.
	Inbound
	// Local: from a source to an address of the gateway at which a socket of
	// its own listens.
	Local
)

// Permission is one pending permission as the kernel holds it: an element of
// a set with a timeout. It is a value; two permissions with the same ID are
// versions of the same one.
type Permission struct {
	// ID is unique while the gateway runs, never 0.
	ID        uint64
	Direction Direction
	Proto     flow.Proto

	// Outbound: Client goes from any port to exactly Target.
	// Inbound: a flow to External is sent to Client and its port.
	Client netip.AddrPort
	// Target is set for Outbound.
	Target netip.AddrPort
	// Via, if valid, is the address of the gateway's inside that the client of
	// an Outbound one goes to instead; it leads to Target. Who else goes there
	// is refused at once, until Quarantine after the permission is removed.
	// Without a Client it lets nobody in: the translation alone is held.
	Via netip.AddrPort
	// Source, if valid, is the gateway's address that Outbound flows leave
	// from; port 0: any port.
	Source netip.AddrPort
	// External is set for Inbound and Local. It equals Client for a pinhole,
	// where nothing is translated.
	External netip.AddrPort
	// Sources may use an Inbound or Local permission; AnySource: everybody.
	Sources   []netip.Prefix
	AnySource bool
	// OneWay, for Inbound and UDP: what the client answers is dropped.
	OneWay bool
	// FromGateway, for Inbound: the client sees an address of the gateway as
	// the source, the one that the route to it prefers.
	FromGateway bool
	// Leaves, for Inbound and IPv4, is the name of the NAT network rule under
	// which what Client itself sends leaves from External; empty: none. ICMP
	// may have that, and nothing else: the ports of Client and External are
	// then identifiers of queries.
	Leaves string
	// Mapped permissions are those of endpoint-independent mappings: the kernel
	// does not tell of the flows that it lets in, and hosts that the rule hides
	// are user space's. Multiple and, to let anybody in at all, AnySource.
	Mapped bool
	// PeersOnly, for Mapped: of any source only those addresses that Client has
	// sent to.
	PeersOnly bool
	// Shared, for Mapped: other permissions may have some of its addresses, too.
	Shared bool

	// Multiple permissions are not used up by their first flow.
	Multiple bool
	// ToUser sends the flows to the queue, not through the kernel.
	ToUser bool
	// Timeout is the time until it expires; 0: never.
	Timeout time.Duration
}

// Peer is an address that an inside endpoint has sent to.
type Peer struct {
	Proto  flow.Proto
	Inside netip.AddrPort
	Addr   netip.Addr
}

// ErrConflict: the kernel holds another permission for the same addresses,
// which sends its flows elsewhere; or one from a range of sources that overlaps
// and is not the same.
var ErrConflict = errors.New("another permission has the same address and port and another destination")

// ErrNoRule: there is no NAT network rule of the name in Leaves.
var ErrNoRule = errors.New("no such network rule hides addresses")
