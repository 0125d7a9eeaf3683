package engine

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
)

// stillThere is how long after its deadline a filter's code is named again if
// it still runs.
const stillThere = time.Minute

// errLate: a filter did not answer in time, which is in the log.
var errLate = errors.New("filter missed its deadline")

// code is one call of a filter's own code. One that misses its deadline runs
// on, unheard; it is named in the log then, when it answers at last, and once
// more if it has not a minute later.
type code struct {
	e     *Engine
	r     *registered
	what  string
	about *connection // nil: it is about none
	begun time.Time

	mu    sync.Mutex
	over  bool // it has answered
	named bool // it has missed its deadline
	timer *time.Timer
}

func (e *Engine) code(r *registered, what string, about *connection) *code {
	return &code{e: e, r: r, what: what, about: about, begun: e.now()}
}

// errExited is the answer of a filter that ended its goroutine.
var errExited = errors.New("the filter's code ended its goroutine")

// ask runs a filter's code on a goroutine of its own, with a recover, and
// waits no longer than ctx.
func ask[T any](ctx context.Context, k *code, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	res := &result{err: errExited} // unless it comes back, or panics
	w := k.e.waits.begin(ctx)
	go func() {
		defer func() {
			if !w.over(true) {
				k.answered()
			}
		}()
		defer recovered(&res.err)
		res.value, res.err = f()
	}()
	inTime := <-w.inTime
	k.e.waits.end(w, inTime)
	if inTime {
		return res.value, res.err
	}
	k.missed()
	var zero T
	return zero, fmt.Errorf("%w: %w", errLate, ctx.Err())
}

// missed says that somebody does not wait any more.
func (k *code) missed() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.over || k.named {
		return
	}
	k.named = true
	k.r.log.Warn("the filter missed its deadline", k.fields()...)
	k.timer = time.AfterFunc(stillThere, func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if !k.over {
			k.r.log.Error("the filter's code still runs long after its deadline", k.fields()...)
		}
	})
}

// answered says that the code has returned, in time or not.
func (k *code) answered() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.over = true
	if k.named {
		k.timer.Stop()
		k.r.log.Warn("the filter answered when nobody waited for it any more", k.fields()...)
	}
}

func (k *code) fields() []zap.Field {
	f := []zap.Field{zap.String("in", k.what), zap.Duration("after", k.e.now().Sub(k.begun))}
	if k.about != nil {
		f = append(f, zap.Stringer("flow", k.about.tuple))
	}
	return f
}
