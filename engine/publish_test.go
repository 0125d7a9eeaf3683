package engine

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// publishing is testPolicy with an FTP server of the inside, and with hairpin.
func publishing(t *testing.T, server string, fromGateway bool) *policy.Policy {
	t.Helper()
	p := testPolicy(t, policy.Allow)
	rules := append(p.Rules(), policy.Rule{
		Name: "server", Action: policy.Publish, From: []string{"outside", "inside"}, Protocols: []string{"ftp"},
		Filters: []policy.FilterUse{{Name: "ftp", Options: "published"}},
		Publication: &policy.Publication{
			Addresses: []netip.Addr{ap("203.0.113.1:1").Addr()}, Servers: []netip.Addr{netip.MustParseAddr(server)}, FromGateway: fromGateway,
		},
	})
	p, err := policy.New(p.Networks(), p.NetworkRules(), p.Protocols(), rules)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const published = "203.0.113.1:21"

// accepting attaches to what is accepted, and keeps the last such event.
func accepting(last *filterapi.AcceptEvent) *probe {
	p := &probe{events: filterapi.Events{Types: filterapi.Accepted | filterapi.Terminating}}
	p.handle = func(ev filterapi.Event) error {
		a, ok := ev.(*filterapi.AcceptEvent)
		if !ok {
			return nil
		}
		*last = *a
		return a.Connection.AttachDataFilter(pumpless{}, filterapi.PriorityNAT)
	}
	return p
}

// come opens a connection to the published server.
func (b *bench) come(t *testing.T, src, iface string) *Takeover {
	t.Helper()
	p := syn(src, published)
	p.InIface = iface
	d := b.Decide(context.Background(), p)
	if d.Path != flow.User || d.Takeover == nil {
		t.Fatalf("decision %+v, want user", d)
	}
	d.Takeover.Connected(ap("10.0.0.1:33000"), d.Takeover.Dial.Target)
	return d.Takeover
}

// A published flow is an inbound one of the server's session, in by a bind that
// its rule stands for and that goes with its last flow.
func TestPublishedFlow(t *testing.T) {
	var ev filterapi.AcceptEvent
	p := accepting(&ev)
	b := newBench(t, p)
	b.SetPolicy(publishing(t, "10.0.0.5", false))
	tk := b.come(t, "203.0.113.10:5000", "wan0")
	if ev.Options != "published" || ev.Rule != "server" || ev.Local != ap(published) || ev.Secondary {
		t.Errorf("event %+v", ev)
	}
	want := Dial{Proto: flow.TCP, Target: ap("10.0.0.5:21"), Source: ap("203.0.113.10:5000"), Transparent: true}
	if tk.Dial != want || !tk.InitiatorExternal || tk.Conn().Session().ClientAddr() != ap("10.0.0.5:1").Addr() || tk.Conn().Flags() != 0 {
		t.Errorf("takeover %+v", tk)
	}
	if name, err := ev.Listener.ExternalName(); name != ap(published) || err != nil {
		t.Errorf("the listener is at %v, %v", name, err)
	}
	if err := ev.Listener.SetIPFilter(nil); !errors.Is(err, filterapi.ErrNotSupported) {
		t.Errorf("a filter changed who may come: %v", err)
	}
	ev.Listener.Kill()
	other := b.come(t, "203.0.113.10:5001", "wan0")
	if got := len(b.Permissions()); got != 0 || !b.kernel.empty() {
		t.Errorf("%d permissions, and the kernel holds %v", got, b.kernel.held)
	}
	if flows := b.PublishedFlows()["server"]; len(flows) != 2 {
		t.Errorf("flows %v", flows)
	}
	tk.Ended(flow.Counts{}, flow.Closed, "")
	other.Ended(flow.Counts{}, flow.Closed, "")
	b.calm()
	if got := b.Sessions(); len(got) != 0 || p.detached != 1 {
		t.Errorf("sessions %+v, detached %d times", got, p.detached)
	}
	end := b.logs.FilterMessage("flow").All()[0].ContextMap()
	if end["rule"] != "server" || end["nat_dst"] != "10.0.0.5:21" || end["permission"] != nil || end["nat_src"] != nil {
		t.Errorf("record %v", end)
	}
}

// What it negotiates goes to the external address, and out to the client that
// came, whatever joins the networks.
func TestPublishedNegotiates(t *testing.T) {
	for _, fromGateway := range []bool{false, true} {
		var ev filterapi.AcceptEvent
		b := newBench(t, accepting(&ev))
		b.SetPolicy(publishing(t, "10.0.0.5", fromGateway))
		tk := b.come(t, "203.0.113.10:5000", "wan0")
		if tk.Dial.Transparent == fromGateway || (tk.Conn().Flags() == filterapi.InternalAddressTranslation) != fromGateway {
			t.Errorf("dial %+v, flags %d", tk.Dial, tk.Conn().Flags())
		}
		s := ev.Connection.Session()
		n := filterapi.Negotiated{Primary: ev.Connection, Proto: flow.TCP, Flags: filterapi.Timeout}
		binds, err := s.BindForClient(filterapi.Bind{Negotiated: n, Clients: []netip.AddrPort{ap("10.0.0.5:4000")}, IPFilter: filterapi.OnlyFrom(ap("203.0.113.10:1").Addr())})
		if err != nil {
			t.Fatal(err)
		}
		if p := b.kernel.only(t); p.External.Addr() != ap(published).Addr() || p.FromGateway != fromGateway || p.Client != ap("10.0.0.5:4000") {
			t.Errorf("the kernel holds %+v", p)
		}
		binds[0].Kill()
		_, err = s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: ap("203.0.113.10:6000"), External: ap("203.0.113.1:20")})
		if p := b.kernel.only(t); err != nil || p.Source != ap("203.0.113.1:20") || p.Client.Addr() != ap("10.0.0.5:1").Addr() {
			t.Errorf("the kernel holds %+v, %v", p, err)
		}
		if _, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: ap("203.0.113.11:6000")}); !errors.Is(err, filterapi.ErrPolicyDenied) {
			t.Errorf("another host than the client: %v", err)
		}
		b.SetPolicy(publishing(t, "10.0.0.6", fromGateway))
		if err := b.Recheck(context.Background(), nil); err != nil {
			t.Fatal(err)
		}
		b.calm()
		select {
		case <-tk.Killed():
		default:
			t.Error("a flow that leads elsewhere by the new rules lives")
		}
		if !b.kernel.empty() {
			t.Errorf("and the kernel holds %v", b.kernel.held)
		}
	}
}

// Hairpin: the server sees the address that was asked for, and is told that as
// its peer's.
func TestPublishedHairpin(t *testing.T) {
	var ev filterapi.AcceptEvent
	b := newBench(t, accepting(&ev))
	b.SetPolicy(publishing(t, "10.0.0.5", false))
	tk := b.come(t, "10.0.0.3:5000", "lan0")
	if tk.Dial.Source != ap("203.0.113.1:0") || tk.Dial.Transparent || tk.Conn().Flags() != filterapi.InternalAddressTranslation {
		t.Errorf("dial %+v, flags %d", tk.Dial, tk.Conn().Flags())
	}
	inside, _, err := ev.Connection.Session().RedirectConnections(filterapi.Redirect{
		Negotiated: filterapi.Negotiated{Primary: ev.Connection, Proto: flow.TCP}, Targets: []netip.AddrPort{ap("10.0.0.3:6000")},
	})
	if err != nil || inside.Addr() != ap(published).Addr() {
		t.Errorf("the server is told %v, %v", inside, err)
	}
}

// Of the kernel's flows that user space never saw, those are cut that lead
// elsewhere by the new rules.
func TestPublishedKernelFlows(t *testing.T) {
	var ev filterapi.AcceptEvent
	b := newBench(t, accepting(&ev))
	b.SetPolicy(publishing(t, "10.0.0.5", false))
	in := flow.Tuple{Proto: flow.TCP, Src: ap("203.0.113.10:5000"), Dst: ap(published)}
	for server, cut := range map[string]int{"10.0.0.5:21": 0, "10.0.0.6:21": 1} {
		b.kernel.cut = nil
		if err := b.Recheck(context.Background(), []KernelFlow{{Tuple: in, Translation: flow.Translation{Dst: ap(server)}}}); err != nil || len(b.kernel.cut) != cut {
			t.Errorf("to %s: cut %v, %v", server, b.kernel.cut, err)
		}
	}
}

// The end of the server's session ends what the kernel carries to it.
func TestPublishedDisconnect(t *testing.T) {
	var ev filterapi.AcceptEvent
	b := newBench(t, accepting(&ev))
	b.SetPolicy(publishing(t, "10.0.0.5", false))
	tk := b.come(t, "203.0.113.10:5000", "wan0")
	in := flow.Tuple{Proto: flow.TCP, Src: ap("203.0.113.11:5000"), Dst: ap(published)}
	other := flow.Tuple{Proto: flow.TCP, Src: ap("203.0.113.11:5000"), Dst: ap("10.0.0.9:80")}
	if err := b.Disconnect(context.Background(), ev.Connection.Session().ID(), []flow.Tuple{in, other}); err != nil {
		t.Fatal(err)
	}
	if len(b.kernel.cut) != 1 || b.kernel.cut[0] != in {
		t.Errorf("cut %v", b.kernel.cut)
	}
	<-tk.Killed()
}
