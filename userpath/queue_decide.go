package userpath

import (
	"context"
	"sync"
	"time"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// Takeovers is what carries the flows whose decision is User. Both methods own
// the takeover from the call on and end it themselves when the answer is not
// User. The first packet is held meanwhile.
type Takeovers interface {
	// TCP begins to dial upstream, does not wait for it, and answers: User when
	// the connection stands, else what the client is to be told: Reject,
	// HostUnreachable, NetUnreachable, PortUnreachable, Exhausted, or Drop. It
	// gives up after within, or some time later. nil: the answer was given.
	TCP(t *engine.Takeover, within time.Duration, first Held) Dialling
	// UDP makes ready to receive the flow's datagrams and returns the answer.
	// It runs on a goroutine of its own and may block. ctx bounds the call
	// alone: it is cancelled when the packet is lost, and after the return.
	UDP(ctx context.Context, t *engine.Takeover) flow.Path
}

// Held is a first packet that waits for its answer. Neither method blocks; both
// may be called from any goroutine.
type Held interface {
	// Answer is called exactly once. The packet does not go before a Release.
	Answer(flow.Path)
	// Release has the packets of all answers go that were given so far, of
	// this one and of others, in one send if they can.
	Release()
}

// Dialling is a dial that is under way.
type Dialling interface {
	// Lost says that nobody waits for the answer any more. It does not block
	// and may come too late.
	Lost()
}

// cancelled is a dial that ends with its context.
type cancelled context.CancelFunc

// Lost implements Dialling.
func (c cancelled) Lost() { c() }

// judge asks for the decision on a flow. True: it is settled and the caller
// releases it. Else it goes on elsewhere, or nobody waits for it any more.
func (q *Queues) judge(f *inflight) (release bool) {
	if !f.waiting() {
		return false
	}
	f.ctx.Parent = q.ctx
	f.ctx.At = q.table.start.Add(f.born + q.cfg.DecideWithin)
	d := q.cfg.Decide(&f.ctx, f.packet)
	f.ctx.End()
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
	if !f.startDial() {
		q.dials.Add(-1)
		return q.tooLate(f, t)
	}
	q.dialling.Add(1)
	f.queues = q
	if f.packet.Proto == flow.TCP {
		if d := q.cfg.Takeovers.TCP(t, q.cfg.DialWithin, f); d != nil && !f.dials(d) {
			d.Lost()
		}
		return false
	}
	ctx, cancel := context.WithTimeout(q.ctx, q.cfg.DialWithin)
	if !f.dials(cancelled(cancel)) {
		cancel()
	}
	q.dialling.Go(func() { q.readyUDP(ctx, cancel, f, t) }) // until its packet has its verdict
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

func (q *Queues) readyUDP(ctx context.Context, cancel context.CancelFunc, f *inflight, t *engine.Takeover) {
	q.dialling.Add(1) // until the packet has gone; the answer ends the other one
	defer q.dialling.Done()
	defer cancel()
	path := flow.Drop
	if f.packet.Proto == flow.UDP {
		path = q.cfg.Takeovers.UDP(ctx, t)
	} else {
		q.abandon(t, "neither TCP nor UDP")
	}
	f.Answer(path)
	f.Release()
}

// Answer implements Held.
func (f *inflight) Answer(p flow.Path) {
	q := f.queues
	q.dials.Add(-1)
	if release, _ := f.settle(p); release {
		q.answered.add(f)
	}
	q.dialling.Done()
}

// later is a flow whose answer DecideLater gives.
type later inflight

// Answer implements engine.Waiting. Who gives answers gives many at a time, and
// has other things to do than to carry packets: releaseLoop does that.
func (l *later) Answer(p flow.Path) (inTime bool) {
	f := (*inflight)(l)
	q := f.queues
	q.count.decisions.Add(1)
	release, late := f.settle(p)
	if release {
		q.answered.add(f)
		select {
		case q.answered.kick <- struct{}{}:
		default:
		}
	}
	return !late
}

// releaseLoop releases the flows that were answered later.
func (q *Queues) releaseLoop(stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-q.answered.kick:
			q.releaseAnswered()
		}
	}
}

// Release implements Held.
func (f *inflight) Release() { f.queues.releaseAnswered() }

// releaseAnswered sends the verdicts of all answers that were given so far.
func (q *Queues) releaseAnswered() {
	q.answered.mu.Lock()
	flows := q.answered.flows
	q.answered.flows, q.answered.spare = q.answered.spare[:0], nil
	q.answered.mu.Unlock()
	if len(flows) == 0 {
		return
	}
	q.release(flows...)
	clear(flows)
	q.answered.mu.Lock()
	q.answered.spare = flows
	q.answered.mu.Unlock()
}

// answered are the flows that have their answers and whose packets have not gone
// yet.
type answered struct {
	mu    sync.Mutex
	flows []*inflight
	spare []*inflight   // room for the next ones
	kick  chan struct{} // holds one: releaseLoop has something to do
}

func (a *answered) add(f *inflight) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.flows = append(a.flows, f)
}
