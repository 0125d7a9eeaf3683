// Package engine is where flows are judged: sessions, connections, events to
// the filters, decisions, permissions, and the one end of every flow. It holds
// no socket and speaks no netlink.
package engine

import (
	"net/netip"
	"sync"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// Decision is the one answer to a first packet. The zero value drops.
type Decision struct {
	Path flow.Path
	// Takeover is set exactly when Path is User.
	Takeover *Takeover
}

// Dial says how the upstream leg of a taken-over flow is made.
type Dial struct {
	Proto  flow.Proto
	Target netip.AddrPort
	// Source is the address to come from. Port 0: any of the gateway's own
	// range. An invalid address: whatever the route prefers.
	Source netip.AddrPort
	// Transparent: Source is not an address of the gateway, but the
	// initiator's own.
	Transparent bool
}

// Link is one data filter on a flow.
type Link struct {
	Filter   filterapi.DataFilter
	Name     string // of the application filter, for the log
	Priority filterapi.Priority

	owner     *registered
	peer      netip.AddrPort // if valid, it is for this peer's datagrams alone
	inherited bool           // it was there before the flow's own event
}

// Takeover is a flow that user space carries: engine and userpath meet in it.
// userpath calls Connected once when the upstream leg stands (for UDP: before
// the first datagram is passed), Established once when both ends stand (for UDP:
// when the first datagram was passed), and Ended exactly once in any case, also when
// the dial failed.
type Takeover struct {
	Tuple flow.Tuple
	Dial  Dial
	// Chain has the data filters from the client's side to the external side.
	// Empty: the flow is spliced.
	Chain []Link
	// InitiatorExternal is true if the initiator is on the external side (an
	// inbound flow): the pump then gives the chain its sockets the other way
	// round.
	InitiatorExternal bool
	// Emulated: there is no upstream leg. Dial is not set, and the last filter
	// of the chain gets no external socket. The initiator's SYN is accepted at
	// once.
	Emulated bool
	// OneWay, for an inbound UDP flow: what the client sends is dropped.
	OneWay bool
	// Burst: a burst of 64 KiB of UDP payload waits without loss.
	Burst bool
	// Idle is how long a UDP flow may carry nothing, and its client's socket
	// after it; 0: as userpath is configured.
	Idle time.Duration
	// Buffer is the receive buffer for Chain, in bytes.
	Buffer int

	flow *connection

	mu      sync.Mutex
	killed  bool
	kill    chan struct{} // made when somebody asks for it
	carrier Carrier       // nil: nobody has said so
}

// Carrier is what carries the bytes of a Takeover.
type Carrier interface {
	// Cut ends the flow at once. It does not block, and may be called again,
	// from any goroutine.
	Cut()
}
