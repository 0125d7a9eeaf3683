package filtertest_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

// A filter's listening socket and what it dials, with the test as client and as
// server.
func TestNetworkTCP(t *testing.T) {
	p := &puppet{}
	g := filtertest.New(t, p, "")
	at := netip.AddrPortFrom(g.Inside, 1080)
	l, err := p.fw.Listen(at, filterapi.OnlyFrom(client.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.fw.Listen(at, nil); !errors.Is(err, filterapi.ErrAlreadyExists) {
		t.Errorf("listening twice: %v", err)
	}
	remote, err := g.World().Listen(server, nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() { // the filter: a relay
		in, err := l.Accept()
		if err != nil {
			return
		}
		out, err := p.fw.Dial(t.Context(), flow.TCP, netip.AddrPort{}, server)
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.Copy(out, in) // ends with the client
		_ = out.Close()
	}()
	c, err := g.World().Dial(t.Context(), flow.TCP, client, at)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = c.Write([]byte("through")); _ = c.Close() }()
	far, err := remote.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(far); string(got) != "through" || err != nil {
		t.Errorf("the server got %q, %v", got, err)
	}
	if from := far.RemoteAddr().String(); !strings.HasPrefix(from, "203.0.113.1:") {
		t.Errorf("the server saw %s", from)
	}
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := g.World().Dial(short, flow.TCP, netip.MustParseAddrPort("10.0.0.3:1"), at); !errors.Is(err, syscall.ETIMEDOUT) {
		t.Errorf("somebody who is not let in: %v", err)
	}
	if _, err := p.fw.Dial(t.Context(), flow.TCP, netip.AddrPort{}, netip.AddrPortFrom(server.Addr(), 9)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("where nobody listens: %v", err)
	}
	if err := l.SetIPFilter(nil); err != nil || l.IPFilter() != nil {
		t.Errorf("everybody: %v, %v", err, l.IPFilter())
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after close: %v", err)
	}
	if err := l.SetIPFilter(nil); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("filter after close: %v", err)
	}
	journal := strings.Join(g.Permissions(), "\n")
	for _, want := range []string{"opened tcp 10.0.0.1:1080", "opened tcp 203.0.113.1:", "shut tcp 10.0.0.1:1080"} {
		if !strings.Contains(journal, want) {
			t.Errorf("no %q in the journal:\n%s", want, journal)
		}
	}
}

func TestNetworkUDP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &puppet{}
		g := filtertest.New(t, p, "")
		sock, err := p.fw.ListenPacket(netip.AddrPortFrom(g.Inside, 69), nil)
		if err != nil {
			t.Fatal(err)
		}
		peer, err := g.World().ListenPacket(client, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := peer.WriteTo([]byte("ask"), sock.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 10)
		n, from, err := sock.ReadFrom(buf)
		if string(buf[:n]) != "ask" || err != nil || from.String() != client.String() {
			t.Errorf("%q from %v, %v", buf[:n], from, err)
		}
		if err := sock.SetIPFilter(filterapi.OnlyFrom()); err != nil {
			t.Fatal(err)
		}
		if _, err := peer.WriteTo([]byte("again"), sock.LocalAddr()); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := sock.SetReadDeadline(start.Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := sock.ReadFrom(buf); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Hour {
			t.Errorf("from nobody: %v after %v", err, time.Since(start))
		}
		c, err := p.fw.Dial(t.Context(), flow.UDP, netip.AddrPort{}, client)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		n, from, err = peer.ReadFrom(buf)
		if string(buf[:n]) != "hello" || err != nil || from.String() != c.LocalAddr().String() {
			t.Errorf("%q from %v, %v", buf[:n], from, err)
		}
		if _, err := peer.WriteTo([]byte("back"), from); err != nil {
			t.Fatal(err)
		}
		if n, err = c.Read(buf); string(buf[:n]) != "back" || err != nil {
			t.Errorf("%q, %v", buf[:n], err)
		}
	})
}

// A private session is a filter's own: flows of the client do not belong to it,
// and its permissions serve its own sockets unless they say otherwise.
func TestPrivateSession(t *testing.T) {
	p := &puppet{}
	g := filtertest.New(t, p, "")
	fl := g.Connect(client, server)
	s, err := p.fw.PrivateSession(client.Addr(), "somebody")
	if err != nil {
		t.Fatal(err)
	}
	if s.ID() == fl.Conn.Session().ID() || s.User() != "somebody" || s.Flags() != filterapi.SessionPrivate|filterapi.SessionAuthenticated {
		t.Errorf("session %d of %q, flags %v", s.ID(), s.User(), s.Flags())
	}
	if err := s.AttachFilter("puppet"); err != nil || p.Session.ID() != s.ID() {
		t.Errorf("attached to session %d, %v", p.Session.ID(), err)
	}
	target := netip.AddrPortFrom(server.Addr(), 5001)
	ask := filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Protocol: "puppet", Proto: flow.TCP, Flags: filterapi.ToAll}, Target: target}
	if _, err := s.AllowFutureConnect(ask); err != nil {
		t.Fatal(err)
	}
	if g.Dial(flow.TCP, client.Addr(), target) {
		t.Error("the client uses a permission of a private session")
	}
	g.Access = func(netip.Addr, filterapi.HostAccess) error { return filterapi.ErrPolicyDenied }
	remote, err := g.World().Listen(target, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Network().Dial(t.Context(), flow.TCP, netip.AddrPort{}, target); err != nil {
		t.Errorf("its own socket: %v", err)
	}
	if _, err := s.Network().Dial(t.Context(), flow.TCP, netip.AddrPort{}, target); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("its own socket, the permission used up: %v", err)
	}
	far, err := remote.Accept()
	if err != nil {
		t.Fatal(err)
	}
	g.Access = nil
	ask.Flags |= filterapi.AddressBased
	if _, err := s.AllowFutureConnect(ask); err != nil || !g.Dial(flow.TCP, client.Addr(), target) {
		t.Errorf("by address: %v", err)
	}
	s.Close()
	if _, err := far.Read(make([]byte, 1)); err == nil {
		t.Error("a socket outlives its session")
	}
	if _, err := s.AllowFutureConnect(ask); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("after Close: %v", err)
	}
	if fl.Conn.Session().Flags() != filterapi.SessionNAT {
		t.Error("the client's own session ended with it")
	}

	other, err := p.fw.ClientSession(netip.MustParseAddr("10.0.0.9"))
	if err != nil {
		t.Fatal(err)
	}
	same, err := p.fw.ClientSession(netip.MustParseAddr("10.0.0.9"))
	if err != nil || same.ID() != other.ID() {
		t.Errorf("two sessions of one client, %v", err)
	}
	other.Close()
	if other.Flags()&filterapi.SessionTerminated != 0 {
		t.Error("a session ends while somebody has it")
	}
	same.Close()
	if other.Flags()&filterapi.SessionTerminated == 0 {
		t.Error("a session without flows outlives its last user")
	}
}

// At the end of a session its flows are cut and told of before Detach.
func TestEndSession(t *testing.T) {
	var order []string
	p := &puppet{want: filterapi.Events{Types: every}}
	p.raised = func(ev filterapi.Event) error {
		if c, ok := ev.(*filterapi.ConnectEvent); ok {
			return c.Connection.AttachDataFilter(pumper(func(ctx context.Context, _ filterapi.Connection, in, _ filterapi.Socket) error {
				_, err := in.Recv()
				order = append(order, "pump")
				return err
			}), filterapi.PriorityNAT)
		}
		order = append(order, "terminating")
		return nil
	}
	d := &detaching{puppet: p, order: &order}
	g := filtertest.New(t, d, "")
	fl := g.Connect(client, server)
	g.EndSession(client.Addr())
	if got := strings.Join(order, " "); got != "pump terminating detach" {
		t.Errorf("order: %s", got)
	}
	fl.Client.ExpectReset()
	if next := g.Connect(client, server); next.Conn.Session().ID() == fl.Conn.Session().ID() {
		t.Error("a new flow belongs to the session that has ended")
	}
}

type detaching struct {
	*puppet
	order *[]string
}

func (d *detaching) AttachToSession(s filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	_, ev, err := d.puppet.AttachToSession(s)
	return d, ev, err
}
func (d *detaching) Detach() { *d.order = append(*d.order, "detach") }
