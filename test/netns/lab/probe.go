package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"time"
)

// The probe filter is an application filter that does what a test says. It is
// built into the gateway by the build tag "probe", is named "probe" in rules,
// and listens on the Unix socket that SLUICE_PROBE_SOCKET names. The two sides
// send JSON values, one a line:
//
//	test -> probe    ProbeRequest
//	probe -> test    ProbeReply for each request, in any order, by ID
//	probe -> test    ProbeEvent whenever the gateway calls the filter
//
// A handler answers at once with what ops "on" has set for its kind of event
// (pass, when nothing is set), unless that says hold: then it waits for the
// op "answer" with the event's number. More than one test connection may be
// open; each gets every event from its own beginning on.
//
// Ops, and the fields of Args that they read:
//
//	on       kind, do: what the next events of a kind get: pass | deny | hold |
//	         attach | fail | panic; chain: what an attached data filter puts in
//	         front of each direction's first bytes; priority: its class
//	answer   event, do, chain, priority: for one event that is held
//	future   session, conn (the primary), proto, targets, flags, timeout_ms -> actions
//	bind     session, conn (the primary), proto, client, sources, flags, timeout_ms -> conn, addr
//	filter   conn, sources: SetIPFilter
//	kill     conn
//	cancel   action
//	pause    conn, on: the attached data filter stops reading
//	count    kind -> count
//	sessions -> sessions
type ProbeRequest struct {
	ID   uint64    `json:"id"`
	Op   string    `json:"op"`
	Args ProbeArgs `json:"args"`
}

// ProbeArgs are the arguments of all ops together.
type ProbeArgs struct {
	Kind      string   `json:"kind,omitempty"`
	Do        string   `json:"do,omitempty"`
	Event     uint64   `json:"event,omitempty"`
	Chain     string   `json:"chain,omitempty"`
	Priority  string   `json:"priority,omitempty"`
	Session   uint64   `json:"session,omitempty"`
	Conn      uint64   `json:"conn,omitempty"`
	Action    uint64   `json:"action,omitempty"`
	Proto     string   `json:"proto,omitempty"`
	Client    string   `json:"client,omitempty"`
	Targets   []string `json:"targets,omitempty"`
	Sources   []string `json:"sources"` // null: everybody
	Flags     []string `json:"flags,omitempty"`
	TimeoutMS int64    `json:"timeout_ms,omitempty"`
	On        bool     `json:"on,omitempty"`
}

// ProbeReply answers a request. Error is the sentinel's name in filterapi
// without "Err" (PolicyDenied, NoPorts ...), or a sentence.
type ProbeReply struct {
	ID       uint64         `json:"id"`
	Error    string         `json:"error,omitempty"`
	Addr     string         `json:"addr,omitempty"`
	Conn     uint64         `json:"conn,omitempty"`
	Actions  []uint64       `json:"actions,omitempty"`
	Count    int            `json:"count,omitempty"`
	Sessions []ProbeSession `json:"sessions,omitempty"`
}

// ProbeSession is a session as the filter sees it.
type ProbeSession struct {
	ID     uint64 `json:"id"`
	Client string `json:"client"`
}

// ProbeEvent is one call of the filter. Kind is the event's type in filterapi:
// ConnectTCP, UDPDestination, BindTCP, BindUDP, Listen, Accepted, Established,
// Terminating; or Bytes, for what passed the attached data filter.
type ProbeEvent struct {
	Event     uint64 `json:"event"` // numbers from 1; how a line is told from a reply
	Kind      string `json:"kind"`
	Session   uint64 `json:"session,omitempty"`
	Conn      uint64 `json:"conn,omitempty"`
	Secondary bool   `json:"secondary,omitempty"`
	Src       string `json:"src,omitempty"`
	Dst       string `json:"dst,omitempty"`
	FromSide  string `json:"from_side,omitempty"` // of Bytes: internal or external
	Data      []byte `json:"data,omitempty"`
}

// Probe is a test's connection to the probe filter.
type Probe struct {
	lab    *Lab
	conn   net.Conn
	mu     sync.Mutex
	next   uint64
	waits  map[uint64]chan ProbeReply
	events []ProbeEvent
	more   chan struct{}
}

// Probe connects to the probe filter of the lab's gateway.
func (l *Lab) Probe() *Probe {
	l.T.Helper()
	p := &Probe{lab: l, waits: map[uint64]chan ProbeReply{}, more: make(chan struct{})}
	Eventually(l.T, 5*time.Second, "the probe filter listens", func() bool {
		c, err := net.Dial("unix", filepath.Join(l.dir, "probe"))
		p.conn = c
		return err == nil
	})
	l.OnClose(func() { _ = p.conn.Close() })
	go p.read()
	p.Must("count", ProbeArgs{}) // answered: from here on events come
	return p
}

func (p *Probe) read() {
	lines := bufio.NewScanner(p.conn)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e ProbeEvent
		if json.Unmarshal(lines.Bytes(), &e) == nil && e.Event != 0 {
			p.mu.Lock()
			p.events = append(p.events, e)
			close(p.more)
			p.more = make(chan struct{})
			p.mu.Unlock()
			continue
		}
		var r ProbeReply
		if json.Unmarshal(lines.Bytes(), &r) == nil {
			p.mu.Lock()
			if w := p.waits[r.ID]; w != nil {
				w <- r
				delete(p.waits, r.ID)
			}
			p.mu.Unlock()
		}
	}
}

// Ask sends a request and waits for its reply. A refusal is in the reply.
func (p *Probe) Ask(op string, a ProbeArgs) ProbeReply {
	p.lab.T.Helper()
	answer := make(chan ProbeReply, 1)
	p.mu.Lock()
	p.next++
	line, err := json.Marshal(ProbeRequest{ID: p.next, Op: op, Args: a})
	p.waits[p.next] = answer
	if err == nil {
		_, err = p.conn.Write(append(line, '\n'))
	}
	p.mu.Unlock()
	if err != nil {
		p.lab.T.Fatalf("probe %s: %v", op, err)
	}
	select {
	case r := <-answer:
		return r
	case <-time.After(Patience(10 * time.Second)):
		p.lab.T.Fatalf("probe %s: no reply", op)
		panic("unreachable")
	}
}

// Must is Ask that fails the test on a refusal.
func (p *Probe) Must(op string, a ProbeArgs) ProbeReply {
	p.lab.T.Helper()
	r := p.Ask(op, a)
	if r.Error != "" {
		p.lab.T.Fatalf("probe %s: %s", op, r.Error)
	}
	return r
}

// Events are those so far that satisfy ok.
func (p *Probe) Events(ok func(ProbeEvent) bool) []ProbeEvent {
	p.mu.Lock()
	defer p.mu.Unlock()
	var some []ProbeEvent
	for _, e := range p.events {
		if ok(e) {
			some = append(some, e)
		}
	}
	return some
}

// Await waits for the first event that satisfies ok.
func (p *Probe) Await(d time.Duration, ok func(ProbeEvent) bool) ProbeEvent {
	p.lab.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience(d))
	defer cancel()
	for {
		p.mu.Lock()
		more := p.more
		p.mu.Unlock()
		if found := p.Events(ok); len(found) > 0 {
			return found[0]
		}
		select {
		case <-more:
		case <-ctx.Done():
			p.lab.T.Fatal(fmt.Errorf("no such event of the probe filter: %w", ctx.Err()))
		}
	}
}
