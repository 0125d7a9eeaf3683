package engine

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

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

// kindNames are the events for people.
var kindNames = map[filterapi.EventMask]string{
	filterapi.ConnectTCP: "ConnectEvent", filterapi.UDPDestination: "UDPDestinationEvent",
	filterapi.BindTCP: "BindEvent", filterapi.BindUDP: "BindEvent", filterapi.Listen: "ListenEvent",
	filterapi.Accepted: "AcceptEvent", filterapi.Terminating: "TerminatingEvent", filterapi.Established: "EstablishedEvent",
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

// eventFor makes the event that one filter gets.
type eventFor func(r *registered, a filterapi.About) filterapi.Event

// notify raises one event with every filter that is registered for it, in the
// order of the configuration, and stops when one denies. It is the only place from which filters'
// handlers are called for a flow that can still be refused.
func (e *Engine) notify(ctx context.Context, c *connection, kind filterapi.EventMask, event eventFor) error {
	return e.notifyExcept(ctx, c, kind, nil, event)
}

// notifyExcept is notify for all filters but one.
func (e *Engine) notifyExcept(ctx context.Context, c *connection, kind filterapi.EventMask, except *registered, event eventFor) error {
	var handlers *Deadline
	for _, r := range e.filters {
		if r == except {
			continue
		}
		if _, ok := bound(c.session.wants(r), kind, r.filter.Name(), c.uses, c.secondary); !ok {
			continue
		}
		if handlers == nil {
			handlers = forHandlers(ctx)
			defer handlers.End()
		}
		if err := e.deliver(handlers, c, r, kind, event); err != nil {
			return fmt.Errorf("filter %q: %w", r.filter.Name(), err)
		}
		if c.isDenied() {
			return fmt.Errorf("filter %q: %w", r.filter.Name(), errDeniedByFilter)
		}
	}
	return nil
}

var errDeniedByFilter = errors.New("denied")

// forHandlers is the time that the handlers of an event have together: three
// quarters of what is left. In the rest the flow of a filter that fails open
// can still be decided.
func forHandlers(ctx context.Context) *Deadline {
	end, ok := ctx.Deadline()
	if !ok {
		return &Deadline{Parent: ctx, At: time.Now().Add(never)}
	}
	return &Deadline{Parent: ctx, At: end.Add(-time.Until(end) / 4)}
}

// never is longer than anything waits.
const never = 100 * 365 * 24 * time.Hour

// deliver gives one event to one filter. Its error means that the flow is
// refused. When the time is over nobody is called any more, so that a handler
// that runs on never finds the connection open for another.
func (e *Engine) deliver(ctx context.Context, c *connection, r *registered, kind filterapi.EventMask, event eventFor) error {
	err := e.handle(ctx, c, r, kind, event)
	if err == nil || errors.Is(err, filterapi.ErrNotSupported) {
		return nil
	}
	r.failed("event handler", err, c)
	if r.mode == filterapi.FailOpen {
		c.dropLinks(r)
		return nil
	}
	return err
}

// failed logs what a filter's code came to. One that was late is in the log.
func (r *registered) failed(what string, err error, c *connection) {
	var p *panicked
	switch {
	case errors.As(err, &p):
		r.log.Error(what+" panicked", zap.Any("value", p.value), zap.ByteString("stack", p.stack), zap.Stringer("flow", c.tuple))
	case !errors.Is(err, errLate):
		r.log.Warn(what+" failed", zap.Error(err), zap.Stringer("flow", c.tuple))
	}
}

func (e *Engine) handle(ctx context.Context, c *connection, r *registered, kind filterapi.EventMask, event eventFor) error {
	a, err := e.attach(ctx, c.session, r)
	if err != nil {
		return err
	}
	options, ok := bound(c.session.scope(a.wants()), kind, r.filter.Name(), c.uses, c.secondary)
	if !ok {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("no time is left for it: %w", ctx.Err())
	}
	c.told(r, a) // whatever comes of it: the connection is in its hands from now on
	c.open(r, kind)
	defer c.shut()
	_, err = ask(ctx, e.code(r, kindNames[kind], c), func() (struct{}, error) { return struct{}{}, a.filter.HandleEvent(ctx, event(r, c.about(r, options))) })
	return err
}

// lastWords bounds the handlers that nothing but the end of a session waits
// for.
const lastWords = 5 * time.Second

// terminating tells the filters that saw the connection that it is over.
func (e *Engine) terminating(c *connection) {
	ctx := within(lastWords)
	defer ctx.End()
	for _, h := range c.heard() {
		_, err := ask(ctx, e.code(h.r, kindNames[filterapi.Terminating], c), func() (struct{}, error) {
			return struct{}{}, h.a.filter.HandleEvent(ctx, &filterapi.TerminatingEvent{Connection: c.handle(h.r)})
		})
		if err != nil && !errors.Is(err, filterapi.ErrNotSupported) {
			h.r.failed("terminating handler", err, c)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.letGo()
}

// detach ends a filter's part in a session; sf may be nil.
func (e *Engine) detach(r *registered, sf filterapi.SessionFilter) {
	if sf == nil {
		return
	}
	ctx := within(lastWords)
	defer ctx.End()
	if _, err := ask(ctx, e.code(r, "Detach", nil), func() (struct{}, error) { sf.Detach(); return struct{}{}, nil }); err != nil {
		r.log.Error("detach failed", zap.Error(err))
	}
}

// shutdown ends a filter.
func (e *Engine) shutdown(r *registered) {
	ctx := within(lastWords)
	defer ctx.End()
	if _, err := ask(ctx, e.code(r, "Shutdown", nil), func() (struct{}, error) { r.filter.Shutdown(); return struct{}{}, nil }); err != nil {
		r.log.Error("shutdown failed", zap.Error(err))
	}
}
