package engine

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// DefaultQuota is how many permissions one client may hold at a time.
const DefaultQuota = 64

// DefaultAnswer is how long a call waits for the filters that it asks.
const DefaultAnswer = 800 * time.Millisecond

// DefaultPeerIdle is how long a UDP peer of an explicit client is remembered.
const DefaultPeerIdle = 120 * time.Second

// Config is what an Engine is made of.
type Config struct {
	Policy *policy.Policy
	// Filters in the order of the configuration; it is their order inside a
	// priority class.
	Filters []filterapi.Filter
	Kernel  Kernel
	User    User
	Routes  Routes
	// Ports leases the external ports of binds.
	Ports *nat.Allocator
	// KernelPorts are those that the kernel's own translation chooses from: a
	// bind that asks for one of them by its number alone gets it not.
	KernelPorts nat.Range
	// Quota of pending permissions per client; 0: DefaultQuota.
	Quota int
	// Answer bounds the handlers of an event that a call raises; 0:
	// DefaultAnswer. What a first packet raises is bounded by its context.
	Answer time.Duration
	Log    *zap.Logger
	// LeakDelay is how long a filter may hold on to a connection that is over
	// before the log names it; 0: DefaultLeakDelay.
	LeakDelay time.Duration
	// PeerIdle ends the flow of a UDP peer of an explicit client that has carried
	// nothing for that long; 0: DefaultPeerIdle.
	PeerIdle time.Duration
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Engine judges flows and keeps what is known of the living ones. Safe for
// concurrent use.
type Engine struct {
	kernel      Kernel
	user        User
	routes      Routes
	cached      CachedRoutes // may be nil
	ports       *nat.Allocator
	kernelPorts atomic.Pointer[portRange]
	quota       int
	answer      time.Duration
	idle        time.Duration // of UDP peers
	log         *zap.Logger
	now         func() time.Time
	filters     []*registered

	policies  policies
	sessions  sessions
	factories factories
	flows     living
	perms     permissions
	deadlines deadlines
	overtaken overtaken
	mappings  mappings
	tasks     tasks
	waits     waits
	leaks     leaks

	wide   atomic.Bool // a filter asks for flows of rules that do not name it
	lastID atomic.Uint64
}

// registered is a filter with what it asked for in Init.
type registered struct {
	filter filterapi.Filter
	events filterapi.Events
	mode   filterapi.FailMode
	log    *zap.Logger

	afterEnd atomic.Uint64 // calls on connections that it knows to be over
}

// name is the filter's name; nil is the gateway itself.
func (r *registered) name() string {
	if r == nil {
		return ""
	}
	return r.filter.Name()
}

// New makes an engine and initialises its filters. A filter that fails to
// start is logged once and left out: its protocols are then handled by the
// rules alone.
func New(c Config) (*Engine, error) {
	if c.Policy == nil || c.Kernel == nil || c.Routes == nil || c.Ports == nil || c.Log == nil {
		return nil, fmt.Errorf("make engine: incomplete configuration: %w", filterapi.ErrInvalidArgument)
	}
	e := &Engine{
		kernel: c.Kernel, user: c.User, routes: c.Routes, ports: c.Ports,
		quota: c.Quota, answer: c.Answer, idle: c.PeerIdle, log: c.Log, now: c.Now,
	}
	e.cached, _ = c.Routes.(CachedRoutes)
	if e.quota == 0 {
		e.quota = DefaultQuota
	}
	if e.answer == 0 {
		e.answer = DefaultAnswer
	}
	if e.idle == 0 {
		e.idle = DefaultPeerIdle
	}
	if e.now == nil {
		e.now = time.Now
	}
	e.sessions.init()
	e.flows.byTuple = make(map[flow.Tuple]*connection)
	e.perms.init()
	e.deadlines.init(e.now, e.expire)
	e.mappings.init()
	e.SetKernelPorts(c.KernelPorts)
	e.tasks.init()
	if e.leaks.delay = c.LeakDelay; e.leaks.delay == 0 {
		e.leaks.delay = DefaultLeakDelay
	}
	e.policies.swap(c.Policy, e.now())
	for _, f := range c.Filters {
		e.register(f)
	}
	return e, nil
}

func (e *Engine) register(f filterapi.Filter) {
	r := &registered{filter: f, log: e.log.Named(f.Name())}
	if m, ok := f.(filterapi.FailModer); ok {
		r.mode = m.FailMode()
	}
	events, err := initFilter(f, firewall{e.network(nil), e, r})
	if err != nil {
		r.log.Error("filter did not start; its protocols are handled by the rules alone", zap.Error(err))
		return
	}
	r.events = events
	e.widen(events)
	e.filters = append(e.filters, r)
}

// widen notes a registration.
func (e *Engine) widen(ev filterapi.Events) {
	if ev.AnyProtocol && ev.Types&(filterapi.ConnectTCP|filterapi.UDPDestination|filterapi.Accepted) != 0 {
		e.wide.Store(true)
	}
}

func initFilter(f filterapi.Filter, fw filterapi.Firewall) (ev filterapi.Events, err error) {
	defer recovered(&err)
	return f.Init(fw)
}

// Stop ends all sessions, so that every permission is void, and shuts the
// filters down. Flows in user space must have ended before; what the kernel
// carries goes on.
func (e *Engine) Stop() {
	for _, s := range e.sessions.all() {
		s.mu.Lock()
		e.endSession(s)
	}
	for _, x := range e.overtaken.all() {
		e.unheard(x)
	}
	e.tasks.wait()
	e.tasks.mu.Lock()
	e.tasks.stopped = true
	e.tasks.mu.Unlock()
	for _, r := range e.filters {
		e.shutdown(r)
	}
}

// firewall is the gateway as filters see it.
type firewall struct {
	network
	e *Engine
	r *registered
}

// Logger implements filterapi.Firewall.
func (f firewall) Logger() *zap.Logger { return f.r.log }

func (e *Engine) nextID() uint64 { return e.lastID.Add(1) }

// policies are the policy in force and those before it: a kernel flow that
// ends is judged by the policy of its start.
type policies struct {
	mu      sync.RWMutex
	history []dated // oldest first
}

type dated struct {
	since  time.Time
	policy *policy.Policy
}

// maxHistory bounds how many reloads back a flow's rule can be named.
const maxHistory = 16

func (p *policies) swap(next *policy.Policy, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.history); n > 0 && p.history[n-1].policy == next {
		return // loaded again for another reason
	}
	if len(p.history) == maxHistory {
		p.history = append(p.history[:0:0], p.history[1:]...)
	}
	p.history = append(p.history, dated{now, next})
}

func (p *policies) current() *policy.Policy {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.history[len(p.history)-1].policy
}

// at is the policy that was in force at a time.
func (p *policies) at(t time.Time) *policy.Policy {
	p.mu.RLock()
	defer p.mu.RUnlock()
	for i := len(p.history) - 1; i > 0; i-- {
		if !p.history[i].since.After(t) {
			return p.history[i].policy
		}
	}
	return p.history[0].policy
}

// Policy is the one in force.
func (e *Engine) Policy() *policy.Policy { return e.policies.current() }

// SetPolicy puts another policy in force for flows to come. The caller has
// loaded it into the kernel before, and calls Recheck after.
func (e *Engine) SetPolicy(p *policy.Policy) { e.policies.swap(p, e.now()) }

// question asks the routes for what a tuple alone does not tell.
func (e *Engine) question(t flow.Tuple, inIface string) (policy.Question, error) {
	out, _, local, err := e.routes.Lookup(t.Dst.Addr())
	if err != nil {
		return policy.Question{}, err
	}
	if inIface == "" {
		if inIface, _, _, err = e.routes.Lookup(t.Src.Addr()); err != nil {
			return policy.Question{}, err
		}
	}
	return policy.Question{Tuple: t, InIface: inIface, OutIface: out, ToGateway: local}, nil
}
