package engine

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// waits are the calls of filters' code that somebody waits for. Nearly all are
// over in microseconds, and a timer for each would cost as much as the call: one
// for all looks every lateLook for those whose time is over.
type waits struct {
	mu      sync.Mutex
	calls   []*call
	looking bool
	spare   []*call // for the next ones
}

// lateLook is how much later than its deadline a filter's code may be found late.
const lateLook = 5 * time.Millisecond

// call is one of them. Who ends it first, the code or the look, says so to who
// waits, once.
type call struct {
	ctx    context.Context
	at     int // in waits.calls
	ended  atomic.Bool
	inTime chan bool // holds one
}

// maxSpare bounds what is kept for calls to come.
const maxSpare = 64

// begin takes a call in whose answer is waited for no longer than ctx.
func (x *waits) begin(ctx context.Context) *call {
	x.mu.Lock()
	defer x.mu.Unlock()
	var k *call
	if n := len(x.spare); n > 0 {
		k, x.spare = x.spare[n-1], x.spare[:n-1]
		k.ended.Store(false)
	} else {
		k = &call{inTime: make(chan bool, 1)}
	}
	k.ctx, k.at = ctx, len(x.calls)
	x.calls = append(x.calls, k)
	if !x.looking {
		x.looking = true
		time.AfterFunc(lateLook, x.look)
	}
	return k
}

// end takes a call out. One that was in time is used again: nobody has it any
// more.
func (x *waits) end(k *call, inTime bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	last := x.calls[len(x.calls)-1]
	x.calls[k.at], last.at = last, k.at
	x.calls[len(x.calls)-1] = nil
	x.calls = x.calls[:len(x.calls)-1]
	k.ctx = nil
	if inTime && len(x.spare) < maxSpare {
		x.spare = append(x.spare, k)
	}
}

// look tells those who have waited long enough. While nothing is asked nobody
// looks.
func (x *waits) look() {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, k := range x.calls {
		if k.ctx.Err() != nil {
			k.over(false)
		}
	}
	if x.looking = len(x.calls) > 0; x.looking {
		time.AfterFunc(lateLook, x.look)
	}
}

// over ends a call; false: it has ended before.
func (k *call) over(inTime bool) bool {
	first := k.ended.CompareAndSwap(false, true)
	if first {
		k.inTime <- inTime
	}
	return first
}
