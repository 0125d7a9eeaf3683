package engine

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// factory makes data filters for connections to come. One for an exact remote
// address has the kernel bring the client's flows there to user space, where
// the rules judge them as ever.
type factory struct {
	filterapi.DataFilterFactory
	r       *registered
	session *session
	kernel  nat.Permission // ID 0: the kernel has nothing to do with it

	change sync.Mutex // held across kernel changes of this factory
	held   bool       // the kernel may have it; under change
}

// factories are those in force. Most gateways have none, and then nobody
// looks at more than the count.
type factories struct {
	count    atomic.Int32
	mu       sync.RWMutex
	byClient map[netip.Addr][]*factory // oldest first
}

// add takes a factory in; false: the client has as many as it may.
func (x *factories) add(f *factory, quota int) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	client := f.session.addr
	if len(x.byClient[client]) >= quota {
		return false
	}
	if x.byClient == nil {
		x.byClient = make(map[netip.Addr][]*factory)
	}
	x.byClient[client] = append(slices.Clip(x.byClient[client]), f)
	x.count.Add(1)
	return true
}

// remove takes it out; false: it was out.
func (x *factories) remove(f *factory) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	client := f.session.addr
	at := slices.Index(x.byClient[client], f)
	if at < 0 {
		return false
	}
	rest := slices.Delete(slices.Clone(x.byClient[client]), at, at+1)
	if x.byClient[client] = rest; len(rest) == 0 {
		delete(x.byClient, client)
	}
	x.count.Add(-1)
	return true
}

// has says whether a factory is in force.
func (x *factories) has(f *factory) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return slices.Contains(x.byClient[f.session.addr], f)
}

// of are the factories that concern a session.
func (x *factories) of(s *session) []*factory {
	if x.count.Load() == 0 {
		return nil
	}
	x.mu.RLock()
	all := x.byClient[s.addr]
	x.mu.RUnlock()
	var out []*factory
	for _, f := range all {
		if f.session == s || f.Flags&filterapi.AddressBased != 0 {
			out = append(out, f)
		}
	}
	return out
}

// concern says whether any of them may be for what a client sends.
func (x *factories) concern(client netip.Addr) bool {
	if x.count.Load() == 0 {
		return false
	}
	x.mu.RLock()
	defer x.mu.RUnlock()
	return len(x.byClient[client]) > 0
}

// owned are the factories of a session.
func (x *factories) owned(s *session) []*factory {
	return slices.DeleteFunc(x.of(s), func(f *factory) bool { return f.session != s })
}

// matches compares an address with that of the factory.
func (f *factory) matches(a netip.AddrPort) bool {
	return (f.Address.Addr().IsUnspecified() || f.Address.Addr() == a.Addr()) &&
		(f.Address.Port() == 0 || f.Address.Port() == a.Port())
}

func (f *factory) exact() bool { return !f.Address.Addr().IsUnspecified() && f.Address.Port() != 0 }

// concerns says whether the factory is for a flow.
func (f *factory) concerns(c *connection) bool {
	tcp := c.tuple.Proto == flow.TCP
	switch f.Event {
	case filterapi.ConnectTCP:
		return tcp && !c.inbound() && f.matches(c.far())
	case filterapi.UDPDestination:
		return !tcp && f.matches(c.far())
	case filterapi.Accepted:
		return tcp && c.inbound() && f.matches(c.perm.external())
	default:
		return !tcp && c.inbound() && f.matches(c.perm.external())
	}
}

// wants says whether flows that a permission lets in are for the factory, and
// must come to user space. p.mu is held.
func (f *factory) wants(p *permission) bool {
	tcp := p.proto == flow.TCP
	switch f.Event {
	case filterapi.ConnectTCP:
		return tcp && !p.inbound() && f.matches(p.target())
	case filterapi.UDPDestination:
		if p.inbound() {
			return !tcp && f.exact() && p.bind.filter.Includes(f.Address.Addr())
		}
		return !tcp && f.matches(p.target())
	case filterapi.Accepted:
		return tcp && p.inbound() && f.matches(p.external())
	default:
		return !tcp && p.inbound() && f.matches(p.external())
	}
}

// bringToUser has the flows of a permission come to user space if a factory is
// waiting for them; true: that is new.
func (e *Engine) bringToUser(p *permission) bool {
	for _, f := range e.factories.of(p.session) {
		p.mu.Lock()
		changed := !p.is.has(toUser) && f.wants(p)
		if changed {
			p.is.set(toUser, true)
		}
		p.mu.Unlock()
		if changed {
			return true
		}
	}
	return false
}

// setDataFilterFactory is SetDataFilterFactory, called by a filter.
func (s *session) setDataFilterFactory(r *registered, f filterapi.DataFilterFactory) (filterapi.Action, error) {
	if err := checkFactory(f, s.addr); err != nil {
		return nil, fmt.Errorf("set data filter factory: %w", err)
	}
	x := &factory{DataFilterFactory: f, r: r, session: s}
	if x.exact() && f.Event&(filterapi.ConnectTCP|filterapi.UDPDestination) != 0 && (!s.private || f.Flags&filterapi.AddressBased != 0) {
		x.kernel = nat.Permission{
			ID: s.e.nextID(), Direction: nat.Outbound, Proto: flow.TCP, Client: netip.AddrPortFrom(s.addr, 0),
			Target: f.Address, Multiple: true, ToUser: true,
		}
		if f.Event == filterapi.UDPDestination {
			x.kernel.Proto = flow.UDP
		}
	}
	if err := s.e.install(x); err != nil {
		return nil, fmt.Errorf("set data filter factory for %v: %w", f.Address, err)
	}
	return factoryAction{s.e, x}, nil
}

func checkFactory(f filterapi.DataFilterFactory, client netip.Addr) error {
	a := f.Address.Addr()
	switch f.Event {
	case filterapi.ConnectTCP, filterapi.UDPDestination, filterapi.Accepted, filterapi.BindUDP:
	default:
		return fmt.Errorf("event 0x%x: %w", f.Event, filterapi.ErrInvalidArgument)
	}
	switch {
	case f.New == nil:
		return fmt.Errorf("no New: %w", filterapi.ErrInvalidArgument)
	case !knownPriority(f.Priority):
		return fmt.Errorf("priority %d: %w", f.Priority, filterapi.ErrInvalidArgument)
	case f.Flags&^filterapi.AddressBased != 0:
		return fmt.Errorf("flags 0x%x: %w", f.Flags&^filterapi.AddressBased, filterapi.ErrInvalidArgument)
	case !a.IsValid() || a.Zone() != "" || !a.IsUnspecified() && a.Is4() != client.Is4():
		return fmt.Errorf("address %v: %w", f.Address, filterapi.ErrInvalidArgument)
	}
	return nil
}

// install puts a factory in force. When it returns, the kernel brings to user
// space what it is for.
func (e *Engine) install(f *factory) error {
	if !e.factories.add(f, e.quota) {
		return filterapi.ErrQuota
	}
	// A session that ends later finds the factory in the list.
	if !f.session.lives() {
		e.factories.remove(f)
		return filterapi.ErrTerminating
	}
	// Permissions first: the kernel holds no two answers for one address.
	for _, s := range e.concernedBy(f) {
		for _, p := range e.perms.of(s) {
			if !e.bringToUser(p) {
				continue
			}
			if err := e.enforce(p); err != nil {
				e.uninstall(f)
				return err
			}
		}
	}
	if err := e.divert(f); err != nil {
		e.uninstall(f)
		return err
	}
	if f.session.lives() {
		return nil
	}
	e.uninstall(f) // or the end of the session has
	return filterapi.ErrTerminating
}

// concernedBy are the sessions whose flows a factory is for.
func (e *Engine) concernedBy(f *factory) []*session {
	if f.Flags&filterapi.AddressBased == 0 {
		return []*session{f.session}
	}
	return slices.DeleteFunc(e.sessions.all(), func(s *session) bool { return s.addr != f.session.addr })
}

// uninstall ends a factory; false: it had ended.
func (e *Engine) uninstall(f *factory) bool {
	if !e.factories.remove(f) {
		return false
	}
	f.change.Lock()
	defer f.change.Unlock()
	if f.held {
		f.held = false
		e.withdraw(f.kernel)
	}
	return true
}

// divert has the kernel bring to user space what a factory is for, unless it
// has ended meanwhile.
func (e *Engine) divert(f *factory) error {
	f.change.Lock()
	defer f.change.Unlock()
	if f.kernel.ID == 0 || !e.factories.has(f) {
		return nil
	}
	f.held = true // perhaps, also after an error
	return e.put(f.kernel)
}

// withdraw removes what the kernel holds, and tries until it is gone.
func (e *Engine) withdraw(p nat.Permission) {
	if err := e.kernel.Remove(context.Background(), p); err != nil {
		e.log.Error("removing a permission failed; it is tried again", zap.Uint64("permission", p.ID), zap.Error(err))
		e.later(enforceAgain, func() { e.withdraw(p) })
	}
}

// factoryAction is a factory as its filter holds it.
type factoryAction struct {
	e *Engine
	f *factory
}

// Cancel implements filterapi.Action.
func (a factoryAction) Cancel() error {
	if !a.e.uninstall(a.f) {
		return filterapi.ErrTerminating
	}
	return nil
}

// manufacture puts on a flow the data filters that factories make for it. Its
// error means that the flow is refused.
func (e *Engine) manufacture(ctx context.Context, c *connection) error {
	made := e.factories.of(c.session)
	if len(made) == 0 {
		return nil
	}
	handlers := forHandlers(ctx)
	defer handlers.End()
	for _, f := range made {
		if !f.concerns(c) {
			continue
		}
		if err := e.attachMade(handlers, c, f); err != nil {
			f.r.failed("data filter factory", err, c)
			if f.r.mode != filterapi.FailOpen {
				return fmt.Errorf("filter %q: %w", f.r.filter.Name(), err)
			}
		}
		if c.isDenied() {
			return fmt.Errorf("filter %q: %w", f.r.filter.Name(), errDeniedByFilter)
		}
	}
	return nil
}

func (e *Engine) attachMade(ctx context.Context, c *connection, f *factory) error {
	if a := c.session.attachedTo(f.r); a != nil {
		c.told(f.r, a)
	}
	h := c.handle(f.r)
	c.open(f.r, inFactory)
	df, err := ask(ctx, e.code(f.r, "data filter factory", c), func() (filterapi.DataFilter, error) { return f.New(h) })
	c.shut()
	if err != nil || df == nil || c.isDenied() {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.Priority == filterapi.PriorityEmulation && c.emulated {
		return filterapi.ErrAlreadyEmulated
	}
	c.link(Link{Filter: df, Name: f.r.filter.Name(), Priority: f.Priority, owner: f.r})
	return nil
}
