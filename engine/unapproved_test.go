package engine

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// TestNothingIsOpenWhileFiltersAreAsked: what a handler of a BindEvent does to
// the bind opens nothing before all filters have had their say.
func TestNothingIsOpenWhileFiltersAreAsked(t *testing.T) {
	for name, c := range map[string]struct {
		client string
		open   func(filterapi.Connection) error
	}{
		"SetIPFilter": {"10.0.0.2:5000", func(c filterapi.Connection) error { return c.SetIPFilter(nil) }},
		"SetClientAddress": {"0.0.0.0:0", func(c filterapi.Connection) error {
			return c.SetClientAddress(netip.MustParseAddrPort("10.0.0.2:5000"))
		}},
	} {
		for _, denies := range []bool{true, false} {
			p := attaching(&probe{})
			p.events = filterapi.Events{Types: p.events.Types | filterapi.BindTCP, Secondary: true}
			b, _ := talkBench(t, p)
			connect := p.handle
			p.handle = func(ev filterapi.Event) error {
				e, ok := ev.(*filterapi.BindEvent)
				if !ok {
					return connect(ev)
				}
				if err := c.open(e.Connection); err != nil {
					t.Error(err)
				}
				if !b.kernel.empty() {
					t.Errorf("%s: open in the kernel while filters are asked: %v", name, b.kernel.held)
				}
				if denies {
					return e.Connection.Deny()
				}
				return nil
			}
			tk := b.decide(t)
			_, err := tk.flow.session.handle(b.filters[0]).BindForClient(filterapi.Bind{
				Negotiated: filterapi.Negotiated{Primary: tk.flow.handle(b.filters[0]), Proto: flow.TCP},
				Clients:    []netip.AddrPort{netip.MustParseAddrPort(c.client)},
			})
			if denies != errors.Is(err, filterapi.ErrPolicyDenied) || denies != b.kernel.empty() {
				t.Errorf("%s, denied %v: %v, kernel %v", name, denies, err, b.kernel.held)
			}
		}
	}
}
