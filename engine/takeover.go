package engine

import (
	"context"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// Conn is the connection as the gateway itself holds it. Each data filter of
// Chain gets that of its own filter instead, whatever its Pump is called with.
func (t *Takeover) Conn() filterapi.Connection { return t.flow.handle(nil) }

// ownHandle is a data filter that gets its own filter's handle of the flow.
type ownHandle struct {
	filterapi.DataFilter
	conn *connHandle
}

// Pump implements filterapi.DataFilter.
func (o ownHandle) Pump(ctx context.Context, _ filterapi.Connection, internal, external filterapi.Socket) error {
	return o.DataFilter.Pump(ctx, o.conn, internal, external)
}

// Connected tells the engine that the upstream leg stands. name is the
// gateway's end of it, peer the far one.
func (t *Takeover) Connected(name, peer netip.AddrPort) {
	c := t.flow
	if t.Emulated {
		return // there is none; what a filter says it is stays
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if t.InitiatorExternal && !t.Dial.Transparent {
		c.near = name
	}
	if t.InitiatorExternal {
		// The external side is the initiator's leg, whose addresses are known
		// from its first packet.
		c.name, c.peer = c.tuple.Dst, c.tuple.Src
		return
	}
	c.name, c.peer = name, peer
}

// Established tells the engine that the connection stands from end to end.
func (t *Takeover) Established() { t.flow.e.established(t.flow) }

// CarriedBy names who ends the flow when the engine wants that at once: it
// then resets both ends and calls Ended. Where the engine wants it already, Cut
// is called before CarriedBy returns.
func (t *Takeover) CarriedBy(c Carrier) {
	t.mu.Lock()
	t.carrier = c
	killed := t.killed
	t.mu.Unlock()
	if killed {
		c.Cut()
	}
}

// Killed is closed when the engine wants the flow to end at once, for those
// who wait for that and are no Carrier.
func (t *Takeover) Killed() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.kill == nil {
		t.kill = make(chan struct{})
		if t.killed {
			close(t.kill)
		}
	}
	return t.kill
}

// cut asks userpath to end the flow. It may be called again.
func (t *Takeover) cut() {
	t.mu.Lock()
	first, c := !t.killed, t.carrier
	t.killed = true
	if first && t.kill != nil {
		close(t.kill)
	}
	t.mu.Unlock()
	if first && c != nil {
		c.Cut()
	}
}

// isCut says whether the engine wants the flow to end.
func (t *Takeover) isCut() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.killed
}

// Ended is the one end of a flow that user space carried, or tried to. reason
// may be empty.
func (t *Takeover) Ended(counts flow.Counts, r flow.Result, reason string) {
	c := t.flow
	end := flow.End{Tuple: c.tuple, Path: flow.User, Start: c.start, Counts: counts, Result: r, Reason: reason}
	c.mu.Lock()
	if c.emulated {
		// What passed between the client and a filter went nowhere; the filter
		// says what did.
		end.Counts = flow.Counts{OutBytes: c.sent}
	}
	end.Translation = c.translation()
	c.mu.Unlock()
	c.e.over(c, end)
}

// translation is what became of the addresses of a flow in user space. c.mu is
// held.
func (c *connection) translation() flow.Translation {
	var t flow.Translation
	if c.takeover == nil {
		return t
	}
	if to := c.takeover.Dial.Target; to.IsValid() && to != c.tuple.Dst {
		t.Dst = to
	}
	if !c.takeover.InitiatorExternal && !c.emulated && c.name.IsValid() && c.name.Addr() != c.tuple.Src.Addr() {
		t.Src = c.name
	}
	if c.near.IsValid() {
		t.Src = c.near
	}
	return t
}
