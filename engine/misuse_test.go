package engine

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// stage is a gateway with one object of each kind, as the filter "ftp" holds
// them after its handlers have returned.
type stage struct {
	b                       *bench
	fw                      filterapi.Firewall
	session, over           filterapi.Session
	tcp, udp, young, ended  filterapi.Connection
	bind, killed, played    filterapi.Connection
	others                  filterapi.Connection // tcp as another filter holds it
	used                    filterapi.Action
	inHandler, otherHandler map[string]error // what calls inside handlers gave
}

// setTheStage makes them. The handlers try what must fail inside handlers.
func setTheStage(t *testing.T) *stage {
	t.Helper()
	s := &stage{inHandler: map[string]error{}, otherHandler: map[string]error{}}
	var ours filterapi.Connection
	p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP | filterapi.UDPDestination | filterapi.BindTCP | filterapi.Listen, Secondary: true}}
	p.handle = func(ev filterapi.Event) error {
		switch e := ev.(type) {
		case *filterapi.ConnectEvent:
			c := e.Connection
			ours = c
			s.inHandler["EmulateForBind in a connect"] = c.EmulateForBind()
			s.inHandler["a data filter for one peer of a TCP connection"] = c.AttachDataFilterWithDestination(tagged{}, filterapi.PriorityNAT, netip.MustParseAddrPort(phone))
			return c.AttachDataFilter(tagged{}, filterapi.PriorityNAT)
		case *filterapi.UDPDestinationEvent:
			return e.Connection.AttachDataFilter(tagged{}, filterapi.PriorityNAT)
		case *filterapi.BindEvent:
			s.inHandler["EmulateForConnect in a bind"] = e.Connection.EmulateForConnect(tagged{})
			s.inHandler["a data filter on a TCP bind"] = e.Connection.AttachDataFilter(tagged{}, filterapi.PriorityNAT)
		case *filterapi.ListenEvent:
			s.inHandler["Deny in a listen"] = e.Connection.Deny()
		}
		return nil
	}
	other := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP, AnyProtocol: true}}
	other.handle = func(ev filterapi.Event) error {
		c := ev.(*filterapi.ConnectEvent).Connection
		s.others = c
		s.otherHandler["AttachDataFilter"] = ours.AttachDataFilter(tagged{}, filterapi.PriorityNAT)
		s.otherHandler["Deny"] = ours.Deny()
		s.otherHandler["SetBufferSize"] = ours.SetBufferSize(1)
		s.otherHandler["EmulateForConnect"] = ours.EmulateForConnect(tagged{})
		return nil
	}
	s.b, _ = talkBench(t, p, named{other, "other"})
	s.fw = p.fw
	r := s.b.filters[0]
	decide := func(first flow.Packet) (*Takeover, filterapi.Connection) {
		d := s.b.Decide(t.Context(), first)
		if d.Takeover == nil {
			t.Fatalf("%v: %v", first.Tuple, d.Path)
		}
		return d.Takeover, d.Takeover.flow.handle(r)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var tk *Takeover
	_, s.udp = decide(udp("10.0.0.2:5000", phone))
	_, s.young = decide(syn("10.0.0.2:40001", control))
	tk, s.ended = decide(syn("10.0.0.2:40002", control))
	tk.Ended(flow.Counts{}, flow.Closed, "")
	tk, s.tcp = decide(syn(client, control))
	tk.Connected(netip.MustParseAddrPort("203.0.113.1:33000"), netip.MustParseAddrPort(control))
	s.session = s.tcp.Session()
	newBind := func() filterapi.Connection {
		c, err := s.session.BindForClient(filterapi.Bind{Negotiated: filterapi.Negotiated{Primary: s.tcp, Proto: flow.TCP}, Clients: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:5000")}})
		must(err)
		return c[0]
	}
	s.bind, s.killed = newBind(), newBind()
	s.killed.Kill()
	var err error
	s.played, err = s.session.EmulateClientBind(emulated)
	must(err)
	must(s.played.SetSocketName(netip.MustParseAddrPort("203.0.113.1:9")))
	s.over, err = p.fw.PrivateSession(netip.MustParseAddr("10.0.0.3"), "")
	must(err)
	s.over.Close()
	s.used, err = s.session.SetDataFilterFactory(making(filterapi.ConnectTCP, webServer, "web"))
	must(err)
	must(s.used.Cancel())
	return s
}

// TestMisuse: whatever a filter calls at the wrong time, with the wrong thing
// or twice has an error of its own, and changes nothing.
func TestMisuse(t *testing.T) {
	s := setTheStage(t)
	addr := netip.MustParseAddrPort
	none := netip.AddrPort{}
	df := tagged{}
	const middle = filterapi.PriorityMiddle
	emulate := func(c filterapi.Connection, df filterapi.DataFilter, remote, local netip.AddrPort) error {
		_, err := c.EmulateConnection(df, remote, local)
		return err
	}
	allow := func(x filterapi.Session, n filterapi.Negotiated) error {
		n.Proto = flow.TCP
		_, err := x.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: addr("203.0.113.10:2000")})
		return err
	}
	factory := func(x filterapi.Session, change func(*filterapi.DataFilterFactory)) error {
		f := making(filterapi.ConnectTCP, webServer, "web")
		change(&f)
		_, err := x.SetDataFilterFactory(f)
		return err
	}
	emulated := func(x filterapi.Session, change func(*filterapi.EmulatedBind)) error {
		b := emulated
		change(&b)
		_, err := x.EmulateClientBind(b)
		return err
	}
	dial := func(n filterapi.Network, p flow.Proto, from, to netip.AddrPort) error {
		_, err := n.Dial(t.Context(), p, from, to)
		return err
	}
	listen := func(n filterapi.Network, at string, f *filterapi.IPFilter) error {
		_, err := n.Listen(addr(at), f)
		_, err2 := n.ListenPacket(addr(at), f)
		if !errors.Is(err2, err) && errors.Unwrap(err).Error() != errors.Unwrap(err2).Error() {
			t.Errorf("listen at %s: %v for TCP, %v for UDP", at, err, err2)
		}
		return err
	}
	var nobody *connHandle
	invalid, badContext, over := filterapi.ErrInvalidArgument, filterapi.ErrBadContext, filterapi.ErrTerminating
	for _, x := range []struct {
		what string
		err  error
		want error
	}{
		{"attach nil", s.tcp.AttachDataFilter(nil, middle), invalid},
		{"attach with no class", s.tcp.AttachDataFilter(df, 0), invalid},
		{"attach with an unknown class", s.tcp.AttachDataFilter(df, filterapi.PriorityEmulation+1), invalid},
		{"attach outside a handler", s.tcp.AttachDataFilter(df, middle), badContext},
		{"attach after the end", s.ended.AttachDataFilter(df, middle), over},
		{"attach to a bind that is over", s.killed.AttachDataFilter(df, middle), over},
		{"attach for a peer, nil", s.udp.AttachDataFilterWithDestination(nil, middle, addr(phone)), invalid},
		{"attach for a peer without a port", s.udp.AttachDataFilterWithDestination(df, middle, addr("203.0.113.10:0")), invalid},
		{"attach for a peer of the other family", s.udp.AttachDataFilterWithDestination(df, middle, addr("[2001:db8::1]:5")), invalid},
		{"attach for nobody", s.udp.AttachDataFilterWithDestination(df, middle, none), invalid},
		{"attach for a peer outside a handler", s.udp.AttachDataFilterWithDestination(df, middle, addr(phone)), badContext},
		{"deny outside a handler", s.tcp.Deny(), badContext},
		{"deny after the end", s.ended.Deny(), badContext},
		{"external name too early", second(s.young.ExternalName()), badContext},
		{"external peer too early", second(s.young.ExternalPeer()), badContext},
		{"external peer of a bind", second(s.bind.ExternalPeer()), badContext},
		{"IP filter of a flow", s.tcp.SetIPFilter(nil), filterapi.ErrNotSupported},
		{"IP filter of the other family", s.bind.SetIPFilter(filterapi.OnlyFrom(netip.MustParseAddr("::1"))), invalid},
		{"IP filter of a bind that is over", s.killed.SetIPFilter(nil), over},
		{"client's address of a flow", s.tcp.SetClientAddress(addr("10.0.0.2:5000")), invalid},
		{"client's address again", s.bind.SetClientAddress(addr("10.0.0.2:5000")), invalid},
		{"emulate with nil", s.tcp.EmulateForConnect(nil), invalid},
		{"emulate outside a handler", s.tcp.EmulateForConnect(df), badContext},
		{"emulate after the end", s.ended.EmulateForConnect(df), over},
		{"emulate a bind outside a handler", s.bind.EmulateForBind(), badContext},
		{"emulate a bind that is over", s.killed.EmulateForBind(), over},
		{"emulate a connection on a flow", emulate(s.tcp, df, addr(control), none), filterapi.ErrNotEmulated},
		{"emulate a connection on a bind", emulate(s.bind, df, addr(control), none), filterapi.ErrNotEmulated},
		{"emulate a connection with nil", emulate(s.played, nil, addr(control), none), invalid},
		{"emulate a connection from nobody", emulate(s.played, df, none, none), invalid},
		{"emulate a connection from port 0", emulate(s.played, df, addr("203.0.113.10:0"), none), invalid},
		{"emulate a connection from the other family", emulate(s.played, df, addr("[2001:db8::1]:5"), none), invalid},
		{"emulate a connection to port 0", emulate(s.played, df, addr(control), addr("10.0.0.2:0")), invalid},
		{"bytes sent on a flow", s.tcp.IncrementBytesSent(1), filterapi.ErrNotEmulated},
		{"bytes sent on a bind", s.played.IncrementBytesSent(1), filterapi.ErrNotEmulated},
		{"socket name of a flow", s.tcp.SetSocketName(addr("203.0.113.1:9")), filterapi.ErrNotEmulated},
		{"socket name of a bind", s.bind.SetSocketName(addr("203.0.113.1:9")), filterapi.ErrNotEmulated},
		{"socket name without a port", s.played.SetSocketName(addr("203.0.113.1:0")), invalid},
		{"socket name twice", s.played.SetSocketName(addr("203.0.113.1:9")), filterapi.ErrAlreadyExists},
		{"no buffer", s.tcp.SetBufferSize(0), invalid},
		{"a buffer too large", s.tcp.SetBufferSize(maxBuffer + 1), invalid},
		{"buffer outside a handler", s.tcp.SetBufferSize(8192), badContext},

		{"no primary connection", allow(s.session, filterapi.Negotiated{}), invalid},
		{"another filter's primary connection", allow(s.session, filterapi.Negotiated{Primary: s.others}), invalid},
		{"a foreign primary connection", allow(s.session, filterapi.Negotiated{Primary: struct{ filterapi.Connection }{s.tcp}}), invalid},
		{"a nil handle", allow(s.session, filterapi.Negotiated{Primary: nobody}), invalid},
		{"a bind as the primary connection", allow(s.session, filterapi.Negotiated{Primary: s.bind}), invalid},
		{"a primary connection of another session", allow(s.over, filterapi.Negotiated{Primary: s.tcp}), invalid},
		{"a primary connection that is over", allow(s.session, filterapi.Negotiated{Primary: s.ended}), over},
		{"notify somebody else", allow(s.session, filterapi.Negotiated{Primary: s.tcp, Notify: &probe{}}), invalid},
		{"notify what cannot be compared", allow(s.session, filterapi.Negotiated{Primary: s.tcp, Notify: incomparable{nil}}), invalid},
		{"permission in a session that is over", allow(s.over, filterapi.Negotiated{Protocol: "web"}), over},

		{"factory for no event", factory(s.session, func(f *filterapi.DataFilterFactory) { f.Event = 0 }), invalid},
		{"factory for two events", factory(s.session, func(f *filterapi.DataFilterFactory) { f.Event = filterapi.ConnectTCP | filterapi.Accepted }), invalid},
		{"factory for a listen", factory(s.session, func(f *filterapi.DataFilterFactory) { f.Event = filterapi.Listen }), invalid},
		{"factory without New", factory(s.session, func(f *filterapi.DataFilterFactory) { f.New = nil }), invalid},
		{"factory without an address", factory(s.session, func(f *filterapi.DataFilterFactory) { f.Address = none }), invalid},
		{"factory of the other family", factory(s.session, func(f *filterapi.DataFilterFactory) { f.Address = addr("[2001:db8::1]:80") }), invalid},
		{"factory without a class", factory(s.session, func(f *filterapi.DataFilterFactory) { f.Priority = 0 }), invalid},
		{"factory with a strange flag", factory(s.session, func(f *filterapi.DataFilterFactory) { f.Flags = filterapi.Timeout }), invalid},
		{"factory in a session that is over", factory(s.over, func(*filterapi.DataFilterFactory) {}), over},
		{"cancel twice", s.used.Cancel(), over},

		{"emulated bind without a protocol", emulated(s.session, func(b *filterapi.EmulatedBind) { b.Protocol = "" }), invalid},
		{"emulated bind of an unknown protocol", emulated(s.session, func(b *filterapi.EmulatedBind) { b.Protocol = "nonsense" }), invalid},
		{"emulated bind of ICMP", emulated(s.session, func(b *filterapi.EmulatedBind) { b.Proto = flow.ICMP }), invalid},
		{"emulated bind of another client", emulated(s.session, func(b *filterapi.EmulatedBind) { b.Client = addr("10.0.0.3:7") }), invalid},
		{"emulated bind at port 0", emulated(s.session, func(b *filterapi.EmulatedBind) { b.Client = addr("10.0.0.2:0") }), invalid},
		{"emulated bind nowhere", emulated(s.session, func(b *filterapi.EmulatedBind) { b.External = none }), invalid},
		{"emulated bind in a session that is over", emulated(s.over, func(b *filterapi.EmulatedBind) { b.Client = addr("10.0.0.3:7") }), over},

		{"attach a filter to a session that is over", s.over.AttachFilter("ftp"), over},
		{"dial by ICMP", dial(s.fw, flow.ICMP, none, addr(webServer)), invalid},
		{"dial port 0", dial(s.fw, flow.TCP, none, addr("203.0.113.10:0")), invalid},
		{"dial nobody", dial(s.fw, flow.TCP, none, none), invalid},
		{"dial a group", dial(s.fw, flow.UDP, none, addr("224.0.0.1:5353")), invalid},
		{"dial from elsewhere", dial(s.fw, flow.TCP, addr("10.0.0.2:0"), addr(webServer)), invalid},
		{"dial from the other family", dial(s.fw, flow.TCP, addr("[::1]:0"), addr(webServer)), invalid},
		{"dial in a session that is over", dial(s.over.Network(), flow.TCP, none, addr(webServer)), over},
		{"listen anywhere", listen(s.fw, "0.0.0.0:0", nil), invalid},
		{"listen elsewhere", listen(s.fw, "10.0.0.2:0", nil), invalid},
		{"listen to the other family", listen(s.fw, "10.0.0.1:0", filterapi.OnlyFrom(netip.MustParseAddr("::1"))), invalid},
		{"listen in a session that is over", listen(s.over.Network(), "10.0.0.1:0", nil), over},

		{"EmulateForBind in a connect", s.inHandler["EmulateForBind in a connect"], badContext},
		{"a data filter for one peer of a TCP connection", s.inHandler["a data filter for one peer of a TCP connection"], invalid},
		{"EmulateForConnect in a bind", s.inHandler["EmulateForConnect in a bind"], badContext},
		{"a data filter on a TCP bind", s.inHandler["a data filter on a TCP bind"], badContext},
		{"Deny in a listen", s.inHandler["Deny in a listen"], badContext},
		{"AttachDataFilter in another filter's handler", s.otherHandler["AttachDataFilter"], badContext},
		{"Deny in another filter's handler", s.otherHandler["Deny"], badContext},
		{"SetBufferSize in another filter's handler", s.otherHandler["SetBufferSize"], badContext},
		{"EmulateForConnect in another filter's handler", s.otherHandler["EmulateForConnect"], badContext},
	} {
		if !errors.Is(x.err, x.want) {
			t.Errorf("%s: %v, want %v", x.what, x.err, x.want)
		}
	}
	s.over.Close() // a second time: nothing
	s.session.Close()
	s.killed.Kill()
	if got := s.b.Flows(); len(got) != 3 || s.session.Flags()&filterapi.SessionTerminated != 0 || s.b.factories.count.Load() != 0 {
		t.Errorf("left %v, session %v, %d factories", got, s.session.Flags(), s.b.factories.count.Load())
	}
}

func second[T any](_ T, err error) error { return err }

// incomparable is a session filter that == panics with.
type incomparable struct{ names []string }

func (incomparable) HandleEvent(context.Context, filterapi.Event) error { return nil }
func (incomparable) Detach()                                            {}
