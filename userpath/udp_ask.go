package userpath

import (
	"context"
	"sync"
	"time"

	"github.com/sluicegw/sluice/flow"
)

const (
	// udpAskers bounds the calls of Decide at a time.
	udpAskers = 16
	// udpAsking bounds the tuples that are being asked about or were refused
	// a moment ago.
	udpAsking = 1024
	// udpHeld bounds the datagrams that wait for one answer.
	udpHeld = 16
	// udpRefusal is how long a refused tuple is not asked about again.
	udpRefusal = time.Second
	// udpAskLimit is the deadline of one answer.
	udpAskLimit = 5 * time.Second
)

// udpAsks asks again about flows that conntrack remembers and the pump does
// not: their datagrams come straight to the listener, past the queue.
//
//	unknown --(first datagram)--> waiting --(User)--> carried, forgotten here
//	                                      --(else)--> refused for udpRefusal
type udpAsks struct {
	u       *UDP
	pending chan udpKey
	// decide answers for a tuple: flow.User when the flow is carried again.
	// nil: nobody can be asked.
	decide func(context.Context, flow.Packet) flow.Path

	mu      sync.Mutex
	waiting map[udpKey]*udpWait
}

type udpWait struct {
	held    [][]byte
	refused time.Time // zero: no answer yet
}

func newUDPAsks(u *UDP) *udpAsks {
	a := &udpAsks{u: u, pending: make(chan udpKey, udpAsking), waiting: make(map[udpKey]*udpWait)}
	if u.config.Decide != nil {
		a.decide = u.decide
	}
	return a
}

// decide asks the engine and takes the flow over if it says so.
func (u *UDP) decide(ctx context.Context, p flow.Packet) flow.Path {
	d := u.config.Decide(ctx, p)
	switch {
	case d.Path != flow.User:
		return d.Path
	case d.Takeover == nil:
		return flow.Drop
	}
	return u.Takeover(ctx, d.Takeover)
}

// ask holds a copy of the datagram until the answer is there.
func (a *udpAsks) ask(key udpKey, data []byte) {
	if a.decide == nil {
		a.u.stats.noFlow.Add(1)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	w := a.waiting[key]
	if w != nil && !w.refused.IsZero() && time.Since(w.refused) > udpRefusal {
		delete(a.waiting, key)
		w = nil
	}
	switch {
	case w == nil && len(a.waiting) >= udpAsking:
		a.forgetRefused()
		fallthrough
	case w != nil && (!w.refused.IsZero() || len(w.held) >= udpHeld):
		a.u.stats.noFlow.Add(1)
		return
	case w == nil:
		select {
		case a.pending <- key:
		default:
			a.u.stats.noFlow.Add(1)
			return
		}
		w = &udpWait{}
		a.waiting[key] = w
	}
	w.held = append(w.held, append([]byte(nil), data...))
}

// forgetRefused makes room. The caller holds a.mu.
func (a *udpAsks) forgetRefused() {
	for key, w := range a.waiting {
		if !w.refused.IsZero() && time.Since(w.refused) > udpRefusal {
			delete(a.waiting, key)
		}
	}
}

// run answers until ctx is cancelled.
func (a *udpAsks) run(ctx context.Context) {
	var askers sync.WaitGroup
	for range udpAskers {
		askers.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case key := <-a.pending:
					a.answer(ctx, key)
				}
			}
		})
	}
	askers.Wait()
}

func (a *udpAsks) answer(ctx context.Context, key udpKey) {
	tuple := flow.Tuple{Proto: flow.UDP, Src: key.src, Dst: key.dst}
	path := flow.User
	if a.u.find(key) == nil {
		ctx, cancel := context.WithTimeout(ctx, udpAskLimit)
		defer cancel()
		path = a.decide(ctx, flow.Packet{Tuple: tuple, Mark: a.u.marks.Value(flow.User)})
	}
	f := a.u.find(key)
	a.mu.Lock()
	w := a.waiting[key]
	held := w.held
	if path == flow.User && f != nil {
		delete(a.waiting, key)
	} else {
		w.held, w.refused = nil, time.Now()
		f = nil
	}
	a.mu.Unlock()
	if f == nil {
		a.u.stats.noFlow.Add(uint64(len(held)))
		a.u.refuse(path, key, held[0])
		return
	}
	out := a.u.outs.Get().(*udpOut)
	for _, data := range held {
		a.u.carry(f, udpOutward, data, out, a.u.now())
	}
	out.flush()
	a.u.outs.Put(out)
}
