package nat

import "time"

// tick is the unit in which the ends of quarantines are kept: they fit into 32
// bits for 13 years of running.
const tick = 100 * time.Millisecond

// ticks is the time, rounded down; never 0.
func (a *Allocator) ticks() uint32 { return uint32(a.c.Now().Sub(a.epoch)/tick) + 1 }

// deadline is a time to come, rounded up.
func (a *Allocator) deadline(in time.Duration) uint32 {
	return uint32((a.c.Now().Sub(a.epoch)+in+tick-1)/tick) + 1
}

// wake frees the ports whose rest is over. a.mu is held.
func (a *Allocator) wake() {
	if a.due.n == 0 {
		return
	}
	now := a.ticks()
	for {
		x, ok := a.due.first()
		if !ok || x.until > now {
			break
		}
		a.due.pop()
		if h, held := x.s.ports[x.port]; held && h.resting() && h.rests == x.until {
			a.free(x.s, x.port, h)
		}
	}
	if a.due.n > a.due.bound {
		a.tidy()
	}
}

// tidy drops from the queue what was leased and returned again since: it is
// there with its later time.
func (a *Allocator) tidy() {
	var kept dueQueue
	for x, ok := a.due.first(); ok; x, ok = a.due.first() {
		a.due.pop()
		if h, held := x.s.ports[x.port]; held && h.rests == x.until {
			kept.push(x)
		}
	}
	kept.bound = 2*kept.n + minDue
	a.due = kept
}

// dueAt is a port and the tick until which it rests.
type dueAt struct {
	s     *space
	port  uint16
	until uint32
}

// dueQueue has the ports in the order of their ends: all rest equally long. It
// is a list of pieces, so that it is as long as what is in it.
type dueQueue struct {
	head, tail *duePiece
	n, bound   int
}

const (
	pieceLen = 255
	minDue   = 4096
)

type duePiece struct {
	next     *duePiece
	from, to int
	list     [pieceLen]dueAt
}

func (q *dueQueue) push(x dueAt) {
	if q.tail == nil || q.tail.to == pieceLen {
		p := new(duePiece)
		if q.tail == nil {
			q.head = p
		} else {
			q.tail.next = p
		}
		q.tail = p
	}
	q.tail.list[q.tail.to] = x
	q.tail.to++
	q.n++
	q.bound = max(q.bound, minDue)
}

func (q *dueQueue) first() (dueAt, bool) {
	if q.n == 0 {
		return dueAt{}, false
	}
	return q.head.list[q.head.from], true
}

func (q *dueQueue) pop() {
	q.n--
	if q.head.from++; q.head.from < q.head.to {
		return
	}
	if q.head = q.head.next; q.head == nil {
		q.tail = nil
	}
}
