package netns_test

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// B47: a session that is disconnected takes its flows and permissions with it; a
// new connect works.
func TestB47Disconnect(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		l.Srv.EchoTCP(8)
		c := probed()
		c.Rules += "  - {name: user, action: allow, from: lan, to: wan, protocols: [user], no_kernel_mode: true}\n"
		c.Protocols += "  user: {tcp: 2102}\n"
		s := play(t, l, f, c)
		e := s.connect()
		other := s.dial(l.Client2, to(f.srv, 7))
		at, _ := s.redirect(e, lab.ProbeArgs{Flags: []string{"AllowMultiple"}})
		own := map[string]net.Conn{
			"kernel": e, "user": s.dial(l.Client, to(f.srv, 2102)), "secondary": s.dial(l.Client, at), "plain": s.dial(l.Client, to(f.srv, 8)),
		}
		s.must("future", e, lab.ProbeArgs{Proto: "tcp", Targets: []string{to(f.srv, 2101).String()}})
		if out, status := s.g.Command("sessions", "disconnect", fmt.Sprint(e.Session)); status != 0 {
			t.Fatalf("sessions disconnect: status %d\n%s", status, out)
		}
		for name, c := range own {
			s.isReset(c, "the client's "+name+" flow")
		}
		s.p.Await(5*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Detach" && x.Session == e.Session })
		noPermissions(t, s.g)
		s.silent(l.Client, to(f.srv, 2101), "its session is gone")
		s.rejected(l.Client, at, "its session is gone")
		echo(t, other, "of another session")
		if again := s.connect(); again.Session == e.Session {
			t.Error("the session is still there")
		}
		if out, status := s.g.Command("sessions", "disconnect", "123456789"); status == 0 {
			t.Errorf("a session that does not exist: %s", out)
		}
	})
}

// B48: data filters for connections to come, without a registration.
func TestB48DataFilterFactory(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		l.SetupProbe("probe", lab.ProbeSetup{
			Init:    lab.ProbeEvents{Types: []string{"UDPDestination"}},
			Session: lab.ProbeEvents{Types: []string{"UDPDestination", "Terminating"}},
		})
		s := play(t, l, f, probed())
		u := s.talk(l.Client, to(f.srv, 7)) // attaches
		session := s.asked("UDPDestination", u).Session
		ask := lab.ProbeArgs{Session: session, Kind: "ConnectTCP", External: to(f.srv, 7).String(), Mode: "upper"}
		shout := func(want string) {
			t.Helper()
			c := l.Client.MustDial("tcp", to(f.srv, 7).String(), 5*time.Second)
			mustWrite(t, c, "shout")
			s.reads(c, want)
		}
		shout("shout")
		action := s.p.Must("factory", ask).Actions[0]
		shout("SHOUT")
		shout("SHOUT")
		c := l.Client2.MustDial("tcp", to(f.srv, 7).String(), 5*time.Second)
		mustWrite(t, c, "shout")
		s.reads(c, "shout") // another session
		s.p.Must("cancel", lab.ProbeArgs{Action: action})
		shout("shout")
		s.answers("Terminating", "cancel", lab.ProbeArgs{Action: action})
		if n := s.count(s.p, "ConnectTCP"); n != 0 {
			t.Errorf("%d events that nobody registered for", n)
		}
		ask.Kind, ask.External, ask.Do = "UDPDestination", to(f.srv, 7).String(), "none"
		s.p.Must("factory", ask)
		s.talk(l.Client, to(f.srv, 7))
		ask.Kind = "Listen"
		s.answers("InvalidArgument", "factory", ask)
	})
}

// B48: a factory that fails goes by the filter's fail mode.
func TestB48FactoryFails(t *testing.T) {
	eachScene(t, func(s *scene) {
		e := s.connect()
		for _, do := range []string{"fail", "panic"} {
			action := s.p.Must("factory", lab.ProbeArgs{Session: e.Session, Kind: "ConnectTCP", External: to(s.srv, 7).String(), Do: do}).Actions[0]
			s.rejected(s.Client, to(s.srv, 7), "its factory fails")
			s.p.Must("cancel", lab.ProbeArgs{Action: action})
			s.dial(s.Client, to(s.srv, 7))
		}
	})
}

// B51: the rules answer a filter's question, and nothing changes.
func TestB51HostAccessCheck(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		c := probed()
		c.Protocols += "  never: {tcp: 2100}\n"
		s := play(t, l, f, c)
		e := s.connect()
		for _, row := range []struct {
			protocol, proto, target, want string
		}{
			{"probed", "", to(f.srv, 7).String(), ""},
			{"", "tcp", to(f.srv, 7).String(), ""},
			{"", "udp", to(f.srv, 8).String(), ""},
			{"never", "", to(f.srv, 7).String(), "PolicyDenied"},
			{"", "tcp", to(f.srv, 2100).String(), "PolicyDenied"},
			{"no-such-protocol", "", to(f.srv, 7).String(), "InvalidArgument"},
			{"", "", to(f.srv, 7).String(), "InvalidArgument"},
			{"probed", "", "", "InvalidArgument"},
			{"probed", "", to(f.second, 7).String(), "NetworkDenied"},
		} {
			if r := s.p.Ask("access", lab.ProbeArgs{Session: e.Session, Protocol: row.protocol, Proto: row.proto, Remote: row.target}); r.Error != row.want {
				t.Errorf("%+v: %q", row, r.Error)
			}
		}
		s.rejected(l.Client, to(f.srv, 2100), "it was only asked about")
	})
}

// B51, B50: sessions that a filter makes.
func TestB51Sessions(t *testing.T) {
	eachScene(t, func(s *scene) {
		made := s.p.Must("client-session", lab.ProbeArgs{Local: s.client.String()}).Session
		e := s.connect()
		if e.Session != made {
			s.t.Errorf("the client's session is %d, the filter was given %d", e.Session, made)
		}
		private := s.p.Must("private-session", lab.ProbeArgs{Local: s.client.String(), User: "mary"}).Session
		if again := s.connect(); again.Session != made {
			s.t.Error("a flow of the client's belongs to a private session")
		}
		flags := map[uint64]string{}
		for _, x := range s.p.Must("sessions", lab.ProbeArgs{}).Sessions {
			flags[x.ID] = fmt.Sprint(x.Client, " ", x.User, " ", len(x.Flags))
		}
		if flags[made] != s.client.String()+"  1" || flags[private] != s.client.String()+" mary 2" {
			s.t.Errorf("sessions %v: want a client's and a private, authenticated one", flags)
		}
		for _, bad := range []string{s.inside.String(), s.outside.String(), s.any().String()} {
			s.answers("InvalidArgument", "client-session", lab.ProbeArgs{Local: bad})
		}
		s.answers("InvalidArgument", "private-session", lab.ProbeArgs{Local: s.any().String()})
		s.p.Must("attach-filter", lab.ProbeArgs{Session: private, FilterName: "probe"})
		s.p.Must("close-session", lab.ProbeArgs{Session: private})
		s.p.Await(5*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Detach" && x.Session == private })
		echo(s.t, e, "the client's session lives")
	})
}

// B61: a filter is attached without an event.
func TestB61AttachFilter(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		l.SetupProbe("probe2", anywhere())
		s := play(t, l, f, probed())
		second := l.ProbeNamed("probe2")
		session := s.p.Must("client-session", lab.ProbeArgs{Local: f.client.String()}).Session
		for range 2 { // again is fine
			s.p.Must("attach-filter", lab.ProbeArgs{Session: session, FilterName: "probe2"})
		}
		attached := heard(second, func(x lab.ProbeEvent) bool { return x.Kind == "Attach" })
		if len(attached) != 1 || attached[0].Session != session || attached[0].Src != f.client.String() {
			t.Errorf("attached %+v", attached)
		}
		s.answers("NotFound", "attach-filter", lab.ProbeArgs{Session: session, FilterName: "no-such-filter"})
		if n := s.count(second, "ConnectTCP"); n != 0 {
			t.Errorf("%d events", n)
		}
	})
}

// B51: a filter's own sockets go through the firewall: those of nobody always,
// those of a session if the rules allow it.
func TestB51Dial(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		peers := map[string]*lab.Peers{"tcp": l.Srv.EchoTCP(7), "udp": l.Srv.EchoUDP(7)}
		l.Srv.EchoTCP(2100)
		s := play(t, l, f, probed())
		session := s.connect().Session
		for _, proto := range []string{"tcp", "udp"} {
			for _, owner := range []uint64{0, session} {
				r := s.p.Must("dial", lab.ProbeArgs{Session: owner, Proto: proto, Local: to(f.spare, 0).String(), Remote: to(f.srv, 7).String(), Text: "hello"})
				if r.Text != "hello" || mustAddrPort(r.Addr).Addr() != f.spare {
					t.Errorf("%s from %s: %q came back", proto, r.Addr, r.Text)
				}
				if saw := peers[proto].Addrs(); saw[len(saw)-1].String() != r.Addr {
					t.Errorf("%s: srv saw %s, the socket says %s", proto, saw[len(saw)-1], r.Addr)
				}
			}
		}
		never := lab.ProbeArgs{Proto: "tcp", Remote: to(f.srv, 2100).String(), Text: "hello"}
		s.answers("", "dial", never) // of nobody: the rules are not asked
		never.Session = session
		s.answers("PolicyDenied", "dial", never)
		if r := s.p.Ask("dial", lab.ProbeArgs{Proto: "tcp", Remote: to(f.srv, 2199).String(), Text: "x"}); r.Error == "" {
			t.Error("nobody listens there")
		}
		s.answers("InvalidArgument", "dial", lab.ProbeArgs{Proto: "tcp", Local: to(f.client, 0).String(), Remote: to(f.srv, 7).String()})
	})
}

// B51: a filter listens at the gateway; exactly those it names reach it, until
// it closes.
func TestB51Listen(t *testing.T) {
	eachScene(t, func(s *scene) {
		for _, where := range []struct {
			at              netip.Addr
			named, stranger *lab.Host
			source          netip.Addr
		}{{s.inside, s.Client, s.Client2, s.client}, {s.outside, s.Srv, s.Other, s.srv}} {
			ask := lab.ProbeArgs{Proto: "tcp", Local: to(where.at, 0).String(), Sources: []string{where.source.String()}}
			tcp := s.p.Must("listen", ask)
			at := mustAddrPort(tcp.Addr)
			if at.Addr() != where.at || at.Port() == 0 {
				s.t.Errorf("it listens at %s", at)
			}
			s.dial(where.named, at)
			if err := briefly(where.stranger, at); err == nil {
				s.t.Errorf("%s reaches %s, too", where.stranger.Name, at)
			}
			s.p.Must("restrict", lab.ProbeArgs{Socket: tcp.Socket})
			s.dial(where.stranger, at)
			ask.Proto = "udp"
			udp := s.p.Must("listen", ask)
			echo(s.t, s.talk(where.named, mustAddrPort(udp.Addr)), "again")
			if err := udpError(where.stranger.MustDial("udp", udp.Addr, time.Second)); err == nil {
				s.t.Errorf("%s reaches %s, too", where.stranger.Name, udp.Addr)
			}
			ask.Proto, ask.Local = "tcp", at.String()
			s.answers("AlreadyExists", "listen", ask)
			for _, socket := range []uint64{tcp.Socket, udp.Socket} {
				s.p.Must("close-socket", lab.ProbeArgs{Socket: socket})
			}
			if err := briefly(where.named, at); err == nil {
				s.t.Error("it is closed, and reached")
			}
		}
		for _, bad := range []string{to(s.any(), 0).String(), to(s.client, 0).String()} {
			s.answers("InvalidArgument", "listen", lab.ProbeArgs{Proto: "tcp", Local: bad})
		}
	})
}
