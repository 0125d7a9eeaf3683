package engine

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// asked is a private session of alice's at 10.0.0.2.
func asked(t *testing.T, p *probe) filterapi.Session {
	t.Helper()
	s, err := p.fw.PrivateSession(netip.MustParseAddr("10.0.0.2"), "alice")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func to(target string) filterapi.Connect {
	return filterapi.Connect{Client: ap(client), Target: ap(target)}
}

func watcher(handle func(filterapi.Event) error) *probe {
	const all = filterapi.ConnectTCP | filterapi.UDPDestination | filterapi.BindTCP | filterapi.BindUDP | filterapi.Listen | filterapi.Accepted | filterapi.Terminating
	return &probe{events: filterapi.Events{Types: all, Secondary: true, AnyProtocol: true}, handle: handle}
}

func TestConnectForClient(t *testing.T) {
	var heard []filterapi.ConnectEvent
	var deny bool
	p := watcher(nil)
	p.handle = func(ev filterapi.Event) error {
		if e, ok := ev.(*filterapi.ConnectEvent); ok {
			heard = append(heard, *e)
			if deny {
				return e.Connection.Deny()
			}
		}
		return nil
	}
	b, u := talkBench(t, p)
	s := asked(t, p)
	leg, err := s.ConnectForClient(t.Context(), to(control))
	if err != nil {
		t.Fatal(err)
	}
	d := u.carried[0].Dial
	if len(heard) != 1 || heard[0].Source != filterapi.Explicit || heard[0].Rule != "talk" || d.Target != ap(control) || d.Transparent || d.Source.IsValid() {
		t.Errorf("event %+v, dialled %+v", heard, d)
	}
	if err := leg.Carry(nil); err != nil {
		t.Error(err)
	}
	if x := b.Flows(); len(x) != 1 || x[0].User != "alice" || x[0].Path != flow.User {
		t.Errorf("flows %+v", x)
	}
	leg.Connection().Kill()
	<-u.carried[0].Killed()
	u.carried[0].Ended(flow.Counts{}, flow.CutByPolicy, "killed")
	<-leg.Done()

	for name, c := range map[string]struct {
		x    filterapi.Connect
		want error
	}{
		"no rule":               {to("203.0.113.10:23"), filterapi.ErrPolicyDenied},
		"no network rule":       {to("10.0.0.3:21"), filterapi.ErrNetworkDenied},
		"the gateway":           {to("10.0.0.1:21"), filterapi.ErrPolicyDenied},
		"loopback":              {to("127.0.0.1:21"), filterapi.ErrInvalidArgument},
		"a group":               {to("224.0.0.1:21"), filterapi.ErrInvalidArgument},
		"no port":               {to("203.0.113.10:0"), filterapi.ErrInvalidArgument},
		"the other family":      {to("[2001:db8::1]:21"), filterapi.ErrInvalidArgument},
		"nowhere":               {filterapi.Connect{Client: ap(client)}, filterapi.ErrInvalidArgument},
		"from another client":   {filterapi.Connect{Client: ap("10.0.0.3:1"), Target: ap(control)}, filterapi.ErrInvalidArgument},
		"of a protocol that is": {filterapi.Connect{Client: ap(client), Target: ap("203.0.113.10:23"), Protocol: "talk"}, nil},
		"of one that is not":    {filterapi.Connect{Client: ap(client), Target: ap(control), Protocol: "nonsense"}, filterapi.ErrInvalidArgument},
	} {
		leg, err := s.ConnectForClient(t.Context(), c.x)
		if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if leg != nil {
			leg.Close()
		}
	}
	deny = true
	if _, err := s.ConnectForClient(t.Context(), to(control)); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("denied by a filter: %v", err)
	}
	deny = false
	u.refuse = syscall.ECONNREFUSED
	if _, err := s.ConnectForClient(t.Context(), to(control)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("refused: %v", err)
	}
	u.refuse = nil
	if n := len(b.Flows()); n != 0 {
		t.Errorf("%d flows are left", n)
	}
	for _, r := range b.logs.FilterMessage("flow").All() {
		if r.ContextMap()["user"] != "alice" {
			t.Errorf("record %v", r.ContextMap())
		}
	}

	transparent, err := p.fw.ClientSession(netip.MustParseAddr("10.0.0.2"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := transparent.ConnectForClient(t.Context(), to(control)); !errors.Is(err, filterapi.ErrNotSupported) {
		t.Errorf("in a session that is not private: %v", err)
	}
	s.Close()
	if _, err := s.ConnectForClient(t.Context(), to(control)); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("in a session that is over: %v", err)
	}
}

// What one connection negotiated, another of the same session may have, once;
// and a policy that allows it no more cuts it.
func TestConnectForClientByPermission(t *testing.T) {
	p := watcher(func(filterapi.Event) error { return nil })
	b, u := talkBench(t, p)
	s := asked(t, p)
	leg, err := s.ConnectForClient(t.Context(), to(control))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.AllowFutureConnect(filterapi.FutureConnect{
		Negotiated: filterapi.Negotiated{Primary: leg.Connection(), Proto: flow.TCP, Flags: filterapi.Timeout},
		Target:     ap("203.0.113.10:5000"),
	}); err != nil {
		t.Fatal(err)
	}
	data, err := s.ConnectForClient(t.Context(), to("203.0.113.10:5000"))
	if err != nil {
		t.Fatal(err)
	}
	if i := data.Connection().(*connHandle).c.info(); !i.Secondary || i.Rule != "talk" {
		t.Errorf("data connection %+v", i)
	}
	if _, err := s.ConnectForClient(t.Context(), to("203.0.113.10:5000")); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("a second one: %v", err)
	}
	if !b.kernel.empty() {
		t.Error("the kernel was told")
	}
	b.SetPolicy(testPolicy(t, policy.Deny))
	if err := b.Recheck(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for _, x := range u.carried[:2] {
		<-x.Killed()
	}
}

// here is a host that the fake's sockets know.
var here = netip.MustParseAddr("127.0.0.1")

func listenFor(t *testing.T, s filterapi.Session, n filterapi.Negotiated) filterapi.ClientListener {
	t.Helper()
	l, err := s.ListenForClient(filterapi.Bind{Negotiated: n, Clients: []netip.AddrPort{ap(client)}, External: ap("203.0.113.1:0")})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A bind whose end is a socket is a bind as any other: it discards, is allowed,
// and used once.
func TestListenForClient(t *testing.T) {
	p := watcher(func(filterapi.Event) error { return nil })
	b, u := talkBench(t, p)
	s := asked(t, p)
	l := listenFor(t, s, filterapi.Negotiated{Proto: flow.TCP, Flags: filterapi.Discarding})
	at, err := l.Bind().ExternalName()
	if err != nil || at.Port() < 61000 || !b.kernel.empty() {
		t.Fatalf("at %v, %v, the kernel holds %v", at, err, b.kernel.held)
	}
	if i := b.Permissions(); len(i) != 1 || i[0].State != "discarding" || i[0].By != "ftp" || !i[0].Socket || i[0].User != "alice" {
		t.Errorf("permissions %+v", i)
	}
	local := netip.AddrPortFrom(here, at.Port()).String()
	// The socket is there, and whoever gets through to it is not let in.
	early, err := net.Dial("tcp", local)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := l.Accept(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("accepted while it discards: %v", err)
	}
	if _, err := early.Read(make([]byte, 1)); err == nil {
		t.Error("it was not reset")
	}
	a := filterapi.AllowBind{Proto: flow.TCP, Address: at}
	if _, err := s.RetroactiveAllowBind(a); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("a bind of no protocol is allowed: %v", err)
	}
	a.Protocol = "talk"
	if already, err := s.RetroactiveAllowBind(a); err != nil || already {
		t.Fatalf("allow: %v, %v", already, err)
	}
	if k := b.kernel.only(t); k.Direction != nat.Local || k.External != at || !k.Multiple || k.ToUser || k.OneWay {
		t.Errorf("the kernel holds %+v", k)
	}
	if _, err := net.Dial("tcp", local); err != nil {
		t.Fatal(err)
	}
	leg, err := l.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if x := u.carried[0]; !x.InitiatorExternal || x.Tuple.Dst != at || x.Dial.Target != ap(client) {
		t.Errorf("takeover %+v", x)
	}
	b.calm()
	if _, err := l.Accept(t.Context()); !errors.Is(err, filterapi.ErrTerminating) || !b.kernel.empty() {
		t.Errorf("a second one: %v, the kernel holds %v", err, b.kernel.held)
	}
	if n := b.ports.Leased(); n != 1 {
		t.Errorf("%d ports are leased while the flow lives", n)
	}
	u.carried[0].Ended(flow.Counts{}, flow.Closed, "")
	<-leg.Done()
	b.calm()
	if n := b.ports.Leased(); n != 0 {
		t.Errorf("%d ports are leased still", n)
	}

	l = listenFor(t, s, filterapi.Negotiated{Proto: flow.TCP, Flags: filterapi.Discarding})
	s.Close()
	b.calm()
	if _, err := l.Accept(t.Context()); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("the session is over: %v", err)
	}
}

func TestListenForClientMisuse(t *testing.T) {
	p := watcher(func(filterapi.Event) error { return nil })
	_, _ = talkBench(t, p)
	s := asked(t, p)
	good := filterapi.Bind{
		Negotiated: filterapi.Negotiated{Proto: flow.TCP, Flags: filterapi.Discarding}, Clients: []netip.AddrPort{ap(client)}, External: ap("203.0.113.1:0"),
	}
	for name, c := range map[string]struct {
		change func(*filterapi.Bind)
		want   error
	}{
		"nobody":           {func(b *filterapi.Bind) { b.Clients = nil }, filterapi.ErrInvalidArgument},
		"two":              {func(b *filterapi.Bind) { b.Clients = append(b.Clients, b.Clients[0]) }, filterapi.ErrInvalidArgument},
		"somebody else":    {func(b *filterapi.Bind) { b.Clients = []netip.AddrPort{ap("10.0.0.3:1")} }, filterapi.ErrPolicyDenied},
		"a foreign place":  {func(b *filterapi.Bind) { b.External = ap("203.0.113.9:0") }, filterapi.ErrInvalidArgument},
		"even":             {func(b *filterapi.Bind) { b.Flags |= filterapi.EvenPort }, filterapi.ErrInvalidArgument},
		"bidirectional":    {func(b *filterapi.Bind) { b.Flags |= filterapi.Bidirectional }, filterapi.ErrInvalidArgument},
		"not by any rule":  {func(b *filterapi.Bind) { b.Flags = 0 }, filterapi.ErrInvalidArgument},
		"of no protocol":   {func(b *filterapi.Bind) { b.Protocol = "nonsense" }, filterapi.ErrInvalidArgument},
		"the other family": {func(b *filterapi.Bind) { b.IPFilter = filterapi.OnlyFrom(netip.MustParseAddr("::1")) }, filterapi.ErrInvalidArgument},
	} {
		b := good
		b.Clients = append([]netip.AddrPort(nil), good.Clients...)
		c.change(&b)
		if _, err := s.ListenForClient(b); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	l, err := s.ListenForClient(good)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Send(nil, ap(control)); !errors.Is(err, filterapi.ErrNotSupported) {
		t.Errorf("a datagram by TCP: %v", err)
	}
	if _, _, err := l.Recv(nil); !errors.Is(err, filterapi.ErrNotSupported) {
		t.Errorf("a datagram by TCP: %v", err)
	}
	good.Proto = flow.UDP
	u, err := s.ListenForClient(good)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := u.Accept(t.Context()); !errors.Is(err, filterapi.ErrNotSupported) {
		t.Errorf("accept by UDP: %v", err)
	}
	for _, bad := range []string{"203.0.113.10:0", "127.0.0.1:5060", "224.0.0.1:5060", "[2001:db8::1]:5060"} {
		if err := u.Send([]byte("x"), ap(bad)); !errors.Is(err, filterapi.ErrInvalidArgument) {
			t.Errorf("to %s: %v", bad, err)
		}
	}
	for _, bad := range []string{"203.0.113.10:5061", "203.0.113.1:5060"} {
		if err := u.Send([]byte("x"), ap(bad)); !errors.Is(err, filterapi.ErrPolicyDenied) {
			t.Errorf("to %s: %v", bad, err)
		}
	}
}
