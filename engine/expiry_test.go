package engine

import (
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// TestAnExpiryThatIsSet stays whatever is set later, is what the kernel is told
// each time, and ends the bind.
func TestAnExpiryThatIsSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, f := officeBench(t)
		s, _ := f.call(t, b, client, control, outer)
		binds, err := s.BindForClient(filterapi.Bind{
			Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP, Flags: filterapi.AllowMultiple | filterapi.Timeout},
			Clients:    []netip.AddrPort{ap("10.0.0.2:5000")},
		})
		if err != nil {
			t.Fatal(err)
		}
		bind := binds[0]
		if err := bind.SetExpiry(time.Hour); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * filterapi.DefaultTimeout) // its Timeout has no effect any more
		if got := b.kernel.only(t); got.Timeout != time.Hour {
			t.Errorf("the kernel holds it for %v", got.Timeout)
		}
		if err := bind.SetIPFilter(nil); err != nil {
			t.Fatal(err)
		}
		if got := b.kernel.only(t); got.Timeout != time.Hour-2*filterapi.DefaultTimeout {
			t.Errorf("armed again, the kernel holds it for %v", got.Timeout)
		}
		if at, ends := bind.Expiry(); !ends || time.Until(at) != time.Hour-2*filterapi.DefaultTimeout {
			t.Errorf("expiry %v, %v", at, ends)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if err := bind.SetExpiry(time.Hour); !errors.Is(err, filterapi.ErrTerminating) || !b.kernel.empty() {
			t.Errorf("after its end: %v; the kernel holds %v", err, b.kernel.held)
		}
	})
}

// TestAnExpiryThatTheKernelRefuses closes the bind: it shall not outlive what
// its client was told.
func TestAnExpiryThatTheKernelRefuses(t *testing.T) {
	b, f := officeBench(t)
	s, _ := f.call(t, b, client, control, outer)
	binds, err := s.BindForClient(filterapi.Bind{
		Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP}, Clients: []netip.AddrPort{ap("10.0.0.2:5000")},
	})
	if err != nil {
		t.Fatal(err)
	}
	b.kernel.fail = errors.New("no")
	if err := binds[0].SetExpiry(time.Hour); err == nil {
		t.Error("no error")
	}
	if err := binds[0].SetIPFilter(nil); !errors.Is(err, filterapi.ErrTerminating) || !b.kernel.empty() {
		t.Errorf("afterwards %v; the kernel holds %v", err, b.kernel.held)
	}
}
