package engine

import (
	"context"
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// TestAListenerEndsAfterTheAcceptThatUsesItUp: the bind is over for a filter
// only when its handler of the event that names it has returned.
func TestAListenerEndsAfterTheAcceptThatUsesItUp(t *testing.T) {
	var listener atomic.Pointer[filterapi.Connection]
	var handled, ended, tooEarly atomic.Bool
	p := attaching(&probe{})
	p.events = filterapi.Events{
		Types:     filterapi.ConnectTCP | filterapi.BindTCP | filterapi.Accepted | filterapi.Terminating,
		Secondary: true, AnyProtocol: true,
	}
	attach, b := p.handle, (*bench)(nil)
	p.handle = func(ev filterapi.Event) error {
		switch ev := ev.(type) {
		case *filterapi.AcceptEvent:
			listener.Store(&ev.Listener)
			b.tasks.wait() // whatever the use has set going is over
			handled.Store(true)
			return nil
		case *filterapi.TerminatingEvent:
			if l := listener.Load(); l == nil || *l == ev.Connection {
				ended.Store(true)
				tooEarly.Store(!handled.Load())
			}
			return nil
		}
		return attach(ev)
	}
	b = newBench(t, p)
	tk := b.decide(t)
	binds, err := tk.Conn().Session().BindForClient(filterapi.Bind{
		Negotiated: negotiated(tk, flow.TCP, 0), Clients: []netip.AddrPort{ap("10.0.0.2:5000")},
	})
	if err != nil {
		t.Fatal(err)
	}
	at, err := binds[0].ExternalName()
	if err != nil {
		t.Fatal(err)
	}
	in := syn("203.0.113.10:20", at.String())
	in.InIface = "wan0"
	b.Decide(context.Background(), in)
	b.calm()
	if !handled.Load() || !ended.Load() || tooEarly.Load() {
		t.Errorf("handled %v, the bind ended %v, before that %v", handled.Load(), ended.Load(), tooEarly.Load())
	}
}
