package netns_test

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// redirect asks for inside addresses of targets at srv, and gives the lowest.
func (s *scene) redirect(e primary, a lab.ProbeArgs) (netip.AddrPort, lab.ProbeReply) {
	s.t.Helper()
	if a.Proto == "" {
		a.Proto = "tcp"
	}
	if a.Targets == nil {
		a.Targets = []string{to(s.srv, 2100).String()}
	}
	r := s.must("redirect", e, a)
	at, err := netip.ParseAddrPort(r.Addr)
	if err != nil || at.Addr() != s.inside || at.Port() == 0 {
		s.t.Fatalf("redirected from %q, want a port of %s", r.Addr, s.inside)
	}
	if len(r.Actions) != len(a.Targets) {
		s.t.Fatalf("%d actions for %d targets", len(r.Actions), len(a.Targets))
	}
	return at, r
}

// eachMode is eachScene twice: for permissions whose flows the kernel carries,
// and for those with NoKernelMode. more are the mode's flags, and others.
func eachMode(t *testing.T, run func(s *scene, more func(...string) []string)) {
	t.Parallel()
	for _, mode := range []string{"kernel", "user"} {
		t.Run(mode, func(t *testing.T) {
			eachScene(t, func(s *scene) {
				run(s, func(flags ...string) []string {
					if mode == "user" {
						flags = append(flags, "NoKernelMode")
					}
					return flags
				})
			})
		})
	}
}

// next is the address whose port is i higher.
func next(a netip.AddrPort, i int) netip.AddrPort { return to(a.Addr(), int(a.Port())+i) }

// B1: a target behind an inside address of the gateway. The client never talks
// to the target's own address; the server sees whom it would see otherwise.
func TestB01Redirect(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"tcp", "udp", "tcp-NoKernelMode", "udp-NoKernelMode"} {
		t.Run(name, func(t *testing.T) {
			proto, flag, _ := strings.Cut(name, "-")
			eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
				peers := map[string]*lab.Peers{"tcp": l.Srv.EchoTCP(2100), "udp": l.Srv.EchoUDP(2100)}[proto]
				l.Srv.EchoTCP(7)
				s := play(t, l, f, probed())
				at, _ := s.redirect(s.connect(), lab.ProbeArgs{Proto: proto, Flags: strings.Fields(flag)})
				inside := l.Client.Capture()
				c := l.Client.MustDial(proto, at.String(), 5*time.Second)
				echo(t, c, "to the target")
				if c.RemoteAddr().String() != at.String() {
					t.Errorf("the client talks to %s", c.RemoteAddr())
				}
				if saw := peers.Addrs(); len(saw) != 1 || saw[0].Addr() != f.seen() {
					t.Errorf("srv saw %v, want one connection from %s", saw, f.seen())
				}
				if n := len(lab.Select(inside.Stop(), func(p lab.Seen) bool { return p.Src == to(f.srv, 2100) || p.Dst == to(f.srv, 2100) })); n != 0 {
					t.Errorf("%d packets of the client's name the target", n)
				}
			})
		})
	}
}

// B11: a redirected flow is one translated entry of conntrack's, and none of
// the daemon's sockets.
func TestB11RedirectInKernel(t *testing.T) {
	eachScene(t, func(s *scene) {
		at, _ := s.redirect(s.connect(), lab.ProbeArgs{})
		s.dial(s.Client, at)
		tracked, ok := s.GW.Flow("tcp", s.client, at)
		if !ok || tracked.Path() != "kernel" || tracked.ReplySrc != to(s.srv, 2100) || tracked.ReplyDst.Addr() != s.seen() {
			s.t.Errorf("conntrack: %s", tracked.Line)
		}
		if n := s.g.Carries("tcp", 2100) + s.g.Carries("tcp", int(at.Port())); n != 0 {
			s.t.Errorf("the daemon holds %d sockets", n)
		}
	})
}

// B2: consecutive ports, each with its target and its action.
func TestB02RedirectSeveral(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.Srv.EchoTCP(7)
		for i := range 3 {
			l.Srv.ServeTCP(2100+i, func(c *net.TCPConn) { _, _ = fmt.Fprint(c, i) })
		}
		s := play(t, l, f, probed())
		targets := []string{to(f.srv, 2100).String(), to(f.srv, 2101).String(), to(f.srv, 2102).String()}
		at, r := s.redirect(s.connect(), lab.ProbeArgs{Targets: targets, Flags: []string{"AllowMultiple"}})
		reaches := func(i int) {
			t.Helper()
			s.reads(l.Client.MustDial("tcp", next(at, i).String(), 5*time.Second), fmt.Sprint(i))
		}
		for i := range 3 {
			reaches(i)
		}
		s.p.Must("cancel", lab.ProbeArgs{Action: r.Actions[1]})
		s.rejected(l.Client, next(at, 1), "cancelled")
		reaches(0)
		reaches(2)
	})
}

// B2: where no run of ports is free nothing is installed.
func TestB02NoPorts(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		c := probed()
		c.Extra = "ports: {leases: 61000-61003}\n"
		s := play(t, l, f, c)
		e := s.connect()
		targets := func(n int) lab.ProbeArgs {
			return lab.ProbeArgs{Proto: "tcp", Targets: slices.Repeat([]string{to(f.srv, 2100).String()}, n)}
		}
		s.refused("NoPorts", "redirect", e, targets(5))
		if open := openPermissions(s.g); len(open) != 0 {
			t.Errorf("installed: %+v", open)
		}
		at, _ := s.redirect(e, targets(3))
		s.refused("NoPorts", "redirect", e, targets(2))
		s.dial(l.Client, next(at, 2))
	})
}

// B3: one connection is the default; the next one is refused at once.
func TestB03SingleUse(t *testing.T) {
	eachMode(t, func(s *scene, more func(...string) []string) {
		at, _ := s.redirect(s.connect(), lab.ProbeArgs{Flags: more()})
		c := s.dial(s.Client, at)
		s.rejected(s.Client, at, "the second time")
		echo(s.t, c, "the first stays up")
		at, _ = s.redirect(s.connect(), lab.ProbeArgs{Proto: "udp", Flags: more()})
		u := s.talk(s.Client, at)
		if err := udpError(s.Client.MustDial("udp", at.String(), time.Second)); err == nil || timedOut(err) {
			s.t.Errorf("a second UDP socket: %v, want an ICMP error", err)
		}
		echo(s.t, u, "the first stays up")
	})
}

// B3: the first SYN, sent again, still passes.
func TestB03RetransmittedSYN(t *testing.T) {
	eachMode(t, func(s *scene, more func(...string) []string) {
		at, _ := s.redirect(s.connect(), lab.ProbeArgs{Flags: more()})
		s.Srv.Run("nft", "add table inet slow; add chain inet slow in { type filter hook input priority 0; }; add rule inet slow in tcp dport 2100 drop")
		seen := s.Srv.Capture()
		result := dialling(s, s.Client, at)
		lab.Eventually(s.t, 10*time.Second, "srv sees the SYN again", func() bool {
			return len(lab.Select(seen.Peek(), lab.SYN(to(s.srv, 2100)))) >= 2
		})
		s.rejected(s.Client, at, "while the first is being made")
		s.Srv.Run("nft", "delete", "table", "inet", "slow")
		c, ok := <-result
		if !ok {
			s.t.Fatal("no connection")
		}
		defer c.Close()
		echo(s.t, c, "hello")
	})
}

// B4: any number of connections with AllowMultiple.
func TestB04AllowMultiple(t *testing.T) {
	eachMode(t, func(s *scene, more func(...string) []string) {
		at, _ := s.redirect(s.connect(), lab.ProbeArgs{Flags: more("AllowMultiple")})
		var all []net.Conn
		for range 6 {
			all = append(all, s.Client.MustDial("tcp", at.String(), 5*time.Second))
		}
		for i, c := range all {
			echo(s.t, c, fmt.Sprint("connection ", i))
		}
	})
}

// B5: unused it expires; a connection that was made before goes on.
func TestB05Timeout(t *testing.T) {
	eachMode(t, func(s *scene, more func(...string) []string) {
		e := s.connect()
		many, _ := s.redirect(e, lab.ProbeArgs{Flags: more("AllowMultiple", "Timeout"), TimeoutMS: 1500})
		made := s.dial(s.Client, many)
		once, _ := s.redirect(e, lab.ProbeArgs{Flags: more("Timeout"), TimeoutMS: 300})
		s.must("future", e, lab.ProbeArgs{Proto: "tcp", Targets: []string{to(s.srv, 2101).String()}, Flags: more("Timeout"), TimeoutMS: 300})
		noPermissions(s.t, s.g)
		s.rejected(s.Client, many, "expired")
		s.rejected(s.Client, once, "expired")
		s.silent(s.Client, to(s.srv, 2101), "expired")
		echo(s.t, made, "made before")
	})
}

// B6: without Timeout it outlasts any expiry, until it is cancelled or its
// session ends.
func TestB06WithoutTimeout(t *testing.T) {
	eachScene(t, func(s *scene) {
		e := s.connect()
		short, _ := s.redirect(e, lab.ProbeArgs{Flags: []string{"Timeout"}, TimeoutMS: 300})
		first, r := s.redirect(e, lab.ProbeArgs{})
		second, _ := s.redirect(e, lab.ProbeArgs{Flags: []string{"AllowMultiple"}})
		lab.Eventually(s.t, 5*time.Second, "one has expired", func() bool { return len(openPermissions(s.g)) == 2 })
		s.rejected(s.Client, short, "expired")
		used := s.asked("ConnectTCP", e).Conn
		c := s.dial(s.Client, second)
		s.p.Must("cancel", lab.ProbeArgs{Action: r.Actions[0]})
		s.rejected(s.Client, first, "cancelled")
		src := c.LocalAddr().String()
		lab.Eventually(s.t, 3*time.Second, "the gateway knows whose flow it is", func() bool {
			var flows []struct{ Src, Rule string }
			s.g.JSON(&flows, "flows")
			return slices.Contains(flows, struct{ Src, Rule string }{src, "probed"})
		})
		_ = c.Close()
		s.GW.Run("conntrack", "-D", "-s", s.client.String(), "-p", "tcp", "--dport", fmt.Sprint(second.Port()))
		s.p.Must("kill", lab.ProbeArgs{Conn: used})
		s.p.Await(5*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Detach" && x.Session == e.Session })
		noPermissions(s.t, s.g)
		s.rejected(s.Client, second, "the session has ended")
	})
}

// B7: Cancel voids what waits, and leaves what is connected alone.
func TestB07Cancel(t *testing.T) {
	eachMode(t, func(s *scene, more func(...string) []string) {
		e := s.connect()
		target := to(s.srv, 2101)
		at, r := s.redirect(e, lab.ProbeArgs{Flags: more()})
		future := s.must("future", e, lab.ProbeArgs{Proto: "tcp", Targets: []string{target.String()}, Flags: more()}).Actions[0]
		for _, a := range []uint64{r.Actions[0], future} {
			s.p.Must("cancel", lab.ProbeArgs{Action: a})
			s.answers("Terminating", "cancel", lab.ProbeArgs{Action: a})
		}
		s.rejected(s.Client, at, "cancelled")
		s.silent(s.Client, target, "cancelled")

		many, r := s.redirect(e, lab.ProbeArgs{Flags: more("AllowMultiple")})
		c := s.dial(s.Client, many)
		s.p.Must("cancel", lab.ProbeArgs{Action: r.Actions[0]})
		s.rejected(s.Client, many, "cancelled")
		echo(s.t, c, "goes on")

		once, r := s.redirect(e, lab.ProbeArgs{Flags: more()})
		c = s.dial(s.Client, once)
		noPermissions(s.t, s.g) // the gateway has heard that it is used up
		s.answers("Terminating", "cancel", lab.ProbeArgs{Action: r.Actions[0]})
		echo(s.t, c, "goes on, too")
	})
}

// B8: a permission is of its session alone: another client is refused at once,
// and uses nothing up.
func TestB08OtherSession(t *testing.T) {
	eachMode(t, func(s *scene, more func(...string) []string) {
		at, _ := s.redirect(s.connect(), lab.ProbeArgs{Flags: more()})
		s.rejected(s.Client2, at, "of another client")
		s.dial(s.Client, at)
	})
}

// B15: the external address that was asked for is what the server sees, with
// the port if one was asked for.
func TestB15ExternalAddress(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		peers := l.Srv.EchoTCP(2100)
		l.Srv.EchoTCP(7)
		s := play(t, l, f, probed())
		e := s.connect()
		for _, flags := range [][]string{{"AllowMultiple"}, {"AllowMultiple", "NoKernelMode"}} {
			many := lab.ProbeArgs{External: to(f.spare, 0).String(), Flags: flags}
			at, _ := s.redirect(e, many)
			for range 2 {
				s.dial(l.Client, at)
			}
			many.Proto, many.Targets = "tcp", []string{to(f.srv, 2100).String()}
			future := s.must("future", e, many).Actions[0]
			for range 2 {
				s.dial(l.Client, to(f.srv, 2100))
			}
			s.p.Must("cancel", lab.ProbeArgs{Action: future})
		}
		saw := peers.Addrs()
		for _, a := range saw {
			if a.Addr() != f.spare {
				t.Errorf("srv saw %v, want connections from %s", saw, f.spare)
			}
		}
		// A port with many connections cannot be kept.
		s.refused("InvalidArgument", "redirect", e, lab.ProbeArgs{
			Proto: "tcp", Targets: []string{to(f.srv, 2100).String()}, External: to(f.spare, 61500).String(), Flags: []string{"AllowMultiple"},
		})
	})
}

// B61: an external port that was asked for is used.
func TestB61RedirectExternalPort(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		peers := l.Srv.EchoTCP(2100)
		l.Srv.EchoTCP(7)
		s := play(t, l, f, probed())
		e := s.connect()
		for i, flags := range [][]string{nil, {"NoKernelMode"}} {
			from := to(f.spare, 61500+i)
			at, _ := s.redirect(e, lab.ProbeArgs{External: from.String(), Flags: flags})
			s.dial(l.Client, at)
			if saw := peers.Addrs(); len(saw) != i+1 || saw[i] != from {
				t.Errorf("srv saw %v, want %s at last", saw, from)
			}
		}
	})
}

// B10: with NoKernelMode a redirected flow makes no progress without the
// daemon; without it, it does.
func TestB10RedirectNoKernelMode(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.Srv.EchoTCP(7)
		l.Srv.Stream(2100)
		s := play(t, l, f, probed())
		e := s.connect()
		user, _ := s.redirect(e, lab.ProbeArgs{Flags: []string{"NoKernelMode"}})
		kernel, _ := s.redirect(e, lab.ProbeArgs{})
		slow, fast := startDownload(l, user), startDownload(l, kernel)
		s.g.Freeze()
		defer s.g.Thaw()
		slow.stands(t)
		fast.moves(t, 16<<20)
		s.g.Thaw()
		slow.moves(t, 4<<20)
		_, _ = slow.conn.Close(), fast.conn.Close()
	})
}

// B12: a data filter on a secondary flow brings it to user space.
func TestB12RedirectFiltered(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		l.SetupProbe("probe", watching())
		s := play(t, l, f, probed())
		e := s.connect()
		s.p.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "attach", Mode: "upper"})
		at, _ := s.redirect(e, lab.ProbeArgs{Flags: []string{"AllowMultiple"}})
		for range 2 { // each has a data filter of its own
			c := l.Client.MustDial("tcp", at.String(), 5*time.Second)
			mustWrite(t, c, "shout")
			s.reads(c, "SHOUT")
		}
		if n := len(heard(s.p, func(e lab.ProbeEvent) bool {
			return e.Kind == "Pump" && e.Dst == at.String() || e.Kind == "Pump" && e.Peer == to(f.srv, 2100).String()
		})); n != 2 {
			t.Errorf("%d pumps", n)
		}
	})
}
