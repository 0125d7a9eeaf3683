package filtertest_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

const every = filterapi.ConnectTCP | filterapi.UDPDestination | filterapi.BindTCP | filterapi.BindUDP |
	filterapi.Listen | filterapi.Accepted | filterapi.Terminating

// watching is a puppet that hears of everything and does what raised says.
func watching(t *testing.T, raised func(filterapi.Event) error) (*puppet, *filtertest.Gateway) {
	if raised == nil {
		raised = func(filterapi.Event) error { return nil }
	}
	p := &puppet{want: filterapi.Events{Types: every, Secondary: true}, raised: raised}
	return p, filtertest.New(t, p, "")
}

func redirect(p *puppet, c filterapi.Connection, ports ...uint16) filterapi.Redirect {
	r := filterapi.Redirect{Negotiated: filterapi.Negotiated{Primary: c, Proto: flow.TCP}}
	for _, n := range ports {
		r.Targets = append(r.Targets, netip.AddrPortFrom(server.Addr(), n))
	}
	return r
}

func TestRedirectConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, g, fl := open(t)
		inside, acts, err := p.RedirectConnections(redirect(p, fl.Conn, 7000, 7001, 7002))
		if err != nil || len(acts) != 3 || inside.Addr() != g.Inside || inside.Port() == 0 {
			t.Fatalf("%v with %d actions, %v", inside, len(acts), err)
		}
		at := func(i uint16) netip.AddrPort { return netip.AddrPortFrom(inside.Addr(), inside.Port()+i) }
		if err := acts[1].Cancel(); err != nil {
			t.Error(err)
		}
		if _, err := g.Outbound(flow.TCP, port(1), at(1)); !errors.Is(err, filtertest.ErrReset) {
			t.Errorf("cancelled: %v", err)
		}
		if _, err := g.Outbound(flow.TCP, netip.MustParseAddrPort("10.0.0.3:1"), at(0)); !errors.Is(err, filtertest.ErrReset) {
			t.Errorf("another client: %v", err)
		}
		if _, err := g.Outbound(flow.TCP, port(1), at(7)); !errors.Is(err, filtertest.ErrSilence) {
			t.Errorf("an address that nobody has opened: %v", err)
		}
		second, err := g.Outbound(flow.TCP, port(2), at(2))
		if err != nil {
			t.Fatal(err)
		}
		if to := second.Server.Name(); to != netip.AddrPortFrom(server.Addr(), 7002) || second.User {
			t.Errorf("leads to %v, through user space: %v", to, second.User)
		}
		second.Client.Send("hello")
		second.Server.Expect("hello")
		if _, err := g.Outbound(flow.TCP, port(3), at(2)); !errors.Is(err, filtertest.ErrReset) {
			t.Errorf("used twice: %v", err)
		}
		time.Sleep(3 * time.Minute)
		if _, err := g.Outbound(flow.TCP, port(3), at(1)); !errors.Is(err, filtertest.ErrSilence) {
			t.Errorf("long after: %v", err)
		}
		if open := g.Open(); len(open) != 1 || open[0] != fmt.Sprintf("tcp 10.0.0.2 > %v > 203.0.113.10:7000", inside) {
			t.Errorf("open: %v", open)
		}
		g.Ports = 2
		if _, _, err := p.RedirectConnections(redirect(p, fl.Conn, 1, 2, 3)); !errors.Is(err, filterapi.ErrNoPorts) || len(g.Open()) != 1 {
			t.Errorf("no run of three: %v, open %v", err, g.Open())
		}
	})
}

// A filter hears of a redirection at the call; a data filter then has every
// connection brought to user space, and to the filter again.
func TestRedirectAsks(t *testing.T) {
	for name, c := range map[string]struct {
		do     func(filterapi.Connection) error
		want   error
		events int // after the call and one connection
		held   bool
	}{
		"left alone": {func(filterapi.Connection) error { return nil }, nil, 2, false},
		"attached":   {func(c filterapi.Connection) error { return c.AttachDataFilter(passing{}, filterapi.PriorityMiddle) }, nil, 2, true},
		"denied":     {func(c filterapi.Connection) error { return c.Deny() }, filterapi.ErrPolicyDenied, 1, false},
	} {
		p, g := watching(t, nil)
		fl := g.Connect(client, server)
		p.raised = func(ev filterapi.Event) error {
			if e, ok := ev.(*filterapi.ConnectEvent); ok {
				if !e.Secondary || e.Target.Port() != 7000 {
					t.Errorf("%s: event %+v", name, e)
				}
				return c.do(e.Connection)
			}
			return nil
		}
		inside, _, err := p.RedirectConnections(redirect(p, fl.Conn, 7000))
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if err == nil {
			second, err := g.Outbound(flow.TCP, port(2), inside)
			if err != nil {
				t.Fatal(err)
			}
			second.Client.Send("x")
			second.Server.Expect("x")
			if second.Filtered != c.held {
				t.Errorf("%s: held by a data filter: %v", name, second.Filtered)
			}
		}
		if n := len(seen[*filterapi.ConnectEvent](p)) - 1; n != c.events {
			t.Errorf("%s: %d events", name, n)
		}
	}
}

// A bind of a client discards until the filter allows it, and then lets in whom
// that call says.
func TestRetroactiveAllowBind(t *testing.T) {
	p, g := watching(t, nil)
	c, err := g.ClientBind(flow.UDP, port(7000))
	if err != nil {
		t.Fatal(err)
	}
	at := name(t, c)
	if bindEvents := seen[*filterapi.BindEvent](p); len(bindEvents) != 1 || bindEvents[0].TCP || bindEvents[0].External != at || bindEvents[0].Secondary {
		t.Errorf("bind events %+v", bindEvents)
	}
	if _, err := g.Inbound(flow.UDP, server, at); !errors.Is(err, filtertest.ErrSilence) {
		t.Errorf("before: %v", err)
	}
	allow := filterapi.AllowBind{Proto: flow.UDP, Address: netip.AddrPortFrom(netip.IPv4Unspecified(), at.Port()), IPFilter: filterapi.OnlyFrom(server.Addr()), Flags: filterapi.Bidirectional}
	g.Access = func(_ netip.Addr, q filterapi.HostAccess) error {
		if q.Protocol != "allowed" {
			return filterapi.ErrPolicyDenied
		}
		return nil
	}
	if _, err := p.RetroactiveAllowBind(allow); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("against the rules: %v", err)
	}
	if _, err := g.Inbound(flow.UDP, server, at); !errors.Is(err, filtertest.ErrSilence) {
		t.Errorf("after a refusal: %v", err)
	}
	allow.Protocol = "allowed"
	for _, want := range []bool{false, true} {
		if already, err := p.RetroactiveAllowBind(allow); already != want || err != nil {
			t.Errorf("already %v, %v", already, err)
		}
	}
	if _, err := g.Inbound(flow.UDP, netip.MustParseAddrPort("203.0.113.11:9"), at); !errors.Is(err, filtertest.ErrSilence) {
		t.Errorf("from elsewhere: %v", err)
	}
	fl, err := g.Inbound(flow.UDP, server, at)
	if err != nil {
		t.Fatal(err)
	}
	fl.Client.Send("answer")
	fl.Server.Expect("answer")
	want := []string{
		"discards udp 203.0.113.1:40000 > 10.0.0.2:7000 from everybody",
		"approved udp 203.0.113.1:40000 > 10.0.0.2:7000 from [203.0.113.10]",
	}
	if got := g.Permissions(); !slices.Equal(got, want) {
		t.Errorf("journal %q", got)
	}
	p.raised = func(ev filterapi.Event) error {
		if e, ok := ev.(*filterapi.BindEvent); ok {
			return e.Connection.Deny()
		}
		return nil
	}
	if _, err := g.ClientBind(flow.TCP, port(7001)); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("denied: %v", err)
	}
}

// An accepted connection comes with the bind that it came to, and each is told
// of its end.
func TestAccept(t *testing.T) {
	var listener, accepted filterapi.Connection
	p, g := watching(t, nil)
	fl := g.Connect(client, server)
	p.raised = func(ev filterapi.Event) error {
		switch ev := ev.(type) {
		case *filterapi.BindEvent:
			listener = ev.Connection
		case *filterapi.AcceptEvent:
			if ev.Listener != listener || ev.Remote != server || !ev.Secondary || ev.Local.Addr() != netip.MustParseAddr("203.0.113.1") {
				t.Errorf("accept %+v", ev)
			}
			accepted = ev.Connection
			if ev.Remote.Addr() == server.Addr() {
				return ev.Connection.AttachDataFilter(passing{"!"}, filterapi.PriorityNAT)
			}
		}
		return nil
	}
	b := bind(p)
	b.Primary = fl.Conn
	binds, err := p.BindForClient(b)
	if err != nil {
		t.Fatal(err)
	}
	if binds[0] != listener || len(seen[*filterapi.ListenEvent](p)) != 1 {
		t.Errorf("a bind of its own event, %d listen events", len(seen[*filterapi.ListenEvent](p)))
	}
	in, err := g.Inbound(flow.TCP, server, name(t, binds[0]))
	if err != nil {
		t.Fatal(err)
	}
	in.Server.Send("hi")
	in.Client.Expect("hi!")
	if peer, err := in.Conn.ExternalPeer(); err != nil || peer != server || in.Conn != accepted {
		t.Errorf("peer %v, %v", peer, err)
	}
	if _, err := g.Inbound(flow.TCP, server, name(t, binds[0])); !errors.Is(err, filtertest.ErrSilence) {
		t.Errorf("a second one: %v", err)
	}
	in.Cut()
	in.End()
	var over []filterapi.Connection
	for _, ev := range seen[*filterapi.TerminatingEvent](p) {
		over = append(over, ev.Connection)
	}
	if !slices.Equal(over, []filterapi.Connection{listener, accepted}) {
		t.Errorf("told of the end of %v", over)
	}
}

func TestEmulation(t *testing.T) {
	server2 := func(ctx context.Context, c filterapi.Connection, internal, external filterapi.Socket) error {
		if external != nil {
			t.Error("an emulating filter has an external socket")
		}
		buf, err := internal.Recv()
		if err != nil {
			return err
		}
		n := len(buf.Data)
		return errors.Join(internal.Send(buf), c.IncrementBytesSent(uint64(n)))
	}
	p, g := watching(t, func(ev filterapi.Event) error {
		switch ev := ev.(type) {
		case *filterapi.ConnectEvent:
			return ev.Connection.EmulateForConnect(pumper(server2))
		case *filterapi.BindEvent:
			err := ev.Connection.EmulateForBind()
			if again := errors.Is(err, filterapi.ErrAlreadyEmulated); again != (ev.External.Port() == 25) {
				t.Errorf("bind at %v: %v", ev.External, err)
			}
		}
		return nil
	})
	fl := g.Connect(client, server)
	fl.Client.Exchange("echo", "echo")
	fl.Client.ExpectEOF()
	if err := fl.Server.Offer("x"); err == nil || !fl.Emulated || fl.SentBytes() != 4 {
		t.Errorf("the server is there: %v, %d bytes", err, fl.SentBytes())
	}
	fl = g.Connect(port(3), server)
	b := bind(p)
	b.Primary = fl.Conn
	binds, err := p.BindForClient(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := binds[0].SetSocketName(netip.MustParseAddrPort("203.0.113.1:25")); err != nil {
		t.Fatal(err)
	}
	if at := name(t, binds[0]); at.Port() != 25 {
		t.Errorf("the binder is told %v", at)
	}
	if open := g.Open(); len(open) > 0 {
		t.Errorf("an emulated bind opened %v", open)
	}
	g.ClientRefuses = syscall.ECONNREFUSED
	g2 := filterapi.EmulatedBind{Client: port(25), External: netip.MustParseAddrPort("203.0.113.1:25"), Proto: flow.TCP, Protocol: "mail", InternalAddressTranslation: true}
	mail, err := p.EmulateClientBind(g2)
	if err != nil {
		t.Fatal(err)
	}
	if mail.Flags() != filterapi.InternalAddressTranslation {
		t.Errorf("flags %v", mail.Flags())
	}
	if _, err := mail.EmulateConnection(pumper(server2), server, netip.AddrPort{}); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the client refuses: %v", err)
	}
	g.ClientRefuses = nil
	c, err := binds[0].EmulateConnection(pumper(server2), server, netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	all := g.Flows()
	last := all[len(all)-1]
	if last.Conn != c || last.Client.Name() != b.Clients[0] {
		t.Errorf("the client gets %v", last.Client.Name())
	}
	last.Client.Exchange("ping", "ping")
}

// pumper is a function as a data filter.
type pumper func(context.Context, filterapi.Connection, filterapi.Socket, filterapi.Socket) error

func (f pumper) Pump(ctx context.Context, c filterapi.Connection, in, out filterapi.Socket) error {
	return f(ctx, c, in, out)
}

// Rules that refuse a flow keep it from the filter; those that refuse a
// permission are the call's error.
func TestAccess(t *testing.T) {
	p, g := watching(t, nil)
	fl := g.Connect(client, server)
	before := len(seen[*filterapi.ConnectEvent](p))
	for _, why := range []error{filterapi.ErrPolicyDenied, filterapi.ErrNetworkDenied} {
		g.Access = func(a netip.Addr, q filterapi.HostAccess) error {
			if a != client.Addr() || q.Protocol != "puppet" {
				t.Errorf("asked for %v, %+v", a, q)
			}
			return why
		}
		_, connect := g.Offer(port(9), server)
		f := future(p, 5001)
		f.Primary = fl.Conn
		_, allow := p.AllowFutureConnect(f)
		b := bind(p)
		b.Primary = fl.Conn
		_, bound := p.BindForClient(b)
		_, _, redirected := p.RedirectConnections(redirect(p, fl.Conn, 1))
		b.Flags, b.Clients = filterapi.Discarding, []netip.AddrPort{port(7777)}
		binds, err := p.BindForClient(b) // nobody has approved of it yet
		if err != nil {
			t.Fatalf("a bind that discards: %v", err)
		}
		binds[0].Kill()
		for call, err := range map[string]error{"connect": connect, "allow": allow, "bind": bound, "redirect": redirected} {
			if !errors.Is(err, why) {
				t.Errorf("%s: %v, want %v", call, err, why)
			}
		}
	}
	if len(seen[*filterapi.ConnectEvent](p)) != before || len(g.Open()) > 0 {
		t.Errorf("events for refused flows, or open: %v", g.Open())
	}
}

// Events made by hand reach the handler as they are.
func TestRaise(t *testing.T) {
	deny := false
	p, g := watching(t, func(ev filterapi.Event) error {
		if d, ok := ev.(*filterapi.UDPDestinationEvent); ok && deny {
			return d.Destination.Deny()
		}
		return nil
	})
	external := netip.MustParseAddrPort("203.0.113.1:40000")
	for _, ev := range []filterapi.Event{
		&filterapi.ConnectEvent{Target: server}, &filterapi.UDPDestinationEvent{Peer: server},
		&filterapi.BindEvent{TCP: true, External: external}, &filterapi.BindEvent{External: external}, &filterapi.ListenEvent{External: external},
		&filterapi.AcceptEvent{Remote: server, Local: external}, &filterapi.EstablishedEvent{Proto: flow.TCP}, &filterapi.TerminatingEvent{},
	} {
		if err := g.Raise(client, ev); err != nil {
			t.Errorf("%T: %v", ev, err)
		}
		p.mu.Lock()
		if last := p.events[len(p.events)-1]; last != ev {
			t.Errorf("%T became %T", ev, last)
		}
		p.mu.Unlock()
	}
	if c := seen[*filterapi.AcceptEvent](p)[0].Connection; c.Tuple().Src != server || c.Tuple().Dst != external {
		t.Errorf("connection of an accept event: %v", c.Tuple())
	}
	deny = true
	if err := g.Raise(client, &filterapi.UDPDestinationEvent{Peer: server}); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("denied: %v", err)
	}
}

// Who hears of what: the registration of Init until the filter has attached,
// that of the session from then on.
func TestRegistrations(t *testing.T) {
	for name, c := range map[string]struct {
		want    filterapi.Events
		unnamed bool
		events  int // of a connect, and of a secondary one
	}{
		"connects":                    {filterapi.Events{Types: filterapi.ConnectTCP}, false, 1},
		"secondary ones too":          {filterapi.Events{Types: filterapi.ConnectTCP, Secondary: true}, false, 2},
		"nothing":                     {filterapi.Events{Types: filterapi.Listen}, false, 0},
		"explicit clients only":       {filterapi.Events{Types: filterapi.ConnectTCP, Sources: filterapi.Explicit}, false, 0},
		"transparent clients only":    {filterapi.Events{Types: filterapi.ConnectTCP, Sources: filterapi.Transparent}, false, 1},
		"no rule names it":            {filterapi.Events{Types: filterapi.ConnectTCP}, true, 0},
		"no rule names it, any would": {filterapi.Events{Types: filterapi.ConnectTCP, AnyProtocol: true}, true, 1},
	} {
		p := &puppet{want: c.want, raised: func(filterapi.Event) error { return nil }}
		g := filtertest.New(t, p, "")
		g.Unnamed = c.unnamed
		fl := g.Connect(client, server)
		s := fl.Conn.Session()
		f := filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Primary: fl.Conn, Proto: flow.TCP}, Target: server}
		if _, err := s.AllowFutureConnect(f); err != nil {
			t.Fatal(err)
		}
		g.Dial(flow.TCP, client.Addr(), server)
		if n := len(seen[*filterapi.ConnectEvent](p)); n != c.events {
			t.Errorf("%s: %d events, want %d", name, n, c.events)
		}
		if (p.Session != nil) != (c.events > 0) {
			t.Errorf("%s: attached without an event, or not with one", name)
		}
	}
}
