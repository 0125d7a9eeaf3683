package engine

import (
	"sync"
	"time"
)

// tasks are what the engine does behind the back of those who report to it:
// filters' last events and kernel changes, for which neither the reader of
// conntrack's events nor a pump may wait.
type tasks struct {
	mu      sync.Mutex
	running int
	idle    *sync.Cond
	stopped bool
}

func (t *tasks) init() { t.idle = sync.NewCond(&t.mu) }

func (t *tasks) run(f func()) {
	t.mu.Lock()
	t.running++
	t.mu.Unlock()
	go func() {
		f()
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.running--; t.running == 0 {
			t.idle.Broadcast()
		}
	}()
}

// wait returns when nothing runs.
func (t *tasks) wait() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.running > 0 {
		t.idle.Wait()
	}
}

// later runs f after a while, unless the engine has stopped by then.
func (e *Engine) later(d time.Duration, f func()) {
	time.AfterFunc(d, func() {
		e.tasks.mu.Lock()
		stopped := e.tasks.stopped
		e.tasks.mu.Unlock()
		if !stopped {
			f()
		}
	})
}
