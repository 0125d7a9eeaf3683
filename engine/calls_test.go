package engine

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func negotiated(tk *Takeover, proto flow.Proto, f filterapi.Flags) filterapi.Negotiated {
	return filterapi.Negotiated{Primary: tk.Conn(), Proto: proto, Flags: f}
}

// byID are the permissions that the kernel holds, in the order of the calls.
func (k *fakeKernel) byID() []uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Sorted(maps.Keys(k.held))
}

func TestRedirect(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	s := tk.Conn().Session()
	targets := []netip.AddrPort{ap("203.0.113.10:2000"), ap("203.0.113.11:443")}
	inside, actions, err := s.RedirectConnections(filterapi.Redirect{Negotiated: negotiated(tk, flow.TCP, filterapi.Timeout), Targets: targets})
	if err != nil || len(actions) != 2 || inside.Addr() != ap("10.0.0.1:1").Addr() {
		t.Fatalf("%v %d actions, %v", inside, len(actions), err)
	}
	ids := b.kernel.byID()
	for i, id := range ids {
		p := b.kernel.held[id]
		if p.Via != netip.AddrPortFrom(inside.Addr(), inside.Port()+uint16(i)) || p.Target != targets[i] || p.ToUser || p.Client.Addr() != s.ClientAddr() {
			t.Errorf("redirect %d: kernel holds %+v", i, p)
		}
	}
	// The first is used, in the kernel.
	first := flow.Packet{Tuple: flow.Tuple{Proto: flow.TCP, Src: ap("10.0.0.2:40005"), Dst: inside}, InIface: "lan0"}
	b.KernelUsed(first)
	b.calm()
	if err := actions[0].Cancel(); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("cancel after use: %v", err)
	}
	// Others are still refused there while the flow lives, and nobody gets in.
	if used := b.kernel.held[ids[0]]; used.Via != inside || used.Client.IsValid() || used.Timeout != 0 {
		t.Errorf("after its use the kernel holds %+v", used)
	}
	if d := b.Decide(context.Background(), flow.Packet{Tuple: flow.Tuple{Proto: flow.TCP, Src: ap("10.0.0.2:40006"), Dst: inside}, InIface: "lan0"}); d.Path != flow.Reject {
		t.Errorf("a second use: %v", d.Path)
	}
	if d := b.Decide(context.Background(), flow.Packet{Tuple: flow.Tuple{Proto: flow.TCP, Src: ap("10.0.0.3:40006"), Dst: netipPort(inside, inside.Port()+1)}, InIface: "lan0"}); d.Path != flow.Reject {
		t.Errorf("another client: %v", d.Path)
	}
	if got := b.Permissions(); len(got) != 2 || got[0].State != "used" || len(got[0].Living) != 1 || got[1].State != "armed" {
		t.Errorf("shown %+v", got)
	}
	b.KernelEnded(flow.End{Tuple: first.Tuple, Path: flow.Kernel, Result: flow.Closed})
	b.calm()
	if err := actions[1].Cancel(); err != nil || !b.kernel.empty() {
		t.Errorf("after cancel: %v, kernel %v", err, b.kernel.held)
	}
	if rec := b.logs.FilterMessage("flow").FilterField(zap.Bool("secondary", true)).All(); len(rec) != 1 {
		t.Errorf("records %v", rec)
	}
}

// TestAFirstPacketThatIsSentAgain: while user space holds it, the kernel still
// shows the same client the way there, and user space refuses all else.
func TestAFirstPacketThatIsSentAgain(t *testing.T) {
	for name, ends := range map[string]func(*Takeover){
		"established": (*Takeover).Established,
		"over":        func(tk *Takeover) { tk.Ended(flow.Counts{}, flow.Refused, "") },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, attaching(&probe{}))
			tk := b.decide(t)
			inside, _, err := tk.Conn().Session().RedirectConnections(filterapi.Redirect{
				Negotiated: negotiated(tk, flow.TCP, filterapi.NoKernelMode), Targets: []netip.AddrPort{ap("203.0.113.10:2000")},
			})
			if err != nil {
				t.Fatal(err)
			}
			id := b.kernel.byID()[0]
			d := b.Decide(t.Context(), syn("10.0.0.2:40005", inside.String()))
			b.calm()
			if d.Path != flow.User || b.kernel.held[id].Client.Addr() != ap(client).Addr() {
				t.Fatalf("decision %v; meanwhile the kernel holds %+v", d.Path, b.kernel.held[id])
			}
			if d := b.Decide(t.Context(), syn("10.0.0.2:40006", inside.String())); d.Path != flow.Reject {
				t.Errorf("another connection meanwhile: %v", d.Path)
			}
			ends(d.Takeover)
			b.calm()
			if p := b.kernel.held[id]; p.Client.IsValid() {
				t.Errorf("afterwards the kernel holds %+v", p)
			}
		})
	}
}

// TestRedirectAsksTheFilters: what they do with the event at the call decides.
func TestRedirectAsksTheFilters(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(*filterapi.ConnectEvent) error
		flag filterapi.Flags
		err  error
		user bool
	}{
		"left alone":     {do: func(*filterapi.ConnectEvent) error { return nil }},
		"no kernel mode": {do: func(*filterapi.ConnectEvent) error { return nil }, flag: filterapi.NoKernelMode, user: true},
		"denied":         {do: func(e *filterapi.ConnectEvent) error { return e.Connection.Deny() }, err: filterapi.ErrPolicyDenied},
		"attached": {do: func(e *filterapi.ConnectEvent) error {
			return e.Connection.AttachDataFilter(pumpless{}, filterapi.PriorityMiddle)
		}, user: true},
	} {
		t.Run(name, func(t *testing.T) {
			p := attaching(&probe{})
			p.events.Secondary = true
			primary, heard := p.handle, []netip.AddrPort{}
			var ended int
			p.handle = func(ev filterapi.Event) error {
				switch e := ev.(type) {
				case *filterapi.ConnectEvent:
					if e.Secondary {
						heard = append(heard, e.Target)
						return c.do(e)
					}
				case *filterapi.TerminatingEvent:
					ended++
				}
				return primary(ev)
			}
			b := newBench(t, p)
			tk := b.decide(t)
			inside, _, err := tk.Conn().Session().RedirectConnections(filterapi.Redirect{Negotiated: negotiated(tk, flow.TCP, c.flag), Targets: []netip.AddrPort{ap("203.0.113.10:2000")}})
			b.calm()
			if !errors.Is(err, c.err) || len(heard) != 1 || heard[0] != ap("203.0.113.10:2000") || ended != 1 {
				t.Fatalf("%v; heard %v, %d ended", err, heard, ended)
			}
			if err != nil {
				if !b.kernel.empty() || len(b.Permissions()) != 0 {
					t.Errorf("left: kernel %v", b.kernel.held)
				}
				return
			}
			if got := b.kernel.only(t); got.ToUser != c.user {
				t.Fatalf("kernel holds %+v", got)
			}
			if !c.user {
				return
			}
			d := b.Decide(context.Background(), flow.Packet{Tuple: flow.Tuple{Proto: flow.TCP, Src: ap("10.0.0.2:40005"), Dst: inside}, InIface: "lan0"})
			if d.Path != flow.User || d.Takeover.Dial.Target != ap("203.0.113.10:2000") || d.Takeover.Dial.Transparent || len(heard) != 2 {
				t.Fatalf("decision %+v, heard %v", d, heard)
			}
			want := 0
			if name == "attached" {
				want = 1
			}
			if len(d.Takeover.Chain) != want {
				t.Errorf("chain %v", d.Takeover.Chain)
			}
			d.Takeover.Connected(ap("203.0.113.1:33333"), d.Takeover.Dial.Target)
			if peer, err := d.Takeover.Conn().ExternalPeer(); err != nil || peer != ap("203.0.113.10:2000") {
				t.Errorf("external peer %v, %v", peer, err)
			}
			for _, f := range b.Flows() {
				if f.Dst == inside && (f.Translation.Dst != ap("203.0.113.10:2000") || f.Translation.Src != ap("203.0.113.1:33333") || f.Permission == 0) {
					t.Errorf("shown %+v", f)
				}
			}
			d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
		})
	}
}

func TestBindRun(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	s := tk.Conn().Session()
	clients := []netip.AddrPort{ap("10.0.0.2:5000"), ap("10.0.0.2:5001")}
	binds, err := s.BindForClient(filterapi.Bind{Negotiated: negotiated(tk, flow.UDP, filterapi.EvenPort|filterapi.AllowMultiple|filterapi.Bidirectional), Clients: clients})
	if err != nil || len(binds) != 2 {
		t.Fatal(binds, err)
	}
	low := binds[0].Tuple().Dst
	if low.Port()%2 != 0 || binds[1].Tuple().Dst != netipPort(low, low.Port()+1) {
		t.Errorf("at %v and %v", low, binds[1].Tuple().Dst)
	}
	for i, id := range b.kernel.byID() {
		if p := b.kernel.held[id]; p.Client != clients[i] || p.External.Port() != low.Port()+uint16(i) || p.OneWay || !p.AnySource {
			t.Errorf("bind %d: kernel holds %+v", i, p)
		}
	}
	// Only two ports are left, and the lowest of them may be odd.
	_, err = s.BindForClient(filterapi.Bind{Negotiated: negotiated(tk, flow.UDP, 0), Clients: append(clients, ap("10.0.0.2:5002"))})
	if !errors.Is(err, filterapi.ErrNoPorts) && !errors.Is(err, filterapi.ErrQuota) || len(b.kernel.byID()) != 2 {
		t.Errorf("three more: %v, kernel %v", err, b.kernel.held)
	}
	binds[0].Kill()
	if got := b.kernel.only(t); got.Client != clients[1] {
		t.Errorf("after a kill: %+v", got)
	}
}

func TestBindWaitsForItsClient(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	binds, err := tk.Conn().Session().BindForClient(filterapi.Bind{Negotiated: negotiated(tk, flow.TCP, 0), Clients: []netip.AddrPort{{}}})
	if err != nil || !b.kernel.empty() {
		t.Fatal(err, b.kernel.held)
	}
	bind := binds[0]
	in := flow.Packet{Tuple: flow.Tuple{Proto: flow.TCP, Src: ap("203.0.113.10:20"), Dst: bind.Tuple().Dst}, InIface: "wan0"}
	if d := b.Decide(context.Background(), in); d.Path.Carries() || d.Path == flow.Reject {
		t.Errorf("before the address: %v", d.Path)
	}
	for addr, want := range map[string]error{"10.0.0.3:5000": filterapi.ErrPolicyDenied, "10.0.0.2:0": filterapi.ErrInvalidArgument, "[fd00::1]:5000": filterapi.ErrInvalidArgument} {
		if err := bind.SetClientAddress(ap(addr)); !errors.Is(err, want) {
			t.Errorf("%s: %v", addr, err)
		}
	}
	b.kernel.fail = errors.New("kernel says no")
	if err := bind.SetClientAddress(ap("10.0.0.2:5000")); !errors.Is(err, b.kernel.fail) {
		t.Errorf("refused by the kernel: %v", err)
	}
	b.kernel.fail = nil
	if err := bind.SetClientAddress(ap("10.0.0.2:5001")); err != nil {
		t.Fatal(err)
	}
	if got := b.kernel.only(t); got.Client != ap("10.0.0.2:5001") || got.External != in.Dst {
		t.Errorf("kernel holds %+v", got)
	}
	if err := bind.SetClientAddress(ap("10.0.0.2:5001")); !errors.Is(err, filterapi.ErrInvalidArgument) {
		t.Errorf("again: %v", err)
	}
	b.KernelUsed(in)
	if f := b.Describe(in.Tuple, b.Engine.now()); !f.Secondary || f.Permission == 0 {
		t.Errorf("its flow: %+v", f)
	}
}

func TestRetroactiveAllow(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	s := tk.Conn().Session()
	binds, err := s.BindForClient(filterapi.Bind{Negotiated: negotiated(tk, flow.UDP, filterapi.Discarding), Clients: []netip.AddrPort{ap("10.0.0.2:5000")}})
	if err != nil || !b.kernel.empty() {
		t.Fatal(err, b.kernel.held)
	}
	name := binds[0].Tuple().Dst
	any := netip.AddrPortFrom(netip.IPv4Unspecified(), name.Port())
	ask := func(a netip.AddrPort, proto flow.Proto, f filterapi.Flags, protocol string) (bool, error) {
		return s.RetroactiveAllowBind(filterapi.AllowBind{Proto: proto, Address: a, Flags: f, Protocol: protocol, IPFilter: filterapi.OnlyFrom(ap("203.0.113.10:1").Addr())})
	}
	for _, c := range []struct {
		at       netip.AddrPort
		proto    flow.Proto
		flags    filterapi.Flags
		protocol string
		want     error
	}{
		{netipPort(name, 0), flow.UDP, 0, "", filterapi.ErrInvalidArgument},
		{name, 99, 0, "", filterapi.ErrInvalidArgument},
		{name, flow.TCP, filterapi.Bidirectional, "", filterapi.ErrInvalidArgument},
		{name, flow.UDP, filterapi.AllowMultiple, "", filterapi.ErrInvalidArgument},
		{name, flow.UDP, 0, "no-such", filterapi.ErrInvalidArgument},
		{netipPort(name, 1), flow.UDP, 0, "", filterapi.ErrNotFound},
		{name, flow.TCP, 0, "", filterapi.ErrNotFound},
		{ap("203.0.113.2:61000"), flow.UDP, 0, "", filterapi.ErrNotFound},
		{name, flow.UDP, 0, "telnet", filterapi.ErrPolicyDenied},
	} {
		if already, err := ask(c.at, c.proto, c.flags, c.protocol); !errors.Is(err, c.want) || already {
			t.Errorf("%+v: %v %v", c, already, err)
		}
	}
	if !b.kernel.empty() || b.Permissions()[0].State != "discarding" {
		t.Fatalf("it discards no more: %+v", b.Permissions())
	}
	b.kernel.fail = errors.New("kernel says no")
	if _, err := ask(any, flow.UDP, 0, ""); !errors.Is(err, b.kernel.fail) || b.Permissions()[0].State != "discarding" {
		t.Errorf("refused by the kernel: %v, %+v", err, b.Permissions())
	}
	b.kernel.fail = nil
	if already, err := ask(any, flow.UDP, filterapi.Bidirectional|filterapi.IncreaseReceiveBuffer, ""); err != nil || already {
		t.Fatal(already, err)
	}
	if got := b.kernel.only(t); got.OneWay || len(got.Sources) != 1 || got.AnySource {
		t.Errorf("kernel holds %+v", got)
	}
	if already, err := s.RetroactiveAllowBind(filterapi.AllowBind{Proto: flow.UDP, Address: name}); err != nil || !already {
		t.Errorf("again: %v %v", already, err)
	}
	if got := b.kernel.only(t); got.AnySource {
		t.Errorf("the second call changed it: %+v", got)
	}
	binds[0].Kill()
	if _, err := ask(any, flow.UDP, 0, ""); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("a closing bind: %v", err)
	}
}
