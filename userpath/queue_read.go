package userpath

import (
	"context"
	"errors"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// synFlags are the TCP flags that tell the first segment of a connection from
// all others: of them it has SYN alone (RFC 9293, 3.5).
const synFlags = flow.FlagFIN | flow.FlagSYN | flow.FlagRST | flow.FlagACK

// Backoff of reopening a queue that was lost.
const (
	reopenFirst = 20 * time.Millisecond
	reopenMost  = time.Second
)

// run reads the queue until ctx is cancelled and takes it again whenever it
// is lost.
func (x *queue) run(ctx context.Context) {
	log := x.q.cfg.Logger.With(zap.Uint16("queue", x.number))
	for ctx.Err() == nil {
		s := x.sock.Load()
		err := newReader(x, s).loop()
		s.close()
		x.q.table.lost(func(h heldPacket) bool { return h.sock == s })
		if ctx.Err() != nil {
			return
		}
		log.Error("queue lost, taking it again", zap.Error(err))
		if !x.reopen(ctx) {
			return
		}
		x.q.count.reopened.Add(1)
		log.Info("queue taken again")
	}
}

// reopen tries until it has the queue; false if ctx was cancelled before.
func (x *queue) reopen(ctx context.Context) bool {
	for wait := reopenFirst; x.open() != nil; wait = min(2*wait, reopenMost) {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(wait):
		}
	}
	if ctx.Err() != nil {
		x.sock.Load().close() // Run may have closed the one before
		return false
	}
	return true
}

// reader is what one goroutine needs to read one socket of a queue.
type reader struct {
	x     *queue
	q     *Queues
	sock  *queueSocket
	recv  *receiver
	v     *verdicts
	batch *batch
	now   time.Duration
}

func newReader(x *queue, s *queueSocket) *reader {
	r := &reader{x: x, q: x.q, sock: s, recv: newReceiver(s, &x.reading), v: newVerdicts(x.q.cfg.Marks, &x.q.count)}
	// What is in a holding queue has a flow of its own to answer it.
	r.v.reader = x.kind != holdingQueue
	return r
}

// loop reads until the socket is closed. It never waits for anything but
// packets.
func (r *reader) loop() error {
	r.x.reading.Store(true)
	r.now = r.q.table.now()
	for _, b := range r.sock.early {
		r.datagram(b)
	}
	r.sock.early = nil
	r.finish()
	for {
		if err := r.recv.receive(); err != nil {
			if errors.Is(err, unix.ENOBUFS) {
				r.q.count.noBuffers.Add(1)
				continue
			}
			return err
		}
		r.now = r.q.table.now()
		for i := range r.recv.n {
			r.datagram(r.recv.message(i))
		}
		r.finish()
		if r.recv.n < drainMax { // that was all
			r.x.read.Store(int64(r.recv.began.Sub(r.q.table.start)))
		}
	}
}

// read is a time not after now: every packet that was queued before it is in
// the table.
func (q *Queues) read(now time.Duration) time.Duration {
	least := now
	for _, x := range q.queues {
		if x.kind == holdingQueue {
			continue
		}
		// In this order: the reader says that it reads before it takes.
		if !x.sock.Load().readable() && !x.reading.Load() {
			continue
		}
		least = min(least, time.Duration(x.read.Load()))
	}
	return least
}

// finish ends a drain: new flows go to the pool, quick verdicts to the kernel.
func (r *reader) finish() {
	if r.batch != nil {
		b := r.batch
		r.batch = nil
		r.q.pool.hand(b)
	}
	r.v.flush()
}

func (r *reader) datagram(b []byte) {
	if b == nil {
		r.sock.held.Add(1) // whatever was cut off has no answer
		return
	}
	for {
		kind, _, body, rest, ok := netlinkMessage(b)
		if !ok {
			return
		}
		switch kind {
		case nfqMsgPacket:
			r.packet(body)
		case unix.NLMSG_ERROR:
			r.refused(body)
		}
		b = rest
	}
}

// refused handles a verdict that the kernel did not take. ENOENT is a packet
// that is gone: its queue was flushed, or its chain was deleted.
func (r *reader) refused(body []byte) {
	e, ok := parseNetlinkError(body)
	if !ok || e.errno == 0 {
		return
	}
	if e.errno != unix.ENOENT {
		r.q.count.refused.Add(1)
		return
	}
	r.q.count.gone.Add(1)
	if e.verdict {
		r.q.table.lost(func(h heldPacket) bool { return h.sock == r.sock && h.id == e.id })
	}
}

// packet enters one packet of the queue.
func (r *reader) packet(body []byte) {
	r.q.count.packets.Add(1)
	m, ok := parseQueued(body)
	h := heldPacket{sock: r.sock, id: m.id, mark: m.mark}
	if !ok {
		r.q.count.malformed.Add(1)
		r.sock.held.Add(1) // without an id there is nothing to answer
		return
	}
	tuple, flags, ok := flow.ParsePacket(m.payload)
	opens := tuple.Proto != flow.TCP || flags&synFlags == flow.FlagSYN
	if !ok || !opens && !r.q.cfg.Segments {
		r.q.count.malformed.Add(1)
		r.v.drop(h)
		return
	}
	if r.x.kind == holdingQueue {
		r.parked(tuple, h)
		return
	}
	p := flow.Packet{Tuple: tuple, Mark: m.mark, InIface: r.q.cfg.IfaceName(int(m.inDev))}
	open := r.x.kind == openQueue
	// Most flows end here: no filter hears of them, and waking a worker would
	// cost more than their decision. Nothing is kept of them; a packet that was
	// queued behind the first is decided alike.
	if r.q.cfg.DecideNow != nil && !r.q.table.knows(tuple) {
		if path, ok := r.q.cfg.DecideNow(p); ok {
			r.q.count.decisions.Add(1)
			r.v.path(h, path)
			return
		}
	}
	if !opens {
		r.v.drop(h)
		return
	}
	r.sock.held.Add(1) // before anybody can answer it
	f, what, path := r.q.table.arrive(p, h, open, r.now, r.q.cfg.MaxHeld)
	if what != arrivalNew && what != arrivalHeld {
		r.sock.held.Add(-1)
	}
	switch what {
	case arrivalNew:
		f.queues = r.q
		if r.q.cfg.DecideLater == nil || !r.q.cfg.DecideLater(p, (*later)(f)) {
			r.ask(f)
		}
	case arrivalHeld:
		r.q.count.held.Add(1)
	case arrivalAnswered:
		r.v.path(h, path)
	case arrivalAbsorbed:
		r.q.count.absorbed.Add(1)
		r.v.drop(h)
	case arrivalOverHeld:
		r.q.count.overHeld.Add(1)
		r.v.drop(h)
	case arrivalFull:
		r.q.count.overload.Add(1)
		r.v.path(h, unanswered(open))
	}
}

// ask puts a new flow among those that go to the pool with this drain.
func (r *reader) ask(f *inflight) {
	if r.batch == nil {
		r.batch = r.q.newBatch()
	}
	r.batch.jobs[r.batch.n] = f
	r.batch.n++
	if r.batch.n == drainMax {
		r.q.pool.hand(r.batch)
		r.batch = nil
	}
}

// parked matches a packet that came out of a fast queue to its flow.
func (r *reader) parked(tuple flow.Tuple, h heldPacket) {
	h.parked = true
	f, ok := r.q.table.parked(tuple, h)
	switch {
	case !ok:
		r.v.drop(h)
	case f != nil:
		r.q.release(f)
	}
}
