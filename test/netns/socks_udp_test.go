package netns_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// associated is a UDP ASSOCIATE with the client's socket.
type associated struct {
	control socks
	*net.UDPConn
	s *scene
}

func (s *scene) associate() associated {
	s.t.Helper()
	k := s.must5(s.Client, "", socksAssociate, to(s.any(), 0))
	if k.at.Addr() != s.inside {
		s.t.Fatalf("the relay is at %v, want %v", k.at, s.inside)
	}
	return associated{k, s.Client.MustDial(s.network("udp"), k.at.String(), 3*time.Second).(*net.UDPConn), s}
}

// say sends a datagram to a peer, whose address is as SOCKS has it.
func (a associated) say(target []byte, text string) {
	a.s.t.Helper()
	mustWrite(a.s.t, a, string(append([]byte{0, 0, 0}, target...))+text)
}

// hears wants a datagram from a peer.
func (a associated) hears(from netip.AddrPort, text string) {
	a.s.t.Helper()
	deadline(a.s.t, a, 5*time.Second)
	b := make([]byte, 70000)
	n, err := a.Read(b)
	want := string(append([]byte{0, 0, 0}, socksAddress(from)...)) + text
	if err != nil || string(b[:n]) != want {
		a.s.t.Fatalf("% x, %v; want %q from %v", b[:min(n, 40)], err, text, from)
	}
}

// deaf wants nothing.
func (a associated) deaf(why string) {
	a.s.t.Helper()
	if err := a.SetReadDeadline(time.Now().Add(silence())); err != nil {
		a.s.t.Fatal(err)
	}
	if n, err := a.Read(make([]byte, 100)); !errors.Is(err, os.ErrDeadlineExceeded) {
		a.s.t.Errorf("%s: %d bytes, %v", why, n, err)
	}
}

// B31, B32: one socket of the client's, many peers: the rules are asked about
// each, and filters hear of it once.
func TestB32SocksAssociate(t *testing.T) {
	eachSocksBind(t, socksConfig(openly+"udp: {peer_idle: 2}\n"), func(s *scene) {
		s.names()
		peers := s.Other.EchoUDP(7)
		a := s.associate()
		s.Other.EchoUDP(22)
		own := s.GW.EchoUDP(7)
		for range 2 {
			a.say(socksAddress(to(s.srv, 7)), "to srv")
			a.hears(to(s.srv, 7), "to srv")
			a.say(socksAddress(to(s.other, 7)), "to other")
			a.hears(to(s.other, 7), "to other")
		}
		a.say([]byte("\x03\x08srv.test\x00\x07"), "by name")
		a.hears(to(s.srv, 7), "by name")
		for _, p := range peers.Addrs() {
			if p.Addr() != s.outside {
				s.t.Errorf("other saw %v", p)
			}
		}
		for _, peer := range []netip.Addr{s.srv, s.other} {
			if n := len(heard(s.p, kindTo("UDPDestination", to(peer, 7).String()))); n != 1 {
				s.t.Errorf("%d events for %v", n, peer)
			}
		}
		a.say(socksAddress(to(s.other, 22)), "no rule")
		a.say([]byte("\x03\x0bnobody.test\x00\x07"), "no name")
		for _, at := range []netip.Addr{s.inside, s.outside, s.everybody()} {
			a.say(socksAddress(to(at, 7)), "the gateway")
		}
		mustWrite(s.t, a, "\x00\x00\x01"+string(socksAddress(to(s.srv, 7)))+"a fragment")
		mustWrite(s.t, a, "\x00\x00\x00\x09")
		a.deaf("what is refused, broken, or a fragment")
		s.flowRecord(to(s.other, 22), resultIs("denied"))
		if list := own.Addrs(); len(list) > 0 {
			s.t.Errorf("the gateway's own service is reached from %v", list)
		}

		// Another peer is denied, silently; the rest goes on.
		s.flowRecord(to(s.other, 7), resultIs("closed")) // forgotten
		s.on("UDPDestination", "deny")
		a.say(socksAddress(to(s.other, 7)), "denied")
		a.deaf("a peer that a filter denies")
		s.on("UDPDestination", "pass")

		// Datagrams of others are not the client's.
		stranger := s.Client2.MustDial("udp", a.control.at.String(), 3*time.Second)
		mustWrite(s.t, stranger, string(append([]byte{0, 0, 0}, socksAddress(to(s.srv, 7))...))+"stranger")
		port := s.Client.MustDial("udp", a.control.at.String(), 3*time.Second)
		mustWrite(s.t, port, string(append([]byte{0, 0, 0}, socksAddress(to(s.srv, 7))...))+"another port")
		a.deaf("somebody else's datagrams")

		// It ends with the connection.
		at := netip.MustParseAddrPort(a.control.at.String())
		_ = a.control.Close()
		lab.Eventually(s.t, 5*time.Second, "the relay is closed", func() bool {
			for _, x := range s.GW.Sockets("udp") {
				if x.Local == at {
					return false
				}
			}
			var binds []any
			s.g.JSON(&binds, "binds")
			return len(binds) == 0
		})
	})
}

// B23, B24, B27 for UDP: a peer that the client has not sent to is heard when a
// filter has allowed the bind, and answered if it may be.
func TestB27SocksAssociateFromPeers(t *testing.T) {
	eachSocksBind(t, socksConfig(openly), func(s *scene) {
		a := s.associate()
		a.say(socksAddress(to(s.srv, 7)), "first")
		a.hears(to(s.srv, 7), "first")
		e := s.p.Await(3*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "BindUDP" })
		external := netip.MustParseAddrPort(e.Dst)
		peer := s.Other.MustListenPacket(s.network("udp"), netip.AddrPortFrom(s.other, 4444).String())
		call := func(text string) {
			s.t.Helper()
			if _, err := peer.WriteToUDPAddrPort([]byte(text), external); err != nil {
				s.t.Fatal(err)
			}
		}
		call("too early")
		a.deaf("a bind that nobody has allowed")
		allow := func(flags ...string) lab.ProbeReply {
			return s.p.Ask("allow-bind", lab.ProbeArgs{Session: e.Session, Proto: "udp", Protocol: "probed", External: external.String(), Flags: flags})
		}
		if r := allow("Bidirectional", "IncreaseReceiveBuffer"); r.Error != "" || r.Already {
			s.t.Fatalf("allow: %+v", r)
		}
		call("now")
		a.hears(to(s.other, 4444), "now")
		if n := len(heard(s.p, kindTo("UDPDestination", to(s.other, 4444).String()))); n != 1 {
			s.t.Errorf("%d events", n)
		}
		a.say(socksAddress(to(s.other, 4444)), "an answer")
		deadline(s.t, peer, 5*time.Second)
		b := make([]byte, 100)
		n, from, err := peer.ReadFromUDPAddrPort(b)
		if err != nil || string(b[:n]) != "an answer" || from != external {
			s.t.Errorf("the peer read %q from %v, %v; want it from %v", b[:n], from, err, external)
		}
		a.say(socksAddress(to(s.other, 4445)), "to whom has not sent")

		one := s.associate()
		one.say(socksAddress(to(s.srv, 7)), "second")
		one.hears(to(s.srv, 7), "second")
		e = s.p.Await(3*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "BindUDP" && x.Conn != e.Conn })
		external = netip.MustParseAddrPort(e.Dst)
		if r := allow(); r.Error != "" || r.Already {
			s.t.Fatalf("allow: %+v", r)
		}
		call("one way")
		one.hears(to(s.other, 4444), "one way")
		one.say(socksAddress(to(s.other, 4444)), "no answer")
		if err := peer.SetReadDeadline(time.Now().Add(silence())); err != nil {
			s.t.Fatal(err)
		}
		if n, _, err := peer.ReadFromUDPAddrPort(b); err == nil {
			s.t.Errorf("an answer to a bind that is not bidirectional: %q", b[:n])
		}
	})
}

// B31, B34, B35 for UDP: a data filter holds the datagrams of a peer, in both
// directions, gives the flow back, or plays the peer.
func TestB34SocksAssociateFiltered(t *testing.T) {
	eachSocksBind(t, socksConfig(openly), func(s *scene) {
		s.Other.EchoUDP(7)
		a := s.associate()
		s.p.Must("on", lab.ProbeArgs{Kind: "UDPDestination", Do: "attach", Mode: "upper"})
		a.say(socksAddress(to(s.srv, 7)), "filtered")
		a.hears(to(s.srv, 7), "FILTERED")
		e := s.p.Await(3*time.Second, kindTo("UDPDestination", to(s.srv, 7).String()))
		lab.Eventually(s.t, 3*time.Second, "the data filter saw both directions", func() bool {
			return filtered(s.p, e.Conn, "internal") == "filtered" && filtered(s.p, e.Conn, "external") == "FILTERED"
		})
		s.on("UDPDestination", "pass")
		a.say(socksAddress(to(s.other, 7)), "not filtered")
		a.hears(to(s.other, 7), "not filtered")
		s.p.Must("release", lab.ProbeArgs{Conn: e.Conn})
		s.p.Await(3*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "PumpEnd" && x.Conn == e.Conn })
		// Pump says so when it is about to return.
		lab.Eventually(s.t, 5*time.Second, "datagrams pass without the filter", func() bool {
			a.say(socksAddress(to(s.srv, 7)), "given back")
			deadline(s.t, a, 5*time.Second)
			b := make([]byte, 100)
			n, err := a.Read(b)
			return err == nil && strings.HasSuffix(string(b[:n]), "given back")
		})

		s.p.Must("on", lab.ProbeArgs{Kind: "UDPDestination", Do: "emulate", Mode: "echo"})
		seen := s.Srv.Capture()
		a.say(socksAddress(to(s.nobody, 7)), "played")
		a.hears(to(s.nobody, 7), "played")
		if n := len(lab.Select(seen.Stop(), lab.UDPTo(to(s.nobody, 7)))); n != 0 {
			s.t.Errorf("%d datagrams left the gateway", n)
		}
		played := s.p.Await(3*time.Second, kindTo("UDPDestination", to(s.nobody, 7).String()))
		s.p.Must("kill", lab.ProbeArgs{Conn: played.Conn})
		s.p.Await(5*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Terminating" && x.Conn == played.Conn })
		_ = a.control.Close()
		s.p.Await(5*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Terminating" && x.Conn == e.Conn })
	})
}
