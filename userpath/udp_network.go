package userpath

import (
	"sync"
	"time"

	"github.com/sluicegw/sluice/filterapi"
)

// udpTurn is how long a datagram may wait for those that follow it, if its
// filter does not come back for them.
const udpTurn = time.Millisecond

// udpNetwork is an end of a chain: a way out of the gateway.
//
// A system call for each datagram costs more than a filter does. So what a
// filter sends while more waits for it to be received stays here, and leaves in
// one call with what follows: when the filter has received the last one that
// waited and sends again or asks for more, when udpBatchLen are here, or after
// udpTurn. A datagram that comes alone leaves at once. The order is that of the
// sends.
type udpNetwork struct {
	u    *UDP
	f    *udpFlow
	dir  udpDirection
	feed *udpLink // what waits for the filter that sends here

	mu      sync.Mutex // the calls under it do not wait
	waiting []*filterapi.Buffer
	armed   bool // timer is set
	timer   *time.Timer
}

// feedBy says what waits for the filter that sends here.
func (n *udpNetwork) feedBy(l *udpLink) { n.feed, l.end = l, n }

func (n *udpNetwork) push(b *filterapi.Buffer) {
	n.f.last.Store(n.u.now()) // a filter may have begun it
	n.mu.Lock()
	defer n.mu.Unlock()
	n.waiting = append(n.waiting, b)
	if n.feed.more.Load() && len(n.waiting) < udpBatchLen {
		n.arm()
		return
	}
	n.leave()
}

// arm has the timer send what waits. The caller holds mu.
func (n *udpNetwork) arm() {
	switch {
	case n.armed:
		return
	case n.timer == nil:
		n.timer = time.AfterFunc(udpTurn, func() {
			n.mu.Lock()
			defer n.mu.Unlock()
			n.armed = false
			n.leave()
		})
	default:
		n.timer.Reset(udpTurn)
	}
	n.armed = true
}

// flush sends what waits.
func (n *udpNetwork) flush() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.leave()
}

// leave sends what waits, unless the flow was killed. The caller holds mu.
func (n *udpNetwork) leave() {
	if len(n.waiting) == 0 {
		return
	}
	if !n.f.killed() {
		out := n.u.outs.Get().(*udpOut)
		for _, b := range n.waiting {
			out.add(n.f, n.dir, b.Data)
		}
		out.flush()
		n.u.outs.Put(out)
	}
	for i, b := range n.waiting {
		n.waiting[i] = nil
		b.Release()
	}
	n.waiting = n.waiting[:0]
}

// shut does nothing: UDP has no way to say it.
func (n *udpNetwork) shut() {}
