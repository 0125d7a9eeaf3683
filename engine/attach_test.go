package engine

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// fakeUser carries takeovers as user space does: Originate fails as a client
// does that does not listen, or stands until the test ends it.
type fakeUser struct {
	refuse  error
	carried []*Takeover
	dialled []netip.AddrPort
}

func (u *fakeUser) Originate(_ context.Context, t *Takeover) error {
	u.carried = append(u.carried, t)
	if u.refuse != nil {
		t.Ended(flow.Counts{}, flow.Refused, u.refuse.Error())
		return u.refuse
	}
	t.Connected(t.Dial.Source, t.Dial.Target)
	t.Established()
	return nil
}

func (u *fakeUser) Connect(_ context.Context, t *Takeover) (Joint, error) {
	u.carried = append(u.carried, t)
	if u.refuse != nil {
		t.Ended(flow.Counts{}, flow.Refused, u.refuse.Error())
		return nil, u.refuse
	}
	t.Connected(netip.MustParseAddrPort("203.0.113.1:33000"), t.Dial.Target)
	return fakeJoint{t}, nil
}

func (u *fakeUser) Receive(t *Takeover, conn net.Conn) (Joint, error) {
	u.carried = append(u.carried, t)
	t.Connected(t.Tuple.Dst, t.Tuple.Src)
	go func() {
		<-t.Killed()
		_ = conn.Close()
	}()
	return fakeJoint{t}, nil
}

func (u *fakeUser) Filter(*Takeover, netip.AddrPort, func([]byte), func([]byte)) Duct {
	panic("no data filter holds the datagrams of these tests")
}

// fakeJoint is a flow that waits for its client.
type fakeJoint struct{ t *Takeover }

func (j fakeJoint) Carry(net.Conn) error { j.t.Established(); return nil }
func (j fakeJoint) Close()               { j.t.Ended(flow.Counts{}, flow.Failed, "not carried") }

func (u *fakeUser) Dial(ctx context.Context, _ flow.Proto, _, to netip.AddrPort) (net.Conn, error) {
	u.dialled = append(u.dialled, to)
	near, far := net.Pipe()
	context.AfterFunc(ctx, func() { _ = far.Close() })
	return near, nil
}

func (u *fakeUser) Listen(at netip.AddrPort) (net.Listener, error) {
	return net.Listen("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), at.Port()).String())
}

func (u *fakeUser) ListenPacket(at netip.AddrPort) (net.PacketConn, error) {
	return net.ListenPacket("udp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), at.Port()).String())
}

// talkPolicy lets the inside talk to the outside by a protocol that the filter
// "ftp" understands, on TCP port 21 and UDP port 5060.
func talkPolicy(t testing.TB) *policy.Policy {
	t.Helper()
	p, err := policy.New(
		[]policy.Network{{Name: "inside", Interfaces: []string{"lan0"}}, {Name: "outside", Interfaces: []string{"wan0"}}},
		[]policy.NetworkRule{{Name: "internet", From: "inside", To: "outside", Relation: policy.NAT}},
		[]policy.Protocol{{Name: "talk", Filter: "ftp", Matches: []policy.Match{
			{Proto: flow.TCP, Ports: policy.PortRange{Lo: 21, Hi: 21}}, {Proto: flow.UDP, Ports: policy.PortRange{Lo: 5060, Hi: 5060}},
		}}, {Name: "web", Matches: []policy.Match{{Proto: flow.TCP, Ports: policy.PortRange{Lo: 80, Hi: 80}}}}},
		[]policy.Rule{
			{Name: "talk", Action: policy.Allow, From: []string{"inside"}, To: []string{"outside"}, Protocols: []string{"talk"}, Filters: []policy.FilterUse{{Name: "ftp"}}},
			{Name: "web", Action: policy.Allow, From: []string{"inside"}, To: []string{"outside"}, Protocols: []string{"web"}},
		})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// talkBench is a bench whose policy has UDP, too, and whose user space is
// there.
func talkBench(t *testing.T, filters ...filterapi.Filter) (*bench, *fakeUser) {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	k := &fakeKernel{held: map[uint64]nat.Permission{}}
	u := new(fakeUser)
	ports := nat.NewAllocator(nat.Range{Lo: 61000, Hi: 61099}, func(nat.Endpoint) bool { return false }, time.Now)
	e, err := New(Config{Policy: talkPolicy(t), Filters: filters, Kernel: k, User: u, Routes: fakeRoutes{}, Ports: ports, Quota: 8, Log: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	return &bench{e, k, logs}, u
}

// named is a probe under another name, which no rule binds to a protocol.
type named struct {
	*probe
	name string
}

func (n named) Name() string { return n.name }

func udp(src, dst string) flow.Packet {
	p := syn(src, dst)
	p.Proto = flow.UDP
	return p
}

// tagged is a data filter that can be told from others.
type tagged struct {
	tag  string
	conn *filterapi.Connection // what Pump was called with
}

func (d tagged) Pump(_ context.Context, c filterapi.Connection, _, _ filterapi.Socket) error {
	if d.conn != nil {
		*d.conn = c
	}
	return nil
}

// tags are those of a chain, in its order.
func tags(t *Takeover) (out []string) {
	if t == nil {
		return nil
	}
	for _, l := range t.Chain {
		out = append(out, l.Filter.(ownHandle).DataFilter.(tagged).tag)
	}
	return out
}

const phone = "203.0.113.10:5060"

func TestAHandleIsTheSameForOneFilterAndAnotherForAnother(t *testing.T) {
	var pumped filterapi.Connection
	got := map[string][]filterapi.Connection{}
	note := func(name string, attach bool) func(filterapi.Event) error {
		return func(ev filterapi.Event) error {
			switch ev := ev.(type) {
			case *filterapi.ConnectEvent:
				got[name] = append(got[name], ev.Connection)
				if attach {
					return ev.Connection.AttachDataFilter(tagged{tag: name, conn: &pumped}, filterapi.PriorityMiddle)
				}
			case *filterapi.TerminatingEvent:
				got[name] = append(got[name], ev.Connection)
			}
			return nil
		}
	}
	ev := filterapi.Events{Types: filterapi.ConnectTCP | filterapi.Terminating, AnyProtocol: true}
	b, _ := talkBench(t, &probe{events: ev, handle: note("ftp", true)}, named{&probe{events: ev, handle: note("other", false)}, "other"})
	d := b.Decide(context.Background(), syn(client, control))
	ours, theirs := got["ftp"][0], got["other"][0]
	if ours == theirs || ours.Session() == theirs.Session() || ours.Session() != ours.Session() {
		t.Fatalf("handles %p %p, sessions %p %p", ours, theirs, ours.Session(), theirs.Session())
	}
	_ = d.Takeover.Chain[0].Filter.Pump(context.Background(), d.Takeover.Conn(), nil, nil)
	if pumped != ours {
		t.Errorf("Pump got %p, want its filter's %p", pumped, ours)
	}
	ask := func(primary filterapi.Connection) error {
		_, err := ours.Session().AllowFutureConnect(filterapi.FutureConnect{
			Negotiated: filterapi.Negotiated{Primary: primary, Proto: flow.TCP}, Target: netip.MustParseAddrPort("203.0.113.10:2000")})
		return err
	}
	var none *connHandle
	for what, primary := range map[string]filterapi.Connection{"another filter's": theirs, "foreign": struct{ filterapi.Connection }{ours}, "nil handle": none} {
		if err := ask(primary); !errors.Is(err, filterapi.ErrInvalidArgument) {
			t.Errorf("%s primary: %v", what, err)
		}
	}
	if err := ask(ours); err != nil {
		t.Errorf("its own primary: %v", err)
	}
	d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
	b.calm()
	if len(got["ftp"]) != 2 || got["ftp"][1] != ours || got["other"][1] != theirs {
		t.Errorf("at the end %v", got)
	}
}

func TestADestinationIsDeniedInItsHandlerAlone(t *testing.T) {
	var kept filterapi.Destination
	deny := false
	p := &probe{events: filterapi.Events{Types: filterapi.UDPDestination}}
	p.handle = func(ev filterapi.Event) error {
		e := ev.(*filterapi.UDPDestinationEvent)
		if e.Source != filterapi.Transparent || e.Peer != netip.MustParseAddrPort(phone) {
			t.Errorf("event %+v", e)
		}
		kept = e.Destination
		if deny {
			return e.Destination.Deny()
		}
		return nil
	}
	b, _ := talkBench(t, p)
	if d := b.Decide(context.Background(), udp("10.0.0.2:5000", phone)); d.Path != flow.Kernel {
		t.Errorf("path %v", d.Path)
	}
	if err := kept.Deny(); !errors.Is(err, filterapi.ErrBadContext) {
		t.Errorf("after the handler: %v", err)
	}
	deny = true
	if d := b.Decide(context.Background(), udp("10.0.0.2:5001", phone)); d.Path != flow.Drop {
		t.Errorf("denied: path %v", d.Path)
	}
}

// TestDataFiltersOfOnePeer: what was attached for one peer is on the flows of
// that peer alone, also when it comes back, and then once.
func TestDataFiltersOfOnePeer(t *testing.T) {
	again := "again"
	p := &probe{events: filterapi.Events{Types: filterapi.UDPDestination}}
	p.handle = func(ev filterapi.Event) error {
		e := ev.(*filterapi.UDPDestinationEvent)
		switch {
		case again == "first":
			peer := netip.MustParseAddrPort("203.0.113.11:5060") // another one, too
			return errors.Join(e.Connection.AttachDataFilterWithDestination(tagged{tag: "far"}, filterapi.PriorityExternal, e.Peer),
				e.Connection.AttachDataFilterWithDestination(tagged{tag: "near"}, filterapi.PriorityNAT, e.Peer),
				e.Connection.AttachDataFilterWithDestination(tagged{tag: "other"}, filterapi.PriorityNAT, peer))
		case again == "renewed":
			return e.Connection.AttachDataFilterWithDestination(tagged{tag: "renewed"}, filterapi.PriorityNAT, e.Peer)
		}
		return nil
	}
	b, _ := talkBench(t, p)
	hold := b.Decide(context.Background(), udp("10.0.0.2:7000", phone)) // keeps the session
	if hold.Path != flow.Kernel {
		t.Fatalf("path %v", hold.Path)
	}
	for _, x := range []struct {
		again, src, dst string
		want            []string
	}{
		{"first", "10.0.0.2:5000", phone, []string{"near", "far"}},
		{"left alone", "10.0.0.2:5000", phone, []string{"near", "far"}},
		{"left alone", "10.0.0.2:5001", phone, nil},
		{"left alone", "10.0.0.2:5000", "203.0.113.11:5060", []string{"other"}},
		{"renewed", "10.0.0.2:5000", phone, []string{"renewed"}},
		{"left alone", "10.0.0.2:5000", phone, []string{"renewed"}},
	} {
		again = x.again
		d := b.Decide(context.Background(), udp(x.src, x.dst))
		if got := tags(d.Takeover); !slices.Equal(got, x.want) {
			t.Errorf("%s, %s to %s: chain %v, want %v", x.again, x.src, x.dst, got, x.want)
		}
		if d.Takeover != nil {
			d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
		}
	}
}

// TestDataFiltersOfAUDPBind are on each peer's flow, which come to user space
// for it.
func TestDataFiltersOfAUDPBind(t *testing.T) {
	p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP | filterapi.BindUDP | filterapi.BindTCP, Secondary: true}}
	p.handle = func(ev filterapi.Event) error {
		e, ok := ev.(*filterapi.BindEvent)
		if !ok {
			return ev.(*filterapi.ConnectEvent).Connection.AttachDataFilter(tagged{}, filterapi.PriorityNAT)
		}
		err := e.Connection.AttachDataFilter(tagged{tag: "all"}, filterapi.PriorityMiddle)
		if e.TCP {
			if !errors.Is(err, filterapi.ErrBadContext) {
				t.Errorf("data filter on a TCP bind: %v", err)
			}
			return nil
		}
		return errors.Join(err, e.Connection.SetBufferSize(9000),
			e.Connection.AttachDataFilterWithDestination(tagged{tag: "one"}, filterapi.PriorityNAT, netip.MustParseAddrPort(phone)))
	}
	b, _ := talkBench(t, p)
	tk := b.decide(t)
	bind := func(proto flow.Proto) filterapi.Connection {
		binds, err := tk.Conn().Session().BindForClient(filterapi.Bind{
			Negotiated: filterapi.Negotiated{Primary: tk.Conn(), Proto: proto, Flags: filterapi.AllowMultiple},
			Clients:    []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:6000")}})
		if err != nil {
			t.Fatal(err)
		}
		return binds[0]
	}
	bind(flow.TCP).Kill()
	name, _ := bind(flow.UDP).ExternalName()
	if !b.kernel.only(t).ToUser {
		t.Error("the kernel carries the flows of a bind with a data filter")
	}
	for src, want := range map[string][]string{phone: {"one", "all"}, "203.0.113.11:5060": {"all"}} {
		d := b.Decide(context.Background(), flow.Packet{Tuple: flow.Tuple{Proto: flow.UDP, Src: netip.MustParseAddrPort(src), Dst: name}, InIface: "wan0"})
		if got := tags(d.Takeover); !slices.Equal(got, want) || d.Takeover.Buffer != 9000 {
			t.Errorf("from %s: chain %v, want %v", src, got, want)
		}
	}
}
