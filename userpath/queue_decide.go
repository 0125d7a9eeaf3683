package userpath

import (
	"context"
	"sync"
	"time"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// Takeovers is what carries the flows whose decision is User. Both methods own
// the takeover from the call on and end it themselves when they do not return
// User. They run on a goroutine of their own and may block; the first packet
// is held meanwhile. ctx bounds the call alone: it is cancelled when the packet
// is lost, and after the return.
type Takeovers interface {
	// TCP dials upstream and returns User when the connection stands, else
	// what the client is to be told: Reject, HostUnreachable, NetUnreachable,
	// PortUnreachable, Exhausted, or Drop.
	TCP(ctx context.Context, t *engine.Takeover) flow.Path
	// UDP makes ready to receive the flow's datagrams and returns as TCP does.
	UDP(ctx context.Context, t *engine.Takeover) flow.Path
}

// judge asks for the decision on a flow. True: it is settled and the caller
// releases it. Else it goes on elsewhere, or nobody waits for it any more.
func (q *Queues) judge(f *inflight) (release bool) {
	if !f.waiting() {
		return false
	}
	f.ctx.parent = q.ctx
	f.ctx.deadline = q.table.start.Add(f.born + q.cfg.DecideWithin)
	d := q.cfg.Decide(&f.ctx, f.packet)
	f.ctx.end()
	q.count.decisions.Add(1)
	if q.table.now()-f.born >= q.cfg.DecideWithin {
		return q.tooLate(f, d.Takeover)
	}
	if d.Path == flow.User {
		return q.takeOver(f, d.Takeover)
	}
	release, _ = f.settle(d.Path)
	return release
}

// takeOver starts the dial for a flow. The return value is judge's.
func (q *Queues) takeOver(f *inflight, t *engine.Takeover) (release bool) {
	if t == nil {
		release, _ = f.settle(flow.Drop)
		return release
	}
	if q.dials.Add(1) > int64(q.cfg.MaxDials) {
		q.dials.Add(-1)
		q.count.overDials.Add(1)
		q.abandon(t, "too many dials at a time")
		release, _ = f.settle(flow.Drop)
		return release
	}
	ctx, cancel := context.WithTimeout(q.ctx, q.cfg.DialWithin)
	if !f.startDial(cancel) {
		cancel()
		q.dials.Add(-1)
		return q.tooLate(f, t)
	}
	q.dialling.Add(1)
	go q.dial(ctx, cancel, f, t)
	return false
}

// tooLate puts an answer aside that missed its deadline, or whose packet is
// gone. The return value is judge's.
func (q *Queues) tooLate(f *inflight, t *engine.Takeover) (release bool) {
	if t != nil {
		q.abandon(t, "the decision came too late")
	}
	release, late := f.settle(unanswered(f.open))
	if !late {
		q.count.late.Add(1)
	}
	return release
}

func (q *Queues) dial(ctx context.Context, cancel context.CancelFunc, f *inflight, t *engine.Takeover) {
	defer q.dialling.Done()
	defer cancel()
	path := flow.Drop
	switch f.packet.Proto {
	case flow.TCP:
		path = q.cfg.Takeovers.TCP(ctx, t)
	case flow.UDP:
		path = q.cfg.Takeovers.UDP(ctx, t)
	default:
		q.abandon(t, "neither TCP nor UDP")
	}
	q.dials.Add(-1)
	if release, _ := f.settle(path); release {
		q.release(f)
	}
}

// decideContext is the context of one decision. Most decisions never ask for
// more than that it is there, so that its timer and channel are made only when
// somebody calls Done. It lives in its flow and costs nothing of its own.
type decideContext struct {
	parent   context.Context
	deadline time.Time

	mu     sync.Mutex
	ended  bool
	real   context.Context
	cancel context.CancelFunc
}

// Deadline implements context.Context.
func (c *decideContext) Deadline() (time.Time, bool) { return c.deadline, true }

// Done implements context.Context.
func (c *decideContext) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.real == nil {
		c.real, c.cancel = context.WithDeadline(c.parent, c.deadline)
		if c.ended {
			c.cancel()
		}
	}
	return c.real.Done()
}

// Err implements context.Context.
func (c *decideContext) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.real != nil:
		return c.real.Err()
	case c.ended:
		return context.Canceled
	case c.parent.Err() != nil:
		return c.parent.Err()
	case !time.Now().Before(c.deadline):
		return context.DeadlineExceeded
	}
	return nil
}

// Value implements context.Context. The real context answers when there is
// one: the context package recognises its own kind by a value.
func (c *decideContext) Value(key any) any {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.real != nil {
		return c.real.Value(key)
	}
	return c.parent.Value(key)
}

// end cancels the context: the decision was made.
func (c *decideContext) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	if c.cancel != nil {
		c.cancel()
	}
}
