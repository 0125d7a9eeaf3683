package engine

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// TestAPermissionThatLeadsElsewhereIsInTheWay: every call that the kernel
// refuses for another one's sake says so, in the filters' terms.
func TestAPermissionThatLeadsElsewhereIsInTheWay(t *testing.T) {
	b, f := officeBench(t)
	s, _ := f.call(t, b, client, control, outer)
	n := filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP}
	target, inner := ap("203.0.113.10:2000"), ap("10.0.0.2:5000")
	bind := func(x filterapi.Bind) (filterapi.Connection, error) {
		x.Negotiated.Primary, x.Negotiated.Proto = s.primary, flow.TCP
		binds, err := s.BindForClient(x)
		if err != nil {
			return nil, err
		}
		return binds[0], nil
	}
	open := func(x filterapi.Bind) filterapi.Connection {
		c, err := bind(x)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	reserved := open(filterapi.Bind{Clients: []netip.AddrPort{inner}, IPFilter: filterapi.OnlyFrom()})
	waiting := open(filterapi.Bind{Clients: []netip.AddrPort{{}}})
	discarding := open(filterapi.Bind{Clients: []netip.AddrPort{inner}, Negotiated: filterapi.Negotiated{Flags: filterapi.Discarding}})
	b.kernel.fail = fmt.Errorf("install: %w", nat.ErrConflict)
	for name, call := range map[string]func() error{
		"AllowFutureConnect": func() error {
			_, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: target})
			return err
		},
		"RedirectConnections": func() error {
			_, _, err := s.RedirectConnections(filterapi.Redirect{Negotiated: n, Targets: []netip.AddrPort{target}})
			return err
		},
		"BindForClient": func() error {
			_, err := bind(filterapi.Bind{Clients: []netip.AddrPort{inner}})
			return err
		},
		"SetIPFilter":      func() error { return reserved.SetIPFilter(nil) },
		"SetClientAddress": func() error { return waiting.SetClientAddress(inner) },
		"RetroactiveAllowBind": func() error {
			_, err := s.RetroactiveAllowBind(filterapi.AllowBind{Proto: flow.TCP, Address: discarding.Tuple().Dst})
			return err
		},
		"SetDataFilterFactory": func() error {
			_, err := s.SetDataFilterFactory(making(filterapi.ConnectTCP, target.String(), "data"))
			return err
		},
	} {
		if err := call(); !errors.Is(err, filterapi.ErrAlreadyExists) || !errors.Is(err, nat.ErrConflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
