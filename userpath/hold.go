package userpath

import (
	"time"

	"github.com/sluicegw/sluice/flow"
)

// heldPacket is a packet that waits in the kernel for its verdict. Its id
// means something to its socket only, and dies with it.
type heldPacket struct {
	sock *queueSocket
	id   uint32
	mark uint32
	// parked: it waits in a holding queue. moving: it is on its way there,
	// and id is still that of the queue which it left.
	parked, moving bool
}

// moveWithin bounds how long a packet may be between two queues. The kernel
// drops it silently when the holding queue is full or has nobody.
const moveWithin = 2 * time.Second

// release sends the verdicts of flows whose answers were settled, in the order
// of their packets. A packet that arrives meanwhile waits and follows.
func (q *Queues) release(flows ...*inflight) {
	v := q.borrow()
	defer q.giveBack(v)
	for len(flows) > 0 {
		for _, f := range flows {
			f.shard.mu.Lock()
			v.held = append(v.held[:0], f.held...)
			f.held = f.held[:0]
			f.shard.mu.Unlock()
			for _, h := range v.held {
				v.path(h, f.path)
			}
		}
		v.flush()
		now := q.table.now()
		again := flows[:0]
		for _, f := range flows {
			f.shard.mu.Lock()
			switch {
			case f.stage == releasing && len(f.held) > 0:
				again = append(again, f)
			case f.stage == releasing:
				f.releasedLocked(now)
			}
			f.shard.mu.Unlock()
		}
		flows = again
	}
}

// move is a verdict of the sweeper: a packet and the queue that it goes to.
type move struct {
	heldPacket
	number uint16
}

// park moves the packets of a slow flow to its holding queue, so that the
// kernel's search for a verdict's packet in the fast queue, a walk from the
// oldest, stays short. Called with the shard's lock; the caller sends what is
// added to moves after it.
func (q *Queues) park(f *inflight, now time.Duration, moves []move) []move {
	if len(q.holding) == 0 || f.stage != judging {
		return moves
	}
	number := q.holding[int(f.packet.Src.Port())%len(q.holding)].number
	for i := range f.held {
		h := &f.held[i]
		if h.parked || h.moving {
			continue
		}
		h.moving = true
		f.moving++
		f.since = now
		moves = append(moves, move{*h, number})
	}
	return moves
}

// parked enters a packet that came out of a fast queue into a holding queue:
// the oldest of its flow that is on its way. False: nobody waits for it.
// release is the flow if this was the last packet that its answer waited for.
func (t *table) parked(tuple flow.Tuple, at heldPacket) (release *inflight, ok bool) {
	s := t.shard(tuple)
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.flows[tuple]
	if f == nil || f.moving == 0 {
		return nil, false
	}
	for i := range f.held {
		if f.held[i].moving {
			f.held[i] = at
			break
		}
	}
	f.moving--
	if f.moving == 0 && f.stage == settled {
		f.stage = releasing
		return f, true
	}
	return nil, true
}

// The sweeper's rhythm: fresh flows and answers at every tick, slow flows,
// which may be many, at every slowTicks-th.
const (
	sweepTick = 5 * time.Millisecond
	slowTicks = 8
)

// sweeper keeps its buffers between two sweeps.
type sweeper struct {
	q     *Queues
	v     *verdicts
	moves []move
	late  []*inflight
	// read: everything was read that was queued before.
	read time.Duration
}

// sweep looks for flows that are past something: their time in the fast
// queue, their deadline, the time to move, the grace of their answer.
func (w *sweeper) sweep(now time.Duration, slow bool) {
	w.read = w.q.read(now)
	for i := range w.q.table.shards {
		w.moves = w.moves[:0]
		w.sweepShard(&w.q.table.shards[i], now, slow)
		for _, m := range w.moves {
			w.v.requeue(m.heldPacket, m.number)
		}
		w.q.count.requeued.Add(uint64(len(w.moves))) // before anybody can see them elsewhere
		w.v.flush()
	}
	if len(w.late) > 0 {
		w.q.release(w.late...)
		w.late = w.late[:0]
	}
}

func (w *sweeper) sweepShard(s *shard, now time.Duration, slow bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for f := s.done.head; f != nil && (w.read-f.since > releasedGrace || now-f.since > releasedMost); f = s.done.head {
		f.forgetLocked()
	}
	for f := s.fresh.head; f != nil && now-f.born > w.q.cfg.HoldAfter; f = s.fresh.head {
		s.fresh.remove(f)
		s.slow.push(f)
		w.moves = w.q.park(f, now, w.moves)
	}
	if !slow {
		return
	}
	for f := s.slow.head; f != nil; {
		next := f.next
		if !w.overdue(f, now) {
			w.moves = w.q.park(f, now, w.moves)
		}
		f = next
	}
}

// overdue settles a flow that is past its deadline and forgets one whose
// packet never reached the holding queue.
func (w *sweeper) overdue(f *inflight, now time.Duration) bool {
	if f.moving > 0 && now-f.since > moveWithin {
		w.q.count.lost.Add(1)
		f.forgetLocked()
		return true
	}
	if f.stage != judging || f.dialling || now-f.born < w.q.cfg.DecideWithin {
		return false
	}
	w.q.count.late.Add(1)
	if release, _ := f.settleLocked(unanswered(f.open)); release {
		w.late = append(w.late, f)
	}
	return true
}

// unanswered is the path of a flow that user space could not judge: a
// fail-open rule lets it pass, every other drops it.
func unanswered(open bool) flow.Path {
	if open {
		return flow.Kernel
	}
	return flow.Drop
}

// sweepLoop sweeps while there is anything to sweep.
func (q *Queues) sweepLoop(stop <-chan struct{}) {
	w := &sweeper{q: q, v: newVerdicts(q.cfg.Marks, &q.count)}
	tick := time.NewTicker(sweepTick)
	defer tick.Stop()
	for {
		tick.Stop()
		select {
		case <-stop:
			return
		case <-q.table.kick:
		}
		tick.Reset(sweepTick)
		for n := 1; q.table.busy(); n++ {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			w.sweep(q.table.now(), n%slowTicks == 0)
		}
	}
}
