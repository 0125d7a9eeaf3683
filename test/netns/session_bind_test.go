package netns_test

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// eachBound is eachFamily with echo servers at the client's ports 4000 to 4002, a
// primary connection, and a probe that hears of secondary connections, which
// therefore go through user space.
func eachBound(t *testing.T, run func(s *scene, e primary)) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.SetupProbe("probe", watching())
		bound(t, l, f, run)
	})
}

// eachPath is eachBound twice: through user space, and with a probe that hears
// of primary connections alone, where the kernel carries what comes in.
func eachPath(t *testing.T, run func(s *scene, e primary)) {
	t.Parallel()
	t.Run("user", func(t *testing.T) { eachBound(t, run) })
	t.Run("kernel", func(t *testing.T) {
		eachFamily(t, func(t *testing.T, l *lab.Lab, f family) { bound(t, l, f, run) })
	})
}

func bound(t *testing.T, l *lab.Lab, f family, run func(s *scene, e primary)) {
	echoes(l)
	for _, port := range []int{4000, 4001, 4002} {
		l.Client.EchoTCP(port)
		l.Client.EchoUDP(port)
	}
	s := play(t, l, f, probed())
	run(s, s.connect())
}

// bind opens an address for the client's port 4000, or what a says.
func (s *scene) bind(e primary, a lab.ProbeArgs) (netip.AddrPort, uint64) {
	s.t.Helper()
	if a.Proto == "" {
		a.Proto = "tcp"
	}
	if a.Clients == nil {
		a.Clients = []string{to(s.client, 4000).String()}
	}
	r := s.must("bind", e, a)
	at, err := netip.ParseAddrPort(r.Addr)
	if err != nil || at.Port() == 0 {
		s.t.Fatalf("bound to %q", r.Addr)
	}
	return at, r.Conn
}

func many(flags ...string) lab.ProbeArgs {
	return lab.ProbeArgs{Flags: append([]string{"AllowMultiple"}, flags...)}
}

// B20: BindForClient lets the named peer reach the client, and nobody else.
func TestB20BindForClient(t *testing.T) {
	eachPath(t, func(s *scene, e primary) {
		at, conn := s.bind(e, lab.ProbeArgs{Sources: []string{}})
		if at.Addr() != s.seen() {
			s.t.Errorf("bound to %s, want an address of %s", at, s.seen())
		}
		s.silent(s.Srv, at, "an empty IP filter")
		s.p.Must("filter", lab.ProbeArgs{Conn: conn, Sources: []string{s.srv.String()}})
		s.silent(s.Other, at, "not in the IP filter")
		s.dial(s.Srv, at)
		s.silent(s.Srv, at, "the second time")

		at, _ = s.bind(e, lab.ProbeArgs{}) // everybody
		s.dial(s.Other, at)

		at, _ = s.bind(e, lab.ProbeArgs{Proto: "udp", Sources: []string{s.srv.String()}, Flags: []string{"Bidirectional"}})
		s.mute(s.Other, at, "not in the IP filter")
		echo(s.t, s.talk(s.Srv, at), "again")
		s.mute(s.Srv, at, "another flow")
	})
}

// B20: several clients' addresses on consecutive ports, an even one first if
// that is asked for; an address that was asked for.
func TestB20Several(t *testing.T) {
	eachPath(t, func(s *scene, e primary) {
		clients := []string{to(s.client, 4000).String(), to(s.client, 4001).String()}
		for range 2 {
			r := s.must("bind", e, lab.ProbeArgs{Proto: "udp", Clients: clients, Flags: []string{"EvenPort", "Bidirectional"}})
			if len(r.Addrs) != 2 {
				s.t.Fatalf("bound to %v", r.Addrs)
			}
			low, high := netip.MustParseAddrPort(r.Addrs[0]), netip.MustParseAddrPort(r.Addrs[1])
			if high != next(low, 1) || low.Port()%2 != 0 {
				s.t.Errorf("bound to %v", r.Addrs)
			}
			s.talk(s.Srv, low)
			s.talk(s.Srv, high)
		}
		at, _ := s.bind(e, lab.ProbeArgs{External: to(s.spare, 61777).String()})
		if at != to(s.spare, 61777) {
			s.t.Errorf("bound to %s", at)
		}
		s.refused("AlreadyExists", "bind", e, lab.ProbeArgs{
			Proto: "tcp", Clients: []string{to(s.client, 4001).String()}, External: to(s.spare, 61777).String(),
		})
		s.dial(s.Srv, at)
	})
}

// B21: before the client's address is known a connection gets no answer; it can
// be said once.
func TestB21NoClientYet(t *testing.T) {
	eachPath(t, func(s *scene, e primary) {
		ask := many()
		ask.Clients, ask.External = []string{to(s.any(), 0).String()}, to(s.spare, 0).String()
		at, conn := s.bind(e, ask)
		if at.Addr() != s.spare {
			s.t.Errorf("bound to %s", at)
		}
		s.silent(s.Srv, at, "before the client's address is known")
		s.answers("InvalidArgument", "client-address", lab.ProbeArgs{Conn: conn, Local: to(s.client, 0).String()})
		s.p.Must("client-address", lab.ProbeArgs{Conn: conn, Local: to(s.client, 4001).String()})
		s.dial(s.Srv, at)
		s.answers("InvalidArgument", "client-address", lab.ProbeArgs{Conn: conn, Local: to(s.client, 4000).String()})
		_, known := s.bind(e, lab.ProbeArgs{})
		s.answers("InvalidArgument", "client-address", lab.ProbeArgs{Conn: known, Local: to(s.client, 4000).String()})
	})
}

// B22: one listening object and one for each connection; the listener goes with
// the first connection unless more are allowed.
func TestB22SingleOrMultiple(t *testing.T) {
	eachBound(t, func(s *scene, e primary) {
		at, conn := s.bind(e, many())
		var accepted []lab.ProbeEvent
		for range 2 {
			c := s.dial(s.Srv, at)
			x := s.p.Await(3*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Accepted" && x.Remote == c.LocalAddr().String() })
			if x.Listener != conn || x.Conn == conn || !x.Secondary {
				s.t.Errorf("accepted: %+v, the bind is %d", x, conn)
			}
			accepted = append(accepted, x)
			s.p.Must("kill", lab.ProbeArgs{Conn: x.Conn}) // ends only that one
			s.isReset(c, "the peer")
		}
		if accepted[0].Conn == accepted[1].Conn {
			s.t.Error("two connections are one object")
		}
		s.dial(s.Srv, at)
		over := func(id uint64) int {
			return len(heard(s.p, func(x lab.ProbeEvent) bool { return x.Kind == "Terminating" && x.Conn == id }))
		}
		lab.Eventually(s.t, 3*time.Second, "the ends of both", func() bool { return over(accepted[0].Conn) == 1 && over(accepted[1].Conn) == 1 })
		if over(conn) != 0 {
			s.t.Error("the bind has ended")
		}
		s.p.Must("kill", lab.ProbeArgs{Conn: conn})
		s.silent(s.Srv, at, "closed")
		lab.Eventually(s.t, 3*time.Second, "the end of the bind", func() bool { return over(conn) == 1 })

		at, _ = s.bind(e, lab.ProbeArgs{})
		s.dial(s.Srv, at)
		s.silent(s.Srv, at, "used up")
	})
}

// B33: sources can be changed while the bind is open; the copy that a filter
// gets of them is its own.
func TestB33SetIPFilter(t *testing.T) {
	eachPath(t, func(s *scene, e primary) {
		ask := many()
		ask.Sources = []string{s.srv.String()}
		at, conn := s.bind(e, ask)
		s.dial(s.Srv, at)
		s.silent(s.Other, at, "not in the IP filter")
		if r := s.p.Must("scribble", lab.ProbeArgs{Conn: conn}); len(r.Prefixes) != 1 || netip.MustParsePrefix(r.Prefixes[0]).Addr() != s.srv {
			s.t.Errorf("the IP filter has %v", r.Prefixes)
		}
		s.silent(s.Other, at, "a copy was changed")
		low, _ := s.srv.Prefix(s.srv.BitLen() - 4) // srv's and other's, among others
		s.p.Must("filter", lab.ProbeArgs{Conn: conn, Sources: []string{low.Addr().String() + "-" + s.other.String(), "!" + s.srv.String()}})
		s.dial(s.Other, at)
		s.silent(s.Srv, at, "taken out of the range")
		s.p.Must("filter", lab.ProbeArgs{Conn: conn, Sources: []string{}})
		s.silent(s.Other, at, "nobody may")
		s.p.Must("filter", lab.ProbeArgs{Conn: conn})
		s.dial(s.Srv, at)
		if r := s.p.Must("scribble", lab.ProbeArgs{Conn: conn}); r.Prefixes != nil {
			s.t.Errorf("everybody may: %v", r.Prefixes)
		}
	})
}

// dialling is a connect that goes on in the background.
func dialling(s *scene, from *lab.Host, at netip.AddrPort) <-chan net.Conn {
	result := make(chan net.Conn, 1)
	ctx, cancel := context.WithTimeout(s.t.Context(), lab.Patience(20*time.Second))
	go func() {
		defer close(result)
		defer cancel()
		if c, err := from.Dial(ctx, "tcp", at.String()); err == nil {
			result <- c
		}
	}()
	return result
}

// B23, B24: a bind that nobody has approved of succeeds and discards what comes,
// without a word. Approved, it takes the SYN that is sent again.
func TestB23UnapprovedBind(t *testing.T) { unapproved(t, false) }

func TestB24RetroactiveAllowBind(t *testing.T) { unapproved(t, true) }

func unapproved(t *testing.T, approve bool) {
	eachPath(t, func(s *scene, e primary) {
		seen, outside := s.Client.Capture(), s.Srv.Capture()
		tcp, _ := s.bind(e, many("Discarding"))
		udp, _ := s.bind(e, lab.ProbeArgs{Proto: "udp", Flags: []string{"AllowMultiple", "Discarding"}})
		waiting := dialling(s, s.Srv, tcp)
		lab.Eventually(s.t, 5*time.Second, "srv's SYN", func() bool { return len(lab.Select(outside.Peek(), lab.SYN(tcp))) > 0 })
		early := s.Srv.MustListenPacket(s.network("udp"), ":0")
		send(s.t, early, udp, "early")
		nothing(s.t, early, "before the approval")
		if n := len(lab.Select(outside.Peek(), func(p lab.Seen) bool { return !p.Out && (p.Src == tcp || p.Proto == "icmp") })); n != 0 {
			s.t.Errorf("srv saw %d answers", n)
		}
		if !approve {
			s.silent(s.Other, tcp, "not approved")
			if n := len(lab.Select(seen.Stop(), func(p lab.Seen) bool { return p.Dst.Port() == 4000 })); n != 0 {
				s.t.Errorf("the client saw %d packets", n)
			}
			return
		}
		s.must("allow-bind", e, lab.ProbeArgs{Proto: "tcp", External: tcp.String()})
		s.must("allow-bind", e, lab.ProbeArgs{Proto: "udp", External: udp.String(), Flags: []string{"Bidirectional"}})
		c, ok := <-waiting
		if !ok {
			s.t.Fatal("the connection is not made")
		}
		defer c.Close()
		echo(s.t, c, "at last")
		nothing(s.t, early, "what was discarded")
		if from, text := ask(s.t, early, udp, "late"); from != udp || text != "late" {
			s.t.Errorf("%q from %s", text, from)
		}
	})
}

// B25: what RetroactiveAllowBind answers.
func TestB25AllowBindResults(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		l.Client.EchoTCP(4000)
		c := probed()
		c.Protocols += "  never: {tcp: 2100}\n"
		s := play(t, l, f, c)
		e := s.connect()
		at, _ := s.bind(e, many("Discarding"))
		ask := func(change func(*lab.ProbeArgs)) lab.ProbeArgs {
			a := with(e, lab.ProbeArgs{Proto: "tcp", External: at.String()})
			change(&a)
			return a
		}
		for i, row := range []struct {
			want   string
			change func(*lab.ProbeArgs)
		}{
			{"InvalidArgument", func(a *lab.ProbeArgs) { a.External = to(at.Addr(), 0).String() }},
			{"InvalidArgument", func(a *lab.ProbeArgs) { a.Proto = "icmp" }},
			{"InvalidArgument", func(a *lab.ProbeArgs) { a.Flags = []string{"Bidirectional"} }},
			{"InvalidArgument", func(a *lab.ProbeArgs) { a.Flags = []string{"Unknown"} }},
			{"InvalidArgument", func(a *lab.ProbeArgs) { a.Protocol = "no-such-protocol" }},
			{"NotFound", func(a *lab.ProbeArgs) { a.External = next(at, 1).String() }},
			{"NotFound", func(a *lab.ProbeArgs) { a.Proto = "udp" }},
			{"PolicyDenied", func(a *lab.ProbeArgs) { a.Protocol = "never" }},
		} {
			if r := s.p.Ask("allow-bind", ask(row.change)); r.Error != row.want {
				t.Errorf("%d: error %q, want %q", i, r.Error, row.want)
			}
		}
		s.silent(l.Srv, at, "none of it has allowed it")
		anyAddress := ask(func(a *lab.ProbeArgs) { a.External = to(f.any(), int(at.Port())).String() })
		if r := s.p.Must("allow-bind", anyAddress); r.Already {
			t.Error("it was not allowed before")
		}
		s.dial(l.Srv, at)
		if r := s.p.Must("allow-bind", anyAddress); !r.Already {
			t.Error("it was allowed before")
		}
		// Used up, it is closing for as long as its connection lives.
		once, _ := s.bind(e, lab.ProbeArgs{Clients: []string{to(f.client, 4001).String()}})
		l.Client.EchoTCP(4001)
		s.dial(l.Srv, once)
		noPermissionAt(t, s.g, once)
		s.answers("Terminating", "allow-bind", ask(func(a *lab.ProbeArgs) { a.External = once.String() }))
	})
}

// noPermissionAt waits until nobody is let in at an address any more.
func noPermissionAt(t testing.TB, g *lab.Gateway, at netip.AddrPort) {
	t.Helper()
	lab.Eventually(t, 5*time.Second, "it is used up", func() bool {
		return !slices.ContainsFunc(openPermissions(g), func(p permission) bool { return p.External == at.String() })
	})
}

// B19 for binds: where inbound connections are sent is the session's own address
// unless a flag widens that.
func TestB19AllowedClients(t *testing.T) {
	eachPath(t, func(s *scene, e primary) {
		s.Client2.EchoTCP(4000)
		for flag, want := range map[string]string{"": "PolicyDenied", "ToSameNet": "", "ToSameNetwork": "", "ToAll": ""} {
			ask := lab.ProbeArgs{Proto: "tcp", Clients: []string{to(s.second, 4000).String()}}
			if flag != "" {
				ask.Flags = []string{flag}
			}
			r := s.p.Ask("bind", with(e, ask))
			if r.Error != want {
				s.t.Errorf("%q: error %q, want %q", flag, r.Error, want)
			}
			if want == "" {
				s.dial(s.Srv, mustAddrPort(r.Addr))
			}
		}
		s.refused("PolicyDenied", "bind", e, lab.ProbeArgs{Proto: "tcp", Clients: []string{to(s.srv, 4000).String()}, Flags: []string{"ToSameNetwork"}})
	})
}

// B26: the IP filter of the approval.
func TestB26AllowBindFilter(t *testing.T) {
	eachPath(t, func(s *scene, e primary) {
		for i, sources := range [][]string{{}, {s.srv.String()}, nil} {
			ask := many("Discarding")
			ask.Clients = []string{to(s.client, 4000+i).String()}
			at, _ := s.bind(e, ask)
			s.must("allow-bind", e, lab.ProbeArgs{Proto: "tcp", External: at.String(), Sources: sources})
			if sources == nil || len(sources) == 1 {
				s.dial(s.Srv, at)
			} else {
				s.silent(s.Srv, at, "nobody may")
			}
			if sources == nil {
				s.dial(s.Other, at)
			} else {
				s.silent(s.Other, at, "not in the IP filter")
			}
		}
	})
}
