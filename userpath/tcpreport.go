package userpath

import "sync"

// What the engine hears of flows comes from one goroutine for each loop, in
// order: the loop itself must not wait for a log, and a goroutine for each flow
// would cost more than all it has to say.

// report is one thing that the engine is told of a flow.
type report struct {
	f      *tcpFlow
	stands bool // both ends are there; else it is over
}

// reports is what waits to be told. Safe for concurrent use.
type reports struct {
	mu     sync.Mutex
	list   []report
	spare  []report // room for the next ones
	bell   chan struct{}
	closed bool // nothing more will come
}

func (r *reports) add(x report) {
	r.mu.Lock()
	r.list = append(r.list, x)
	first := len(r.list) == 1
	r.mu.Unlock()
	if first {
		wake(r.bell)
	}
}

// close ends run once it has told everything.
func (r *reports) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	wake(r.bell)
}

// run tells the engine until close.
func (r *reports) run() {
	for {
		r.mu.Lock()
		list, closed := r.list, r.closed
		r.list, r.spare = r.spare[:0], nil
		r.mu.Unlock()
		if len(list) == 0 && closed {
			return
		}
		for _, x := range list {
			x.tell()
		}
		clear(list)
		r.mu.Lock()
		r.spare = list[:0]
		empty := len(r.list) == 0 && !r.closed
		r.mu.Unlock()
		if empty {
			<-r.bell
		}
	}
}

func (x report) tell() {
	switch {
	case x.stands:
		x.f.job.Established()
	case x.f.chain != nil:
		go x.f.ended() // filters may take their time
	default:
		x.f.ended()
	}
}

// ended reports the end of a flow, that of its dial included.
func (f *tcpFlow) ended() {
	if f.chain != nil {
		f.chain.wait()
	}
	defer f.tcp.flows.Done()
	if f.dialErr == nil {
		f.job.Ended(f.counts(), f.result, f.reason)
		f.tcp.stats.flows.Add(-1)
		return
	}
	path := f.job.undialled(f.dialErr)
	if f.job.dialled != nil {
		f.job.dialled <- f.dialErr
		return
	}
	f.job.held.Answer(path)
	f.job.held.Release()
}
