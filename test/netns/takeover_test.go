package netns_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

func userConfig() lab.Config { return lab.Config{Protocols: echoProtocol, Rules: userEcho} }

// B53: what the server does is what the client is told.
func TestB53Connected(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	peers := l.Srv.EchoTCP(7)
	l.Srv.EchoUDP(7)
	seen, inside := l.Srv.Capture(), l.Client.Capture()
	g := l.Gateway(userConfig())
	both(t, func(t *testing.T, srv, client netip.Addr) {
		at := netip.AddrPortFrom(srv, 7)
		c := l.Client.MustDial("tcp", at.String(), 5*time.Second)
		echo(t, c, "through user space")
		inUser(t, l, g, "tcp", client, at)
		all := peers.Addrs()
		saw, own := all[len(all)-1], netip.MustParseAddrPort(c.LocalAddr().String())
		if srv.Is4() && saw.Addr() != lab.Outside4 {
			t.Errorf("translated path: srv saw %s, want the gateway", saw)
		}
		if !srv.Is4() && saw != own {
			t.Errorf("routed path: srv saw %s, want the client's own %s", saw, own)
		}
		if got := c.RemoteAddr().String(); got != at.String() {
			t.Errorf("the client talks to %s", got)
		}
	})
	out, in := seen.Stop(), inside.Stop()
	for _, srv := range []netip.Addr{lab.Srv4, lab.Srv6} {
		at := netip.AddrPortFrom(srv, 7)
		answer := lab.Select(out, func(s lab.Seen) bool { return s.TCP != nil && s.TCP.SYN && s.TCP.ACK && s.Src == at })
		told := lab.Select(in, func(s lab.Seen) bool { return s.TCP != nil && s.TCP.SYN && s.TCP.ACK && s.Src == at })
		if len(answer) == 0 || len(told) == 0 || !answer[0].At.Before(told[0].At) {
			t.Errorf("%s: the client's SYN-ACK does not come after the server's", at)
		}
	}
}

func TestB53Refused(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	inside := l.Client.Capture()
	l.Gateway(userConfig())
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		if err := connect(l.Client, netip.AddrPortFrom(srv, 7), 5*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("the server refuses, the client gets %v", err)
		}
		u := l.Client.MustDial("udp", netip.AddrPortFrom(srv, 7).String(), time.Second)
		if err := udpError(u); !errors.Is(err, syscall.ECONNREFUSED) {
			if err2 := udpError(u); !errors.Is(err2, syscall.ECONNREFUSED) {
				t.Errorf("the server has no such UDP port, the client gets %v, then %v", err, err2)
			}
		}
	})
	noSynAck(t, inside)
}

func noSynAck(t testing.TB, inside *lab.Capture) {
	t.Helper()
	if n := len(lab.Select(inside.Stop(), func(s lab.Seen) bool { return s.TCP != nil && s.TCP.SYN && s.TCP.ACK && !s.Out })); n != 0 {
		t.Errorf("the client saw %d SYN-ACKs", n)
	}
}

func TestB53Silent(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.Run("nft", "add table inet silent; add chain inet silent in { type filter hook input priority 0; }; add rule inet silent in tcp dport 7 drop")
	inside := l.Client.Capture()
	l.Gateway(userConfig())
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		if err := connect(l.Client, netip.AddrPortFrom(srv, 7), 4*time.Second); !timedOut(err) {
			t.Errorf("the server is silent, the client gets %v", err)
		}
	})
	noSynAck(t, inside)
}

func TestB53Unreachable(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	inside := l.Client.Capture()
	l.Gateway(userConfig())
	for _, nobody := range []netip.Addr{lab.Nobody4, lab.Nobody6} {
		if err := connect(l.Client, netip.AddrPortFrom(nobody, 7), 10*time.Second); !errors.Is(err, syscall.EHOSTUNREACH) {
			t.Errorf("nobody is at %s, the client gets %v", nobody, err)
		}
	}
	noSynAck(t, inside)
}

// B53, retransmission: the client's SYN is sent again while its dial goes on;
// there is one connection at the server, and it works.
func TestB53RetransmittedSYN(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.Srv.Run("nft", "add table inet slow; add chain inet slow in { type filter hook input priority 0; }; add rule inet slow in tcp dport 7 drop")
		peers := l.Srv.EchoTCP(7)
		inside := l.Client.Capture()
		s := play(t, l, f, userConfig())
		at := to(f.srv, 7)
		result := dialling(s, l.Client, at)
		lab.Eventually(t, 10*time.Second, "the client sends its SYN again", func() bool {
			return len(lab.Select(inside.Peek(), lab.SYN(at))) >= 2
		})
		l.Srv.Run("nft", "delete", "table", "inet", "slow")
		c, ok := <-result
		if !ok {
			t.Fatal("no connection")
		}
		defer c.Close()
		echo(t, c, "hello")
		if n := len(peers.Addrs()); n != 1 {
			t.Errorf("the server has seen %d connections, want 1", n)
		}
	})
}

// B38: a half-close and a reset pass.
func TestB38HalfCloseAndReset(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	heard := make(chan string, 4)
	ended := make(chan error, 4)
	l.Srv.ServeTCP(7, func(c *net.TCPConn) {
		b, err := io.ReadAll(c) // to the client's FIN
		heard <- string(b)
		ended <- err
		if err == nil {
			_, _ = io.WriteString(c, "and after it "+string(b))
			_ = c.CloseWrite()
		}
	})
	l.Gateway(userConfig())
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		at := netip.AddrPortFrom(srv, 7).String()
		c := l.Client.MustDial("tcp", at, 5*time.Second).(*net.TCPConn)
		deadline(t, c, 5*time.Second)
		mustWrite(t, c, "before")
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); err != nil || string(got) != "and after it before" {
			t.Errorf("after the half-close: %q, %v", got, err)
		}
		<-heard
		if err := <-ended; err != nil {
			t.Errorf("the server's end: %v", err)
		}

		c = l.Client.MustDial("tcp", at, 5*time.Second).(*net.TCPConn)
		mustWrite(t, c, "then")
		if err := c.SetLinger(0); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		<-heard
		if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client resets, the server sees %v", err)
		}
	})
}

func deadline(t testing.TB, c net.Conn, d time.Duration) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(lab.Patience(d))); err != nil {
		t.Fatal(err)
	}
}

func mustWrite(t testing.TB, c io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatalf("send: %v", err)
	}
}

// B39: a slow reader holds its sender back; memory stays bounded, nothing is
// lost.
func TestB39BackPressure(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		const total = 64 << 20
		for _, h := range []*lab.Host{l.Client, l.GW, l.Srv} { // the machine's own bound may be above all of it
			h.Run("sysctl", "-qw", "net.ipv4.tcp_rmem=4096 131072 4194304")
		}
		body, want := lab.Content(total)
		sent := make(chan int, 1)
		l.Srv.ServeTCP(7, func(c *net.TCPConn) {
			for n := 0; n < total; n += 1 << 20 {
				if _, err := c.Write(body[n : n+1<<20]); err != nil {
					return
				}
				select {
				case <-sent:
				default:
				}
				sent <- n
			}
			_ = c.CloseWrite()
			_, _ = io.Copy(io.Discard, c)
		})
		g := l.Gateway(userConfig())
		c := l.Client.MustDial("tcp", to(f.srv, 7).String(), 5*time.Second)
		deadline(t, c, 60*time.Second)
		sum := sha256.New()
		if _, err := io.CopyN(sum, c, 1<<20); err != nil {
			t.Fatal(err)
		}
		last, quiet := -1, lab.Patience(1500*time.Millisecond)
		for waiting := true; waiting; { // until the sender stands
			select {
			case last = <-sent:
			case <-time.After(quiet):
				waiting = false
			}
		}
		if last > total/2 {
			t.Errorf("%d bytes went into buffers while nobody read", last)
		}
		if rss, err := g.RSS(); err != nil || rss > 128<<20 {
			t.Errorf("the daemon has %d bytes, %v", rss, err)
		}
		if _, err := io.Copy(sum, c); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%x", sum.Sum(nil)); got != want {
			t.Error("another hash")
		}
	})
}

// UDP in user space: one client socket, many peers, each answers from its own
// address; the datagrams that came while the flow was judged all arrive.
func TestUDPManyPeers(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoUDP(7)
	l.Other.EchoUDP(7)
	g := l.Gateway(userConfig())
	for _, family := range []struct {
		network string
		peers   []netip.Addr
	}{{"udp4", []netip.Addr{lab.Srv4, lab.Other4}}, {"udp6", []netip.Addr{lab.Srv6, lab.Other6}}} {
		c := l.Client.MustListenPacket(family.network, ":0")
		want := map[string]bool{}
		for i := range 10 {
			for _, p := range family.peers {
				text := fmt.Sprintf("%d to %s", i, p)
				if _, err := c.WriteToUDPAddrPort([]byte(text), netip.AddrPortFrom(p, 7)); err != nil {
					t.Fatal(err)
				}
				want[text+" from "+netip.AddrPortFrom(p, 7).String()] = true
			}
		}
		if err := c.SetReadDeadline(time.Now().Add(lab.Patience(5 * time.Second))); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		for len(want) > 0 {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				t.Fatalf("%d answers are missing: %v", len(want), err)
			}
			delete(want, string(b[:n])+" from "+netip.AddrPortFrom(from.Addr().Unmap(), from.Port()).String())
		}
		if n := g.Carries("udp", 7); n == 0 {
			t.Error("the daemon holds no socket for the peers")
		}
	}
}

// Without a data filter a datagram of any size passes user space whole.
func TestUDPLargeDatagram(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoUDP(7)
	l.Gateway(userConfig())
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		body, _ := lab.Content(30_000)
		echo(t, l.Client.MustDial("udp", netip.AddrPortFrom(srv, 7).String(), time.Second), string(body))
	})
}
