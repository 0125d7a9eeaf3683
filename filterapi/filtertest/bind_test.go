package filtertest_test

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

func port(n uint16) netip.AddrPort { return netip.AddrPortFrom(client.Addr(), n) }

func name(t *testing.T, c filterapi.Connection) netip.AddrPort {
	t.Helper()
	n, err := c.ExternalName()
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A pair of binds is two consecutive ports, the lower one even, and each leads
// to its own client port.
func TestBindPair(t *testing.T) {
	p, g, _ := open(t)
	first, err := p.BindForClient(bind(p)) // so that the next free port is odd
	if err != nil {
		t.Fatal(err)
	}
	b := bind(p)
	b.Proto, b.Flags = flow.UDP, filterapi.EvenPort|filterapi.Bidirectional
	b.Clients = []netip.AddrPort{port(7000), port(7001)}
	pair, err := p.BindForClient(b)
	if err != nil || len(pair) != 2 {
		t.Fatalf("%d binds, %v", len(pair), err)
	}
	low, high := name(t, pair[0]), name(t, pair[1])
	if low.Port()%2 != 0 || high.Port() != low.Port()+1 || low.Addr() != g.External {
		t.Errorf("a pair at %v and %v, after %v", low, high, name(t, first[0]))
	}
	for i, at := range []netip.AddrPort{low, high} {
		fl, err := g.Inbound(flow.UDP, server, at)
		if err != nil {
			t.Fatal(err)
		}
		if fl.Client.Name() != b.Clients[i] {
			t.Errorf("%v leads to %v, want %v", at, fl.Client.Name(), b.Clients[i])
		}
		fl.Server.Send("in")
		fl.Client.Expect("in")
		fl.Client.Send("out")
		fl.Server.Expect("out")
	}
}

// Without Bidirectional the client's answers are lost.
func TestOneWay(t *testing.T) {
	p, g, _ := open(t)
	b := bind(p)
	b.Proto = flow.UDP
	binds, err := p.BindForClient(b)
	if err != nil {
		t.Fatal(err)
	}
	fl, err := g.Inbound(flow.UDP, server, name(t, binds[0]))
	if err != nil {
		t.Fatal(err)
	}
	fl.Client.Send("lost")
	fl.Server.Send("in")
	fl.Client.Expect("in")
	if got := fl.Server.Waiting(); got != "" {
		t.Errorf("a peer got the answer %q", got)
	}
}

func TestBindAsked(t *testing.T) {
	own := netip.MustParseAddrPort("203.0.113.1:50000") // the primary's client is seen as this
	for text, c := range map[string]struct {
		at    string
		flags filterapi.Flags
		wants []error // of one call after the other
	}{
		"an address of the gateway":  {"203.0.113.1:5060", 0, []error{nil, filterapi.ErrAlreadyExists}},
		"any port":                   {"203.0.113.1:0", 0, []error{nil, nil}},
		"another host's":             {"203.0.113.77:5060", 0, []error{filterapi.ErrInvalidArgument}},
		"odd, but even is asked for": {"203.0.113.1:5063", filterapi.EvenPort, []error{filterapi.ErrInvalidArgument}},
		"the primary's own":          {own.String(), 0, []error{nil, nil}},
	} {
		p, g, _ := open(t)
		b := bind(p)
		b.External, b.Flags = netip.MustParseAddrPort(c.at), c.flags
		for _, want := range c.wants {
			binds, err := p.BindForClient(b)
			if !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", text, err, want)
			}
			if err != nil {
				continue
			}
			at := name(t, binds[0])
			if at.Addr() != b.External.Addr() || b.External.Port() != 0 && at != b.External {
				t.Errorf("%s: bound %v", text, at)
			}
			if want == nil && len(c.wants) == 2 && c.wants[1] != nil {
				continue // it must stay for the second call
			}
			if to, in := g.Arrive(flow.TCP, server.Addr(), at); !in || to != b.Clients[0] {
				t.Errorf("%s: leads to %v, %v", text, to, in)
			}
		}
	}
}

// Where nothing is translated a bind is a pinhole at the client's own address,
// unless an address of the gateway is asked for.
func TestPinholes(t *testing.T) {
	p := &puppet{}
	g := filtertest.New(t, p, "")
	six := netip.MustParseAddrPort("[fd00:a::2]:50000")
	g.Connect(six, netip.MustParseAddrPort("[2001:db8:b::10]:21"))
	b := bind(p)
	b.Clients = []netip.AddrPort{netip.AddrPortFrom(six.Addr(), 7001), netip.AddrPortFrom(six.Addr(), 9000)}
	b.Flags = filterapi.EvenPort
	binds, err := p.BindForClient(b)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range b.Clients {
		if got := name(t, binds[i]); got != want {
			t.Errorf("pinhole %v, want %v", got, want)
		}
	}
	b.Clients, b.External = b.Clients[:1], netip.AddrPortFrom(g.External6, 0)
	if binds, err = p.BindForClient(b); err != nil {
		t.Fatal(err)
	}
	if got := name(t, binds[0]); got.Addr() != g.External6 || got.Port()%2 != 0 {
		t.Errorf("asked for %v, bound %v", b.External, got)
	}
}

// A bind without a client's address lets nobody in until it has one.
func TestBindForNobodyYet(t *testing.T) {
	p, g, _ := open(t)
	b := bind(p)
	b.Clients[0] = netip.AddrPort{}
	binds, err := p.BindForClient(b)
	if err != nil {
		t.Fatal(err)
	}
	at := name(t, binds[0])
	if _, err := g.Inbound(flow.TCP, server, at); !errors.Is(err, filtertest.ErrSilence) {
		t.Errorf("before the address is known: %v", err)
	}
	if err := binds[0].SetClientAddress(netip.MustParseAddrPort("10.0.0.77:1")); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("another host's address: %v", err)
	}
	if err := binds[0].SetClientAddress(port(7000)); err != nil {
		t.Fatal(err)
	}
	if err := binds[0].SetClientAddress(port(7001)); !errors.Is(err, filterapi.ErrInvalidArgument) {
		t.Errorf("set twice: %v", err)
	}
	if to, in := g.Arrive(flow.TCP, server.Addr(), at); !in || to != port(7000) {
		t.Errorf("afterwards: %v %v", to, in)
	}
}

// EstablishedEvent comes once for each connection, with the call's context, to
// the session filter that the call named.
func TestEstablished(t *testing.T) {
	for _, proto := range []flow.Proto{flow.TCP, flow.UDP} {
		p, g, _ := open(t)
		b := bind(p)
		b.Proto, b.Notify, b.Context, b.Flags = proto, p, "mine", filterapi.AllowMultiple
		binds, err := p.BindForClient(b)
		if err != nil {
			t.Fatal(err)
		}
		f := future(p, 5001)
		f.Proto, f.Notify, f.Context = proto, p, "yours"
		if _, err := p.AllowFutureConnect(f); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			g.Arrive(proto, server.Addr(), name(t, binds[0]))
		}
		g.Dial(proto, client.Addr(), f.Target)
		var got []any
		for _, ev := range seen[*filterapi.EstablishedEvent](p) {
			if ev.Proto != proto || ev.Connection == nil {
				t.Errorf("event %+v", ev)
			}
			got = append(got, ev.Context)
		}
		if len(got) != 3 || got[0] != "mine" || got[1] != "mine" || got[2] != "yours" {
			t.Errorf("%s: events with %v", proto, got)
		}
	}
	p, g, _ := open(t)
	f := future(p, 5001)
	f.Notify = &puppet{}
	if _, err := p.AllowFutureConnect(f); !errors.Is(err, filterapi.ErrInvalidArgument) || len(g.Open()) > 0 {
		t.Errorf("somebody else's session filter: %v, open %v", err, g.Open())
	}
}

// Each peer of a client's socket is a flow of its own.
func TestPeers(t *testing.T) {
	p := &puppet{pump: func(internal, external filterapi.Socket) error {
		for {
			buf, err := internal.Recv()
			if err != nil {
				return err
			}
			if err := external.Send(buf); err != nil {
				return err
			}
		}
	}}
	g := filtertest.New(t, p, "")
	for _, peer := range []string{"203.0.113.10:69", "203.0.113.11:69"} {
		at := netip.MustParseAddrPort(peer)
		fl, err := g.Associate(client, at)
		if err != nil {
			t.Fatal(err)
		}
		fl.Client.Send(peer)
		fl.Server.Expect(peer)
		if ext, err := fl.Conn.ExternalName(); err != nil || ext.Addr() != g.External || ext.Port() != client.Port() {
			t.Errorf("seen as %v, %v", ext, err)
		}
	}
}
