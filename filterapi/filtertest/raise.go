package filtertest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sluicegw/sluice/filterapi"
)

// listens says whether a registration covers an event.
func (g *Gateway) listens(ev filterapi.Events, kind filterapi.EventMask, c *connection) bool {
	return ev.Types&kind != 0 && (!c.secondary || ev.Secondary) &&
		(ev.Sources == 0 || ev.Sources&c.session.source() != 0) && (!g.Unnamed || ev.AnyProtocol)
}

// raise offers an event to the filter, if it is registered for it, and attaches
// it to the session before that. The error means that the flow is refused.
func (g *Gateway) raise(c *connection, ev filterapi.Event) error {
	s, kind := c.session, ev.Kind()
	a := s.attached()
	if a == nil {
		if !g.listens(g.events, kind, c) {
			return nil
		}
		var err error
		if a, err = s.attach(); err != nil {
			return g.failed(c, err)
		}
	}
	if a.filter == nil || !g.listens(a.events, kind, c) {
		return nil
	}
	c.open(kind)
	err := g.handle(a.filter, ev)
	denied := c.shut()
	switch {
	case err != nil && !errors.Is(err, filterapi.ErrNotSupported):
		return g.failed(c, err)
	case denied:
		return fmt.Errorf("filter %q: %w", g.filter.Name(), filterapi.ErrPolicyDenied)
	}
	return nil
}

// failed does what the filter's fail mode says.
func (g *Gateway) failed(c *connection, err error) error {
	g.journal.add(Entry{Failed, err.Error()})
	if f, ok := g.filter.(filterapi.FailModer); ok && f.FailMode() == filterapi.FailOpen {
		c.dropFilters()
		return nil
	}
	return err
}

// handle calls a session filter as the gateway does: with a deadline after
// which nobody waits any more, and a panic is an error.
func (g *Gateway) handle(f filterapi.SessionFilter, ev filterapi.Event) error {
	return within(g.HandlerTime, func(ctx context.Context) error { return f.HandleEvent(ctx, ev) })
}

// terminating tells the filter that a connection is over which it has heard of.
func (g *Gateway) terminating(c *connection) {
	a := c.session.attached()
	if !c.finish() || a == nil || a.filter == nil || a.events.Types&filterapi.Terminating == 0 {
		return
	}
	if err := g.handle(a.filter, &filterapi.TerminatingEvent{Connection: c}); err != nil && !errors.Is(err, filterapi.ErrNotSupported) {
		g.journal.add(Entry{Failed, err.Error()})
	}
}

// established tells whoever a permission call named that a connection stands.
func (g *Gateway) established(c *connection) {
	p := c.perm
	if p == nil || p.ask.Notify == nil {
		return
	}
	g.journal.add(Entry{Established, c.tuple.String()})
	err := g.handle(p.ask.Notify, &filterapi.EstablishedEvent{Connection: c, Proto: c.tuple.Proto, Context: p.ask.Context})
	if err != nil && !errors.Is(err, filterapi.ErrNotSupported) {
		g.journal.add(Entry{Failed, err.Error()})
	}
}

// within runs a filter's code with a deadline and a recover.
func within(d time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		err := errors.New("the filter ended its goroutine")
		defer func() { done <- err }()
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("panic in the filter: %v", p)
			}
		}()
		err = f(ctx)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("filter missed its deadline: %w", ctx.Err())
	}
}
