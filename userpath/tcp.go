package userpath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/flow"
)

const (
	// DefaultWaitForInitiator is how long an upstream connection stands
	// without its initiator's handshake.
	DefaultWaitForInitiator = 30 * time.Second
	// DefaultLinger is how long a connection whose filters have closed it may
	// take for its last bytes.
	DefaultLinger = 30 * time.Second
	// keepaliveAfter spares short flows the system calls of keepalive.
	keepaliveAfter = 10 * time.Second
	// sweepEvery is how often timers are looked at; they are not exact.
	sweepEvery = time.Second
)

// TCPConfig is what a TCP is made of. Zero fields take the default.
type TCPConfig struct {
	Marks flow.Marks
	Log   *zap.Logger
	// Port of the listeners on 127.0.0.1 and ::1; 0: one that is free.
	Port uint16
	// Steer makes sure, before a flow is carried, that its packets are led to
	// the sockets of the gateway. It is called for each flow, and its error
	// ends the flow. nil: they always are.
	Steer func() error
	// WaitForInitiator and Linger: see the defaults.
	WaitForInitiator, Linger time.Duration
	// Loops is the number of goroutines that carry bytes; the default is one
	// for each processor.
	Loops int
}

// TCPStats are counters since the start, but for Flows, which counts what is
// alive.
type TCPStats struct {
	Flows int
	// Unknown: accepted connections that no takeover was waiting for. They
	// were reset.
	Unknown uint64
	// Expired: upstream connections whose initiator never came.
	Expired uint64
	// AcceptErrors: connections that could not be accepted.
	AcceptErrors uint64
	// FilterFailures: data filters that returned an error or panicked.
	FilterFailures uint64
}

// TCP carries the TCP flows that were taken over:
//
//	initiator --TPROXY--> accepted socket == chain or splice == dialled socket --> far end
//
// A few loops carry the bytes of all flows that no data filter holds. Safe for
// concurrent use.
type TCP struct {
	cfg       TCPConfig
	log       *zap.Logger
	port      uint16
	listeners []*os.File
	loops     []*loop
	nextLoop  atomic.Uint32
	waiting   waitingTable
	asIfs     dialTable
	buffers   bufferPools
	now       func() time.Time

	mu       sync.RWMutex // a flow begins under RLock, the stop under Lock
	stopping atomic.Bool
	flows    sync.WaitGroup // until Ended was called

	stats struct {
		flows                                          atomic.Int64
		unknown, expired, acceptErrors, filterFailures atomic.Uint64
	}
}

// NewTCP opens the listeners, so that Port is known and nothing is lost
// between the first rule and Run. The caller runs Run, which closes them.
func NewTCP(cfg TCPConfig) (*TCP, error) {
	t, err := newTCP(cfg)
	if err != nil {
		return nil, err
	}
	if t.listeners, t.port, err = listenTransparent(cfg.Port); err != nil {
		t.closeLoops()
		return nil, fmt.Errorf("open the TCP listeners: %w", err)
	}
	return t, nil
}

// newTCP makes a TCP without listeners.
func newTCP(cfg TCPConfig) (*TCP, error) {
	if cfg.Log == nil {
		return nil, errors.New("make a TCP pump: no logger")
	}
	if cfg.Steer == nil {
		cfg.Steer = func() error { return nil }
	}
	if cfg.WaitForInitiator <= 0 {
		cfg.WaitForInitiator = DefaultWaitForInitiator
	}
	if cfg.Linger <= 0 {
		cfg.Linger = DefaultLinger
	}
	if cfg.Loops <= 0 {
		cfg.Loops = runtime.GOMAXPROCS(0)
	}
	t := &TCP{cfg: cfg, log: cfg.Log, now: time.Now}
	for range cfg.Loops {
		l, err := newLoop()
		if err != nil {
			t.closeLoops()
			return nil, err
		}
		t.loops = append(t.loops, l)
	}
	return t, nil
}

func (t *TCP) closeLoops() {
	for _, l := range t.loops {
		l.close()
	}
}

// Port is where TPROXY sends connections: on 127.0.0.1 and ::1.
func (t *TCP) Port() uint16 { return t.port }

// Stats is a snapshot.
func (t *TCP) Stats() TCPStats {
	return TCPStats{
		Flows: int(t.stats.flows.Load()), Unknown: t.stats.unknown.Load(), Expired: t.stats.expired.Load(),
		AcceptErrors: t.stats.acceptErrors.Load(), FilterFailures: t.stats.filterFailures.Load(),
	}
}

// Run carries flows until ctx is cancelled, then resets those that are left
// and returns when each of them has been reported. It runs once.
func (t *TCP) Run(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var tasks sync.WaitGroup
	var failed atomic.Pointer[error]
	broken := func(err error) {
		failed.CompareAndSwap(nil, &err)
		stop(err)
	}
	var reporters sync.WaitGroup
	for _, l := range t.loops {
		tasks.Go(func() { l.run(broken) })
		reporters.Go(l.reports.run)
	}
	for _, file := range t.listeners {
		tasks.Go(func() {
			if err := t.accept(file, t.accepted); err != nil {
				broken(err)
			}
		})
	}
	sweep := time.NewTicker(sweepEvery)
	defer sweep.Stop()
	for ctx.Err() == nil {
		select {
		case <-sweep.C:
			for _, l := range t.loops {
				l.post(func() { l.sweep(t) })
			}
		case <-ctx.Done():
		}
	}
	t.stop()
	tasks.Wait()
	t.flows.Wait()
	for _, l := range t.loops {
		l.reports.close()
	}
	reporters.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return nil
}

// stop begins the end: no new flow from now on, and the living ones are reset.
func (t *TCP) stop() {
	t.mu.Lock()
	t.stopping.Store(true)
	t.mu.Unlock()
	for _, file := range t.listeners {
		file.Close()
	}
	for _, l := range t.loops {
		l.post(func() {
			for _, f := range l.flows() {
				f.finish(flow.CutByPolicy, "the gateway stops")
			}
			l.quit = true
		})
	}
}

// begin makes a flow with the sockets that are there, -1: not yet, and a slot
// in a loop.
func (t *TCP) begin(job tcpJob, init, far int) (*tcpFlow, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if t.stopping.Load() {
		return nil, errStopping
	}
	f := new(tcpFlow)
	f.prepare(t, t.loops[t.nextLoop.Add(1)%uint32(len(t.loops))], job)
	f.ends[sideInit].fd, f.ends[sideFar].fd = init, far
	f.told = init >= 0
	f.shaken = f.shaken || f.told
	if job.within > 0 {
		f.dialBy = t.now().Add(job.within)
	}
	t.flows.Add(1)
	f.loop.enter(f)
	return f, nil
}

// accepted joins an initiator's connection with the one that waits for it.
func (t *TCP) accepted(fd int, from, to netip.AddrPort) {
	f := t.waiting.take(waitingKey{from, to})
	if f == nil {
		t.stats.unknown.Add(1)
		resetFD(fd)
		return
	}
	if !f.arrived(fd) {
		resetFD(fd)
	}
}

// waitingTable has the upstream connections that stand while their initiator's
// handshake is under way.
type waitingTable struct {
	mu sync.Mutex
	m  map[waitingKey]*tcpFlow
}

type waitingKey struct{ src, dst netip.AddrPort }

func (f *tcpFlow) key() waitingKey { return waitingKey{f.job.tuple.Src, f.job.tuple.Dst} }

// put adds a flow and gives back the one whose place it took.
func (w *waitingTable) put(f *tcpFlow) (old *tcpFlow) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.m == nil {
		w.m = make(map[waitingKey]*tcpFlow)
	}
	old = w.m[f.key()]
	w.m[f.key()] = f
	return old
}

// take gives the flow that waits under k to the caller alone.
func (w *waitingTable) take(k waitingKey) *tcpFlow {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.m[k]
	delete(w.m, k)
	return f
}

// remove takes exactly f out. False: somebody has taken it.
func (w *waitingTable) remove(f *tcpFlow) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.m[f.key()] != f {
		return false
	}
	delete(w.m, f.key())
	return true
}

// sweep does what can wait a second. Loop only.
func (l *loop) sweep(t *TCP) {
	now := t.now()
	for _, f := range l.flows() {
		f.mu.Lock()
		since := f.since
		f.mu.Unlock()
		switch age := now.Sub(since); {
		case since.IsZero():
			if !f.told && !f.dialBy.IsZero() && now.After(f.dialBy) {
				f.dialEnds(errDialTimeout)
			}
		case !f.carrying.Load():
			switch {
			case age <= t.cfg.WaitForInitiator:
			case f.job.joined:
				t.stats.expired.Add(1)
				f.finish(flow.TimedOut, "the client's connection was not joined to it")
			case t.waiting.remove(f):
				t.stats.expired.Add(1)
				f.finish(flow.TimedOut, "the initiator did not complete its handshake")
			}
		case !f.lingerBy.IsZero() && now.After(f.lingerBy):
			f.end(flow.Closed, "", false)
		case !f.kept && age > keepaliveAfter:
			f.kept = true
			if e := &f.ends[sideFar]; !e.gone {
				_ = setKeepalive(e.fd) // a flow without it works as well
			}
		}
	}
}
