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

// Probe connects to the first probe filter of the lab's gateway.
func (l *Lab) Probe() *Probe { return l.ProbeNamed("probe") }

// ProbeNamed connects to one of them: probe or probe2.
func (l *Lab) ProbeNamed(name string) *Probe {
	l.T.Helper()
	p := &Probe{lab: l, waits: map[uint64]chan ProbeReply{}, more: make(chan struct{})}
	Eventually(l.T, 5*time.Second, "the probe filter listens", func() bool {
		c, err := net.Dial("unix", filepath.Join(l.dir, name))
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
