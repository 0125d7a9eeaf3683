package engine

import (
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// Conn is the connection object that data filters get in Pump.
func (t *Takeover) Conn() filterapi.Connection { return nil }

// Connected tells the engine that the upstream leg stands. name is the
// gateway's end of it, peer the far one.
func (t *Takeover) Connected(name, peer netip.AddrPort) {}

// Killed is closed when the engine wants the flow to end at once: userpath
// then resets both ends and calls Ended.
func (t *Takeover) Killed() <-chan struct{} { return t.kill }

// Ended is the one end of a flow that user space carried, or tried to.
func (t *Takeover) Ended(c flow.Counts, r flow.Result, reason string) {}
