package userpath

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// stage is where a flow under judgement stands:
//
//	judging --answer--> releasing --verdicts sent--> released --grace--> gone
//	   |                    ^
//	   +--answer--> settled-+        (settled: a packet is between two queues)
//
// and from every stage to gone when its packets were lost. In released the
// answer stays for those packets that were queued before the kernel had it.
type stage uint8

const (
	judging stage = iota
	settled
	releasing
	released
	gone
)

// An answer outlives its verdict: a packet that was on its way to the queue
// meanwhile gets the same answer and no new question. It does so for
// releasedGrace, and until everything was read that was queued then, which a
// busy machine may do late; but not for longer than releasedMost.
const (
	releasedGrace = 5 * time.Millisecond
	releasedMost  = 500 * time.Millisecond
)

// inflight is one flow under judgement: one decision for all of its packets.
// The table's shard lock guards everything below packet.
type inflight struct {
	packet flow.Packet
	shard  *shard
	open   bool // came by a fail-open queue
	born   time.Duration
	ctx    engine.Deadline
	queues *Queues // whose it is, once it is dialled or is answered later

	stage    stage
	dialling bool
	path     flow.Path
	since    time.Duration // of being moved, then of being released
	moving   int           // how many of held are between two queues
	held     []heldPacket  // in the order of their arrival
	first    [1]heldPacket // room for held: most flows are one packet
	dial     Dialling      // nil: none, or it has not begun

	in         *flowList
	next, prev *inflight
}

// flowList is a queue of flows, oldest first; a flow is in one at most.
type flowList struct{ head, tail *inflight }

func (l *flowList) push(f *inflight) {
	f.in, f.prev, f.next = l, l.tail, nil
	if l.tail != nil {
		l.tail.next = f
	} else {
		l.head = f
	}
	l.tail = f
}

func (l *flowList) remove(f *inflight) {
	if f.prev != nil {
		f.prev.next = f.next
	} else {
		l.head = f.next
	}
	if f.next != nil {
		f.next.prev = f.prev
	} else {
		l.tail = f.prev
	}
	f.in, f.prev, f.next = nil, nil, nil
}

// shards keep readers of several queues from waiting for each other.
const shards = 16

// table has the flows under judgement.
type table struct {
	shards [shards]shard
	// live counts the flows that wait for an answer.
	live atomic.Int64
	// entries counts the answered ones, too.
	entries atomic.Int64
	limit   int64
	start   time.Time
	// kick wakes the sweeper when there is something to sweep.
	kick chan struct{}
}

type shard struct {
	table *table
	mu    sync.Mutex
	flows map[flow.Tuple]*inflight
	// fresh flows have their packets in fast queues; slow ones were moved;
	// done ones are released.
	fresh, slow, done flowList
}

func newTable(limit int) *table {
	t := &table{limit: int64(limit), start: time.Now(), kick: make(chan struct{}, 1)}
	for i := range t.shards {
		t.shards[i].table = t
		t.shards[i].flows = make(map[flow.Tuple]*inflight)
	}
	return t
}

// now is monotonic and cheap to compare.
func (t *table) now() time.Duration { return time.Since(t.start) }

// shard picks by what differs most between flows: the low bits of both ends.
func (t *table) shard(tuple flow.Tuple) *shard {
	src, dst := tuple.Src.Addr().As16(), tuple.Dst.Addr().As16()
	h := tuple.Src.Port() ^ tuple.Dst.Port() ^ tuple.Src.Port()>>8 ^ uint16(src[15]) ^ uint16(dst[15])
	return &t.shards[(h^h>>4)%shards]
}

// knows says whether a flow is under judgement, or was a moment ago.
func (t *table) knows(tuple flow.Tuple) bool {
	if t.entries.Load() == 0 {
		return false
	}
	s := t.shard(tuple)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flows[tuple] != nil
}

// arrival is what became of a packet that came from a fast queue.
type arrival uint8

const (
	arrivalNew      arrival = iota // the first of its flow: ask
	arrivalHeld                    // waits with the others of its flow
	arrivalAbsorbed                // a retransmitted SYN: drop
	arrivalOverHeld                // one too many of its flow: drop
	arrivalAnswered                // its flow has an answer: the path that is returned
	arrivalFull                    // too many flows under judgement
)

// arrive enters a packet. The flow is returned for arrivalNew only.
func (t *table) arrive(p flow.Packet, h heldPacket, open bool, now time.Duration, maxHeld int) (*inflight, arrival, flow.Path) {
	s := t.shard(p.Tuple)
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.flows[p.Tuple]; f != nil {
		switch {
		case f.stage == released && (p.Proto != flow.TCP || !f.path.Carries()):
			return nil, arrivalAnswered, f.path
		case p.Proto == flow.TCP:
			return nil, arrivalAbsorbed, flow.Drop
		case len(f.held) >= maxHeld:
			return nil, arrivalOverHeld, flow.Drop
		}
		f.held = append(f.held, h)
		return nil, arrivalHeld, flow.Drop
	}
	if t.live.Load() >= t.limit {
		return nil, arrivalFull, flow.Drop
	}
	f := &inflight{packet: p, shard: s, open: open, born: now}
	f.held = append(f.first[:0], h)
	s.flows[p.Tuple] = f
	t.entries.Add(1)
	s.fresh.push(f)
	if t.live.Add(1) == 1 {
		t.wake()
	}
	return f, arrivalNew, flow.Drop
}

func (t *table) wake() {
	select {
	case t.kick <- struct{}{}:
	default:
	}
}

// settle records the answer to a flow. release says that the caller must
// release it now; late that nobody waits for the answer any more.
func (f *inflight) settle(p flow.Path) (release, late bool) {
	f.shard.mu.Lock()
	defer f.shard.mu.Unlock()
	return f.settleLocked(p)
}

func (f *inflight) settleLocked(p flow.Path) (release, late bool) {
	if f.stage != judging {
		return false, true
	}
	f.path = p
	if f.moving > 0 {
		f.stage = settled
		return false, false
	}
	f.stage = releasing
	return true, false
}

// waiting says whether anybody still waits for the answer to a flow.
func (f *inflight) waiting() bool {
	f.shard.mu.Lock()
	defer f.shard.mu.Unlock()
	return f.stage == judging
}

// startDial says that the flow waits for a dial from now on, and no more for
// its decision. False: it is too late.
func (f *inflight) startDial() bool {
	f.shard.mu.Lock()
	defer f.shard.mu.Unlock()
	if f.stage != judging {
		return false
	}
	f.dialling = true
	return true
}

// dials says which dial hears when the flow is forgotten. False: it is, and
// the caller tells it.
func (f *inflight) dials(d Dialling) bool {
	f.shard.mu.Lock()
	defer f.shard.mu.Unlock()
	if f.stage == judging {
		f.dial = d
	}
	return f.stage != gone
}

// forgetLocked ends a flow in any stage.
func (f *inflight) forgetLocked() {
	if f.stage == gone {
		return
	}
	if f.stage != released {
		f.shard.table.live.Add(-1)
	}
	f.stage = gone
	f.held, f.moving = nil, 0
	f.in.remove(f)
	delete(f.shard.flows, f.packet.Tuple)
	f.shard.table.entries.Add(-1)
	if f.dial != nil {
		f.dial.Lost()
		f.dial = nil
	}
}

// releasedLocked notes that the verdicts were sent.
func (f *inflight) releasedLocked(now time.Duration) {
	f.stage, f.since = released, now
	f.in.remove(f)
	f.shard.done.push(f)
	f.shard.table.live.Add(-1)
	f.dial = nil
}

// busy says whether any flow is there, answered ones included.
func (t *table) busy() bool {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		n := len(s.flows)
		s.mu.Unlock()
		if n > 0 {
			return true
		}
	}
	return false
}

// lost forgets the flows that hold a packet which match accepts: the packet
// is no longer in the kernel. It walks the whole table, for rare errors only.
func (t *table) lost(match func(heldPacket) bool) (n int) {
	for i := range t.shards {
		s := &t.shards[i]
		s.mu.Lock()
		for _, f := range s.flows {
			for _, h := range f.held {
				if match(h) {
					f.forgetLocked()
					n++
					break
				}
			}
		}
		s.mu.Unlock()
	}
	return n
}
