package engine

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// TestWhereBindsOpen: the external address of a bind follows the path of its
// primary connection, and what the filter asks for.
func TestWhereBindsOpen(t *testing.T) {
	const server6 = "[2001:db8:b::10]:21"
	peer := filterapi.OnlyFrom(netip.MustParseAddr("203.0.113.10"))
	for name, c := range map[string]struct {
		from, to, name string // of the primary connection
		external       string
		client         string
		protocol       string // set: without the primary connection
		filter         *filterapi.IPFilter
		flags          filterapi.Flags
		want           string // port 0: one of the leases
	}{
		"behind the gateway":            {from: client, to: control, name: outer, want: "203.0.113.1:0"},
		"at another address":            {from: client, to: control, name: outer, external: "203.0.113.2:0", want: "203.0.113.2:0"},
		"at a port":                     {from: client, to: control, name: outer, external: "203.0.113.2:7000", want: "203.0.113.2:7000"},
		"at the end of the primary":     {from: client, to: control, name: outer, external: outer, want: outer},
		"routed":                        {from: client, to: "192.168.1.9:21", name: client, want: "10.0.0.2:5000"},
		"routed, at the primary's":      {from: client, to: "192.168.1.9:21", name: client, external: client, client: client, want: client},
		"routed, an address wanted":     {from: client, to: "192.168.1.9:21", name: client, external: "192.168.1.1:0", want: "192.168.1.1:0"},
		"IPv6":                          {from: inner6, to: server6, name: inner6, client: "[fd00:a::2]:5000", want: "[fd00:a::2]:5000"},
		"IPv6, an address wanted":       {from: inner6, to: server6, name: inner6, client: "[fd00:a::2]:5000", external: "[2001:db8:b::1]:0", want: "[2001:db8:b::1]:0"},
		"no primary":                    {from: client, to: control, name: outer, protocol: "talk", filter: peer, want: "203.0.113.1:0"},
		"no primary, no peer":           {from: client, to: control, name: outer, protocol: "talk", want: "203.0.113.1:0"},
		"no primary, a peer inside":     {from: client, to: control, name: outer, protocol: "talk", filter: filterapi.OnlyFrom(netip.MustParseAddr("10.0.0.3")), want: "203.0.113.1:0"},
		"a port by its number":          {from: client, to: control, name: outer, protocol: "talk", external: "0.0.0.0:7000", want: "203.0.113.1:7000"},
		"a wish":                        {from: client, to: control, name: outer, external: "0.0.0.0:7000", flags: filterapi.Preferred, want: "203.0.113.1:7000"},
		"a wish for a service's":        {from: client, to: control, name: outer, external: "0.0.0.0:22", flags: filterapi.Preferred, want: "203.0.113.1:0"},
		"a wish for the kernel's":       {from: client, to: control, name: outer, external: "0.0.0.0:20000", flags: filterapi.Preferred, want: "203.0.113.1:0"},
		"a wish where it is routed":     {from: inner6, to: server6, name: inner6, client: "[fd00:a::2]:5000", external: "[::]:7000", flags: filterapi.Preferred, want: "[fd00:a::2]:5000"},
		"its own port":                  {from: inner6, to: server6, name: inner6, client: "[fd00:a::2]:5000", external: "[::]:5000", want: "[fd00:a::2]:5000"},
		"no primary, an address wanted": {from: client, to: control, name: outer, protocol: "talk", external: "203.0.113.2:0", want: "203.0.113.2:0"},
		"no primary, IPv6":              {from: inner6, to: server6, name: inner6, client: "[fd00:a::2]:5000", protocol: "talk", want: "[fd00:a::2]:5000"},
		"not allowed yet":               {from: client, to: control, name: outer, protocol: "telnet", external: "203.0.113.2:0", flags: filterapi.Discarding, want: "203.0.113.2:0"},
		"unknown client":                {from: client, to: control, name: outer, client: "0.0.0.0:0", want: "203.0.113.1:0"},
		"unknown client, IPv6":          {from: inner6, to: server6, name: inner6, client: "[::]:0"},
	} {
		t.Run(name, func(t *testing.T) {
			b, f := officeBench(t)
			s, _ := f.call(t, b, c.from, c.to, c.name)
			n := filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP, Flags: c.flags}
			if c.protocol != "" {
				n.Primary, n.Protocol = nil, c.protocol
			}
			ask := filterapi.Bind{Negotiated: n, Clients: []netip.AddrPort{ap("10.0.0.2:5000")}, IPFilter: c.filter}
			if c.client != "" {
				ask.Clients[0] = ap(c.client)
			}
			if c.external != "" {
				ask.External = ap(c.external)
			}
			binds, err := s.BindForClient(ask)
			if err != nil {
				t.Fatal(err)
			}
			got, err := binds[0].ExternalName()
			if got != binds[0].Tuple().Dst || c.want == "" != (err != nil) {
				t.Errorf("name %v, %v; tuple %v", got, err, binds[0].Tuple())
			}
			if want := c.want; want != "" && (got.Addr() != ap(want).Addr() || got.Port() == 0 || ap(want).Port() != 0 && got.Port() != ap(want).Port()) {
				t.Errorf("at %v, want %s", got, want)
			}
			if waiting := ask.Clients[0].Addr().IsUnspecified(); waiting || c.flags == filterapi.Discarding {
				if !b.kernel.empty() {
					t.Errorf("kernel holds %v", b.kernel.held)
				}
			} else if k := b.kernel.only(t); k.External != got || k.Client != ask.Clients[0] {
				t.Errorf("kernel holds %+v", k)
			}
			if lent, leased := c.external == c.name && c.name != "" || got == ask.Clients[0] || !got.IsValid(), b.ports.Leased(); lent == (leased == 1) {
				t.Errorf("%d ports are leased", leased)
			}
		})
	}
}

// TestAPinholeForAClientToCome: on a routed path its place is known with the
// client's address alone.
func TestAPinholeForAClientToCome(t *testing.T) {
	b, f := officeBench(t)
	s, _ := f.call(t, b, inner6, "[2001:db8:b::10]:21", inner6)
	binds, err := s.BindForClient(filterapi.Bind{Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.UDP}, Clients: []netip.AddrPort{{}}})
	if err != nil {
		t.Fatal(err)
	}
	at := ap("[fd00:a::2]:5000")
	in := flow.Packet{Tuple: flow.Tuple{Proto: flow.UDP, Src: ap("[2001:db8:b::10]:99"), Dst: at}, InIface: "wan0"}
	if p := b.usePermission(in.Tuple, true); p != nil {
		t.Fatal("a flow came before the address")
	}
	if err := binds[0].SetClientAddress(at); err != nil {
		t.Fatal(err)
	}
	if name, err := binds[0].ExternalName(); err != nil || name != at || b.kernel.only(t).External != at || !b.kernel.only(t).OneWay {
		t.Errorf("name %v, %v; kernel %v", name, err, b.kernel.held)
	}
	b.KernelUsed(in)
	if got := b.Permissions(); len(got) != 1 || len(got[0].Living) != 1 {
		t.Errorf("permissions %+v", got)
	}
	b.KernelEnded(flow.End{Tuple: in.Tuple, Path: flow.Kernel, Result: flow.Closed})
	b.calm()
	if !b.kernel.empty() || len(b.Permissions()) != 0 {
		t.Errorf("left: %v", b.kernel.held)
	}
	if err := binds[0].SetClientAddress(at); !errors.Is(err, filterapi.ErrInvalidArgument) {
		t.Errorf("again: %v", err)
	}
}

// TestTheSourceThatIsAskedFor: for the kernel, and for user space.
func TestTheSourceThatIsAskedFor(t *testing.T) {
	for _, flags := range []filterapi.Flags{0, filterapi.NoKernelMode} {
		b, f := officeBench(t)
		s, _ := f.call(t, b, client, control, outer)
		n := filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP, Flags: flags}
		target, from := ap("203.0.113.10:2000"), ap("203.0.113.2:7000")
		if _, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: target, External: from}); err != nil {
			t.Fatal(err)
		}
		first := syn("10.0.0.2:40009", target.String())
		if k := b.kernel.only(t); k.Source != from || k.ToUser != (flags != 0) {
			t.Errorf("kernel holds %+v", k)
		}
		if flags == 0 {
			b.KernelUsed(first)
			b.calm()
			b.kernel.only(t) // its first packet may not have got there yet
			b.KernelEnded(flow.End{Tuple: first.Tuple, Path: flow.Kernel, Result: flow.Closed})
		} else {
			d := b.Decide(context.Background(), first)
			if d.Path != flow.User || d.Takeover.Dial.Source != from || d.Takeover.Dial.Transparent {
				t.Fatalf("decision %+v", d)
			}
			d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
		}
		b.calm()
		if !b.kernel.empty() {
			t.Errorf("left: %v", b.kernel.held)
		}
	}
}

// TestSourceOfACutFlow: the target is free for another source as soon as the
// flow is cut, and not only when it has ended.
func TestSourceOfACutFlow(t *testing.T) {
	b, f := officeBench(t)
	s, _ := f.call(t, b, client, control, outer)
	n := filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP}
	allow := func(from string) {
		t.Helper()
		if _, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: ap("203.0.113.10:2000"), External: ap(from)}); err != nil {
			t.Fatal(err)
		}
	}
	allow("203.0.113.2:7000")
	first := syn("10.0.0.2:40009", "203.0.113.10:2000")
	b.KernelUsed(first)
	b.calm()
	c := b.flows.find(first.Tuple)
	c.Kill()
	c.Kill()
	if !b.kernel.empty() {
		t.Errorf("after the cut the kernel holds %v", b.kernel.held)
	}
	allow("203.0.113.2:7002")
	b.KernelEnded(flow.End{Tuple: first.Tuple, Path: flow.Kernel, Result: flow.Closed})
	b.calm()
	if k := b.kernel.only(t); k.Source != ap("203.0.113.2:7002") || len(b.Permissions()) != 1 {
		t.Errorf("the kernel holds %+v, permissions %+v", k, b.Permissions())
	}
}

// TestPermissionsByProtocol: they stand on the rule that allows the protocol
// by its name, and fall with it.
func TestPermissionsByProtocol(t *testing.T) {
	b, f := officeBench(t)
	s, _ := f.call(t, b, client, control, outer)
	private, err := f.fw.PrivateSession(netip.MustParseAddr("10.0.0.2"), "")
	if err != nil {
		t.Fatal(err)
	}
	target := ap("203.0.113.11:2000")
	n := filterapi.Negotiated{Protocol: "talk", Proto: flow.TCP}
	if _, err := private.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: target}); err != nil || !b.kernel.empty() {
		t.Fatalf("for the session's own sockets: %v, kernel %v", err, b.kernel.held)
	}
	n.Flags = filterapi.AddressBased
	if _, err := private.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: target}); err != nil {
		t.Fatal(err)
	}
	first := syn("10.0.0.2:40009", target.String())
	b.KernelUsed(first)
	if got := b.Describe(first.Tuple, b.Engine.now()); got.Rule != "talk" || got.Protocol != "talk" || got.Session != private.ID() || got.Secondary {
		t.Errorf("its flow: %+v", got)
	}
	if _, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Primary: s.primary, Protocol: "sip", Proto: flow.UDP}, Target: ap("203.0.113.10:3000")}); err != nil {
		t.Fatal(err)
	}
	if got := b.Permissions(); len(got) != 3 || got[2].Rule != "voice" || got[2].Protocol != "sip" || got[2].State != "armed" {
		t.Errorf("another protocol than the primary's: %+v", got)
	}
	if _, err := s.BindForClient(filterapi.Bind{Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.UDP, Protocol: "telnet", Flags: filterapi.Discarding}, Clients: []netip.AddrPort{ap("10.0.0.2:5000")}}); err != nil {
		t.Fatal(err)
	}
	b.SetPolicy(testPolicy(t, policy.Allow)) // knows no "talk"
	if err := b.Recheck(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	if got := b.Permissions(); len(got) != 2 || got[0].State != "used" || got[1].State != "discarding" || got[1].Rule != "" {
		t.Errorf("after the reload: %+v", got)
	}
	b.kernel.mu.Lock() // a flow so young is cut again
	defer b.kernel.mu.Unlock()
	if len(b.kernel.cut) != 1 || b.kernel.cut[0] != first.Tuple {
		t.Errorf("cut %v", b.kernel.cut)
	}
}

// TestWiderTargets: compared with the peer of the primary connection.
func TestWiderTargets(t *testing.T) {
	b, f := officeBench(t)
	s, _ := f.call(t, b, client, control, outer)
	for _, c := range []struct {
		target string
		flags  filterapi.Flags
	}{
		{"203.0.113.10:1", 0}, {"203.0.113.11:1", filterapi.ToSameNet}, {"198.51.100.1:1", filterapi.ToSameNetwork}, {"192.168.1.9:1", filterapi.ToAll},
	} {
		a, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP, Flags: c.flags}, Target: ap(c.target)})
		if err != nil {
			t.Errorf("%+v: %v", c, err)
			continue
		}
		if err := a.Cancel(); err != nil {
			t.Error(err)
		}
	}
}

// TestHowUserSpaceCarries: what the flags say reaches it, and the kernel is
// not asked for what it cannot do.
func TestHowUserSpaceCarries(t *testing.T) {
	const user = filterapi.NoKernelMode
	for _, c := range []struct {
		flags         filterapi.Flags
		oneWay, burst bool
	}{
		{user, true, false}, {user | filterapi.Bidirectional, false, false}, {user | filterapi.Bidirectional | filterapi.IncreaseReceiveBuffer, false, true},
	} {
		b, f := officeBench(t)
		s, _ := f.call(t, b, client, control, outer)
		binds, err := s.BindForClient(filterapi.Bind{Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.UDP, Flags: c.flags}, Clients: []netip.AddrPort{ap("10.0.0.2:5000")}})
		if err != nil {
			t.Fatal(err)
		}
		if k := b.kernel.only(t); !k.ToUser || k.OneWay {
			t.Errorf("kernel holds %+v", k)
		}
		d := b.Decide(context.Background(), flow.Packet{Tuple: flow.Tuple{Proto: flow.UDP, Src: ap("203.0.113.10:99"), Dst: binds[0].Tuple().Dst}, InIface: "wan0"})
		if d.Path != flow.User || d.Takeover.OneWay != c.oneWay || d.Takeover.Burst != c.burst {
			t.Errorf("flags 0x%x: %+v", c.flags, d.Takeover)
		}
	}
	b, f := officeBench(t)
	s, _ := f.call(t, b, client, control, outer)
	inside, _, err := s.RedirectConnections(filterapi.Redirect{Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.UDP, Flags: user | filterapi.IncreaseReceiveBuffer}, Targets: []netip.AddrPort{ap("203.0.113.10:2000")}})
	if err != nil {
		t.Fatal(err)
	}
	d := b.Decide(context.Background(), flow.Packet{Tuple: flow.Tuple{Proto: flow.UDP, Src: ap("10.0.0.2:99"), Dst: inside}, InIface: "lan0"})
	if d.Path != flow.User || d.Takeover.OneWay || !d.Takeover.Burst || d.Takeover.Dial.Target != ap("203.0.113.10:2000") {
		t.Errorf("a redirection: %+v", d.Takeover)
	}
}

// TestAReloadThatPartsNetworks: what leads to a network that none joins any
// more is void, though its primary connection goes on.
func TestAReloadThatPartsNetworks(t *testing.T) {
	b, f := officeBench(t)
	s, _ := f.call(t, b, client, control, outer)
	for _, target := range []string{"192.168.1.9:2000", "203.0.113.10:2000"} {
		if _, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP, Flags: filterapi.ToAll}, Target: ap(target)}); err != nil {
			t.Fatal(err)
		}
	}
	now := officePolicy(t)
	parted, err := policy.New(now.Networks(), now.NetworkRules()[:1], now.Protocols(), now.Rules())
	if err != nil {
		t.Fatal(err)
	}
	b.SetPolicy(parted)
	if err := b.Recheck(context.Background(), nil); err != nil {
		t.Fatal(err)
	}
	if got := b.Permissions(); len(got) != 1 || got[0].Target != ap("203.0.113.10:2000") {
		t.Errorf("left: %+v", got)
	}
}

// TestAPortThatWasNeverOpenIsFreeAgain: asking alone uses no ports up. One that
// was open rests.
func TestAPortThatWasNeverOpenIsFreeAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, f := officeBench(t)
		s, _ := f.call(t, b, client, control, outer)
		ask := func(f *filterapi.IPFilter) error {
			binds, err := s.BindForClient(filterapi.Bind{Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP}, Clients: []netip.AddrPort{ap("10.0.0.2:5000")}, IPFilter: f})
			if err == nil {
				binds[0].Kill()
			}
			time.Sleep(2 * lateReports) // in the test's own time
			return err
		}
		for i := range 20 {
			if err := ask(filterapi.OnlyFrom()); err != nil {
				t.Fatalf("reserved for the %d. time: %v", i+1, err)
			}
		}
		for range 8 {
			if err := ask(nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := ask(nil); !errors.Is(err, filterapi.ErrNoPorts) {
			t.Errorf("all ports rest: %v", err)
		}
		time.Sleep(nat.Quarantine)
		if err := ask(nil); err != nil {
			t.Errorf("after their rest: %v", err)
		}
	})
}
