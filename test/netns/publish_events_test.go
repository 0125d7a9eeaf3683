package netns_test

import (
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// eachPublished plays a scene in which client's echo servers are published with
// the probe filter. at is where they are reached from outside.
func eachPublished(t *testing.T, more string, run func(s *scene, v outsideView)) {
	t.Parallel()
	eachView(t, func(t *testing.T, v outsideView) {
		t.Parallel()
		l := lab.New(t)
		l.Client.EchoTCP(7)
		l.Client.EchoUDP(7)
		f := families[0]
		if v.at.Is6() {
			f = families[1]
		}
		run(play(t, l, f, lab.Config{
			Protocols: "  echo7: {tcp: 7, udp: 7, filter: probe}\n  other: {tcp: 9}\n",
			Rules:     published("echo", "echo7", "filters: {probe: {}}"+more),
		}), v)
	})
}

// A flow to a published server is an inbound one of the server's session: TCP
// raises Accepted, with the publication as its listener, UDP raises
// UDPDestination. A data filter's internal side is the server's.
func TestPublishedEvents(t *testing.T) {
	eachPublished(t, "", func(s *scene, v outsideView) {
		s.p.Must("on", lab.ProbeArgs{Kind: "Accepted", Do: "attach", Mode: "upper"})
		c := s.Srv.MustDial("tcp", to(v.at, 7).String(), 5*time.Second)
		mustWrite(s.t, c, "hello")
		wantBytes(s.t, c, "HELLO")
		e := s.p.Await(3*time.Second, func(e lab.ProbeEvent) bool { return e.Kind == "Accepted" && e.Remote == c.LocalAddr().String() })
		if e.Dst != to(v.at, 7).String() || e.Rule != "echo" || e.Protocol != "echo7" || e.Secondary || e.Listener == 0 || e.Client != v.server.String() || e.Flags != 0 {
			s.t.Errorf("the event: %+v", e)
		}
		b := s.p.Await(3*time.Second, func(e lab.ProbeEvent) bool {
			return e.Kind == "Bytes" && e.FromSide == "external" && string(e.Data) == "hello"
		})
		if b.Conn != e.Conn {
			s.t.Errorf("the client's bytes came on connection %d, want %d", b.Conn, e.Conn)
		}
		s.p.Await(3*time.Second, func(e lab.ProbeEvent) bool { return e.Kind == "Bytes" && e.FromSide == "internal" })
		u := s.talk(s.Srv, to(v.at, 7))
		d := s.p.Await(3*time.Second, func(e lab.ProbeEvent) bool { return e.Kind == "UDPDestination" && e.Src == u.LocalAddr().String() })
		if d.Client != v.server.String() || d.Rule != "echo" {
			s.t.Errorf("the datagram's event: %+v", d)
		}
		for _, x := range []struct {
			protocol, remote, want string
		}{
			{"echo7", to(v.peer, 0).String(), ""}, {"", to(v.peer, 7).String(), ""},
			{"other", to(v.peer, 0).String(), "PolicyDenied"}, {"echo7", to(v.secondary, 0).String(), "PolicyDenied"},
		} {
			s.answers(x.want, "access", lab.ProbeArgs{Session: e.Session, Protocol: x.protocol, Proto: "tcp", Remote: x.remote, On: true})
		}
	})
}

// B29 for a published server: what a filter denies is reset, and the server sees
// nothing.
func TestB29PublishedDeny(t *testing.T) {
	eachPublished(t, "", func(s *scene, v outsideView) {
		inside := s.Client.Capture()
		s.on("Accepted", "deny")
		if err := connect(s.Srv, to(v.at, 7), 5*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			s.t.Errorf("denied: %v", err)
		}
		if syns := lab.Select(inside.Stop(), func(p lab.Seen) bool { return p.TCP != nil && p.TCP.SYN && !p.Out }); len(syns) != 0 {
			s.t.Errorf("the server saw %v", syns)
		}
	})
}

// A server that sees the gateway: the connection says so, and what is bound for
// the same client is seen so, too; its own connections out are not.
func TestPublishedInternalAddressTranslation(t *testing.T) {
	eachPublished(t, ", source: gateway", func(s *scene, v outsideView) {
		saw := s.Client.EchoTCP(2100)
		c := s.dial(s.Srv, to(v.at, 7))
		e := s.p.Await(3*time.Second, func(e lab.ProbeEvent) bool { return e.Kind == "Accepted" && e.Remote == c.LocalAddr().String() })
		if e.Flags != 1 {
			s.t.Errorf("the connection has the flags %d, want InternalAddressTranslation", e.Flags)
		}
		r := s.p.Must("bind", lab.ProbeArgs{Session: e.Session, Conn: e.Conn, Proto: "tcp", Clients: []string{to(v.server, 2100).String()}, Sources: []string{v.peer.String()}})
		if !strings.HasPrefix(r.Addr, to(v.at, 0).String()[:len(to(v.at, 0).String())-1]) {
			s.t.Errorf("the bind is at %s, want %s", r.Addr, v.at)
		}
		echo(s.t, s.Srv.MustDial("tcp", r.Addr, 5*time.Second), "secondary")
		if p := saw.Addrs()[0].Addr(); p != v.gateway {
			s.t.Errorf("the server saw %s on the secondary connection, want %s", p, v.gateway)
		}
	})
}

// wantBytes reads as many bytes and compares them.
func wantBytes(t testing.TB, c net.Conn, want string) {
	t.Helper()
	deadline(t, c, 10*time.Second)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("got %q, %v; want %q", got, err, want)
	}
}
