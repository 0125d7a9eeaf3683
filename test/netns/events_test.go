package netns_test

import (
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// B28: denied by a filter is refused at once; srv sees nothing.
func TestB28DenyAtConnect(t *testing.T) {
	eachScene(t, func(s *scene) {
		seen := s.Srv.Capture()
		s.on("ConnectTCP", "deny")
		s.rejected(s.Client, to(s.srv, 7), "the filter denies")
		if n := len(lab.Select(seen.Stop(), func(p lab.Seen) bool { return p.TCP != nil && p.Dst.Port() == 7 })); n != 0 {
			s.t.Errorf("srv saw %d packets", n)
		}
		s.on("ConnectTCP", "pass")
		s.answers("BadContext", "deny", lab.ProbeArgs{Conn: s.connect().id}) // after the handler
	})
}

// B29: an inbound connection that a filter denies is reset; the client sees
// nothing of it, and the bind stays.
func TestB29DenyAtAccept(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		l.Client.EchoTCP(4000)
		l.SetupProbe("probe", watching())
		s := play(t, l, f, probed())
		seen := l.Client.Capture()
		e := s.connect()
		bind := s.must("bind", e, lab.ProbeArgs{Proto: "tcp", Clients: []string{to(f.client, 4000).String()}, Flags: []string{"AllowMultiple"}})
		at := netip.MustParseAddrPort(bind.Addr)
		s.on("Accepted", "deny")
		s.rejected(l.Srv, at, "the filter denies")
		if n := len(lab.Select(seen.Stop(), lab.SYN(to(f.client, 4000)))); n != 0 {
			t.Errorf("the client saw %d SYNs", n)
		}
		s.on("Accepted", "pass")
		s.dial(l.Srv, at)
	})
}

// B30: a bind that a filter denies is refused to who asked for it, and nothing
// is open.
func TestB30DenyAtBind(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		l.SetupProbe("probe", watching())
		s := play(t, l, f, probed())
		e := s.connect()
		for proto, kind := range map[string]string{"tcp": "BindTCP", "udp": "BindUDP"} {
			s.on(kind, "deny")
			s.refused("PolicyDenied", "bind", e, lab.ProbeArgs{Proto: proto, Clients: []string{to(s.client, 4000).String()}})
			if ev := s.p.Await(3*time.Second, func(e lab.ProbeEvent) bool { return e.Kind == kind }); ev.Dst == "" {
				s.t.Errorf("%s names no external address", kind)
			}
		}
		if s.count(s.p, "Listen") != 0 {
			s.t.Error("a denied bind listens")
		}
		if open := openPermissions(s.g); len(open) != 0 {
			s.t.Errorf("open: %+v", open)
		}
	})
}

// B31: a denied UDP destination is lost silently, others pass.
func TestB31DenyUDPDestination(t *testing.T) {
	t.Parallel()
	for _, do := range []string{"deny", "deny-peer"} {
		t.Run(do, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
				l.Srv.EchoTCP(7)
				l.Srv.EchoUDP(7)
				l.Other.EchoUDP(7)
				seen, inside := l.Srv.Capture(), l.Client.Capture()
				s := play(t, l, f, probed())
				c := l.Client.MustListenPacket(f.network("udp"), ":0")
				s.connect() // attaches
				s.on("UDPDestination", do)
				send(t, c, to(f.srv, 7), "hello")
				s.p.Await(5*time.Second, kindTo("UDPDestination", to(f.srv, 7).String()))
				s.on("UDPDestination", "pass")
				if from, text := ask(t, c, to(f.other, 7), "hello"); from != to(f.other, 7) || text != "hello" {
					t.Errorf("%q came from %s, want an answer from other", text, from)
				}
				if n := len(lab.Select(seen.Stop(), lab.UDPTo(to(f.srv, 7)))); n != 0 {
					t.Errorf("srv saw %d datagrams", n)
				}
				if n := len(lab.Select(inside.Stop(), func(p lab.Seen) bool {
					return p.Proto == "icmp" || p.Proto == "icmpv6" && p.ICMPType == 1
				})); n != 0 {
					t.Errorf("the client saw %d ICMP errors", n)
				}
			})
		})
	}
}

// send writes a datagram.
func send(t testing.TB, c *net.UDPConn, at netip.AddrPort, text string) {
	t.Helper()
	if _, err := c.WriteToUDPAddrPort([]byte(text), at); err != nil {
		t.Fatal(err)
	}
}

// receive reads a datagram that must come.
func receive(t testing.TB, c *net.UDPConn) (netip.AddrPort, string) {
	t.Helper()
	deadline(t, c, 5*time.Second)
	b := make([]byte, 65536)
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatalf("no datagram: %v", err)
	}
	return to(from.Addr().Unmap(), int(from.Port())), string(b[:n])
}

// ask sends a datagram and reads the answer that must come. On a machine that is
// emulated the first one may wait too long for its judgement; then it is sent
// again.
func ask(t testing.TB, c *net.UDPConn, at netip.AddrPort, text string) (netip.AddrPort, string) {
	t.Helper()
	for tries := 3; slow() && tries > 0; tries-- {
		send(t, c, at, text)
		if err := c.SetReadDeadline(time.Now().Add(lab.Patience(time.Second))); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 65536)
		if n, from, err := c.ReadFromUDPAddrPort(b); err == nil {
			return to(from.Addr().Unmap(), int(from.Port())), string(b[:n])
		}
	}
	send(t, c, at, text)
	return receive(t, c)
}

// nothing wants no datagram for a while.
func nothing(t testing.TB, c *net.UDPConn, why string) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(silence())); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 65536)
	if n, from, err := c.ReadFromUDPAddrPort(b); !timedOut(err) {
		t.Errorf("%s: %q came from %s, %v", why, b[:n], from, err)
	}
}

// B32: one event for each peer of a client's socket, another one when the peer
// was forgotten meanwhile.
func TestB32UDPDestinationEvents(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.Srv.EchoUDP(7)
		l.Other.EchoUDP(7)
		s := play(t, l, f, probed())
		for _, key := range []string{"nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"} {
			if err := l.GW.Sysctl("net/netfilter/"+key, "2"); err != nil {
				t.Fatal(err)
			}
		}
		c := l.Client.MustListenPacket(f.network("udp"), ":0")
		once := func(peer netip.Addr) {
			ask(t, c, to(peer, 7), "hello")
		}
		for range 3 {
			once(f.srv)
			once(f.other)
		}
		events := func(want ...netip.Addr) {
			t.Helper()
			var got []netip.Addr
			for _, e := range heard(s.p, func(e lab.ProbeEvent) bool { return e.Kind == "UDPDestination" }) {
				got = append(got, netip.MustParseAddrPort(e.Dst).Addr())
			}
			if !slices.Equal(got, want) {
				t.Errorf("events for %v, want %v", got, want)
			}
		}
		events(f.srv, f.other)
		lab.Eventually(t, 15*time.Second, "srv is forgotten", func() bool {
			_, there := l.GW.Flow("udp", f.client, to(f.srv, 7))
			return !there
		})
		once(f.srv)
		events(f.srv, f.other, f.srv)
	})
}

// B37: Kill resets both ends at once, kernel or user, idle.
func TestB37Kill(t *testing.T) {
	t.Parallel()
	for _, do := range []string{"pass", "attach"} {
		t.Run(do, func(t *testing.T) {
			eachScene(t, func(s *scene) {
				s.on("ConnectTCP", do)
				e := s.connect()
				if do == "pass" {
					inKernel(s.t, s.Lab, s.g, "tcp", s.client, to(s.srv, 7))
				} else {
					inUser(s.t, s.Lab, s.g, "tcp", s.client, to(s.srv, 7))
				}
				s.p.Must("kill", lab.ProbeArgs{Conn: e.id})
				s.isReset(e, "the client")
				lab.Eventually(s.t, 3*time.Second, "the server's end is gone", func() bool { return s.Srv.Connections(7) == 0 })
				over := func(x lab.ProbeEvent) bool { return x.Kind == "Terminating" && x.Src == e.Src }
				s.p.Await(3*time.Second, over)
				second := s.connect() // an event that came later would be here by now
				if n := len(heard(s.p, over)); n != 1 {
					s.t.Errorf("%d Terminating events", n)
				}
				s.p.Must("kill", lab.ProbeArgs{Conn: second.id, On: true}) // twice is fine
				s.isReset(second, "the second client")
			})
		})
	}
}

// B41: an error or a panic in a handler ends that flow alone, by the filter's
// declared fail mode.
func TestB41HandlerFails(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"closed", "open"} {
		t.Run(mode, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
				echoes(l)
				setup := watching()
				setup.FailOpen = mode == "open"
				l.SetupProbe("probe", setup)
				s := play(t, l, f, probed())
				for _, do := range []string{"fail", "panic", "attach,fail"} {
					s.on("ConnectTCP", do)
					if setup.FailOpen {
						s.dial(l.Client, to(f.srv, 7))
					} else {
						s.rejected(l.Client, to(f.srv, 7), do)
					}
				}
				s.on("ConnectTCP", "hold") // and nobody answers
				if err := connect(l.Client, to(f.srv, 7), 5*time.Second); (err == nil) != setup.FailOpen {
					t.Errorf("the handler misses its deadline: %v", err)
				}
				s.on("ConnectTCP", "not-supported") // that passes
				s.dial(l.Client, to(f.srv, 7))
				if n := len(heard(s.p, func(e lab.ProbeEvent) bool { return e.Kind == "Pump" })); n != 0 {
					t.Errorf("%d data filters of a handler that failed", n)
				}
				select {
				case <-s.g.Done():
					t.Error("the gateway has ended")
				default:
				}
			})
		})
	}
}

// B43: a flow that the rules deny is not shown to a filter.
func TestB43RulesBeforeFilters(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		c := probed()
		c.Rules = "  - {name: no, action: deny, from: lan, to: wan, protocols: [probed]}\n" + c.Rules
		s := play(t, l, f, c)
		s.rejected(l.Client, to(f.srv, 7), "denied by a rule")
		if n := s.count(s.p, "ConnectTCP"); n != 0 {
			t.Errorf("the filter was shown %d flows", n)
		}
	})
}
