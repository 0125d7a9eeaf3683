package filtertest

import (
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// Raise gives the filter an event of a client's session that the test made by
// hand, whatever the filter is registered for, and returns what the handler
// said, or ErrPolicyDenied if it denied. An event without a Connection gets one
// between the client and the address in the event; the machine does nothing
// with what the handler does to it.
func (g *Gateway) Raise(client netip.AddrPort, ev filterapi.Event) error {
	s := g.session(client.Addr())
	a, err := s.attach()
	if err != nil || a.filter == nil {
		return err
	}
	c := g.byHand(s, client, ev)
	if c == nil {
		return g.handle(a.filter, ev)
	}
	c.open(ev.Kind())
	err = g.handle(a.filter, ev)
	if c.shut() && err == nil {
		err = filterapi.ErrPolicyDenied
	}
	return err
}

// byHand gives an event a connection if it has none, and returns that; nil: the
// event has one that is not the machine's.
func (g *Gateway) byHand(s *session, client netip.AddrPort, ev filterapi.Event) *connection {
	t := flow.Tuple{Proto: flow.TCP, Src: client}
	var about *filterapi.About
	var bare *filterapi.Connection
	switch ev := ev.(type) {
	case *filterapi.ConnectEvent:
		t.Dst, about = ev.Target, &ev.About
	case *filterapi.UDPDestinationEvent:
		t.Proto, t.Dst, about = flow.UDP, ev.Peer, &ev.About
	case *filterapi.BindEvent:
		t.Src, t.Dst, about = netip.AddrPort{}, ev.External, &ev.About
		if !ev.TCP {
			t.Proto = flow.UDP
		}
	case *filterapi.ListenEvent:
		t.Src, t.Dst, about = netip.AddrPort{}, ev.External, &ev.About
	case *filterapi.AcceptEvent:
		t.Src, t.Dst, about = ev.Remote, ev.Local, &ev.About
	case *filterapi.EstablishedEvent:
		t.Proto, bare = ev.Proto, &ev.Connection
	case *filterapi.TerminatingEvent:
		bare = &ev.Connection
	}
	if about != nil {
		bare = &about.Connection
	}
	if bare == nil {
		return nil
	}
	if *bare == nil {
		*bare = g.newConnection(s, t)
	}
	c, _ := (*bare).(*connection)
	if d, ok := ev.(*filterapi.UDPDestinationEvent); ok && d.Destination == nil && c != nil {
		d.Destination = c
	}
	return c
}
