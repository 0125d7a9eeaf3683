package engine

import (
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// Conn is the connection object that data filters get in Pump.
func (t *Takeover) Conn() filterapi.Connection { return t.flow }

// Connected tells the engine that the upstream leg stands. name is the
// gateway's end of it, peer the far one.
func (t *Takeover) Connected(name, peer netip.AddrPort) {
	c := t.flow
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.InitiatorExternal {
		// The external side is the initiator's leg, whose addresses are known
		// from its first packet.
		c.name, c.peer = c.tuple.Dst, c.tuple.Src
		return
	}
	c.name, c.peer = name, peer
}

// Established tells the engine that the connection stands from end to end.
func (t *Takeover) Established() {}

// Killed is closed when the engine wants the flow to end at once: userpath
// then resets both ends and calls Ended.
func (t *Takeover) Killed() <-chan struct{} { return t.kill }

// cut asks userpath to end the flow. It may be called again.
func (t *Takeover) cut() { t.once.Do(func() { close(t.kill) }) }

// Ended is the one end of a flow that user space carried, or tried to. reason
// may be empty.
func (t *Takeover) Ended(counts flow.Counts, r flow.Result, reason string) {
	c := t.flow
	end := flow.End{Tuple: c.tuple, Path: flow.User, Start: c.start, Counts: counts, Result: r, Reason: reason}
	c.mu.Lock()
	if t.InitiatorExternal {
		end.Translation.Dst = t.Dial.Target
	} else if c.name.IsValid() && c.name.Addr() != c.tuple.Src.Addr() {
		end.Translation.Src = c.name
	}
	c.mu.Unlock()
	c.e.over(c, end)
}
