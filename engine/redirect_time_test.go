package engine

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// TestARedirectWaitsOnceForItsFilters: however many targets it has, the call
// returns within the time that a call has.
func TestARedirectWaitsOnceForItsFilters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := false
		p := &openProbe{probe: &probe{events: filterapi.Events{Types: filterapi.ConnectTCP, Secondary: true}}, mode: filterapi.FailOpen}
		p.handle = func(ev filterapi.Event) error {
			if slow {
				time.Sleep(DefaultAnswer / 2)
			}
			return ev.(*filterapi.ConnectEvent).Connection.AttachDataFilter(pumpless{}, filterapi.PriorityNAT)
		}
		b := newBench(t, p)
		tk := b.decide(t)
		slow = true
		start := time.Now()
		_, actions, err := tk.Conn().Session().RedirectConnections(filterapi.Redirect{
			Negotiated: negotiated(tk, flow.TCP, 0),
			Targets:    []netip.AddrPort{ap("203.0.113.10:2000"), ap("203.0.113.10:2001"), ap("203.0.113.10:2002")},
		})
		if took := time.Since(start); err != nil || len(actions) != 3 || took > DefaultAnswer {
			t.Errorf("%v, %d actions, after %v; want 3 within %v", err, len(actions), took, DefaultAnswer)
		}
		time.Sleep(time.Minute) // the handlers end
		tk.Ended(flow.Counts{}, flow.Closed, "")
		b.Stop()
	})
}
