package filtertest

import (
	"context"
	"fmt"
	"slices"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// inFactory is what runs while a factory's New does.
const inFactory = filterapi.EventMask(1 << 15)

// factory attaches data filters to connections to come.
type factory struct {
	session *session
	ask     filterapi.DataFilterFactory
}

func (f *factory) String() string {
	names := map[filterapi.EventMask]string{
		filterapi.ConnectTCP: "connect", filterapi.UDPDestination: "destination",
		filterapi.Accepted: "accept", filterapi.BindUDP: "bind",
	}
	return fmt.Sprintf("%s %s", names[f.ask.Event], f.ask.Address)
}

// SetDataFilterFactory implements filterapi.Session.
func (s *session) SetDataFilterFactory(f filterapi.DataFilterFactory) (filterapi.Action, error) {
	g := s.gateway
	fail := func(err error) (filterapi.Action, error) {
		return nil, fmt.Errorf("data filter factory at %v: %w", f.Address, err)
	}
	switch {
	case f.New == nil, !f.Address.IsValid(), !f.Address.Addr().IsUnspecified() && f.Address.Addr().Is4() != s.addr.Is4(), f.Flags&^filterapi.AddressBased != 0,
		f.Priority < filterapi.PriorityNAT, f.Priority > filterapi.PriorityEmulation,
		f.Event != filterapi.ConnectTCP && f.Event != filterapi.UDPDestination && f.Event != filterapi.Accepted && f.Event != filterapi.BindUDP:
		return fail(filterapi.ErrInvalidArgument)
	}
	x := &factory{s, f}
	g.journal.add(Entry{Asked, "factory for " + x.String()})
	g.mu.Lock()
	err := g.admit(s, 1)
	g.mu.Unlock()
	if err != nil {
		return fail(err)
	}
	g.acknowledge()
	g.mu.Lock()
	defer g.mu.Unlock()
	if s.ended {
		return fail(filterapi.ErrTerminating)
	}
	g.factories = append(g.factories, x)
	g.journal.add(Entry{Factory, x.String()})
	return x, nil
}

// Cancel implements filterapi.Action.
func (f *factory) Cancel() error {
	g := f.session.gateway
	g.mu.Lock()
	i := slices.Index(g.factories, f)
	if i >= 0 {
		g.factories = slices.Delete(g.factories, i, i+1)
	}
	g.mu.Unlock()
	if i < 0 {
		return filterapi.ErrTerminating
	}
	g.journal.add(Entry{Cancelled, "factory " + f.String()})
	return nil
}

// fits says whether a factory is for a flow.
func (f *factory) fits(fl *Flow) bool {
	c := fl.conn
	kind, addr := filterapi.ConnectTCP, fl.Server.addr
	in := c.perm != nil && c.perm.kind == inbound
	switch {
	case fl.tuple.Proto == flow.UDP && in && f.ask.Event == filterapi.BindUDP:
		kind, addr = filterapi.BindUDP, fl.tuple.Dst
	case fl.tuple.Proto == flow.UDP:
		kind = filterapi.UDPDestination
	case in:
		kind, addr = filterapi.Accepted, fl.tuple.Dst
	}
	want := f.ask.Address
	return f.ask.Event == kind &&
		(f.session == c.session || f.ask.Flags&filterapi.AddressBased != 0 && f.session.addr == c.session.addr) &&
		(want.Port() == 0 || want.Port() == addr.Port()) &&
		(want.Addr().IsUnspecified() || want.Addr() == addr.Addr())
}

// fromFactories are the data filters that factories make for a flow.
func (g *Gateway) fromFactories(fl *Flow) ([]attached, error) {
	g.mu.Lock()
	var fitting []*factory
	for _, f := range g.factories {
		if f.fits(fl) {
			fitting = append(fitting, f)
		}
	}
	g.mu.Unlock()
	var out []attached
	for _, f := range fitting {
		var df filterapi.DataFilter
		fl.conn.during(inFactory)
		err := within(g.HandlerTime, func(context.Context) (err error) {
			df, err = f.ask.New(fl.conn)
			return err
		})
		denied := fl.conn.shut()
		if err != nil {
			if err = g.failed(fl.conn, err); err != nil {
				return nil, err
			}
			continue
		}
		if denied {
			return nil, fmt.Errorf("filter %q: %w", g.filter.Name(), filterapi.ErrPolicyDenied)
		}
		if df != nil {
			out = append(out, attached{filter: df, priority: f.ask.Priority})
		}
	}
	return out, nil
}
