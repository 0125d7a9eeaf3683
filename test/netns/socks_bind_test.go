package netns_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// eachSocksBind is eachSocks with a probe that hears of everything.
func eachSocksBind(t *testing.T, c lab.Config, run func(s *scene)) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.SetupProbe("probe", anywhere())
		echoes(l)
		run(play(t, l, f, c))
	})
}

// bound5 asks for a BIND that awaits a host.
func (s *scene) bound5(awaited netip.AddrPort) (socks, lab.ProbeEvent) {
	s.t.Helper()
	k := s.must5(s.Client, "", socksBind, awaited)
	if k.at.Addr() != s.outside || k.at.Port() == 0 {
		s.t.Fatalf("bound to %v, want a port of %v", k.at, s.outside)
	}
	return k, s.p.Await(3*time.Second, kindTo("BindTCP", k.at.String()))
}

// B23, B24, B26, B29: a BIND discards until a filter allows it, and then lets in
// whom that says; the first who comes is joined to the client.
func TestB23SocksBind(t *testing.T) {
	eachSocksBind(t, socksConfig("socks: {networks: lan, bind_timeout: 60}\n"), func(s *scene) {
		k, e := s.bound5(to(s.any(), 0))
		if e.Source != "Explicit" || !e.Secondary && e.Rule != "" {
			s.t.Errorf("event %+v", e)
		}
		if n := s.count(s.p, "Listen"); n != 1 {
			s.t.Errorf("%d Listen events", n)
		}
		s.silent(s.Srv, k.at, "a bind that nobody has allowed")
		binds, _ := s.g.Command("binds")
		if !strings.Contains(binds, k.at.String()) || !strings.Contains(binds, "socks") || !strings.Contains(binds, "discarding") {
			s.t.Errorf("gateway binds:\n%s", binds)
		}
		allow := func(at netip.AddrPort, from ...string) lab.ProbeReply {
			return s.p.Ask("allow-bind", lab.ProbeArgs{Session: e.Session, Proto: "tcp", Protocol: "probed", External: at.String(), Sources: from})
		}
		if r := allow(to(k.at.Addr(), 1)); r.Error != "NotFound" {
			s.t.Errorf("an unknown bind: %q", r.Error)
		}
		if r := s.p.Ask("allow-bind", lab.ProbeArgs{Session: e.Session, Proto: "tcp", External: k.at.String()}); r.Error != "PolicyDenied" {
			s.t.Errorf("a bind of no protocol: %q", r.Error)
		}
		if r := allow(k.at, s.srv.String()); r.Error != "" || r.Already {
			s.t.Fatalf("allow: %+v", r)
		}
		if r := allow(k.at); r.Error != "" || !r.Already {
			s.t.Errorf("allowed again: %+v", r)
		}
		s.silent(s.Other, k.at, "not in the IP filter")

		s.on("Accepted", "deny")
		// The reset may come before connect has looked at what the handshake gave.
		ctx, cancel := context.WithTimeout(s.t.Context(), lab.Patience(5*time.Second))
		peer, err := s.Srv.Dial(ctx, "tcp", k.at.String())
		cancel()
		if err == nil {
			s.isReset(peer, "the peer that a filter denies")
			_ = peer.Close()
		} else if !errors.Is(err, syscall.ECONNRESET) {
			s.t.Errorf("the peer that a filter denies: %v", err)
		}
		if err := k.answer(); err != nil || k.code == 0 {
			s.t.Errorf("the only peer was denied: code %d, %v", k.code, err)
		}

		s.on("Accepted", "pass")
		k, e = s.bound5(to(s.any(), 0))
		if r := allow(k.at, s.srv.String()); r.Error != "" {
			s.t.Fatalf("allow: %+v", r)
		}
		peer = s.Srv.MustDial("tcp", k.at.String(), 5*time.Second)
		mustWrite(s.t, peer, "from the peer")
		if err := k.answer(); err != nil || k.code != 0 || k.at.String() != peer.LocalAddr().String() {
			s.t.Fatalf("second answer: code %d, %v, %v; the peer is %v", k.code, k.at, err, peer.LocalAddr())
		}
		s.reads(k, "from the peer")
		mustWrite(s.t, k, "from the client")
		s.reads(peer, "from the client")
		a := s.p.Await(3*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Accepted" && x.Remote == peer.LocalAddr().String() })
		if a.Listener != e.Conn || a.Source != "Explicit" {
			s.t.Errorf("accept event %+v, the bind is %d", a, e.Conn)
		}
		at := netip.MustParseAddrPort(peer.RemoteAddr().String())
		if err := briefly(s.Srv, at); err == nil {
			s.t.Error("a second peer is let in")
		}
		if err := k.Conn.(*net.TCPConn).CloseWrite(); err != nil {
			s.t.Fatal(err)
		}
		expectEOF(s.t, peer)
		mustWrite(s.t, peer, "goes on")
		s.reads(k, "goes on")
		_ = peer.Close()
		s.g.AwaitRecord("flow", 10*time.Second, func(r lab.Record) bool { return r.Text("dst") == at.String() && r.Text("result") == "closed" })
	})
}

func expectEOF(t *testing.T, c net.Conn) {
	t.Helper()
	deadline(t, c, 5*time.Second)
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || !strings.Contains(err.Error(), "EOF") {
		t.Errorf("read %d bytes, %v, want the end", n, err)
	}
}

// B30: a filter that denies the bind is the protocol's refusal.
func TestB30SocksBindDenied(t *testing.T) {
	eachSocksBind(t, socksConfig(openly), func(s *scene) {
		s.on("BindTCP", "deny")
		s.on("BindUDP", "deny")
		s.code5(2, "", socksBind, socksAddress(to(s.any(), 0)))
		s.code5(2, "", socksAssociate, socksAddress(to(s.any(), 0)))
		var binds []any
		s.g.JSON(&binds, "binds")
		if len(binds) != 0 {
			s.t.Errorf("left %v", binds)
		}
	})
}

// A BIND ends with the client's connection, with its time, and with the session.
func TestSocksBindEnds(t *testing.T) {
	eachSocksBind(t, socksConfig("socks: {networks: lan, bind_timeout: 2}\n"), func(s *scene) {
		none := func(why string) {
			s.t.Helper()
			lab.Eventually(s.t, 5*time.Second, "no bind is left: "+why, func() bool {
				var binds []any
				s.g.JSON(&binds, "binds")
				return len(binds) == 0
			})
		}
		k, _ := s.bound5(to(s.any(), 0))
		_ = k.Close()
		none("the client hangs up")
		k, _ = s.bound5(to(s.any(), 0))
		if err := k.answer(); err != nil || k.code != 6 {
			s.t.Errorf("nobody came: code %d, %v", k.code, err)
		}
		none("nobody came")
		k, e := s.bound5(to(s.any(), 0))
		if out, status := s.g.Command("sessions", "disconnect", fmt.Sprint(e.Session)); status != 0 {
			s.t.Fatalf("disconnect: %d\n%s", status, out)
		}
		if err := k.answer(); err == nil && k.code == 0 {
			s.t.Error("the session has ended, and somebody has come")
		}
		none("the session has ended")
	})
}

// With approve_binds a BIND for a host that the client has a connection to is
// open to that host at once.
func TestSocksApprovedBind(t *testing.T) {
	eachSocksBind(t, socksConfig("socks: {networks: lan, approve_binds: true}\n"), func(s *scene) {
		k, e := s.bound5(to(s.srv, 7))
		if e.Secondary {
			s.t.Errorf("there is no connection that it belongs to: %+v", e)
		}
		s.silent(s.Srv, k.at, "no connection to that host")
		control := s.must5(s.Client, "", socksConnect, to(s.srv, 7))
		echo(s.t, control, "the connection that it belongs to")
		k, e = s.bound5(to(s.srv, 7))
		if !e.Secondary || e.Rule != "probed" {
			s.t.Errorf("event %+v", e)
		}
		s.silent(s.Other, k.at, "another host")
		peer := s.Srv.MustDial("tcp", k.at.String(), 5*time.Second)
		if err := k.answer(); err != nil || k.code != 0 {
			s.t.Fatalf("second answer: code %d, %v", k.code, err)
		}
		mustWrite(s.t, peer, "comes")
		s.reads(k, "comes")
	})
}

// Who has all the ports that one client may have is told so, and counted; what he
// has goes on, and others get theirs.
func TestSocksBindQuota(t *testing.T) {
	eachSocksBind(t, socksConfig("ports: {quota: 2}\nsocks: {networks: lan, approve_binds: true}\n"), func(s *scene) {
		control := s.must5(s.Client, "", socksConnect, to(s.srv, 7))
		echo(s.t, control, "the connection that they belong to")
		k, _ := s.bound5(to(s.srv, 7))
		s.bound5(to(s.srv, 7))
		s.code5(1, "", socksBind, socksAddress(to(s.srv, 7)))
		for _, name := range []string{"ports.over_quota", "socks.failed"} {
			if n := counter(s.g, name); n != 1 {
				s.t.Errorf("%s: %d", name, n)
			}
		}
		s.must5(s.Client2, "", socksBind, to(s.any(), 0))
		peer := s.Srv.MustDial("tcp", k.at.String(), 5*time.Second)
		if err := k.answer(); err != nil || k.code != 0 {
			s.t.Fatalf("second answer: code %d, %v", k.code, err)
		}
		mustWrite(s.t, peer, "comes")
		s.reads(k, "comes")
	})
}

// A port that a reload publishes is no longer a BIND's.
func TestSocksBindPublished(t *testing.T) {
	eachSocksBind(t, socksConfig(openly), func(s *scene) {
		k, _ := s.bound5(to(s.any(), 0))
		at := k.at
		if s.srv.Is6() {
			return // only IPv4 is published at the gateway's addresses
		}
		c := socksConfig(openly)
		c.Protocols += fmt.Sprintf("  held: {tcp: %d}\n", at.Port())
		c.Rules = published("taken", "held", "server_port: 7") + c.Rules
		c.Rules = strings.Replace(c.Rules, ", \"fd00:a::2\"", "", 1)
		s.Lab.Client.EchoTCP(7)
		s.g.Reload(c)
		if err := k.answer(); err != nil || k.code == 0 {
			s.t.Errorf("the BIND is there still: code %d, %v", k.code, err)
		}
		echo(s.t, s.Srv.MustDial("tcp", at.String(), 5*time.Second), "published")
	})
}

// A gateway that is told to stop does, whatever SOCKS clients are at.
func TestSocksStop(t *testing.T) {
	eachSocksBind(t, socksConfig(openly), func(s *scene) {
		k := s.must5(s.Client, "", socksConnect, to(s.srv, 7))
		echo(s.t, k, "carried")
		s.bound5(to(s.any(), 0))
		s.must5(s.Client, "", socksAssociate, to(s.any(), 0))
		half := s.Client.MustDial("tcp", s.socksAt().String(), 5*time.Second)
		mustWrite(s.t, half, "\x05")
		if status := s.g.Stop(); status != 0 {
			s.t.Errorf("status %d\n%s", status, s.g.Output)
		}
		s.isReset(k, "the client")
		if strings.Contains(s.g.Output.String(), "panic") {
			s.t.Errorf("log:\n%s", s.g.Output)
		}
	})
}
