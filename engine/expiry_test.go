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

// TestTheSameSource: the kernel is told by which network rule the client
// leaves, as long as somebody may come, and by none where nothing is
// translated.
func TestTheSameSource(t *testing.T) {
	for name, c := range map[string]struct{ from, to, name, client, want string }{
		"translated": {client, control, outer, "10.0.0.2:5000", "internet"},
		"IPv6":       {inner6, "[2001:db8:b::10]:21", inner6, "[fd00:a::2]:5000", ""},
	} {
		t.Run(name, func(t *testing.T) {
			b, f := officeBench(t)
			s, _ := f.call(t, b, c.from, c.to, c.name)
			for i, primary := range []filterapi.Connection{s.primary, nil} {
				binds, err := s.BindForClient(filterapi.Bind{
					Negotiated: filterapi.Negotiated{Primary: primary, Protocol: "talk", Proto: flow.UDP, Flags: filterapi.SameSource | filterapi.AllowMultiple},
					Clients:    []netip.AddrPort{ap(c.client)},
				})
				if err != nil {
					t.Fatal(err)
				}
				k := b.kernel.only(t)
				if k.Leaves != c.want {
					t.Errorf("bind %d leaves by %q, want %q", i, k.Leaves, c.want)
				}
				b.KernelUsed(flow.Packet{Tuple: flow.Tuple{Proto: flow.UDP, Src: ap(c.to), Dst: k.External}, InIface: "wan0"})
				binds[0].Kill()
				for _, k := range b.kernel.held {
					if k.Leaves != "" {
						t.Errorf("closed, bind %d leaves by %q still", i, k.Leaves)
					}
				}
				b.KernelEnded(flow.End{Tuple: flow.Tuple{Proto: flow.UDP, Src: ap(c.to), Dst: k.External}, Path: flow.Kernel, Result: flow.Closed})
				b.calm()
				clear(b.kernel.held) // void, it waits for late reports
			}
		})
	}
}
