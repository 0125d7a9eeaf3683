package userpath

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// QueueConfig is what Queues are made of. Zero values of the numbers below
// IfaceName have defaults.
type QueueConfig struct {
	// First and Number are the queues of rules that fail closed.
	First  uint16
	Number int
	// FirstOpen and NumberOpen are the queues of rules that fail open: when
	// such a queue is full the kernel lets packets pass.
	FirstOpen  uint16
	NumberOpen int
	// FirstHolding and NumberHolding are the queues where packets wait for
	// slow answers. No rule leads there. None: they wait where they are.
	FirstHolding  uint16
	NumberHolding int

	Marks  flow.Marks
	Logger *zap.Logger
	// Decide judges a first packet. It runs on a pool and may block until its
	// context's deadline; after it the flow is dropped and a late answer
	// counts for nothing (a late takeover is ended).
	Decide func(context.Context, flow.Packet) engine.Decision
	// DecideNow judges a first packet where it is read, if that can be done
	// without waiting; what is not ok goes to Decide. nil: everything does.
	DecideNow func(flow.Packet) (path flow.Path, ok bool)
	// DecideLater judges what DecideNow does not, if that takes the kernel's word
	// alone: it does not wait, and the answer comes when it is there. false: it is
	// Decide's. nil: everything is.
	DecideLater func(flow.Packet, engine.Waiting) (ok bool)
	// Segments is for rules that queue every packet of a flow: then TCP segments
	// that do not open a connection are shown to DecideNow, too, and dropped if
	// it has no answer. Else they are dropped at once.
	Segments  bool
	Takeovers Takeovers
	// IfaceName names the interface of an index; it must be quick.
	IfaceName func(index int) string

	// Length is how many packets may wait in each queue (4096).
	Length uint32
	// MaxFlows bounds the flows under judgement (65536), MaxHeld the packets
	// held for one (64), MaxDials the pending dials (16384), Workers the
	// decisions at a time (1024).
	MaxFlows, MaxHeld, MaxDials, Workers int
	// DecideWithin is the deadline of a decision (800 ms: a client repeats
	// its SYN after 1 s, RFC 6298), DialWithin that of a dial (60 s).
	DecideWithin, DialWithin time.Duration
	// HoldAfter is how long a packet may stay in its fast queue (20 ms).
	HoldAfter time.Duration
	// WatchEvery is the rhythm of the watchdog (500 ms).
	WatchEvery time.Duration
}

func orDefault[T int | uint32 | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

func (c *QueueConfig) check() error {
	if c.Logger == nil || c.Decide == nil || c.Takeovers == nil || c.Number+c.NumberOpen == 0 {
		return errors.New("incomplete configuration")
	}
	if c.IfaceName == nil {
		c.IfaceName = func(int) string { return "" }
	}
	taken := make(map[int]bool)
	for _, r := range [][2]int{{int(c.First), c.Number}, {int(c.FirstOpen), c.NumberOpen}, {int(c.FirstHolding), c.NumberHolding}} {
		for n := r[0]; n < r[0]+r[1]; n++ {
			if n > 65535 || taken[n] {
				return fmt.Errorf("queue %d is named twice or out of range", n)
			}
			taken[n] = true
		}
	}
	orDefault(&c.Length, 4096)
	orDefault(&c.MaxFlows, 65536)
	orDefault(&c.MaxHeld, 64)
	orDefault(&c.MaxDials, 16384)
	orDefault(&c.Workers, 1024)
	orDefault(&c.DecideWithin, 800*time.Millisecond)
	orDefault(&c.DialWithin, 60*time.Second)
	orDefault(&c.HoldAfter, 20*time.Millisecond)
	orDefault(&c.WatchEvery, 500*time.Millisecond)
	return nil
}

// Queues are where first packets enter user space: they are held, judged once
// a flow, and released with a verdict and a mark. Safe for concurrent use.
type Queues struct {
	cfg      QueueConfig
	count    counters
	table    *table
	pool     pool
	batches  sync.Pool
	verdicts sync.Pool
	queues   []*queue
	holding  []*queue
	netns    *os.File // nil: the process's own
	proc     *os.File // the kernel's own account of the queues; may be nil

	// abandon ends a takeover that nobody dials.
	abandon func(t *engine.Takeover, reason string)

	ctx      context.Context // of Run
	dials    atomic.Int64
	dialling sync.WaitGroup
	answered answered
}

// queueKind says what a queue is for.
type queueKind uint8

const (
	closedQueue queueKind = iota
	openQueue
	holdingQueue
)

// queue is one queue of the kernel; its socket is replaced when it dies.
type queue struct {
	q      *Queues
	number uint16
	kind   queueKind
	sock   atomic.Pointer[queueSocket]
	state  queueState // of the watchdog

	reading atomic.Bool  // packets may be between the socket and the table
	read    atomic.Int64 // table time before which all packets are in the table
}

// OpenQueues takes the queues, in the network namespace of the calling
// thread. From then on packets wait for Run. Close or Run gives them up.
func OpenQueues(c QueueConfig) (*Queues, error) {
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("open queues: %w", err)
	}
	q := &Queues{cfg: c, table: newTable(c.MaxFlows), ctx: context.Background()}
	q.abandon = func(t *engine.Takeover, reason string) { t.Ended(flow.Counts{}, flow.Failed, reason) }
	q.answered.kick = make(chan struct{}, 1)
	q.pool = pool{limit: c.Workers, refuse: q.refuse}
	if err := q.findNamespace(); err != nil {
		return nil, fmt.Errorf("open queues: %w", err)
	}
	q.add(c.First, c.Number, closedQueue)
	q.add(c.FirstOpen, c.NumberOpen, openQueue)
	q.add(c.FirstHolding, c.NumberHolding, holdingQueue)
	for _, x := range q.queues {
		if err := x.open(); err != nil {
			q.Close()
			return nil, err
		}
		if x.kind == holdingQueue {
			q.holding = append(q.holding, x)
		}
	}
	return q, nil
}

func (q *Queues) add(first uint16, n int, kind queueKind) {
	for i := range n {
		q.queues = append(q.queues, &queue{q: q, number: first + uint16(i), kind: kind})
	}
}

// findNamespace remembers the calling thread's namespace if it is another
// than the process's, and opens the kernel's account of the queues there.
func (q *Queues) findNamespace() error {
	const own, mine = "/proc/self/ns/net", "/proc/thread-self/ns/net"
	a, err := os.Stat(own)
	if err != nil {
		return err
	}
	b, err := os.Stat(mine)
	if err != nil {
		return err
	}
	if !os.SameFile(a, b) {
		if q.netns, err = os.Open(mine); err != nil {
			return err
		}
	}
	const account = "/proc/thread-self/net/netfilter/nfnetlink_queue"
	if q.proc, err = os.Open(account); err != nil {
		q.cfg.Logger.Warn("the watchdog of the queues is blind", zap.Error(err))
	}
	return nil
}

// open takes the queue with a new socket.
func (x *queue) open() error {
	length, flags, netns := x.q.cfg.Length, uint32(0), 0
	switch x.kind {
	case openQueue:
		flags = nfqFlagFailOpen
	case holdingQueue:
		length = max(length, uint32(x.q.cfg.MaxDials))
	}
	if x.q.netns != nil {
		netns = int(x.q.netns.Fd())
	}
	s, err := openQueueSocket(x.number, length, flags, netns)
	if err != nil {
		return err
	}
	x.sock.Store(s)
	return nil
}

// Close gives the queues up without Run; the kernel drops what waits in them.
func (q *Queues) Close() {
	for _, x := range q.queues {
		if s := x.sock.Load(); s != nil {
			s.close()
		}
	}
	if q.netns != nil {
		_ = q.netns.Close()
	}
	if q.proc != nil {
		_ = q.proc.Close()
	}
}

// stopWithin bounds the wait for filters and dials that do not heed their
// context.
const stopWithin = time.Second

// Run reads the queues until ctx is cancelled, and once only. Then the queues
// are given up: held packets are dropped, decisions and dials are cancelled.
func (q *Queues) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	q.ctx = ctx
	var loops sync.WaitGroup
	for _, x := range q.queues {
		loops.Go(func() { x.run(ctx) })
	}
	loops.Go(func() { q.sweepLoop(ctx.Done()) })
	loops.Go(func() { q.watchLoop(ctx.Done()) })
	loops.Go(func() { q.releaseLoop(ctx.Done()) })
	<-ctx.Done()
	for _, x := range q.queues {
		x.sock.Load().close()
	}
	loops.Wait()
	q.pool.stop()
	q.table.lost(func(heldPacket) bool { return true })
	q.Close()
	done := make(chan struct{})
	go func() {
		q.pool.wg.Wait()
		q.dialling.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(stopWithin):
		q.cfg.Logger.Warn("decisions or dials did not end with the queues")
	}
	return nil
}

// refuse answers the flows of a batch that nobody can judge now.
func (q *Queues) refuse(b *batch) {
	for _, f := range b.jobs[:b.n] {
		q.count.overload.Add(1)
		if release, _ := f.settle(unanswered(f.open)); release {
			q.release(f)
		}
	}
}

func (q *Queues) borrow() *verdicts {
	if v, ok := q.verdicts.Get().(*verdicts); ok {
		return v
	}
	return newVerdicts(q.cfg.Marks, &q.count)
}

func (q *Queues) giveBack(v *verdicts) { q.verdicts.Put(v) }
