package netns_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

func mustAddrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// B35: a filter plays the server: nobody is dialled, and what it says that it
// sent stands in the log.
func TestB35EmulateForConnect(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		seen := l.Srv.Capture()
		s := play(t, l, f, probed())
		s.p.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "emulate", Mode: "echo"})
		e := s.connect()
		pump := s.p.Await(3*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Pump" && x.Conn == e.id })
		if pump.Error != "" {
			t.Error(pump.Error)
		}
		s.p.Must("increment", lab.ProbeArgs{Conn: e.id, Bytes: 1_000_000})
		src := e.LocalAddr().String()
		_ = e.Close()
		r := s.g.AwaitRecord("flow", 5*time.Second, func(r lab.Record) bool { return r.Text("src") == src })
		if out, _ := r["out_bytes"].(float64); out != 1_000_000 {
			t.Errorf("the record has %v bytes sent, want what the filter said", r["out_bytes"])
		}
		if n := len(lab.Select(seen.Stop(), func(p lab.Seen) bool { return p.TCP != nil })); n != 0 {
			t.Errorf("srv saw %d packets", n)
		}
	})
}

// B35 for a UDP peer; what is emulated already cannot be emulated again, and
// what is not has no sent bytes to count.
func TestB35EmulatePeer(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.Srv.EchoTCP(7)
		seen := l.Srv.Capture()
		s := play(t, l, f, probed())
		s.p.Must("on", lab.ProbeArgs{Kind: "UDPDestination", Do: "emulate", Mode: "echo"})
		s.talk(l.Client, to(f.srv, 7))
		s.p.Must("on", lab.ProbeArgs{Kind: "UDPDestination", Do: "emulate,emulate", Mode: "echo"})
		c := s.talk(l.Client, to(f.srv, 7))
		e := s.asked("UDPDestination", c)
		did := s.p.Await(3*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Did" && x.Of == e.Event })
		if did.Error != "AlreadyEmulated" {
			t.Errorf("the second time: %q", did.Error)
		}
		s.answers("NotEmulated", "increment", lab.ProbeArgs{Conn: s.connect().id, Bytes: 1})
		if n := len(lab.Select(seen.Stop(), func(p lab.Seen) bool { return p.Proto == "udp" })); n != 0 {
			t.Errorf("srv saw %d datagrams", n)
		}
	})
}

// B35: a bind that a filter emulates opens nothing; its connections come from
// the filter, and the client sees the peer that the filter names.
func TestB35EmulateForBind(t *testing.T) {
	eachBound(t, func(s *scene, e primary) {
		s.on("BindTCP", "emulate-bind")
		r := s.must("bind", e, lab.ProbeArgs{Proto: "tcp", Clients: []string{to(s.client, 4000).String()}, Flags: []string{"AllowMultiple"}})
		if at, err := netip.ParseAddrPort(r.Addr); err == nil {
			s.silent(s.Srv, at, "nothing is open")
		}
		emulated(s, r.Conn)
		s.answers("NotEmulated", "emulate-connection", lab.ProbeArgs{Conn: e.id, Remote: to(s.srv, 5555).String()})
	})
}

// emulated makes a connection of an emulated bind and talks over it.
func emulated(s *scene, bind uint64) {
	s.t.Helper()
	heard := make(chan net.Addr, 1)
	said := make(chan string, 1)
	s.Client.ServeTCP(4500, func(c *net.TCPConn) {
		heard <- c.RemoteAddr()
		_, _ = c.Write([]byte("ping"))
		b := make([]byte, 16)
		n, _ := c.Read(b)
		said <- string(b[:n])
	})
	outside := s.Srv.Capture()
	s.p.Must("emulate-connection", lab.ProbeArgs{
		Conn: bind, Remote: to(s.srv, 5555).String(), Local: to(s.client, 4500).String(), Mode: "echo", Chain: "emulated ",
	})
	if a := <-heard; a.String() != to(s.srv, 5555).String() {
		s.t.Errorf("the client sees %s", a)
	}
	if got := <-said; got != "emulated ping" {
		s.t.Errorf("the client hears %q", got)
	}
	if n := len(lab.Select(outside.Stop(), func(p lab.Seen) bool { return p.TCP != nil && p.Dst.Port() == 5555 })); n != 0 {
		s.t.Errorf("srv saw %d packets", n)
	}
	s.answers("ConnectionRefused", "emulate-connection", lab.ProbeArgs{Conn: bind, Remote: to(s.srv, 5556).String(), Local: to(s.client, 4999).String()})
}

// B61: a bind of a filter's own raises the events and opens nothing; the name
// that it is given is what the binder is told.
func TestB61EmulateClientBind(t *testing.T) {
	eachBound(t, func(s *scene, e primary) {
		name := to(s.spare, 6000)
		ask := lab.ProbeArgs{
			Session: e.Session, Proto: "tcp", Protocol: "probed", Local: to(s.client, 4000).String(), External: name.String(), On: true,
		}
		r := s.p.Must("emulated-bind", ask)
		if r.Addr != name.String() || len(r.Flags) != 1 {
			s.t.Errorf("the bind is named %s, flags %v", r.Addr, r.Flags)
		}
		for _, kind := range []string{"BindTCP", "Listen"} {
			if x := s.p.Await(3*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == kind }); x.Dst != name.String() || x.Flags != 1 {
				s.t.Errorf("%s: %+v", kind, x)
			}
		}
		s.silent(s.Srv, name, "nothing is open")
		s.p.Must("socket-name", lab.ProbeArgs{Conn: r.Conn, Name: next(name, 1).String()})
		if now := s.p.Must("names", lab.ProbeArgs{Conn: r.Conn}).Addr; now != next(name, 1).String() {
			s.t.Errorf("renamed, it is named %s", now)
		}
		s.answers("AlreadyExists", "socket-name", lab.ProbeArgs{Conn: r.Conn, Name: next(name, 2).String()})
		emulated(s, r.Conn)
		s.on("BindTCP", "deny")
		if r := s.p.Ask("emulated-bind", ask); r.Error != "PolicyDenied" {
			s.t.Errorf("denied: %q", r.Error)
		}
	})
}

// B61: the name of an emulated bind can be said once, and by its filter.
func TestB61SetSocketName(t *testing.T) {
	eachBound(t, func(s *scene, e primary) {
		name := to(s.spare, 6000)
		s.p.Must("on", lab.ProbeArgs{Kind: "BindTCP", Do: "emulate-bind,socket-name", Name: name.String()})
		ask := lab.ProbeArgs{Proto: "tcp", Clients: []string{to(s.client, 4000).String()}, Flags: []string{"AllowMultiple"}}
		r := s.must("bind", e, ask)
		if r.Addr != name.String() {
			s.t.Errorf("the binder is told %s, want %s", r.Addr, name)
		}
		s.answers("AlreadyExists", "socket-name", lab.ProbeArgs{Conn: r.Conn, Name: next(name, 1).String()})
		s.on("BindTCP", "pass")
		_, real := s.bind(e, lab.ProbeArgs{Clients: []string{to(s.client, 4001).String()}})
		s.answers("NotEmulated", "socket-name", lab.ProbeArgs{Conn: real, Name: name.String()})
	})
}
