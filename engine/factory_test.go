package engine

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

const webServer = "203.0.113.10:80"

// making is a factory whose data filters have a tag.
func making(kind filterapi.EventMask, addr, tag string) filterapi.DataFilterFactory {
	return filterapi.DataFilterFactory{
		Event: kind, Address: netip.MustParseAddrPort(addr), Priority: filterapi.PriorityMiddle,
		New: func(filterapi.Connection) (filterapi.DataFilter, error) { return tagged{tag: tag}, nil },
	}
}

// idleSession is the session of the client as the filter holds it.
func idleSession(t *testing.T, p *probe) filterapi.Session {
	t.Helper()
	s, err := p.fw.ClientSession(netip.MustParseAddr("10.0.0.2"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestAFactoryForAnExactAddress: the kernel brings those flows to user space,
// where the rules judge them; no event is needed.
func TestAFactoryForAnExactAddress(t *testing.T) {
	p := &probe{}
	b, _ := talkBench(t, p)
	s := idleSession(t, p)
	denied := making(filterapi.ConnectTCP, "203.0.113.10:9999", "denied")
	for _, f := range []filterapi.DataFilterFactory{making(filterapi.ConnectTCP, webServer, "web"), denied} {
		if _, err := s.SetDataFilterFactory(f); err != nil {
			t.Fatal(err)
		}
	}
	b.kernel.mu.Lock()
	for _, k := range b.kernel.held {
		if !k.ToUser || !k.Multiple || k.Client.Addr() != s.ClientAddr() {
			t.Errorf("kernel holds %+v", k)
		}
	}
	held := len(b.kernel.held)
	b.kernel.mu.Unlock()
	if held != 2 {
		t.Errorf("kernel holds %d permissions", held)
	}
	for _, x := range []struct {
		src, dst string
		want     flow.Path
		chain    []string
	}{
		{client, webServer, flow.User, []string{"web"}},
		{client, "203.0.113.11:80", flow.Kernel, nil},
		{"10.0.0.3:40000", webServer, flow.Kernel, nil},
		{client, "203.0.113.10:9999", flow.Drop, nil},
	} {
		if d := b.Decide(context.Background(), syn(x.src, x.dst)); d.Path != x.want || !slices.Equal(tags(d.Takeover), x.chain) {
			t.Errorf("%s to %s: %v, chain %v; want %v, %v", x.src, x.dst, d.Path, tags(d.Takeover), x.want, x.chain)
		}
	}
}

func TestAFactoryEnds(t *testing.T) {
	p := &probe{}
	b, _ := talkBench(t, p)
	s := idleSession(t, p)
	act, err := s.SetDataFilterFactory(making(filterapi.ConnectTCP, webServer, "web"))
	if err != nil {
		t.Fatal(err)
	}
	if err := act.Cancel(); err != nil || !b.kernel.empty() {
		t.Errorf("cancel: %v, kernel %v", err, b.kernel.held)
	}
	if err := act.Cancel(); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("cancel twice: %v", err)
	}
	b.kernel.fail = errors.New("kernel says no")
	if _, err := s.SetDataFilterFactory(making(filterapi.ConnectTCP, webServer, "web")); !errors.Is(err, b.kernel.fail) || b.factories.count.Load() != 0 {
		t.Errorf("refused by the kernel: %v, %d left", err, b.factories.count.Load())
	}
	b.kernel.fail = nil
	if _, err := s.SetDataFilterFactory(making(filterapi.UDPDestination, phone, "talk")); err != nil {
		t.Fatal(err)
	}
	s.Close()
	b.calm()
	if !b.kernel.empty() || b.factories.count.Load() != 0 || len(b.sessions.byID) != 0 {
		t.Errorf("after the session: kernel %v, %d factories, %d sessions", b.kernel.held, b.factories.count.Load(), len(b.sessions.byID))
	}
}

// TestFactoriesOfInboundFlows: an address that is open already, and one that is
// opened later, bring their flows to user space.
func TestFactoriesOfInboundFlows(t *testing.T) {
	for _, proto := range []flow.Proto{flow.TCP, flow.UDP} {
		p := attaching(&probe{})
		b, _ := talkBench(t, p)
		tk := b.decide(t)
		s := tk.flow.session.handle(b.filters[0])
		bind := func() netip.AddrPort {
			binds, err := s.BindForClient(filterapi.Bind{
				Negotiated: filterapi.Negotiated{Primary: tk.flow.handle(b.filters[0]), Proto: proto, Flags: filterapi.AllowMultiple},
				Clients:    []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:6000")}})
			if err != nil {
				t.Fatal(err)
			}
			return binds[0].Tuple().Dst
		}
		before := bind()
		if b.kernel.only(t).ToUser {
			t.Fatal("the flows of a plain bind come to user space")
		}
		kind := map[flow.Proto]filterapi.EventMask{flow.TCP: filterapi.Accepted, flow.UDP: filterapi.BindUDP}[proto]
		if _, err := s.SetDataFilterFactory(making(kind, "0.0.0.0:0", "in")); err != nil {
			t.Fatal(err)
		}
		for _, at := range []netip.AddrPort{before, bind()} {
			in := flow.Packet{Tuple: flow.Tuple{Proto: proto, Src: netip.MustParseAddrPort(phone), Dst: at}, InIface: "wan0"}
			if d := b.Decide(context.Background(), in); !slices.Equal(tags(d.Takeover), []string{"in"}) {
				t.Errorf("%v to %v: %v, chain %v", proto, at, d.Path, tags(d.Takeover))
			}
		}
		b.kernel.mu.Lock()
		for _, k := range b.kernel.held {
			if !k.ToUser {
				t.Errorf("%v: kernel holds %+v", proto, k)
			}
		}
		b.kernel.mu.Unlock()
	}
}

// TestAFactoryDenies: New may refuse the flow, which no failure is and no fail
// mode forgives; outside of it nothing may. Flows of other clients are nothing to
// the factory, and do not even wait for an answer.
func TestAFactoryDenies(t *testing.T) {
	p := &openProbe{probe: &probe{}, mode: filterapi.FailOpen}
	b, _ := talkBench(t, p)
	var kept filterapi.Connection
	f := making(filterapi.ConnectTCP, "0.0.0.0:0", "never")
	f.New = func(c filterapi.Connection) (filterapi.DataFilter, error) {
		kept = c
		if err := c.AttachDataFilter(tagged{}, filterapi.PriorityNAT); !errors.Is(err, filterapi.ErrBadContext) {
			t.Errorf("attach in New: %v", err)
		}
		return tagged{tag: "never"}, c.Deny()
	}
	if _, err := idleSession(t, p.probe).SetDataFilterFactory(f); err != nil {
		t.Fatal(err)
	}
	bystander := syn("10.0.0.3:40000", webServer)
	if _, ok := b.DecideNow(bystander); !ok {
		t.Error("another client waits for a factory that is not for it")
	}
	if _, ok := b.DecideNow(syn(client, webServer)); ok {
		t.Error("the factory is passed by")
	}
	if d := b.Decide(context.Background(), syn(client, webServer)); d.Path != flow.Reject {
		t.Errorf("path %v, want %v", d.Path, flow.Reject)
	}
	if err := kept.Deny(); !errors.Is(err, filterapi.ErrBadContext) {
		t.Errorf("afterwards: %v", err)
	}
}

// TestAFactorysFilterFails goes by the filter's fail mode.
func TestAFactorysFilterFails(t *testing.T) {
	for mode, want := range map[filterapi.FailMode]flow.Path{filterapi.FailOpen: flow.Kernel, filterapi.FailClosed: flow.Reject} {
		for name, fn := range map[string]func(filterapi.Connection) (filterapi.DataFilter, error){
			"error": func(filterapi.Connection) (filterapi.DataFilter, error) { return nil, errors.New("broken") },
			"panic": func(filterapi.Connection) (filterapi.DataFilter, error) { panic("broken") },
			"late":  func(filterapi.Connection) (filterapi.DataFilter, error) { time.Sleep(time.Hour); return tagged{}, nil },
		} {
			synctest.Test(t, func(t *testing.T) {
				p := &openProbe{probe: &probe{}, mode: mode}
				b, _ := talkBench(t, p)
				f := making(filterapi.ConnectTCP, webServer, "web")
				f.New = fn
				if _, err := idleSession(t, p.probe).SetDataFilterFactory(f); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				if d := b.Decide(ctx, syn(client, webServer)); d.Path != want || ctx.Err() != nil {
					t.Errorf("%s, mode %d: path %v, want %v, while the decision still counts (%v)", name, mode, d.Path, want, ctx.Err())
				}
				time.Sleep(2 * time.Hour)
			})
		}
	}
}

// TestWhoseFlowsAFactorySees: those of its session, and with AddressBased
// those of the client's address.
func TestWhoseFlowsAFactorySees(t *testing.T) {
	p := &probe{}
	b, _ := talkBench(t, p)
	s, err := p.fw.PrivateSession(netip.MustParseAddr("10.0.0.2"), "")
	if err != nil {
		t.Fatal(err)
	}
	f := making(filterapi.ConnectTCP, webServer, "web")
	if _, err := s.SetDataFilterFactory(f); err != nil {
		t.Fatal(err)
	}
	if d := b.Decide(context.Background(), syn(client, webServer)); d.Path != flow.Kernel || !b.kernel.empty() {
		t.Errorf("a private session's: path %v, kernel %v", d.Path, b.kernel.held)
	}
	f.Flags = filterapi.AddressBased
	if _, err := s.SetDataFilterFactory(f); err != nil {
		t.Fatal(err)
	}
	if d := b.Decide(context.Background(), syn("10.0.0.2:40001", webServer)); d.Path != flow.User {
		t.Errorf("the address's: path %v", d.Path)
	}
	b.kernel.only(t)
}
