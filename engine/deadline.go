package engine

import (
	"context"
	"sync"
	"time"
)

// Deadline is a context that ends at a time, with its parent, or with End. Most
// of those that are made for a decision and its handlers are never asked for more
// than that they are there: the timer and the channel of one are made when
// somebody calls Done. It may be part of something else, and costs nothing of its
// own then. Parent and At are set before its use; no copy may be made after. Safe
// for concurrent use.
type Deadline struct {
	Parent context.Context
	At     time.Time

	mu     sync.Mutex
	ended  bool
	real   context.Context
	cancel context.CancelFunc
}

// Deadline implements context.Context.
func (c *Deadline) Deadline() (time.Time, bool) { return c.At, true }

// Done implements context.Context.
func (c *Deadline) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.real == nil {
		c.real, c.cancel = context.WithDeadline(c.Parent, c.At)
		if c.ended {
			c.cancel()
		}
	}
	return c.real.Done()
}

// Err implements context.Context.
func (c *Deadline) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.real != nil {
		return c.real.Err()
	}
	if c.ended {
		return context.Canceled
	}
	if err := c.Parent.Err(); err != nil {
		return err
	}
	if !time.Now().Before(c.At) {
		return context.DeadlineExceeded
	}
	return nil
}

// Value implements context.Context. The real context answers when there is
// one: the context package recognises its own kind by a value.
func (c *Deadline) Value(key any) any {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.real != nil {
		return c.real.Value(key)
	}
	return c.Parent.Value(key)
}

// End cancels the context: what it was for is over. It may be called again.
func (c *Deadline) End() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	if c.cancel != nil {
		c.cancel()
	}
}

// within bounds something that nobody else bounds.
func within(d time.Duration) *Deadline {
	return &Deadline{Parent: context.Background(), At: time.Now().Add(d)}
}
