package filtertest_test

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

var (
	client = netip.MustParseAddrPort("10.0.0.2:50000")
	server = netip.MustParseAddrPort("203.0.113.10:21")
)

// puppet does what the test says.
type puppet struct {
	filterapi.Session
	fw     filterapi.Firewall
	conn   filterapi.Connection
	want   filterapi.Events // of both registrations, if set
	handle func(filterapi.Connection) error
	raised func(filterapi.Event) error // instead of everything below
	pump   func(internal, external filterapi.Socket) error

	mu     sync.Mutex
	events []filterapi.Event // other than connects and destinations
}

func (p *puppet) wants() filterapi.Events {
	if p.want.Types != 0 {
		return p.want
	}
	return filterapi.Events{Types: filterapi.ConnectTCP | filterapi.UDPDestination}
}

// seen are the events so far that are of type T.
func seen[T filterapi.Event](p *puppet) (out []T) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, ev := range p.events {
		if e, ok := ev.(T); ok {
			out = append(out, e)
		}
	}
	return out
}

func (p *puppet) Name() string { return "puppet" }
func (p *puppet) Init(fw filterapi.Firewall) (filterapi.Events, error) {
	p.fw = fw
	return p.wants(), nil
}
func (p *puppet) AttachToSession(s filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	p.Session = s
	return p, p.wants(), nil
}
func (p *puppet) Shutdown() {}
func (p *puppet) Detach()   {}
func (p *puppet) HandleEvent(_ context.Context, ev filterapi.Event) error {
	if p.raised != nil {
		p.mu.Lock()
		p.events = append(p.events, ev)
		p.mu.Unlock()
		return p.raised(ev)
	}
	switch ev := ev.(type) {
	case *filterapi.ConnectEvent:
		p.conn = ev.Connection
	case *filterapi.UDPDestinationEvent:
		p.conn = ev.Connection
	default:
		p.mu.Lock()
		defer p.mu.Unlock()
		p.events = append(p.events, ev)
		return nil
	}
	if p.handle != nil {
		return p.handle(p.conn)
	}
	return p.conn.AttachDataFilter(p, filterapi.PriorityMiddle)
}
func (p *puppet) Pump(_ context.Context, _ filterapi.Connection, internal, external filterapi.Socket) error {
	if p.pump != nil {
		return p.pump(internal, external)
	}
	_, err := internal.Recv()
	return err
}

func open(t *testing.T) (*puppet, *filtertest.Gateway, *filtertest.Flow) {
	p := &puppet{}
	g := filtertest.New(t, p, "")
	return p, g, g.Connect(client, server)
}

func future(p *puppet, port uint16) filterapi.FutureConnect {
	return filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Primary: p.conn, Proto: flow.TCP}, Target: netip.AddrPortFrom(server.Addr(), port)}
}

func bind(p *puppet) filterapi.Bind {
	return filterapi.Bind{Negotiated: filterapi.Negotiated{Primary: p.conn, Proto: flow.TCP}, Clients: []netip.AddrPort{netip.AddrPortFrom(client.Addr(), 5001)}}
}

func TestErrors(t *testing.T) {
	p, g, _ := open(t)
	for name, c := range map[string]struct {
		change func(*filterapi.FutureConnect)
		want   error
	}{
		"port 0":       {func(f *filterapi.FutureConnect) { f.Target = netip.AddrPortFrom(server.Addr(), 0) }, filterapi.ErrInvalidArgument},
		"protocol":     {func(f *filterapi.FutureConnect) { f.Proto = 99 }, filterapi.ErrInvalidArgument},
		"flag":         {func(f *filterapi.FutureConnect) { f.Flags = 1 << 15 }, filterapi.ErrInvalidArgument},
		"another host": {func(f *filterapi.FutureConnect) { f.Target = netip.MustParseAddrPort("203.0.113.11:1") }, filterapi.ErrPolicyDenied},
		"near host": {func(f *filterapi.FutureConnect) {
			f.Target, f.Flags = netip.MustParseAddrPort("203.0.113.11:1"), filterapi.ToSameNet
		}, nil},
		"far host": {func(f *filterapi.FutureConnect) {
			f.Target, f.Flags = netip.MustParseAddrPort("198.51.100.1:1"), filterapi.ToSameNet
		}, filterapi.ErrPolicyDenied},
		"any host": {func(f *filterapi.FutureConnect) {
			f.Target, f.Flags = netip.MustParseAddrPort("198.51.100.1:1"), filterapi.ToAll
		}, nil},
	} {
		f := future(p, 5001)
		c.change(&f)
		if _, err := p.AllowFutureConnect(f); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	b := bind(p)
	b.Flags = filterapi.Flags(1 << 15)
	if _, err := p.BindForClient(b); !errors.Is(err, filterapi.ErrInvalidArgument) {
		t.Errorf("bind with an unknown flag: %v", err)
	}
	b = bind(p)
	b.Clients[0] = netip.MustParseAddrPort("10.0.0.3:5001")
	if _, err := p.BindForClient(b); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("bind for another client: %v", err)
	}
	g.Ports = 1
	if _, err := p.BindForClient(bind(p)); err != nil {
		t.Errorf("bind: %v", err)
	}
	if _, err := p.BindForClient(bind(p)); !errors.Is(err, filterapi.ErrNoPorts) {
		t.Errorf("bind without ports: %v", err)
	}
	g.Quota = 1
	if _, err := p.AllowFutureConnect(future(p, 5001)); !errors.Is(err, filterapi.ErrQuota) {
		t.Errorf("beyond the quota: %v", err)
	}
	g.EndSession(client.Addr())
	if _, err := p.AllowFutureConnect(future(p, 5001)); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("after the session: %v", err)
	}
	if left := g.Open(); len(left) > 0 {
		t.Errorf("open after the session: %v", left)
	}
}

func TestContext(t *testing.T) {
	p := &puppet{handle: func(c filterapi.Connection) error {
		if _, err := c.ExternalName(); !errors.Is(err, filterapi.ErrBadContext) {
			t.Errorf("external name in the handler: %v", err)
		}
		return errors.Join(c.SetBufferSize(100), c.Deny())
	}}
	g := filtertest.New(t, p, "")
	if _, err := g.Offer(client, server); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("denied: %v", err)
	}
	if err := p.conn.AttachDataFilter(p, filterapi.PriorityNAT); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("AttachDataFilter on a connection that is over: %v", err)
	}
	for name, err := range map[string]error{"Deny": p.conn.Deny(), "SetBufferSize": p.conn.SetBufferSize(1)} {
		if !errors.Is(err, filterapi.ErrBadContext) {
			t.Errorf("%s outside the handler: %v", name, err)
		}
	}
	p.handle = func(filterapi.Connection) error { panic("no") }
	if _, err := g.Offer(client, server); err == nil {
		t.Error("a panic in a handler goes unnoticed")
	}
	p.handle = func(filterapi.Connection) error { return filterapi.ErrNotSupported }
	fl := g.Connect(client, server)
	fl.Client.Send("a")
	fl.Server.Expect("a")
	fl.Server.CloseWrite()
	fl.Client.ExpectEOF()
	fl.Client.CloseWrite()
	fl.Server.ExpectEOF()
}

func TestPermissionLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, g, _ := open(t)
		f := future(p, 5001)
		act, err := p.AllowFutureConnect(f)
		if err != nil {
			t.Fatal(err)
		}
		if g.Dial(flow.TCP, netip.MustParseAddr("10.0.0.3"), f.Target) || !g.Dial(flow.TCP, client.Addr(), f.Target) || g.Dial(flow.TCP, client.Addr(), f.Target) {
			t.Error("a permission is for one client and one use")
		}
		if err := act.Cancel(); !errors.Is(err, filterapi.ErrTerminating) {
			t.Errorf("cancel after use: %v", err)
		}

		b := bind(p)
		b.Flags, b.Expiry, b.IPFilter = filterapi.Timeout|filterapi.AllowMultiple, 10*time.Second, filterapi.OnlyFrom()
		binds, err := p.BindForClient(b)
		if err != nil {
			t.Fatal(err)
		}
		c := binds[0]
		name, _ := c.ExternalName()
		if _, in := g.Arrive(flow.TCP, server.Addr(), name); in {
			t.Error("a reserved bind lets somebody in")
		}
		<-time.After(9 * time.Second)
		if err := c.SetIPFilter(filterapi.OnlyFrom(server.Addr())); err != nil {
			t.Fatal(err)
		}
		copied := c.IPFilter()
		if err := copied.IncludeRange(client.Addr(), client.Addr()); err != nil {
			t.Fatal(err)
		}
		<-time.After(9 * time.Second)
		for range 2 {
			if to, in := g.Arrive(flow.TCP, server.Addr(), name); !in || to != b.Clients[0] {
				t.Errorf("armed bind: %v %v", to, in)
			}
		}
		<-time.After(2 * time.Second)
		if err := c.SetIPFilter(nil); !errors.Is(err, filterapi.ErrTerminating) {
			t.Errorf("filter of an expired bind: %v", err)
		}
		c.Kill()
	})
}

// Nothing is in force before the kernel's acknowledgement.
func TestKernelOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, g, _ := open(t)
		release := g.HoldKernel()
		done := make(chan error)
		go func() {
			_, err := p.AllowFutureConnect(future(p, 5001))
			done <- err
		}()
		synctest.Wait()
		if g.Dial(flow.TCP, client.Addr(), future(p, 5001).Target) {
			t.Error("in force before the acknowledgement")
		}
		release()
		if err := <-done; err != nil || !g.Dial(flow.TCP, client.Addr(), future(p, 5001).Target) {
			t.Errorf("after the acknowledgement: %v", err)
		}
		release = g.HoldKernel()
		go func() {
			_, err := p.AllowFutureConnect(future(p, 5002))
			done <- err
		}()
		synctest.Wait()
		g.EndSession(client.Addr())
		release()
		if err := <-done; !errors.Is(err, filterapi.ErrTerminating) || len(g.Open()) > 0 {
			t.Errorf("session ended meanwhile: %v, open %v", err, g.Open())
		}
	})
}

func TestSockets(t *testing.T) {
	var kept []byte
	p := &puppet{pump: func(internal, external filterapi.Socket) error {
		buf, err := internal.Recv()
		if err != nil {
			return err
		}
		kept = buf.Data
		if err := external.Send(buf); err != nil {
			return err
		}
		return filterapi.ErrReleased
	}}
	g := filtertest.New(t, p, "")
	fl := g.Connect(client, server)
	fl.Client.Send("one")
	fl.Server.Expect("one")
	if err := fl.Wait(); !errors.Is(err, filterapi.ErrReleased) {
		t.Errorf("Pump: %v", err)
	}
	if string(kept) == "one" {
		t.Error("a sent buffer keeps its bytes: a use after Send would go unnoticed")
	}
	fl.Client.Send("two")
	fl.Server.Expect("two")
	fl.Client.CloseWrite()
	fl.Server.ExpectEOF()
}

func TestDatagrams(t *testing.T) {
	p := &puppet{pump: func(internal, external filterapi.Socket) error {
		for {
			buf, err := internal.Recv()
			if err != nil {
				return err
			}
			if buf.Addr != server {
				return errors.New("not the peer's address")
			}
			if err := external.Send(buf); err != nil {
				return err
			}
		}
	}}
	g := filtertest.New(t, p, "")
	fl, err := g.Associate(client, server)
	if err != nil {
		t.Fatal(err)
	}
	fl.Client.Send(string(make([]byte, 5000)), "small") // the first does not fit the buffer
	fl.Server.Expect("small")
	fl.Cut()
	if err := fl.Wait(); err == nil {
		t.Error("the sockets of a cut connection go on")
	}
}

func TestBlockedSender(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &puppet{pump: func(_, external filterapi.Socket) error {
			for {
				if err := external.Send(filterapi.NewBuffer(make([]byte, 1000), nil)); err != nil {
					return err
				}
			}
		}}
		g := filtertest.New(t, p, "")
		g.Window = 4000
		fl := g.Connect(client, server)
		synctest.Wait()
		if n := len(fl.Server.Waiting()); n != 4000 {
			t.Errorf("%d bytes wait in a window of 4000", n)
		}
		var wg sync.WaitGroup
		wg.Go(func() { fl.Server.Reset() })
		if err := fl.Wait(); !errors.Is(err, filtertest.ErrReset) {
			t.Errorf("Pump: %v", err)
		}
		wg.Wait()
	})
}
