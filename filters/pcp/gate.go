package pcp

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// The kernel's sets know the sources of a bind by their addresses. Where a
// FILTER names a port, too, the first packet of each flow is shown to the
// mapping's gate, which looks at the port; what it lets in the kernel carries.

// source is what a FILTER lets in: the hosts of a prefix, from one port or, with
// 0, from any.
type source struct {
	prefix netip.Prefix
	port   uint16
}

func (x source) includes(a netip.AddrPort) bool {
	return x.prefix.Contains(a.Addr()) && (x.port == 0 || x.port == a.Port())
}

// gate is the part of a mapping that is asked about flows.
type gate struct {
	allowed atomic.Pointer[[]source]

	mu      sync.Mutex // the handler of the bind's event makes it, the worker does the rest
	asked   filterapi.Action
	at      netip.AddrPort // external
	closed  bool
	failure error // why it could not be made
}

// byPort says whether ports of sources matter.
func (m *mapping) byPort() bool {
	return m.owner != nil && slices.ContainsFunc(m.filters, func(x source) bool { return x.port != 0 })
}

// keepGate has the gate ask for what may come by the claims there are. When it
// returns the kernel shows the flows to it.
func (m *mapping) keepGate(s filterapi.Session, proto flow.Proto, external netip.AddrPort) error {
	if !m.byPort() {
		return nil
	}
	allowed := slices.Clone(m.filters)
	for peer := range m.peers {
		allowed = append(allowed, source{prefix: netip.PrefixFrom(peer.Addr(), peer.Addr().BitLen())})
	}
	g := &m.gate
	g.allowed.Store(&allowed)
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.closed:
		return filterapi.ErrTerminating
	case g.asked != nil && g.at == external:
		return nil
	case g.asked != nil: // that was the bind of somebody else in the session
		_ = g.asked.Cancel() // or it has ended
	}
	g.at = external
	kind := filterapi.BindUDP
	if proto == flow.TCP {
		kind = filterapi.Accepted
	}
	g.asked, g.failure = s.SetDataFilterFactory(filterapi.DataFilterFactory{
		Event: kind, Address: external, Priority: filterapi.PriorityMiddle, New: g.judge,
	})
	return g.failure
}

// judge refuses the flows of sources that may not come. It makes no data filter.
func (g *gate) judge(c filterapi.Connection) (filterapi.DataFilter, error) {
	from := c.Tuple().Src
	if slices.ContainsFunc(*g.allowed.Load(), func(x source) bool { return x.includes(from) }) {
		return nil, nil
	}
	return nil, c.Deny()
}

// close takes the gate away for good, also from a handler that is late.
func (g *gate) close() (failure error) {
	g.mu.Lock()
	g.closed, failure = true, g.failure
	g.mu.Unlock()
	g.remove()
	return failure
}

// remove takes the gate away. Nobody may come in by then for whom it was there.
func (g *gate) remove() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.asked != nil {
		_ = g.asked.Cancel() // with the session it has gone already
		g.asked = nil
	}
}
