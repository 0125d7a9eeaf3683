package userpath

import (
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
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
	spare   []*filterapi.Buffer // room for the next ones
	armed   bool                // timer is set
	timer   *time.Timer
}

// feedBy says what waits for the filter that sends here.
func (n *udpNetwork) feedBy(l *udpLink) { n.feed, l.end = l, n }

func (n *udpNetwork) push(b *filterapi.Buffer) {
	n.f.last.Store(n.u.now()) // a filter may have begun it
	n.mu.Lock()
	n.waiting = append(n.waiting, b)
	var sent []*filterapi.Buffer
	if n.feed.more.Load() && len(n.waiting) < udpBatchLen {
		n.arm()
	} else {
		sent = n.leave()
	}
	n.mu.Unlock()
	n.giveBack(sent)
}

// arm has the timer send what waits. The caller holds mu.
func (n *udpNetwork) arm() {
	switch {
	case n.armed:
		return
	case n.timer == nil:
		n.timer = time.AfterFunc(udpTurn, n.turn)
	default:
		n.timer.Reset(udpTurn)
	}
	n.armed = true
}

// turn sends what has waited long enough. It runs on the timer's goroutine,
// where nobody else catches what a filter's function throws.
func (n *udpNetwork) turn() {
	defer func() {
		if r := recover(); r != nil {
			n.u.log.Error("panic where a data filter's buffer is released", zap.Stringer("flow", n.f.tuple), zap.Any("panic", r),
				zap.ByteString("stack", debug.Stack()))
			n.u.end(n.f, flow.Failed, fmt.Sprintf("panic: %v", r))
		}
	}()
	n.mu.Lock()
	n.armed = false
	sent := n.leave()
	n.mu.Unlock()
	n.giveBack(sent)
}

// flush sends what waits.
func (n *udpNetwork) flush() {
	n.mu.Lock()
	sent := n.leave()
	n.mu.Unlock()
	n.giveBack(sent)
}

// leave sends what waits, unless the flow was killed, and hands it over for
// giveBack. The caller holds mu.
func (n *udpNetwork) leave() (sent []*filterapi.Buffer) {
	if len(n.waiting) == 0 {
		return nil
	}
	if !n.f.killed() {
		out := n.u.outs.Get().(*udpOut)
		for _, b := range n.waiting {
			out.add(n.f, n.dir, b.Data)
		}
		out.flush()
		n.u.outs.Put(out)
	}
	sent, n.waiting, n.spare = n.waiting, n.spare, nil
	return sent
}

// giveBack releases what was sent. The caller does not hold mu: a buffer may be a
// filter's own, whose function may send.
func (n *udpNetwork) giveBack(sent []*filterapi.Buffer) {
	if len(sent) == 0 {
		return
	}
	for i, b := range sent {
		sent[i] = nil
		b.Release()
	}
	n.mu.Lock()
	n.spare = sent[:0]
	n.mu.Unlock()
}

// shut does nothing: UDP has no way to say it.
func (n *udpNetwork) shut() {}
