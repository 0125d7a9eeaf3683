package engine

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

func TestSessionsThatFiltersMake(t *testing.T) {
	p := attaching(&probe{})
	var sources []filterapi.Sources
	handle := p.handle
	p.handle = func(ev filterapi.Event) error {
		if e, ok := ev.(*filterapi.ConnectEvent); ok {
			sources = append(sources, e.Source)
		}
		return handle(ev)
	}
	b, _ := talkBench(t, p)
	for _, bad := range []string{"10.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "127.0.0.1", "::", "ff02::1", "fe80::1%lan0", "::ffff:10.0.0.2"} {
		if _, err := p.fw.ClientSession(netip.MustParseAddr(bad)); !errors.Is(err, filterapi.ErrInvalidArgument) {
			t.Errorf("session of %s: %v", bad, err)
		}
		if _, err := p.fw.PrivateSession(netip.MustParseAddr(bad), ""); !errors.Is(err, filterapi.ErrInvalidArgument) {
			t.Errorf("private session of %s: %v", bad, err)
		}
	}
	s := idleSession(t, p)
	private, err := p.fw.PrivateSession(s.ClientAddr(), "ann")
	if err != nil {
		t.Fatal(err)
	}
	if s.ID() == private.ID() || private.User() != "ann" || s.User() != "" ||
		s.Flags() != filterapi.SessionNAT || private.Flags() != filterapi.SessionPrivate|filterapi.SessionAuthenticated {
		t.Errorf("sessions %v %q, %v %q", s.Flags(), s.User(), private.Flags(), private.User())
	}
	tk := b.decide(t) // belongs to the session that passes by itself
	if got := tk.Conn().Session().ID(); got != s.ID() || len(sources) != 1 || sources[0] != filterapi.Transparent {
		t.Errorf("session %d, want %d; sources %v", got, s.ID(), sources)
	}
	s.Close()
	s.Close()
	if s.Flags()&filterapi.SessionTerminated != 0 {
		t.Error("the session ended with a flow in it")
	}
	tk.Ended(flow.Counts{}, flow.Closed, "")
	private.Close()
	b.calm()
	if s.Flags()&filterapi.SessionTerminated == 0 || private.Flags()&filterapi.SessionTerminated == 0 || len(b.sessions.byID) != 0 {
		t.Errorf("after the end: %v %v, %d left", s.Flags(), private.Flags(), len(b.sessions.byID))
	}
}

// TestSourcesBoundAnAttachment: a filter that asks for explicit sources hears
// of a private session alone.
func TestSourcesBoundAnAttachment(t *testing.T) {
	for _, want := range []filterapi.Sources{filterapi.Transparent, filterapi.Explicit} {
		var heard []filterapi.Sources
		p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP | filterapi.BindTCP, Sources: want, Secondary: true, AnyProtocol: true}}
		p.handle = func(ev filterapi.Event) error {
			switch e := ev.(type) {
			case *filterapi.ConnectEvent:
				heard = append(heard, e.Source)
			case *filterapi.BindEvent:
				heard = append(heard, e.Source)
			}
			return nil
		}
		b, _ := talkBench(t, p)
		b.Decide(context.Background(), syn(client, control))
		s, err := p.fw.PrivateSession(netip.MustParseAddr("10.0.0.2"), "")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.EmulateClientBind(emulated); err != nil {
			t.Fatal(err)
		}
		if len(heard) != 1 || heard[0] != want {
			t.Errorf("asked for %v, heard %v", want, heard)
		}
	}
}

var emulated = filterapi.EmulatedBind{
	Client: netip.MustParseAddrPort("10.0.0.2:7"), External: netip.MustParseAddrPort("203.0.113.1:7"), Proto: flow.TCP, Protocol: "talk",
}

func TestAttachFilterAttachesWithoutAnEvent(t *testing.T) {
	p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP}}
	b, _ := talkBench(t, p)
	s := idleSession(t, p)
	for range 2 {
		if err := s.AttachFilter("ftp"); err != nil || p.attached != 1 {
			t.Errorf("%v, attached %d", err, p.attached)
		}
	}
	if err := s.AttachFilter("nobody"); !errors.Is(err, filterapi.ErrNotFound) {
		t.Errorf("a filter that is not there: %v", err)
	}
	s.Close()
	b.calm()
	if err := s.AttachFilter("ftp"); !errors.Is(err, filterapi.ErrTerminating) || p.detached != 1 {
		t.Errorf("after the end: %v, detached %d", err, p.detached)
	}
}

func TestHostAccessCheck(t *testing.T) {
	p := &probe{}
	talkBench(t, p)
	s := idleSession(t, p)
	for _, x := range []struct {
		ask  filterapi.HostAccess
		want error
	}{
		{filterapi.HostAccess{Protocol: "web", Target: netip.MustParseAddrPort("203.0.113.10:0")}, nil},
		{filterapi.HostAccess{Proto: flow.TCP, Target: netip.MustParseAddrPort(webServer)}, nil},
		{filterapi.HostAccess{Proto: flow.TCP, Target: netip.MustParseAddrPort("203.0.113.10:81")}, filterapi.ErrPolicyDenied},
		{filterapi.HostAccess{Proto: flow.TCP, Target: netip.MustParseAddrPort("10.0.0.9:80")}, filterapi.ErrNetworkDenied},
		{filterapi.HostAccess{Protocol: "nonsense", Target: netip.MustParseAddrPort(webServer)}, filterapi.ErrInvalidArgument},
		{filterapi.HostAccess{Proto: flow.TCP, Target: netip.MustParseAddrPort("203.0.113.10:0")}, filterapi.ErrInvalidArgument},
		{filterapi.HostAccess{Target: netip.MustParseAddrPort(webServer)}, filterapi.ErrInvalidArgument},
		{filterapi.HostAccess{Protocol: "web"}, filterapi.ErrInvalidArgument},
		{filterapi.HostAccess{Protocol: "web", Target: netip.MustParseAddrPort("[2001:db8::1]:80")}, filterapi.ErrInvalidArgument},
	} {
		if err := s.HostAccessCheck(x.ask); !errors.Is(err, x.want) {
			t.Errorf("%+v: %v, want %v", x.ask, err, x.want)
		}
	}
}

// TestSocketsAskTheRulesOfTheirSession, those of nobody do not.
func TestSocketsAskTheRulesOfTheirSession(t *testing.T) {
	p := attaching(&probe{})
	b, user := talkBench(t, p)
	tk := b.decide(t)
	s := idleSession(t, p)
	ctx := t.Context()
	denied, allowed := netip.MustParseAddrPort("203.0.113.10:2000"), netip.MustParseAddrPort(webServer)
	if _, err := p.fw.Dial(ctx, flow.TCP, netip.AddrPort{}, denied); err != nil {
		t.Errorf("nobody's: %v", err)
	}
	if _, err := s.Network().Dial(ctx, flow.TCP, netip.AddrPort{}, denied); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("denied: %v", err)
	}
	if _, err := s.Network().Dial(ctx, flow.TCP, netip.MustParseAddrPort("203.0.113.9:0"), allowed); !errors.Is(err, filterapi.ErrInvalidArgument) {
		t.Errorf("from an address that is not the gateway's: %v", err)
	}
	conn, err := s.Network().Dial(ctx, flow.TCP, netip.AddrPort{}, allowed)
	if err != nil {
		t.Fatal(err)
	}
	b.SetPolicy(testPolicy(t, policy.Deny))
	if err := b.Recheck(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("x")); err == nil {
		t.Error("the socket outlived the rule")
	}
	b.SetPolicy(talkPolicy(t))

	// A private session's permission lets its own socket, once, and nobody else.
	r := b.filters[0]
	private, err := p.fw.PrivateSession(s.ClientAddr(), "")
	if err != nil {
		t.Fatal(err)
	}
	grant(t, private, tk.flow.handle(r), denied)
	if !b.kernel.empty() {
		t.Errorf("the kernel lets the client's own flows in: %v", b.kernel.held)
	}
	if d := b.Decide(ctx, syn("10.0.0.2:41000", denied.String())); d.Path.Carries() {
		t.Errorf("a flow of the client: %v", d.Path)
	}
	mine, err := private.Network().Dial(ctx, flow.TCP, netip.AddrPort{}, denied)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := private.Network().Dial(ctx, flow.TCP, netip.AddrPort{}, denied); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("a second time: %v", err)
	}
	private.Close()
	if _, err := mine.Write([]byte("x")); err == nil || len(user.dialled) != 3 {
		t.Errorf("the socket outlived its session: %v; dialled %v", err, user.dialled)
	}
	if _, err := private.Network().Dial(ctx, flow.TCP, netip.AddrPort{}, allowed); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("after the end: %v", err)
	}
}

// grant gives a session a permission by a primary connection that negotiated it
// for another one of the same client.
func grant(t *testing.T, s filterapi.Session, primary filterapi.Connection, to netip.AddrPort) {
	t.Helper()
	h, c := s.(*sessionHandle), primary.(*connHandle).c
	p := h.s.newPermission(terms{primary: c, basis: c.basis(), standing: standing{c.rule, c.protocol, c.uses}}, filterapi.Negotiated{Primary: primary, Proto: flow.TCP}, ground{direction: nat.Outbound})
	p.far = compactOf(to)
	if err := h.s.e.grant(p); err != nil {
		t.Fatal(err)
	}
}

func TestListeningSocketsAreOpenedInTheKernel(t *testing.T) {
	p := attaching(&probe{})
	b, _ := talkBench(t, p)
	at := netip.MustParseAddrPort("10.0.0.1:0")
	for _, bad := range []string{"0.0.0.0:0", "10.0.0.2:0", "[::]:0"} {
		if _, err := p.fw.Listen(netip.MustParseAddrPort(bad), nil); !errors.Is(err, filterapi.ErrInvalidArgument) {
			t.Errorf("listen at %s: %v", bad, err)
		}
	}
	l, err := p.fw.Listen(at, filterapi.OnlyFrom(netip.MustParseAddr("10.0.0.2")))
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	if k := b.kernel.only(t); k.External != netip.AddrPortFrom(at.Addr(), port) || len(k.Sources) != 1 || k.AnySource || !k.Multiple {
		t.Errorf("kernel holds %+v", k)
	}
	if _, err := p.fw.Listen(netip.AddrPortFrom(at.Addr(), port), nil); !errors.Is(err, filterapi.ErrAlreadyExists) {
		t.Errorf("twice: %v", err)
	}
	if err := l.SetIPFilter(nil); err != nil || !b.kernel.only(t).AnySource || l.IPFilter() != nil {
		t.Errorf("set IP filter: %v", err)
	}
	if err := l.SetIPFilter(filterapi.OnlyFrom()); err != nil || !b.kernel.empty() {
		t.Errorf("nobody: %v, kernel %v", err, b.kernel.held)
	}
	if err := errors.Join(l.SetIPFilter(nil), l.Close()); err != nil || !b.kernel.empty() {
		t.Errorf("close: %v, kernel %v", err, b.kernel.held)
	}
	if err := l.SetIPFilter(nil); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("after the close: %v", err)
	}
	s := idleSession(t, p)
	if _, err := s.Network().Listen(at, nil); !errors.Is(err, filterapi.ErrPolicyDenied) || !b.kernel.empty() {
		t.Errorf("a session's without a rule: %v, kernel %v", err, b.kernel.held)
	}
	b.kernel.fail = errors.New("kernel says no")
	if _, err := p.fw.ListenPacket(at, nil); !errors.Is(err, b.kernel.fail) {
		t.Errorf("refused by the kernel: %v", err)
	}
}

// TestDisconnect: all of a session ends, and the client may begin anew.
func TestDisconnect(t *testing.T) {
	p := attaching(&probe{})
	b, _ := talkBench(t, p)
	tk := b.decide(t)
	s := idleSession(t, p)
	kernel := syn("10.0.0.2:41000", webServer) // in the session, carried by the kernel
	// A factory of the client's has the engine hear of it.
	act, err := s.SetDataFilterFactory(making(filterapi.ConnectTCP, "0.0.0.0:9", "other"))
	if err != nil {
		t.Fatal(err)
	}
	if d := b.Decide(t.Context(), kernel); d.Path != flow.Kernel {
		t.Fatalf("path %v", d.Path)
	}
	if err := act.Cancel(); err != nil {
		t.Fatal(err)
	}
	if _, err := bindFor(tk, nil); err != nil {
		t.Fatal(err)
	}
	info := b.Sessions()
	if len(info) != 1 || info[0].Flows != 2 || info[0].Permissions != 1 || info[0].Client != s.ClientAddr() || len(info[0].Filters) != 1 {
		t.Errorf("sessions %+v", info)
	}
	unseen, other := syn("10.0.0.2:42000", webServer).Tuple, syn("10.0.0.3:42000", webServer).Tuple
	if err := b.Disconnect(t.Context(), s.ID(), []flow.Tuple{unseen, other}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-tk.Killed():
	default:
		t.Error("the flow in user space lives")
	}
	if len(b.kernel.cut) != 2 || b.kernel.cut[0] != kernel.Tuple || b.kernel.cut[1] != unseen || !b.kernel.empty() {
		t.Errorf("cut %v, kernel %v", b.kernel.cut, b.kernel.held)
	}
	if _, err := bindFor(tk, nil); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("a bind in it: %v", err)
	}
	d := b.Decide(t.Context(), syn("10.0.0.2:43000", control))
	if d.Path != flow.User || d.Takeover.Conn().Session().ID() == s.ID() {
		t.Errorf("a new connect: %v", d.Path)
	}
	tk.Ended(flow.Counts{}, flow.CutByPolicy, "")
	b.KernelEnded(flow.End{Tuple: kernel.Tuple, Path: flow.Kernel, Result: flow.CutByPolicy})
	d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
	b.calm()
	if len(b.Sessions()) != 0 || p.detached != 2 {
		t.Errorf("left %+v, detached %d", b.Sessions(), p.detached)
	}
	if err := b.Disconnect(t.Context(), s.ID(), nil); !errors.Is(err, filterapi.ErrNotFound) {
		t.Errorf("once more: %v", err)
	}
}
