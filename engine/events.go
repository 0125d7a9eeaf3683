package engine

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/policy"
)

// panicked is what a recovered panic becomes.
type panicked struct {
	value any
	stack []byte
}

func (p *panicked) Error() string { return fmt.Sprintf("panic: %v", p.value) }

func recovered(err *error) {
	if v := recover(); v != nil {
		*err = &panicked{v, debug.Stack()}
	}
}

// call runs a filter's code on a goroutine of its own, with a recover, and
// waits no longer than ctx. Code that misses its deadline runs on, unheard.
func call[T any](ctx context.Context, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		defer func() { done <- r }()
		defer recovered(&r.err)
		r.value, r.err = f()
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var zero T
		return zero, fmt.Errorf("filter missed its deadline: %w", ctx.Err())
	}
}

// bound says whether a filter is to hear of a flow of this kind, and with
// which options of the rule.
func bound(ev filterapi.Events, kind filterapi.EventMask, name string, uses []policy.FilterUse, secondary bool) (options any, ok bool) {
	if ev.Types&kind == 0 || secondary && !ev.Secondary {
		return nil, false
	}
	for _, u := range uses {
		if u.Name == name {
			return u.Options, true
		}
	}
	return nil, ev.AnyProtocol
}

// notify raises one event with every filter that is registered for it, in the
// order of the configuration, and stops when one denies. event makes the
// event for a filter's own options. It is the only place from which filters'
// handlers are called for a flow that can still be refused.
func (e *Engine) notify(ctx context.Context, c *connection, kind filterapi.EventMask, event func(options any) filterapi.Event) error {
	for _, r := range e.filters {
		options, ok := bound(c.session.wants(r), kind, r.filter.Name(), c.uses, c.secondary)
		if !ok {
			continue
		}
		if err := e.deliver(ctx, c, r, kind, event(options)); err != nil {
			return fmt.Errorf("filter %q: %w", r.filter.Name(), err)
		}
		if c.isDenied() {
			return fmt.Errorf("filter %q: %w", r.filter.Name(), errDeniedByFilter)
		}
	}
	return nil
}

var errDeniedByFilter = errors.New("denied")

// deliver gives one event to one filter. Its error means that the flow is
// refused.
func (e *Engine) deliver(ctx context.Context, c *connection, r *registered, kind filterapi.EventMask, ev filterapi.Event) error {
	a, err := e.attach(ctx, c.session, r)
	if err == nil && (a.filter == nil || a.events.Types&kind == 0) {
		return nil
	}
	if err == nil {
		c.open(r.filter.Name())
		_, err = call(ctx, func() (struct{}, error) { return struct{}{}, a.filter.HandleEvent(ctx, ev) })
		c.shut()
	}
	if err == nil || errors.Is(err, filterapi.ErrNotSupported) {
		c.told(r, a)
		return nil
	}
	var p *panicked
	if errors.As(err, &p) {
		r.log.Error("event handler panicked", zap.Any("value", p.value), zap.ByteString("stack", p.stack), zap.Stringer("flow", c.tuple))
	} else {
		r.log.Warn("event handler failed", zap.Error(err), zap.Stringer("flow", c.tuple))
	}
	if r.mode == filterapi.FailOpen {
		c.dropLinks(r.filter.Name())
		return nil
	}
	return err
}

// terminating tells the filters that saw the connection that it is over.
func (e *Engine) terminating(c *connection) {
	for _, h := range c.heard() {
		if h.a.events.Types&filterapi.Terminating == 0 {
			continue
		}
		var err error
		func() {
			defer recovered(&err)
			err = h.a.filter.HandleEvent(context.Background(), &filterapi.TerminatingEvent{Connection: c.public()})
		}()
		if err != nil && !errors.Is(err, filterapi.ErrNotSupported) {
			h.r.log.Warn("terminating handler failed", zap.Error(err), zap.Stringer("flow", c.tuple))
		}
	}
}

func (e *Engine) detach(r *registered, sf filterapi.SessionFilter) {
	var err error
	func() {
		defer recovered(&err)
		sf.Detach()
	}()
	if err != nil {
		r.log.Error("detach panicked", zap.Error(err))
	}
}
