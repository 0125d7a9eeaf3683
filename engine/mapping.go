package engine

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// socket4 is an IPv4 address and port, or identifier of ICMP queries, in the
// least room: there may be a million of them.
type socket4 struct {
	addr [4]byte
	port uint16
}

func packed(a netip.AddrPort) socket4 { return socket4{a.Addr().As4(), a.Port()} }

func (x socket4) addrPort() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(x.addr), x.port)
}

// mapping gives an inside endpoint one external endpoint, wherever it sends to
// (RFC 4787, REQ-1). The kernel holds it and carries the flows; conntrack's
// entries are its life:
//
//	making --in the kernel--> live --no flow for a while--> leaving --nor since--> gone
//	                           |  ^                            |
//	                           |  +-----a flow, or a packet----+
//	                           +--the rules have changed--> outlived --no flow--> gone
//
// One that leaves is out of the kernel's maps already, so that no flow of it
// can begin unseen; what is on its way brings it back. One that is outlived
// takes nothing new, but the flows that it has go on by conntrack, and nobody
// else may have its external endpoint.
//
// All of it is under mappings.mu, which is taken before the lock of a
// permission or a session, never after.
type mapping struct {
	id               uint64 // of its nat.Permission
	inside, external socket4
	first            socket4 // where its first flow went
	proto            flow.Proto
	state            mappingState
	filtering        policy.Filtering
	opened           bool  // the kernel lets others in
	shared           bool  // the kernel knows that others may have its addresses
	rule             int32 // mappings.rules
	flows            int32 // of the kernel's, and in user space, as far as told: see mapping_survey.go
	since            int64 // nanoseconds, when it was made
	idle             int64 // nanoseconds, since when it has no flow
	extra            *mappingExtra
}

type mappingState uint8

const (
	mappingMaking mappingState = iota
	mappingLive
	mappingLeaving
	mappingOutlived
)

// mappingExtra is what few mappings have.
type mappingExtra struct {
	change   chan struct{} // closed when the kernel has acknowledged a change; nil: none is under way
	bind     *permission   // what filters make of it
	borrower *permission   // a bind that has its address
	lent     bool          // one for a peer of a flow has it
	held     *session      // which lives as long
	inUser   int32         // flows in user space
	peers    map[netip.Addr]int32
	attempts map[netip.AddrPort]int64 // hairpin: until when what it has sent to may answer
	// sent and quiet are what it had sent and since when no more, where what
	// comes in does not keep it alive.
	sent  uint64
	quiet int64
}

func (m *mapping) more() *mappingExtra {
	if m.extra == nil {
		m.extra = &mappingExtra{}
	}
	return m.extra
}

func (m *mapping) bind() *permission {
	if m.extra == nil {
		return nil
	}
	return m.extra.bind
}

type insideKey struct {
	rule  int32
	proto flow.Proto
	at    socket4
}

type externalKey struct {
	proto flow.Proto
	at    socket4
}

// mappings are all of them.
type mappings struct {
	mu         sync.Mutex
	rules      []mappingRule
	ruleOf     map[string]int32
	byInside   map[insideKey]*mapping // without those that are outlived
	byExternal map[externalKey]*mapping
	idle       map[*mapping]struct{}
	sweeping   bool
	adopting   bool                      // the kernel does not have the rules yet
	journal    map[flow.Tuple]journalled // while a dump is compared; else nil
	survey     *survey                   // that is under way; nil: none
	rested     time.Time                 // before which there is no other
}

// mappingRule is a network rule, for mappings: by its name, which stays.
type mappingRule struct {
	name  string
	iface string // by which flows leave
}

func (x *mappings) init() {
	x.ruleOf = make(map[string]int32)
	x.byInside = make(map[insideKey]*mapping)
	x.byExternal = make(map[externalKey]*mapping)
	x.idle = make(map[*mapping]struct{})
}

// numberOf is the number of a network rule. x.mu is held.
func (x *mappings) numberOf(name string) int32 {
	n, ok := x.ruleOf[name]
	if !ok {
		n = int32(len(x.rules))
		x.ruleOf[name] = n
		x.rules = append(x.rules, mappingRule{name: name})
	}
	return n
}

func (m *mapping) insideKey() insideKey     { return insideKey{m.rule, m.proto, m.inside} }
func (m *mapping) externalKey() externalKey { return externalKey{m.proto, m.external} }

// permission is what the kernel is to hold of it.
func (x *mappings) permission(m *mapping) nat.Permission {
	p := nat.Permission{
		ID: m.id, Direction: nat.Inbound, Proto: m.proto, Client: m.inside.addrPort(), External: m.external.addrPort(),
		Multiple: true, Leaves: x.rules[m.rule].name, Mapped: true, Shared: m.shares(),
	}
	if m.opens() {
		p.AnySource, p.PeersOnly = true, m.filtering == policy.FilterAddress
	}
	return p
}

// shares says whether permissions may have addresses of the mapping, now or
// before.
func (m *mapping) shares() bool {
	return m.shared || m.extra != nil && (m.extra.lent || m.extra.bind != nil || m.extra.borrower != nil)
}

// opens says whether the kernel lets in who the network rule says. A filter
// that has allowed it to others says who, from then on.
func (m *mapping) opens() bool {
	if m.filtering == policy.FilterAddressAndPort || !m.proto.HasPorts() {
		return false
	}
	if m.extra == nil {
		return true
	}
	if b := m.extra.borrower; b != nil && b.waits() && !b.isDiscarding() {
		return false
	}
	return m.extra.bind == nil || m.extra.bind.isDiscarding()
}

var (
	// errNoExternalPort: the network rule's address has none left.
	errNoExternalPort = errors.New("no external endpoint")
	errNoMapping      = errors.New("the kernel did not take the mapping")
)

// mapFlow finds the mapping of a flow's inside endpoint, or makes one, and
// returns when the kernel holds it. c hears of one that is made, if filters
// have to do with it. The flow holds it until unmap, or until conntrack tells
// of it.
func (e *Engine) mapFlow(ctx context.Context, c *connection, r *policy.NetworkRule, q policy.Question) (*mapping, error) {
	x := &e.mappings
	for {
		x.mu.Lock()
		key := insideKey{x.numberOf(r.Name), q.Proto, packed(q.Src)}
		m := x.byInside[key]
		if m == nil {
			if q.OutIface != "" {
				x.rules[key.rule].iface = q.OutIface
			}
			return e.makeMapping(ctx, c, r, q, key) // unlocks
		}
		x.mu.Unlock()
		if err := e.revive(ctx, m); errors.Is(err, errGone) {
			continue
		} else if err != nil {
			return nil, err
		}
		return m, e.meet(m, q)
	}
}

// errGone: a mapping has ended while somebody waited for it.
var errGone = errors.New("the mapping is gone")

// revive has a mapping live on, for a moment at least, also one that was about
// to go.
func (e *Engine) revive(ctx context.Context, m *mapping) error {
	x := &e.mappings
	x.mu.Lock()
	for m.extra != nil && m.extra.change != nil {
		wait := m.extra.change
		x.mu.Unlock()
		select {
		case <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
		x.mu.Lock()
	}
	if x.byInside[m.insideKey()] != m {
		x.mu.Unlock()
		return errGone
	}
	e.rest(m, e.now().Add(unconfirmed))
	if m.state != mappingLeaving {
		x.mu.Unlock()
		return nil
	}
	return e.installMapping(m) // unlocks
}

// makeMapping makes a mapping for an endpoint that has none. x.mu is held, and
// is not when it returns.
func (e *Engine) makeMapping(ctx context.Context, c *connection, r *policy.NetworkRule, q policy.Question, key insideKey) (*mapping, error) {
	x := &e.mappings
	m := e.newMapping(r, q, key)
	x.mu.Unlock()
	err := e.leaseMapping(m, r, q)
	if err == nil && c != nil && c.session != nil {
		err = e.raiseBind(ctx, m, c)
	}
	if err == nil {
		x.mu.Lock()
		e.rest(m, e.now().Add(unconfirmed))
		if err = e.putMapping(m); err == nil { // unlocks
			return m, errors.Join(e.enforceBind(m), e.meet(m, q))
		}
	}
	e.abandonMapping(m)
	e.closeBind(m)
	return nil, err
}

// newMapping is one that is to be made. mappings.mu is held.
func (e *Engine) newMapping(r *policy.NetworkRule, q policy.Question, key insideKey) *mapping {
	m := &mapping{
		id: e.nextID(), inside: key.at, first: packed(q.Dst), proto: key.proto, filtering: r.Filtering, rule: key.rule,
		since: e.now().UnixNano(), extra: &mappingExtra{change: make(chan struct{})},
	}
	e.mappings.byInside[key] = m
	return m
}

// abandonMapping gives up one that could not be made.
func (e *Engine) abandonMapping(m *mapping) {
	x := &e.mappings
	x.mu.Lock()
	delete(x.byInside, m.insideKey())
	delete(x.idle, m)
	x.forgetExternal(m)
	e.changed(m)
	x.mu.Unlock()
	if m.external.port != 0 {
		e.ports.Unlease(m.proto, m.external.addrPort())
	}
}

// leaseMapping finds the external endpoint.
func (e *Engine) leaseMapping(m *mapping, r *policy.NetworkRule, q policy.Question) error {
	addrs := r.Addresses()
	if len(addrs) == 0 {
		_, source, _, err := e.routes.Lookup(q.Dst.Addr())
		if err != nil || !source.Is4() {
			return errNoExternalPort
		}
		addrs = []netip.Addr{source}
	}
	at, err := e.ports.Take(nat.Request{Holder: q.Src.Addr(), Proto: m.proto, Addrs: addrs, Like: q.Src.Port()})
	if err != nil {
		return fmt.Errorf("%w: %w", errNoExternalPort, err)
	}
	x := &e.mappings
	x.mu.Lock()
	defer x.mu.Unlock()
	m.external = packed(at)
	x.byExternal[m.externalKey()] = m
	return nil
}

// forgetExternal takes a mapping off the way of what comes in. x.mu is held.
func (x *mappings) forgetExternal(m *mapping) {
	if x.byExternal[m.externalKey()] == m {
		delete(x.byExternal, m.externalKey())
	}
}

// installMapping brings the kernel to what a mapping is to be, and makes it
// live. x.mu is held, and is not when it returns.
func (e *Engine) installMapping(m *mapping) error {
	m.more().change = make(chan struct{})
	return e.putMapping(m)
}

// putMapping does so for one whose change has been announced.
func (e *Engine) putMapping(m *mapping) error {
	x := &e.mappings
	p := x.permission(m)
	x.mu.Unlock()
	err := e.kernel.Install(context.Background(), p)
	x.mu.Lock()
	defer x.mu.Unlock()
	return e.mappingPut(m, p, err)
}

// mappingPut is told what came of it. x.mu is held.
func (e *Engine) mappingPut(m *mapping, p nat.Permission, err error) error {
	if err == nil {
		m.state, m.opened, m.shared = mappingLive, p.AnySource, p.Shared
		if m.shared {
			m.more().lent = false // that is known from now on
		}
	}
	if err != nil && m.state == mappingMaking {
		return errors.Join(errNoMapping, err)
	}
	e.changed(m)
	if err != nil {
		return errors.Join(errNoMapping, err)
	}
	return nil
}

// changed lets those go on who have waited for the kernel. x.mu is held.
func (e *Engine) changed(m *mapping) {
	if m.extra != nil && m.extra.change != nil {
		close(m.extra.change)
		m.extra.change = nil
		m.lean()
	}
}

// enforceBind opens what filters have made of a mapping.
func (e *Engine) enforceBind(m *mapping) error {
	e.mappings.mu.Lock()
	p := m.bind()
	e.mappings.mu.Unlock()
	if p == nil {
		return nil
	}
	return e.enforce(p)
}

// lean gives back what a mapping does not need. x.mu is held.
func (m *mapping) lean() {
	if x := m.extra; x != nil && x.change == nil && x.bind == nil && x.borrower == nil && !x.lent && x.held == nil && x.inUser == 0 && len(x.peers) == 0 && len(x.attempts) == 0 && x.quiet == 0 {
		m.extra = nil
	}
}
