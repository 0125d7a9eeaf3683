package netns_test

import (
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// B32: an event also for a peer that sent first.
func TestB32PeerSendsFirst(t *testing.T) {
	eachBound(t, func(s *scene, e primary) {
		at, _ := s.bind(e, lab.ProbeArgs{Proto: "udp", Flags: []string{"AllowMultiple", "Bidirectional"}})
		c := s.talk(s.Srv, at)
		echo(s.t, c, "again")
		found := heard(s.p, func(e lab.ProbeEvent) bool { return e.Kind == "UDPDestination" })
		if len(found) != 1 || found[0].Dst != c.LocalAddr().String() || !found[0].Secondary {
			s.t.Errorf("events %+v, want one for %s", found, c.LocalAddr())
		}
	})
}

// B27: with Bidirectional the client may answer a peer that sent; without it its
// answers are lost. Nobody else can be sent to.
func TestB27Bidirectional(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"kernel", "user"} {
		t.Run(path, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, l *lab.Lab, f family) { bidirectional(t, l, f, path) })
		})
	}
}

func bidirectional(t *testing.T, l *lab.Lab, f family, path string) {
	echoes(l)
	s := play(t, l, f, probed())
	e := s.connect()
	flags := []string{"AllowMultiple"}
	if path == "user" {
		flags = append(flags, "NoKernelMode")
	}
	for i, row := range []struct {
		flags   []string
		answers bool
	}{{flags, false}, {append([]string{"Bidirectional"}, flags...), true}} {
		inner := to(f.client, 4000+i)
		at, _ := s.bind(e, lab.ProbeArgs{Proto: "udp", Clients: []string{inner.String()}, Flags: row.flags})
		client := l.Client.MustListenPacket(f.network("udp"), inner.String())
		peer := l.Srv.MustListenPacket(f.network("udp"), to(f.srv, 5000+i).String())
		stranger := l.Other.MustListenPacket(f.network("udp"), to(f.other, 5000+i).String())
		send(t, client, to(f.other, 5000+i), "nobody asked")
		nothing(t, stranger, "a peer that never sent")
		send(t, peer, at, "hello")
		from, text := receive(t, client)
		if from != to(f.srv, 5000+i) || text != "hello" {
			t.Errorf("%v: the client got %q from %s", row.flags, text, from)
		}
		send(t, client, from, "answer")
		if !row.answers {
			nothing(t, peer, "the client's answer")
			continue
		}
		if from, text := receive(t, peer); from != at || text != "answer" {
			t.Errorf("%v: the peer got %q from %s", row.flags, text, from)
		}
	}
}

// B13: a burst of 64 KiB in small datagrams waits without loss while nobody
// reads, where that was asked for.
func TestB13IncreaseReceiveBuffer(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		got := make(chan int, 1024)
		srv := l.Srv.MustListenPacket(f.network("udp"), to(f.srv, 2100).String())
		roomy(t, srv)
		go func() {
			b := make([]byte, 65536)
			for {
				n, _, err := srv.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				got <- n
			}
		}()
		l.Srv.EchoTCP(7)
		l.SetupProbe("probe", watching())
		s := play(t, l, f, probed())
		e := s.connect()
		s.p.Must("on", lab.ProbeArgs{Kind: "UDPDestination", Do: "attach", Mode: "quiet"})
		at, _ := s.redirect(e, lab.ProbeArgs{Proto: "udp", Flags: []string{"IncreaseReceiveBuffer"}})
		c := l.Client.MustDial("udp", at.String(), time.Second)
		mustWrite(t, c, "first")
		if n := <-got; n != len("first") {
			t.Fatalf("srv got %d bytes first", n)
		}
		pump := s.p.Await(3*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Pump" })
		s.p.Must("pause", lab.ProbeArgs{Conn: pump.Conn, On: true})
		const size, number = 64, 1024 // 64 KiB of payload, many times that with the kernel's overhead
		for i := range number {
			mustWrite(t, c, fmt.Sprintf("%-*d", size, i))
		}
		s.p.Must("pause", lab.ProbeArgs{Conn: pump.Conn})
		for i := range number {
			select {
			case n := <-got:
				if n != size {
					t.Fatalf("a datagram of %d bytes", n)
				}
			case <-time.After(lab.Patience(3 * time.Second)):
				t.Fatalf("%d of %d datagrams came", i, number)
			}
		}
	})
}

// roomy gives a socket more receive buffer than its user may ask for.
func roomy(t testing.TB, c *net.UDPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var inner error
	if err := raw.Control(func(fd uintptr) {
		inner = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUFFORCE, 8<<20)
	}); err != nil || inner != nil {
		t.Fatal(err, inner)
	}
}

// B61: a data filter for one peer sees that peer's datagrams alone, on a
// client's socket and on a bind.
func TestB61FilterForOnePeer(t *testing.T) {
	eachBound(t, func(s *scene, e primary) {
		s.p.Must("on", lab.ProbeArgs{Kind: "BindUDP", Do: "attach-peer", Peer: to(s.srv, 5000).String(), Mode: "upper"})
		at, _ := s.bind(e, lab.ProbeArgs{Proto: "udp", Flags: []string{"AllowMultiple", "Bidirectional"}})
		for peer, want := range map[*lab.Host]string{s.Srv: "HELLO", s.Other: "hello"} {
			c := peer.MustListenPacket(s.network("udp"), ":5000")
			if from, text := ask(s.t, c, at, "hello"); from != at || text != want {
				s.t.Errorf("%s gets %q from %s, want %q", peer.Name, text, from, want)
			}
		}
		s.p.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "attach-peer", Peer: to(s.srv, 7).String()})
		s.dial(s.Client, to(s.srv, 7))
		did := s.p.Await(3*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Did" && strings.HasSuffix(x.Dst, ":7") })
		if did.Error == "" {
			s.t.Error("a data filter for one peer of a TCP connection")
		}
	})
}

// B61: the client's socket has one peer with a data filter and one without.
func TestB61FilterForOneDestination(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.Srv.EchoUDP(7)
		l.Other.EchoUDP(7)
		s := play(t, l, f, probed())
		s.p.Must("on", lab.ProbeArgs{Kind: "UDPDestination", Do: "attach-peer", Peer: to(f.srv, 7).String(), Mode: "upper"})
		c := l.Client.MustListenPacket(f.network("udp"), ":0")
		for _, row := range []struct {
			peer string
			want string
		}{{to(f.srv, 7).String(), "HELLO"}, {to(f.other, 7).String(), "hello"}} {
			peer := mustAddrPort(row.peer)
			if from, text := ask(t, c, peer, "hello"); from != peer || text != row.want {
				t.Errorf("%q from %s, want %q from %s", text, from, row.want, peer)
			}
		}
	})
}

// B32, B61 where user space carries the flow: a peer that is idle is forgotten,
// its data filter with it; when it comes back both begin anew.
func TestB61FilterOfForgottenPeer(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.Srv.EchoUDP(7)
		c := probed()
		c.Extra = "udp: {peer_idle: 1}\n"
		s := play(t, l, f, c)
		s.p.Must("on", lab.ProbeArgs{Kind: "UDPDestination", Do: "attach-peer", Peer: to(f.srv, 7).String(), Mode: "upper"})
		client := l.Client.MustListenPacket(f.network("udp"), ":0")
		kinds := func(kind string) func(lab.ProbeEvent) bool {
			return func(e lab.ProbeEvent) bool { return e.Kind == kind }
		}
		for turn := 1; turn <= 2; turn++ {
			if from, text := ask(t, client, to(f.srv, 7), "hello"); from != to(f.srv, 7) || text != "HELLO" {
				t.Errorf("%q from %s", text, from)
			}
			lab.Eventually(t, 10*time.Second, "the data filter is called off", func() bool { return len(heard(s.p, kinds("PumpEnd"))) == turn })
			for _, kind := range []string{"UDPDestination", "Pump"} {
				if n := len(heard(s.p, kinds(kind))); n != turn {
					t.Errorf("after turn %d: %d %s", turn, n, kind)
				}
			}
		}
	})
}
