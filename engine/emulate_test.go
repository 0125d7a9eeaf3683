package engine

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

func TestAFilterPlaysTheServer(t *testing.T) {
	p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP}}
	var kept filterapi.Connection
	p.handle = func(ev filterapi.Event) error {
		kept = ev.(*filterapi.ConnectEvent).Connection
		err := kept.EmulateForConnect(tagged{tag: "server"})
		if again := kept.EmulateForConnect(tagged{}); !errors.Is(again, filterapi.ErrAlreadyEmulated) {
			t.Errorf("twice: %v", again)
		}
		return errors.Join(err, kept.AttachDataFilter(tagged{tag: "before"}, filterapi.PriorityExternal))
	}
	b, _ := talkBench(t, p)
	d := b.Decide(context.Background(), syn(client, control))
	if !d.Takeover.Emulated || d.Takeover.Dial != (Dial{}) || !slices.Equal(tags(d.Takeover), []string{"before", "server"}) {
		t.Fatalf("takeover %+v", d.Takeover)
	}
	if err := errors.Join(kept.IncrementBytesSent(1000), kept.IncrementBytesSent(24)); err != nil {
		t.Fatal(err)
	}
	d.Takeover.Connected(netip.MustParseAddrPort(control), netip.MustParseAddrPort(client))
	if _, err := kept.ExternalPeer(); !errors.Is(err, filterapi.ErrBadContext) {
		t.Errorf("an external peer: %v", err)
	}
	d.Takeover.Ended(flow.Counts{OutBytes: 7, InBytes: 8}, flow.Closed, "")
	rec := b.logs.FilterMessage("flow").All()
	if len(rec) != 1 || rec[0].ContextMap()["out_bytes"] != uint64(1024) || rec[0].ContextMap()["in_bytes"] != uint64(0) {
		t.Errorf("log %v", rec)
	}
	if err := kept.IncrementBytesSent(1); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("after the end: %v", err)
	}
}

func TestAFilterEmulatesABind(t *testing.T) {
	p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP | filterapi.BindTCP | filterapi.Accepted, Secondary: true}}
	p.handle = func(ev filterapi.Event) error {
		switch e := ev.(type) {
		case *filterapi.BindEvent:
			return errors.Join(e.Connection.EmulateForBind(), e.Connection.SetSocketName(netip.MustParseAddrPort("198.51.100.9:4711")))
		case *filterapi.ConnectEvent:
			return e.Connection.AttachDataFilter(tagged{}, filterapi.PriorityNAT)
		case *filterapi.AcceptEvent:
			return e.Connection.AttachDataFilter(tagged{tag: "scanner"}, filterapi.PriorityMiddle)
		}
		return nil
	}
	b, user := talkBench(t, p)
	tk := b.decide(t)
	bind, err := bindFor(tk, nil)
	if err != nil {
		t.Fatal(err)
	}
	if name, _ := bind.ExternalName(); !b.kernel.empty() || name.String() != "198.51.100.9:4711" {
		t.Fatalf("kernel %v, name %v", b.kernel.held, name)
	}
	remote := netip.MustParseAddrPort("198.51.100.1:99")
	c, err := bind.EmulateConnection(tagged{tag: "peer"}, remote, netip.AddrPort{})
	if err != nil {
		t.Fatal(err)
	}
	got := user.carried[0]
	if !slices.Equal(tags(got), []string{"scanner", "peer"}) || !got.Emulated || got.Dial.Source != remote ||
		got.Dial.Target.String() != "10.0.0.2:5000" || !got.Dial.Transparent || c.Tuple().Src != remote {
		t.Errorf("takeover %+v", got)
	}
	if err := c.IncrementBytesSent(5); err != nil {
		t.Error(err)
	}
	if _, err := bind.EmulateConnection(tagged{}, remote, netip.AddrPort{}); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("a second one on a bind for one: %v", err)
	}
	got.Ended(flow.Counts{}, flow.Closed, "")
	user.refuse = errors.New("connection refused")
	if bind, err = bindFor(tk, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := bind.EmulateConnection(tagged{}, remote, netip.AddrPort{}); !errors.Is(err, user.refuse) {
		t.Errorf("a client that refuses: %v", err)
	}
	tk.Ended(flow.Counts{}, flow.Closed, "")
	b.calm()
	if len(b.Flows()) != 0 || len(b.sessions.byAddr) != 0 || b.ports.Leased() != 0 || b.logs.FilterMessage("flow").Len() != 3 {
		t.Errorf("left: %v, %d sessions, %d ports; %d records", b.Flows(), len(b.sessions.byAddr), b.ports.Leased(), b.logs.FilterMessage("flow").Len())
	}
}

// TestABindThatNobodyMade: the events of a bind are raised, nothing is opened,
// and a filter sends callers on to the client.
func TestABindThatNobodyMade(t *testing.T) {
	var events []string
	deny := false
	p := &probe{events: filterapi.Events{Types: filterapi.BindTCP | filterapi.Listen}}
	p.handle = func(ev filterapi.Event) error {
		switch e := ev.(type) {
		case *filterapi.BindEvent:
			if e.Secondary || e.External != emulated.External || e.Protocol != "talk" || e.Source != filterapi.Explicit {
				t.Errorf("event %+v", e)
			}
			events = append(events, "bind")
			if deny {
				return e.Connection.Deny()
			}
			if err := e.Connection.EmulateForBind(); !errors.Is(err, filterapi.ErrAlreadyEmulated) {
				t.Errorf("emulate it again: %v", err)
			}
		case *filterapi.ListenEvent:
			events = append(events, "listen")
		}
		return nil
	}
	b, user := talkBench(t, p)
	s, err := p.fw.PrivateSession(emulated.Client.Addr(), "")
	if err != nil {
		t.Fatal(err)
	}
	ask := emulated
	ask.InternalAddressTranslation = true
	bind, err := s.EmulateClientBind(ask)
	if err != nil || !b.kernel.empty() || !slices.Equal(events, []string{"bind", "listen"}) {
		t.Fatalf("%v, kernel %v, events %v", err, b.kernel.held, events)
	}
	for _, remote := range []string{"198.51.100.1:99", "198.51.100.1:100"} {
		c, err := bind.EmulateConnection(tagged{tag: "caller"}, netip.MustParseAddrPort(remote), netip.AddrPort{})
		if err != nil {
			t.Fatal(err)
		}
		if c.Flags() != filterapi.InternalAddressTranslation {
			t.Errorf("flags %v", c.Flags())
		}
	}
	if _, err := bind.EmulateConnection(tagged{}, netip.MustParseAddrPort("198.51.100.1:99"), netip.AddrPort{}); !errors.Is(err, filterapi.ErrAlreadyExists) {
		t.Errorf("the same caller: %v", err)
	}
	if got := user.carried[1]; got.Dial.Target != emulated.Client || !slices.Equal(tags(got), []string{"caller"}) {
		t.Errorf("takeover %+v", got)
	}
	in := flow.Packet{Tuple: flow.Tuple{Proto: flow.TCP, Src: netip.MustParseAddrPort("198.51.100.1:101"), Dst: emulated.External}, InIface: "wan0"}
	if d := b.Decide(t.Context(), in); d.Path.Carries() {
		t.Errorf("somebody else's connection: %v", d.Path)
	}
	deny = true
	if _, err := s.EmulateClientBind(emulated); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("denied: %v", err)
	}
	for _, x := range user.carried {
		x.Ended(flow.Counts{}, flow.Closed, "")
	}
	s.Close()
	b.calm()
	if _, err := bind.EmulateConnection(tagged{}, netip.MustParseAddrPort("198.51.100.1:102"), netip.AddrPort{}); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("after the end: %v", err)
	}
	if len(b.sessions.byID) != 0 || len(b.Flows()) != 0 || len(b.Permissions()) != 0 {
		t.Errorf("left: %d sessions, %v, %v", len(b.sessions.byID), b.Flows(), b.Permissions())
	}
}

// slowUser is user space that dials until it is told to go on.
type slowUser struct {
	*fakeUser
	dials chan struct{}
	goOn  chan struct{}
}

func (u slowUser) Originate(ctx context.Context, t *Takeover) error {
	u.dials <- struct{}{}
	<-u.goOn
	return u.fakeUser.Originate(ctx, t)
}

// TestOneConnectionFromOneRemote: of two calls for the same one, the second
// fails while the first is still being made, and where it has begun.
func TestOneConnectionFromOneRemote(t *testing.T) {
	calls := make(chan error, 2)
	var second func()
	p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP}}
	p.handle = func(ev filterapi.Event) error {
		return ev.(*filterapi.ConnectEvent).Connection.AttachDataFilter(tagged{}, filterapi.PriorityNAT)
	}
	other := named{&probe{events: filterapi.Events{Types: filterapi.Accepted, AnyProtocol: true, Secondary: true}}, "other"}
	other.handle = func(filterapi.Event) error {
		second() // the first is not a living flow yet
		return nil
	}
	b, user := talkBench(t, p, other)
	slow := slowUser{user, make(chan struct{}, 2), make(chan struct{})}
	b.Engine.user = slow
	tk := b.decide(t)
	bind, err := tk.flow.session.handle(b.filters[0]).EmulateClientBind(emulated)
	if err != nil {
		t.Fatal(err)
	}
	remote := netip.MustParseAddrPort("198.51.100.1:99")
	call := func() error {
		_, err := bind.EmulateConnection(tagged{}, remote, netip.AddrPort{})
		return err
	}
	second = func() {
		second = func() {}
		if err := call(); !errors.Is(err, filterapi.ErrAlreadyExists) {
			t.Errorf("while filters are asked about the first: %v", err)
		}
	}
	go func() { calls <- call() }()
	<-slow.dials
	if err := call(); !errors.Is(err, filterapi.ErrAlreadyExists) {
		t.Errorf("while the client is dialled: %v", err)
	}
	close(slow.goOn)
	if err := <-calls; err != nil {
		t.Fatal(err)
	}
	user.carried[0].Ended(flow.Counts{}, flow.Closed, "")
	if err := call(); err != nil {
		t.Errorf("after the first: %v", err)
	}
}
