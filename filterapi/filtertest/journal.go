package filtertest

import (
	"fmt"
	"slices"
	"strings"
	"sync"
)

// What happened, as an Entry of the journal says it.
type What string

// The kinds of entries. Asked comes when a filter calls, the others when the
// kernel has acknowledged: what leaves between the two was announced too
// early.
const (
	Asked       What = "asked"       // a permission call began; Text says which
	Allowed     What = "allowed"     // AllowFutureConnect is in force
	Redirected  What = "redirected"  // RedirectConnections is in force, one entry for each target
	Reserved    What = "reserved"    // BindForClient that lets nobody in yet
	Bound       What = "bound"       // BindForClient that lets somebody in
	Discards    What = "discards"    // a bind that discards what comes
	Approved    What = "approved"    // RetroactiveAllowBind
	Armed       What = "armed"       // SetIPFilter
	Dated       What = "dated"       // SetExpiry
	Factory     What = "factory"     // SetDataFilterFactory
	Emulates    What = "emulates"    // EmulateForBind, EmulateClientBind, EmulateConnection
	Used        What = "used"        // a single-use permission was used up
	Cancelled   What = "cancelled"   // Action.Cancel, or the end of the session
	Killed      What = "killed"      // Connection.Kill of a bind
	Expired     What = "expired"     // the Timeout flag, or SetExpiry
	Opened      What = "opened"      // a socket of the gateway's own
	Shut        What = "shut"        // such a socket was closed
	Established What = "established" // an EstablishedEvent was raised
	Failed      What = "failed"      // the filter failed; Text is the error
	ToClient    What = "client<"     // the filter sent Text to the client
	ToServer    What = "server<"     // the filter sent Text to the server
	Lost        What = "lost"        // the filter gave the flow back and kept Text too long
)

// Entry is one thing that happened.
type Entry struct {
	What What
	// Text is what was sent, or the permission in words:
	//
	//	tcp 10.0.0.2 > 203.0.113.10:5001                      future connect
	//	tcp 10.0.0.2 > 203.0.113.10:5001 as 203.0.113.2:0     from an asked address
	//	tcp 10.0.0.2 > 10.0.0.1:41000 > 203.0.113.10:5001     redirection
	//	tcp 203.0.113.1:40000 > 10.0.0.2:5001 from [203.0.113.10]   bind
	Text string
}

func (e Entry) String() string {
	if e.What == ToClient || e.What == ToServer || e.What == Lost {
		return fmt.Sprintf("%s %q", e.What, e.Text)
	}
	return string(e.What) + " " + e.Text
}

type journal struct {
	mu      sync.Mutex
	entries []Entry
}

func (j *journal) add(e Entry) {
	j.mu.Lock()
	j.entries = append(j.entries, e)
	j.mu.Unlock()
}

func (j *journal) all() []Entry {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.Clone(j.entries)
}

// Journal is everything that happened so far, in order.
func (g *Gateway) Journal() []Entry { return g.journal.all() }

// Permissions is the part of the journal that changed the kernel, one line
// each.
func (g *Gateway) Permissions() []string {
	var out []string
	for _, e := range g.journal.all() {
		switch e.What {
		case ToClient, ToServer, Asked, Lost, Established, Failed:
		default:
			out = append(out, e.String())
		}
	}
	return out
}

// Sent is all that the filter sent to one side, ToClient or ToServer, with the
// segments joined.
func (g *Gateway) Sent(to What) string {
	var b strings.Builder
	for _, e := range g.journal.all() {
		if e.What == to {
			b.WriteString(e.Text)
		}
	}
	return b.String()
}

// Before fails the test unless the journal has an entry of kind first whose
// text contains firstText, and no byte of thenText was sent to the side then
// before it: install first, release after.
func (g *Gateway) Before(first What, firstText string, then What, thenText string) {
	g.tb.Helper()
	seen, sent := false, ""
	for _, e := range g.journal.all() {
		if e.What == first && strings.Contains(e.Text, firstText) {
			seen = true
		}
		if e.What != then {
			continue
		}
		sent += e.Text
		if strings.Contains(sent, thenText) {
			if !seen {
				g.tb.Errorf("%s %q left before %s %q:\n%s", then, thenText, first, firstText, g.dump())
			}
			return
		}
	}
	g.tb.Errorf("%s %q never left:\n%s", then, thenText, g.dump())
}

func (g *Gateway) dump() string {
	var b strings.Builder
	for _, e := range g.journal.all() {
		b.WriteString("  " + e.String() + "\n")
	}
	return b.String()
}
