package userpath

import (
	"sync"
	"sync/atomic"
	"time"
)

// lateAfter is how long one worker may take for a flow before what is left of its
// batch goes to others: a filter that thinks must not delay its neighbours.
const lateAfter = 500 * time.Microsecond

// answersWait is how long the answers of a batch may wait for each other.
const answersWait = 250 * time.Microsecond

// maxBacklog bounds the batches that wait because every worker is busy.
const maxBacklog = 4096

// batch is the new flows of one drain. It goes to a worker whole, because
// waking a goroutine for each flow costs more than most decisions.
type batch struct {
	q    *Queues
	jobs [drainMax]*inflight
	n    int
	next atomic.Int32
	// refs counts who may still touch the batch: its worker and its timer.
	refs  atomic.Int32
	timer *time.Timer
	seen  int32 // next, when the timer came the last time

	mu       sync.Mutex
	answered []*inflight
}

func (q *Queues) newBatch() *batch {
	b, ok := q.batches.Get().(*batch)
	if !ok {
		b = &batch{q: q, answered: make([]*inflight, 0, drainMax)}
		b.timer = time.AfterFunc(time.Hour, b.overtake)
		b.timer.Stop()
	}
	return b
}

func (b *batch) unref(n int32) {
	if b.refs.Add(-n) > 0 {
		return
	}
	clear(b.jobs[:b.n])
	b.n = 0
	b.next.Store(0)
	b.q.batches.Put(b)
}

// take gives the next flow of the batch, nil after the last.
func (b *batch) take() *inflight {
	if i := int(b.next.Add(1)) - 1; i < b.n {
		return b.jobs[i]
	}
	return nil
}

// run judges the flows of the batch and releases them together, unless that takes
// long.
func (b *batch) run() {
	b.refs.Store(2)
	b.seen = 0
	if b.n > 1 {
		b.timer.Reset(lateAfter)
	}
	from := b.q.table.now()
	for f := b.take(); f != nil; f = b.take() {
		if !b.q.judge(f) {
			continue
		}
		b.mu.Lock()
		b.answered = append(b.answered, f)
		b.mu.Unlock()
		if now := b.q.table.now(); now-from > answersWait {
			from = now
			b.send()
		}
	}
	b.send()
	if b.n == 1 || b.timer.Stop() {
		b.unref(2) // the timer will not come
	} else {
		b.unref(1)
	}
}

// send releases the flows that were answered so far.
func (b *batch) send() {
	b.mu.Lock()
	list := b.answered
	b.answered = nil
	b.mu.Unlock()
	if len(list) == 0 {
		return
	}
	b.q.release(list...)
	clear(list)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.answered == nil {
		b.answered = list[:0]
	}
}

// overtake runs every lateAfter while a worker has the batch. If that is still at
// the same flow, the answers so far go out, and each flow that is left gets a
// worker of its own.
func (b *batch) overtake() {
	if next := b.next.Load(); next != b.seen && int(next) < b.n {
		b.seen = next
		b.timer.Reset(lateAfter)
		return
	}
	for f := b.take(); f != nil; f = b.take() {
		one := b.q.newBatch()
		one.jobs[0], one.n = f, 1
		b.q.pool.hand(one)
	}
	b.send()
	b.unref(1)
}

// pool runs batches on goroutines that it starts on demand and keeps.
type pool struct {
	limit int
	// refuse takes the batches that found every worker busy and the backlog
	// full.
	refuse func(*batch)
	wg     sync.WaitGroup

	mu      sync.Mutex
	stopped bool
	workers int
	idle    []chan *batch // the last to become idle is the first to be used: its stack is warm
	backlog []*batch
}

// hand gives a batch away. It never waits.
func (p *pool) hand(b *batch) {
	p.mu.Lock()
	switch n := len(p.idle); {
	case n > 0 && !p.stopped:
		w := p.idle[n-1]
		p.idle = p.idle[:n-1]
		p.mu.Unlock()
		w <- b // has room: an idle worker's channel is empty
	case p.workers < p.limit && !p.stopped:
		p.workers++
		p.wg.Add(1)
		p.mu.Unlock()
		go p.work(b)
	case len(p.backlog) < maxBacklog && !p.stopped:
		p.backlog = append(p.backlog, b)
		p.mu.Unlock()
	default:
		p.mu.Unlock()
		p.refuse(b)
	}
}

func (p *pool) work(b *batch) {
	defer p.wg.Done()
	mine := make(chan *batch, 1)
	for b != nil {
		b.run()
		b = p.await(mine)
	}
}

// await gives a worker its next batch; nil ends it.
func (p *pool) await(mine chan *batch) *batch {
	p.mu.Lock()
	if p.stopped {
		p.mu.Unlock()
		return nil
	}
	if len(p.backlog) > 0 {
		b := p.backlog[0]
		p.backlog[0] = nil
		p.backlog = p.backlog[1:]
		p.mu.Unlock()
		return b
	}
	p.idle = append(p.idle, mine)
	p.mu.Unlock()
	return <-mine
}

// stop ends the idle workers at once and the busy ones after their batch.
func (p *pool) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stopped = true
	for _, w := range p.idle {
		close(w)
	}
	p.idle = nil
	p.backlog = nil
}
