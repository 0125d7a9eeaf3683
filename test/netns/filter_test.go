package netns_test

import (
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// B12: a data filter on a flow that the kernel could carry sees every byte, and
// what it changes is what srv sees.
func TestB12DataFilter(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		heard := make(chan string, 4)
		l.Srv.ServeTCP(7, func(c *net.TCPConn) {
			b, _ := io.ReadAll(c)
			heard <- string(b)
			_, _ = io.WriteString(c, "answer")
		})
		s := play(t, l, f, probed())
		s.p.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "attach", Chain: "tag:", Mode: "upper"})
		c := l.Client.MustDial("tcp", to(f.srv, 7).String(), 5*time.Second).(*net.TCPConn)
		deadline(t, c, 10*time.Second)
		inUser(t, l, s.g, "tcp", f.client, to(f.srv, 7))
		mustWrite(t, c, "question")
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got := <-heard; got != "tag:QUESTION" {
			t.Errorf("srv saw %q", got)
		}
		if got, err := io.ReadAll(c); err != nil || string(got) != "tag:ANSWER" {
			t.Errorf("the client saw %q, %v", got, err)
		}
		conn := s.asked("ConnectTCP", c).Conn
		lab.Eventually(t, 3*time.Second, "the filter has seen question and answer", func() bool {
			return filtered(s.p, conn, "internal") == "question" && filtered(s.p, conn, "external") == "answer"
		})
	})
}

// B12 for UDP.
func TestB12DatagramFilter(t *testing.T) {
	eachScene(t, func(s *scene) {
		s.p.Must("on", lab.ProbeArgs{Kind: "UDPDestination", Do: "attach", Mode: "upper"})
		c := s.Client.MustListenPacket(s.network("udp"), ":0")
		if from, text := ask(s.t, c, to(s.srv, 7), "hello"); from != to(s.srv, 7) || text != "HELLO" {
			s.t.Errorf("%q from %s", text, from)
		}
		conn := s.p.Await(3*time.Second, kindTo("UDPDestination", to(s.srv, 7).String())).Conn
		lab.Eventually(s.t, 3*time.Second, "the filter has seen both datagrams", func() bool {
			return filtered(s.p, conn, "internal") == "hello" && filtered(s.p, conn, "external") == "HELLO"
		})
	})
}

// B14: a datagram that is larger than the buffer is lost in a data filter's
// chain; without a data filter any passes (TestUDPLargeDatagram).
func TestB14BufferSize(t *testing.T) {
	eachScene(t, func(s *scene) {
		large, small := strings.Repeat("x", 5000), "small"
		try := func(a lab.ProbeArgs, want string) {
			s.t.Helper()
			a.Kind = "UDPDestination"
			s.p.Must("on", a)
			c := s.Client.MustListenPacket(s.network("udp"), ":0")
			ask(s.t, c, to(s.srv, 7), small)
			send(s.t, c, to(s.srv, 7), large)
			send(s.t, c, to(s.srv, 7), small)
			if _, got := receive(s.t, c); got != want {
				s.t.Errorf("%s: %d bytes came back, want %d", a.Do, len(got), len(want))
			}
		}
		try(lab.ProbeArgs{Do: "attach"}, small)
		try(lab.ProbeArgs{Do: "buffer,attach", Buffer: 8192}, large)
		try(lab.ProbeArgs{Do: "pass"}, large)
	})
}

// B34: the chain follows the priority, in both directions.
func TestB34Priorities(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		l.SetupProbe("probe2", anywhere())
		s := play(t, l, f, probed())
		second := l.ProbeNamed("probe2")
		classes := []string{"NAT", "Internal", "PostTrust", "Middle", "PreTrust", "External", "Emulation"}
		for i := range len(classes) - 1 {
			inner, outer := s.p, second
			if i%2 == 1 { // whoever is asked first
				inner, outer = outer, inner
			}
			inner.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "attach", Chain: "inner:", Priority: classes[i]})
			outer.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "attach", Chain: "outer:", Priority: classes[i+1]})
			c := l.Client.MustDial("tcp", to(f.srv, 7).String(), 5*time.Second)
			mustWrite(t, c, "x")
			// Whoever is later on the way writes further in front.
			s.reads(c, "inner:outer:outer:inner:x")
			_ = c.Close()
		}
	})
}

// B36: the external side has names from the pump on.
func TestB36ExternalNames(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		peers := l.Srv.EchoTCP(7)
		s := play(t, l, f, probed())
		s.on("ConnectTCP", "attach")
		e := s.connect()
		if e.Name != "BadContext" || e.Peer != "BadContext" {
			t.Errorf("in the handler: name %s, peer %s", e.Name, e.Peer)
		}
		saw := peers.Addrs()[0]
		pump := s.p.Await(3*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Pump" && x.Conn == e.id })
		if pump.Name != saw.String() || pump.Peer != to(f.srv, 7).String() {
			t.Errorf("in the pump: name %s, peer %s; srv saw %s", pump.Name, pump.Peer, saw)
		}
		r := s.p.Must("names", lab.ProbeArgs{Conn: e.id})
		if r.Addr != saw.String() || r.Text != to(f.srv, 7).String() {
			t.Errorf("later: %s and %s", r.Addr, r.Text)
		}
	})
}

// B38: how a data filter ends a connection is how its ends see it end.
func TestB38FilterCloses(t *testing.T) {
	t.Parallel()
	for _, way := range []struct {
		op       string
		abortive bool
	}{{"close", false}, {"close", true}, {"shutdown", false}, {"shutdown", true}} {
		name := way.op + map[bool]string{true: "-abortive", false: "-graceful"}[way.abortive]
		t.Run(name, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
				l.Srv.EchoTCP(7)
				s := play(t, l, f, probed())
				inside := l.Client.Capture()
				s.on("ConnectTCP", "attach")
				e := s.connect()
				s.p.Must(way.op, lab.ProbeArgs{Conn: e.id, Side: "internal", On: way.abortive})
				if way.abortive {
					s.isReset(e, "the client")
				} else {
					deadline(t, e, 3*time.Second)
					if n, err := e.Read(make([]byte, 1)); err != io.EOF {
						t.Errorf("the client reads %d bytes, %v; want an end", n, err)
					}
				}
				if way.op == "shutdown" && !way.abortive { // the other direction goes on
					mustWrite(t, e, "half open")
					conn := e.id
					lab.Eventually(t, 3*time.Second, "srv's echo comes to the filter", func() bool {
						return strings.HasSuffix(filtered(s.p, conn, "external"), "half open")
					})
				}
				from := func(flag func(lab.Seen) bool) int {
					return len(lab.Select(inside.Stop(), func(p lab.Seen) bool { return p.TCP != nil && !p.Out && flag(p) }))
				}
				fins, resets := from(func(p lab.Seen) bool { return p.TCP.FIN }), from(func(p lab.Seen) bool { return p.TCP.RST })
				if (fins > 0) == way.abortive || (resets > 0) != way.abortive {
					t.Errorf("the client saw %d FINs and %d resets", fins, resets)
				}
			})
		})
	}
}

// B40: a filter that fails to start is named in the log; the gateway and other
// filters work, and its protocol is handled by the rules alone.
func TestB40FilterFailsToStart(t *testing.T) {
	t.Parallel()
	for name, setup := range map[string]lab.ProbeSetup{"error": {InitError: "no licence today"}, "panic": {InitPanic: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			echoes(l)
			l.SetupProbe("probe", setup)
			c := probed()
			c.Rules += "  - {name: ftp, action: allow, from: lan, to: wan, protocols: [ftp], filters: {ftp: {}}}\n"
			ftp := l.Srv.VSFTPD()
			hash := ftp.Put(l.Srv, "file", 1000)
			g := l.Gateway(c)
			both(t, func(t *testing.T, srv, client netip.Addr) {
				echo(t, l.Client.MustDial("tcp", to(srv, 7).String(), 5*time.Second), "by the rules alone")
				inKernel(t, l, g, "tcp", client, to(srv, 7))
				if got := fetch(t, l.Client, ftpURL(srv, "file")); lab.Hash(got) != hash {
					t.Error("another filter does not work")
				}
			})
			lines := 0
			for _, line := range strings.Split(g.Output.String(), "\n") {
				if strings.Contains(line, `"probe"`) && strings.Contains(line, "the test said: panic") || strings.Contains(line, "no licence today") {
					lines++
				}
			}
			if lines != 1 {
				t.Errorf("%d lines in the log name it:\n%s", lines, g.Output)
			}
		})
	}
}

// B45: a filter acts on protocols that name it, under rules that name it.
func TestB45FilterPerProtocol(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.Srv.EchoTCP(7)
		l.Srv.EchoTCP(8)
		s := play(t, l, f, probed())
		s.p.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "attach", Chain: "tag:"})
		s.dial(l.Client, to(f.srv, 8))
		inKernel(t, l, s.g, "tcp", f.client, to(f.srv, 8))
		c := l.Client.MustDial("tcp", to(f.srv, 7).String(), 5*time.Second)
		mustWrite(t, c, "x")
		s.reads(c, "tag:tag:x")
		if n := s.count(s.p, "ConnectTCP"); n != 1 {
			t.Errorf("%d events, want 1", n)
		}
	})
}

// B49: what AttachToSession registers for replaces Init's registration in that
// session.
func TestB49TwoRegistrations(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		l.SetupProbe("probe", lab.ProbeSetup{
			Init:    lab.ProbeEvents{Types: []string{"ConnectTCP"}},
			Session: lab.ProbeEvents{Types: []string{"UDPDestination"}},
		})
		s := play(t, l, f, probed())
		s.talk(l.Client, to(f.srv, 7)) // not yet attached, and not registered for
		if n := s.count(s.p, "UDPDestination"); n != 0 {
			t.Errorf("%d UDP events before the session", n)
		}
		first := s.dial(l.Client, to(f.srv, 7)) // attaches
		s.p.Await(3*time.Second, func(e lab.ProbeEvent) bool { return e.Kind == "Attach" && e.Src == f.client.String() })
		s.dial(l.Client, to(f.srv, 7))
		if n := s.count(s.p, "ConnectTCP"); n > 1 { // the one that attached may have been raised still
			t.Errorf("%d TCP events", n)
		}
		c := s.talk(l.Client, to(f.srv, 7))
		e := s.asked("UDPDestination", c)
		if e.Client != f.client.String() {
			t.Errorf("the event's session is of %s", e.Client)
		}
		echo(t, first, "the session lives")
	})
}

// B50: what the objects say of themselves is what the ends see.
func TestB50Objects(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		c := probed()
		c.Rules = strings.Replace(c.Rules, "probe: {}", "probe: {text: this rule's own}", 1)
		s := play(t, l, f, c)
		e := s.connect()
		if e.Dst != to(f.srv, 7).String() || e.Client != f.client.String() || e.Secondary || e.Protocol != "probed" || e.Rule != "probed" ||
			e.Options != "this rule's own" || e.Source != "Transparent" || e.Flags != 0 || e.Proto != "tcp" {
			t.Errorf("the event: %+v", e.ProbeEvent)
		}
		other := s.dial(l.Client2, to(f.srv, 7))
		second := s.asked("ConnectTCP", other)
		if again := s.connect(); again.Session != e.Session || second.Session == e.Session {
			t.Errorf("sessions: client %d and %d, client2 %d", e.Session, again.Session, second.Session)
		}
		seen := map[uint64]lab.ProbeSession{}
		for _, x := range s.p.Must("sessions", lab.ProbeArgs{}).Sessions {
			seen[x.ID] = x
		}
		for id, client := range map[uint64]netip.Addr{e.Session: f.client, second.Session: f.second} {
			x := seen[id]
			if x.Client != client.String() || x.User != "" || strings.Join(x.Flags, " ") != "NAT" {
				t.Errorf("session %d: %+v, want one of %s", id, x, client)
			}
		}
		s.p.Must("kill", lab.ProbeArgs{Conn: second.Conn}) // the last flow of client2
		s.isReset(other, "client2")
		s.p.Await(3*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Detach" && x.Session == second.Session })
	})
}
