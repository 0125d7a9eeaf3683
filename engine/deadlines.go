package engine

import (
	"sync"
	"time"
)

// deadlines are when permissions that wait expire: one heap and one timer for
// all of them, because a timer for each would take more room than the
// permission. Its lock is taken after that of a permission, never before.
type deadlines struct {
	now   func() time.Time
	over  func(*permission) // on a goroutine of its own
	epoch time.Time         // from which the times count that no setting of the clock moves

	mu    sync.Mutex
	heap  []deadline // the first is the next one
	timer *time.Timer
	wakes int64 // when the timer fires, while there is a deadline
}

// deadline is in nanoseconds since the epoch.
type deadline struct {
	at int64
	p  *permission
}

func (d *deadlines) init(now func() time.Time, over func(*permission)) {
	d.now, d.over, d.epoch = now, over, now()
}

// in is the time after a while, as deadline.at.
func (d *deadlines) in(after time.Duration) int64 { return int64(d.now().Sub(d.epoch) + after) }

// time is the time of a deadline.
func (d *deadlines) time(at int64) time.Time { return d.epoch.Add(time.Duration(at)) }

// start gives a permission a deadline, instead of the one that it has.
func (d *deadlines) start(p *permission, at int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p.due == 0 {
		d.heap = append(d.heap, deadline{})
		p.due = int32(len(d.heap))
	}
	d.place(int(p.due)-1, deadline{at, p})
	d.arm()
}

// stop takes the deadline of a permission away; one without a deadline has none.
func (d *deadlines) stop(p *permission) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if p.due != 0 {
		d.remove(int(p.due) - 1)
	}
}

// has says whether a permission has a deadline.
func (d *deadlines) has(p *permission) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return p.due != 0
}

// arm sets the timer if it would fire too late. One that fires too early finds
// nothing to do. mu is held.
func (d *deadlines) arm() {
	if len(d.heap) == 0 {
		return
	}
	next := d.heap[0].at
	wait := time.Duration(next - d.in(0))
	switch {
	case d.timer == nil:
		d.timer = time.AfterFunc(wait, d.fire)
	case d.wakes == 0 || next < d.wakes:
		d.timer.Reset(wait)
	default:
		return
	}
	d.wakes = next
}

// fire ends what is due.
func (d *deadlines) fire() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.wakes = 0
	for now := d.in(0); len(d.heap) > 0 && d.heap[0].at <= now; {
		p := d.heap[0].p
		d.remove(0)
		go d.over(p)
	}
	d.arm()
}

// remove takes deadline i out of the heap. mu is held.
func (d *deadlines) remove(i int) {
	d.heap[i].p.due = 0
	last := len(d.heap) - 1
	moved := d.heap[last]
	d.heap[last] = deadline{}
	if d.heap = d.heap[:last]; i < last {
		d.place(i, moved)
	}
}

// place puts a deadline where position i is free, and moves others until the
// first of three is always the earliest. mu is held.
func (d *deadlines) place(i int, x deadline) {
	put := func(i int, x deadline) {
		d.heap[i] = x
		x.p.due = int32(i + 1)
	}
	for up := (i - 1) / 2; i > 0 && x.at < d.heap[up].at; up = (i - 1) / 2 {
		put(i, d.heap[up])
		i = up
	}
	for down := 2*i + 1; down < len(d.heap); down = 2*i + 1 {
		if down+1 < len(d.heap) && d.heap[down+1].at < d.heap[down].at {
			down++
		}
		if d.heap[down].at >= x.at {
			break
		}
		put(i, d.heap[down])
		i = down
	}
	put(i, x)
}
