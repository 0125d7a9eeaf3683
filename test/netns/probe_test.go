package netns_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// probed is a protocol that the probe filter understands, under a rule that
// names it; plain is the same kind of protocol without a filter.
func probed() lab.Config {
	return lab.Config{
		Protocols: "  probed: {tcp: 7, udp: 7, filter: probe}\n  plain: {tcp: 8, udp: 8}\n",
		Rules: "  - {name: probed, action: allow, from: lan, to: wan, protocols: [probed], filters: {probe: {}}}\n" +
			"  - {name: plain, action: allow, from: lan, to: wan, protocols: [plain]}\n",
	}
}

func kindTo(kind, dst string) func(lab.ProbeEvent) bool {
	return func(e lab.ProbeEvent) bool { return e.Kind == kind && e.Dst == dst }
}

// B12: a data filter on a flow that the kernel could carry sees every byte, and
// what it changes is what srv sees.
func TestB12DataFilter(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	heard := make(chan string, 4)
	l.Srv.ServeTCP(7, func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		heard <- string(b)
		_, _ = io.WriteString(c, "answer")
	})
	g := l.Gateway(probed())
	p := l.Probe()
	p.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "attach", Chain: "tag:"})
	both(t, func(t *testing.T, srv, client netip.Addr) {
		at := netip.AddrPortFrom(srv, 7)
		c := l.Client.MustDial("tcp", at.String(), 5*time.Second).(*net.TCPConn)
		deadline(t, c, 10*time.Second)
		inUser(t, l, g, "tcp", client, at)
		mustWrite(t, c, "question")
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got := <-heard; got != "tag:question" {
			t.Errorf("srv saw %q", got)
		}
		if got, err := io.ReadAll(c); err != nil || string(got) != "tag:answer" {
			t.Errorf("the client saw %q, %v", got, err)
		}
		conn := p.Await(3*time.Second, kindTo("ConnectTCP", at.String())).Conn
		lab.Eventually(t, 3*time.Second, "the filter has seen question and answer", func() bool {
			var seen strings.Builder
			for _, e := range p.Events(func(e lab.ProbeEvent) bool { return e.Kind == "Bytes" && e.Conn == conn }) {
				seen.Write(e.Data)
			}
			return seen.String() == "questionanswer"
		})
	})
}

// B18 with the probe: AllowFutureConnect opens one exact address, TCP and UDP.
func TestB18AllowFutureConnect(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	l.Srv.EchoTCP(2100)
	l.Srv.EchoUDP(2100)
	l.Srv.EchoTCP(2101)
	l.Other.EchoTCP(2100)
	g := l.Gateway(probed())
	p := l.Probe()
	for srv, other := range map[netip.Addr]netip.Addr{lab.Srv4: lab.Other4, lab.Srv6: lab.Other6} {
		primary := netip.AddrPortFrom(srv, 7).String()
		echo(t, l.Client.MustDial("tcp", primary, 5*time.Second), "primary")
		e := p.Await(5*time.Second, kindTo("ConnectTCP", primary))
		at := netip.AddrPortFrom(srv, 2100)
		dropped := func(h *lab.Host, at netip.AddrPort) {
			t.Helper()
			if err := briefly(h, at); !timedOut(err) {
				t.Errorf("%s to %s: %v, want dropped", h.Name, at, err)
			}
		}
		dropped(l.Client, at)
		for _, proto := range []string{"tcp", "udp"} {
			p.Must("future", lab.ProbeArgs{Session: e.Session, Conn: e.Conn, Proto: proto, Targets: []string{at.String()}})
		}
		dropped(l.Client2, at)
		dropped(l.Client, netip.AddrPortFrom(srv, 2101))
		dropped(l.Client, netip.AddrPortFrom(other, 2100))
		for _, proto := range []string{"tcp", "udp"} {
			c := l.Client.MustDial(proto, at.String(), 5*time.Second)
			echo(t, c, "secondary")
			echo(t, c, "again")
			inKernel(t, l, g, proto, addrOf(l.Client, srv), at)
		}
		dropped(l.Client, at)
		if err := udpError(l.Client.MustDial("udp", at.String(), time.Second)); err == nil {
			t.Error("a second UDP flow passes")
		}
		action := p.Must("future", lab.ProbeArgs{Session: e.Session, Conn: e.Conn, Proto: "tcp", Targets: []string{at.String()}}).Actions[0]
		p.Must("cancel", lab.ProbeArgs{Action: action})
		dropped(l.Client, at)
		if r := p.Ask("cancel", lab.ProbeArgs{Action: action}); r.Error != "Terminating" {
			t.Errorf("the second Cancel: %q", r.Error)
		}
	}
}

// B20: BindForClient lets the named peer reach the client, and nobody else.
func TestB20BindForClient(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	l.Client.EchoTCP(4000)
	l.Gateway(probed())
	p := l.Probe()
	both(t, func(t *testing.T, srv, client netip.Addr) {
		primary := netip.AddrPortFrom(srv, 7).String()
		echo(t, l.Client.MustDial("tcp", primary, 5*time.Second), "primary")
		e := p.Await(5*time.Second, kindTo("ConnectTCP", primary))
		r := p.Must("bind", lab.ProbeArgs{
			Session: e.Session, Conn: e.Conn, Proto: "tcp",
			Clients: []string{netip.AddrPortFrom(client, 4000).String()}, Sources: []string{},
		})
		at := netip.MustParseAddrPort(r.Addr)
		if err := briefly(l.Srv, at); !timedOut(err) {
			t.Errorf("an empty IP filter: %v, want silence", err)
		}
		p.Must("filter", lab.ProbeArgs{Conn: r.Conn, Sources: []string{srv.String()}})
		if err := briefly(l.Other, at); !timedOut(err) {
			t.Errorf("another source: %v, want silence", err)
		}
		echo(t, l.Srv.MustDial("tcp", at.String(), 5*time.Second), "to the client")
		if err := briefly(l.Srv, at); !timedOut(err) {
			t.Errorf("the second connection: %v, want silence", err)
		}
	})
}

// B28: denied by a filter is refused at once; srv sees nothing.
func TestB28DenyAtConnect(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	seen := l.Srv.Capture()
	l.Gateway(probed())
	p := l.Probe()
	p.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "deny"})
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		start := time.Now()
		err := connect(l.Client, netip.AddrPortFrom(srv, 7), 5*time.Second)
		if !errors.Is(err, syscall.ECONNREFUSED) || time.Since(start) > lab.Patience(900*time.Millisecond) {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
	if n := len(lab.Select(seen.Stop(), func(s lab.Seen) bool { return s.TCP != nil && s.Dst.Port() == 7 })); n != 0 {
		t.Errorf("srv saw %d packets", n)
	}
}

// B31: a denied UDP destination is lost silently, others pass.
func TestB31DenyUDPDestination(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoUDP(7)
	l.Other.EchoUDP(7)
	seen := l.Srv.Capture()
	l.Gateway(probed())
	p := l.Probe()
	p.Must("on", lab.ProbeArgs{Kind: "UDPDestination", Do: "hold"})
	c := l.Client.MustListenPacket("udp4", ":0")
	for _, to := range []netip.Addr{lab.Srv4, lab.Other4} {
		if _, err := c.WriteToUDPAddrPort([]byte("hello"), netip.AddrPortFrom(to, 7)); err != nil {
			t.Fatal(err)
		}
	}
	for to, do := range map[netip.Addr]string{lab.Srv4: "deny", lab.Other4: "pass"} {
		e := p.Await(5*time.Second, kindTo("UDPDestination", netip.AddrPortFrom(to, 7).String()))
		p.Must("answer", lab.ProbeArgs{Event: e.Event, Do: do})
	}
	if err := c.SetReadDeadline(time.Now().Add(lab.Patience(5 * time.Second))); err != nil {
		t.Fatal(err)
	}
	_, from, err := c.ReadFromUDPAddrPort(make([]byte, 64))
	if want := netip.AddrPortFrom(lab.Other4, 7); err != nil || from != want {
		t.Errorf("an answer from %s, %v; want one from %s", from, err, want)
	}
	if n := len(lab.Select(seen.Stop(), lab.UDPTo(netip.AddrPortFrom(lab.Srv4, 7)))); n != 0 {
		t.Errorf("srv saw %d datagrams", n)
	}
}

// B37: Kill resets both ends at once, kernel or user, idle.
func TestB37Kill(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	g := l.Gateway(probed())
	p := l.Probe()
	for _, do := range []string{"pass", "attach"} {
		p.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: do})
		for _, srv := range []netip.Addr{lab.Srv4, lab.Srv6} {
			at := netip.AddrPortFrom(srv, 7)
			c := l.Client.MustDial("tcp", at.String(), 5*time.Second)
			echo(t, c, "alive")
			src := c.LocalAddr().String()
			if do == "pass" {
				inKernel(t, l, g, "tcp", addrOf(l.Client, srv), at)
			}
			e := p.Await(3*time.Second, func(e lab.ProbeEvent) bool { return e.Kind == "ConnectTCP" && e.Src == src })
			p.Must("kill", lab.ProbeArgs{Conn: e.Conn})
			deadline(t, c, 3*time.Second)
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s to %s: the client reads %v, want a reset", do, at, err)
			}
			lab.Eventually(t, 3*time.Second, "the server's end is gone", func() bool { return l.Srv.Connections(7) == 0 })
			p.Await(3*time.Second, func(e lab.ProbeEvent) bool { return e.Kind == "Terminating" && e.Src == src })
			if n := len(p.Events(func(e lab.ProbeEvent) bool { return e.Kind == "Terminating" && e.Src == src })); n != 1 {
				t.Errorf("%d Terminating events", n)
			}
		}
	}
}

// B41: an error or a panic in a handler ends that flow alone.
func TestB41HandlerFails(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	g := l.Gateway(probed())
	p := l.Probe()
	at := netip.AddrPortFrom(lab.Srv4, 7)
	for _, do := range []string{"fail", "panic"} {
		p.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: do})
		_ = connect(l.Client, at, 3*time.Second) // by the filter's fail mode
		p.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "pass"})
		echo(t, l.Client.MustDial("tcp", at.String(), 5*time.Second), "alive after "+do)
	}
	select {
	case <-g.Done():
		t.Error("the gateway has ended")
	default:
	}
}

// B43: a flow that the rules deny is not shown to a filter.
func TestB43RulesBeforeFilters(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	c := probed()
	c.Rules = "  - {name: no, action: deny, from: lan, to: wan, protocols: [probed]}\n" + c.Rules
	l.Gateway(c)
	p := l.Probe()
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		if err := connect(l.Client, netip.AddrPortFrom(srv, 7), 3*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a denied connect: %v", err)
		}
	})
	if n := p.Must("count", lab.ProbeArgs{Kind: "ConnectTCP"}).Count; n != 0 {
		t.Errorf("the filter was shown %d flows", n)
	}
}

// B45: a filter acts on protocols that name it, under rules that name it.
func TestB45FilterPerProtocol(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	l.Srv.EchoTCP(8)
	g := l.Gateway(probed())
	p := l.Probe()
	p.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "attach", Chain: "tag:"})
	both(t, func(t *testing.T, srv, client netip.Addr) {
		at := netip.AddrPortFrom(srv, 8)
		echo(t, l.Client.MustDial("tcp", at.String(), 5*time.Second), "untouched")
		inKernel(t, l, g, "tcp", client, at)
		c := l.Client.MustDial("tcp", netip.AddrPortFrom(srv, 7).String(), 5*time.Second)
		deadline(t, c, 5*time.Second)
		mustWrite(t, c, "x")
		got := make([]byte, len("tag:tag:x"))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != "tag:tag:x" {
			t.Errorf("through the filter: %q, %v", got, err)
		}
	})
}
