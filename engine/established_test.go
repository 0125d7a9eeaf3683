package engine

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// hear takes the one event that the session filter got.
func (s *callerSession) hear(t *testing.T) *filterapi.EstablishedEvent {
	t.Helper()
	select {
	case e := <-s.heard:
		return e
	case <-time.After(10 * time.Second):
		t.Fatal("no event")
		return nil
	}
}

// TestEstablishedOncePerConnection: whichever report comes first, and however
// often, the session filter that the call named hears of each connection once.
func TestEstablishedOncePerConnection(t *testing.T) {
	for name, fails := range map[string]error{"handled": nil, "failed": errors.New("broken"), "panicked": errPanics} {
		t.Run(name, func(t *testing.T) {
			b, f := officeBench(t)
			s, tk := f.call(t, b, client, control, outer)
			other, _ := f.call(t, b, "10.0.0.3:40000", control, "203.0.113.1:33001")
			s.fails = fails
			n := filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP, Flags: filterapi.AllowMultiple, Notify: s, Context: "mine"}
			inside, actions, err := s.RedirectConnections(filterapi.Redirect{Negotiated: n, Targets: []netip.AddrPort{ap("203.0.113.10:2000")}})
			if err != nil {
				t.Fatal(err)
			}
			if b.kernel.watching() != 1 {
				t.Fatalf("watched %d times", b.kernel.watching())
			}
			var flows []flow.Tuple
			for i := range 4 {
				p := flow.Packet{Tuple: flow.Tuple{Proto: flow.TCP, Src: netip.AddrPortFrom(ap(client).Addr(), uint16(41000+i)), Dst: inside}, InIface: "lan0"}
				flows = append(flows, p.Tuple)
				if i%2 == 0 { // the word of conntrack may overtake that of the packet
					b.KernelEstablished(p.Tuple)
				}
				b.KernelUsed(p)
				b.KernelEstablished(p.Tuple)
				b.KernelEstablished(p.Tuple)
				e := s.hear(t)
				if e.Context != "mine" || e.Proto != flow.TCP || e.Connection.Tuple() != p.Tuple {
					t.Errorf("event %+v of %v", e, e.Connection.Tuple())
				}
			}
			b.calm()
			if err := actions[0].Cancel(); err != nil {
				t.Error(err)
			}
			for _, x := range flows {
				b.KernelEnded(flow.End{Tuple: x, Path: flow.Kernel, Result: flow.Closed})
				b.KernelEstablished(x)
			}
			b.calm()
			if len(s.heard)+len(other.heard) != 0 || len(s.ended) != 4 {
				t.Errorf("%d events more, %d to another, %d ended", len(s.heard), len(other.heard), len(s.ended))
			}
			tk.Ended(flow.Counts{}, flow.Closed, "")
		})
	}
}

// TestEstablishedInUserSpace: the takeover says so, and conntrack is not asked.
func TestEstablishedInUserSpace(t *testing.T) {
	b, f := officeBench(t)
	s, _ := f.call(t, b, client, control, outer)
	n := filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP, Flags: filterapi.NoKernelMode, Notify: s}
	binds, err := s.BindForClient(filterapi.Bind{Negotiated: n, Clients: []netip.AddrPort{ap("10.0.0.2:5000")}})
	if err != nil || b.kernel.watching() != 0 {
		t.Fatalf("%v, watched %d times", err, b.kernel.watching())
	}
	in := flow.Packet{Tuple: flow.Tuple{Proto: flow.TCP, Src: ap("203.0.113.10:20"), Dst: binds[0].Tuple().Dst}, InIface: "wan0"}
	d := b.Decide(t.Context(), in)
	if d.Path != flow.User || !d.Takeover.InitiatorExternal || d.Takeover.Dial.Target != ap("10.0.0.2:5000") {
		t.Fatalf("decision %+v", d)
	}
	d.Takeover.Connected(ap("10.0.0.1:1"), ap("10.0.0.2:5000"))
	d.Takeover.Established()
	d.Takeover.Established()
	if e := s.hear(t); e.Connection.Tuple() != in.Tuple || e.Connection == binds[0] {
		t.Errorf("event %+v", e)
	}
	// The bind is used up: one object for it, one for the flow.
	b.calm()
	if len(s.ended) != 0 || len(b.Permissions()) != 1 || b.Permissions()[0].State != "used" {
		t.Errorf("%d ended; %+v", len(s.ended), b.Permissions())
	}
	d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
	d.Takeover.Established()
	b.calm()
	if len(s.heard) != 0 || len(s.ended) != 1 || <-s.ended == binds[0] || !b.kernel.empty() {
		t.Errorf("%d events more, %d ended, kernel %v", len(s.heard), len(s.ended), b.kernel.held)
	}
}

// TestConntrackIsWatchedNoLongerThanNeeded: its reports cost.
func TestConntrackIsWatchedNoLongerThanNeeded(t *testing.T) {
	b, f := officeBench(t)
	s, _ := f.call(t, b, client, control, outer)
	ask := func(f *filterapi.IPFilter) filterapi.Connection {
		binds, err := s.BindForClient(filterapi.Bind{Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.UDP, Notify: s}, Clients: []netip.AddrPort{ap("10.0.0.2:5000")}, IPFilter: f})
		if err != nil {
			t.Fatal(err)
		}
		return binds[0]
	}
	steps := func(want int, what string) {
		t.Helper()
		b.calm()
		if n := b.kernel.watching(); n != want {
			t.Errorf("%s: watched %d times, want %d", what, n, want)
		}
	}
	bind := ask(filterapi.OnlyFrom())
	steps(0, "reserved")
	if err := bind.SetIPFilter(nil); err != nil {
		t.Fatal(err)
	}
	steps(1, "armed")
	in := flow.Packet{Tuple: flow.Tuple{Proto: flow.UDP, Src: ap("203.0.113.10:20"), Dst: bind.Tuple().Dst}, InIface: "wan0"}
	b.KernelUsed(in)
	steps(1, "used, and not established")
	b.KernelEstablished(in.Tuple)
	steps(0, "established")
	b.KernelEnded(flow.End{Tuple: in.Tuple, Path: flow.Kernel, Result: flow.Closed})
	steps(0, "ended")

	b.kernel.mu.Lock()
	b.kernel.fail = errors.New("no socket")
	b.kernel.mu.Unlock()
	if _, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP, Notify: s}, Target: ap("203.0.113.10:1")}); err == nil {
		t.Error("granted, and nobody will hear of its flows")
	}
	b.kernel.mu.Lock()
	b.kernel.fail = nil
	b.kernel.mu.Unlock()
	steps(0, "refused")
}
