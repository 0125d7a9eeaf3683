package engine

import (
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// TestWhoCarriesTheFlowsOfAPermission, as it is shown to people.
func TestWhoCarriesTheFlowsOfAPermission(t *testing.T) {
	watch := filterapi.ConnectTCP | filterapi.UDPDestination
	for name, x := range map[string]struct {
		watched filterapi.EventMask // of secondary connections
		onBind  func(filterapi.Connection) error
		flags   filterapi.Flags
		factory filterapi.EventMask
		want    string
	}{
		"nobody asks":        {want: "kernel", flags: filterapi.Bidirectional},
		"one way":            {want: "kernel"},
		"filters are asked":  {watched: watch, flags: filterapi.Bidirectional, want: "asked"},
		"asked, and one way": {watched: watch, want: "user"},
		"no kernel mode":     {flags: filterapi.Bidirectional | filterapi.NoKernelMode, want: "user"},
		"a data filter": {watched: filterapi.BindUDP, flags: filterapi.Bidirectional, want: "user", onBind: func(c filterapi.Connection) error {
			return c.AttachDataFilter(tagged{}, filterapi.PriorityNAT)
		}},
		"a data filter for one peer": {watched: filterapi.BindUDP, flags: filterapi.Bidirectional, want: "asked", onBind: func(c filterapi.Connection) error {
			return c.AttachDataFilterWithDestination(tagged{}, filterapi.PriorityNAT, ap(phone))
		}},
		"emulated":          {watched: filterapi.BindUDP, flags: filterapi.Bidirectional, want: "user", onBind: filterapi.Connection.EmulateForBind},
		"a factory for all": {flags: filterapi.Bidirectional, factory: filterapi.BindUDP, want: "asked"},
		"a factory for one": {flags: filterapi.Bidirectional, factory: filterapi.UDPDestination, want: "asked"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP | x.watched, Secondary: x.watched != 0}}
			p.handle = func(ev filterapi.Event) error {
				switch e := ev.(type) {
				case *filterapi.ConnectEvent:
					return e.Connection.AttachDataFilter(tagged{}, filterapi.PriorityNAT)
				case *filterapi.BindEvent:
					return x.onBind(e.Connection)
				}
				return nil
			}
			b, _ := talkBench(t, p)
			tk := b.decide(t)
			s := tk.flow.session.handle(b.filters[0])
			if x.factory != 0 {
				at := "0.0.0.0:0"
				if x.factory == filterapi.UDPDestination {
					at = phone
				}
				if _, err := s.SetDataFilterFactory(making(x.factory, at, "made")); err != nil {
					t.Fatal(err)
				}
			}
			n := filterapi.Negotiated{Primary: tk.flow.handle(b.filters[0]), Proto: flow.UDP, Flags: x.flags}
			if _, err := s.BindForClient(filterapi.Bind{Negotiated: n, Clients: []netip.AddrPort{ap("10.0.0.2:6000")}}); err != nil {
				t.Fatal(err)
			}
			if got := b.Permissions(); len(got) != 1 || got[0].Path != x.want {
				t.Errorf("shown %+v, want path %s", got, x.want)
			}
		})
	}
}
