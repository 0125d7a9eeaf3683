package netns_test

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// RFC 5382, REQ-1: a TCP port that an inside host uses for several connections
// has one external address and port, although another host uses the same.
func TestNTCP01EndpointIndependentMapping(t *testing.T) {
	for _, m := range modes[:3] {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			g := l.Gateway(m.config(""))
			servers := mirrors(l)
			a, _ := mirrored(t, l, l.Client, clientAt, servers[0])
			b, _ := mirrored(t, l, l.Client2, secondAt, servers[0])
			ofClient, ofSecond := []netip.AddrPort{a}, []netip.AddrPort{b}
			g.Freeze()
			for _, s := range servers[1:] {
				a, c := mirrored(t, l, l.Client, clientAt, s)
				b, d := mirrored(t, l, l.Client2, secondAt, s)
				echo(t, c, "of the one")
				echo(t, d, "of the other")
				ofClient, ofSecond = append(ofClient, a), append(ofSecond, b)
			}
			g.Thaw()
			if !all(ofClient) || !all(ofSecond) || a == b || a.Addr() != lab.Outside4 {
				t.Errorf("the servers saw %v of one host and %v of the other; want one address and port of each", ofClient, ofSecond)
			}
		})
	}
}

// mirrors are servers at two addresses and two ports.
func mirrors(l *lab.Lab) []netip.AddrPort {
	var list []netip.AddrPort
	for _, port := range []int{9000, 9001} {
		mirrorTCP(l.Srv, port)
		mirrorTCP(l.Other, port)
		list = append(list, to(lab.Srv4, port), to(lab.Other4, port))
	}
	return list
}

// REQ-3: who may connect to a mapping, by the rule's filtering. The client
// listens at the port that it connects from.
func TestNTCP03Filtering(t *testing.T) {
	for _, m := range modes[:3] {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Gateway(m.config(""))
			mirrorTCP(l.Srv, 9000)
			at, _ := mirrored(t, l, l.Client, clientAt, to(lab.Srv4, 9000))
			inside := accepting(t, l, l.Client, clientAt)
			tries := func(who string, from *lab.Host, may bool) {
				t.Helper()
				if !may {
					(&scene{t: t}).silent(from, at, who+" may not connect")
					return
				}
				c := from.MustDial("tcp4", at.String(), 5*time.Second)
				echo(t, c, who)
				if got := <-inside; got != addrPortOf(c.LocalAddr()) {
					t.Errorf("the client saw %v, want %v", got, c.LocalAddr())
				}
			}
			tries("another port of the server", l.Srv, m.filtering != byAddressPort)
			tries("a stranger", l.Other, m.filtering == independent)
		})
	}
}

// accepting echoes connections to a port of a host and tells who they are from.
func accepting(t testing.TB, l *lab.Lab, h *lab.Host, at netip.AddrPort) <-chan netip.AddrPort {
	t.Helper()
	from := make(chan netip.AddrPort, 16)
	listener := h.MustListen("tcp4", at.String())
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			from <- addrPortOf(c.RemoteAddr())
			l.OnClose(func() { _ = c.Close() })
			go echoTo(c)
		}
	}()
	return from
}

func echoTo(c net.Conn) {
	b := make([]byte, 4096)
	for {
		n, err := c.Read(b)
		if err != nil {
			return
		}
		if _, err := c.Write(b[:n]); err != nil {
			return
		}
	}
}

func addrPortOf(a net.Addr) netip.AddrPort {
	p := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// REQ-2: two ends that connect to each other at the same time become one
// connection, whoever's SYN passes first, in every mode.
func TestNTCP02SimultaneousOpen(t *testing.T) {
	for _, m := range modes {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Gateway(m.config(""))
			// The server does not hear the client's SYN, only what comes later: so
			// both ends have sent one before they hear of each other.
			l.Srv.Run("nft", "add table ip deaf; add chain ip deaf in { type filter hook input priority 0; }; "+
				"add rule ip deaf in tcp sport != 0 tcp flags & (syn|ack) == syn drop")
			wire := l.Srv.Capture()
			client := connecting(l, l.Client, clientAt, to(lab.Srv4, 6000))
			var at netip.AddrPort
			lab.Eventually(t, 5*time.Second, "the client's SYN arrives", func() bool {
				for _, s := range lab.Select(wire.Peek(), lab.SYN(to(lab.Srv4, 6000))) {
					at = s.Src
				}
				return at.IsValid()
			})
			server := connecting(l, l.Srv, to(lab.Srv4, 6000), at)
			c, s := <-client, <-server
			if c == nil || s == nil {
				t.Fatalf("client: connected %v, server: connected %v", c != nil, s != nil)
			}
			mustWrite(t, c, "from the client")
			(&scene{t: t}).reads(s, "from the client")
			mustWrite(t, s, "from the server")
			(&scene{t: t}).reads(c, "from the server")
		})
	}
}

// connecting dials in the background; nil: in vain.
func connecting(l *lab.Lab, h *lab.Host, from, to netip.AddrPort) <-chan net.Conn {
	done := make(chan net.Conn, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), lab.Patience(10*time.Second))
		defer cancel()
		c, err := h.DialFrom(ctx, "tcp4", from, to.String())
		if err != nil {
			done <- nil
			return
		}
		l.OnClose(func() { _ = c.Close() })
		done <- c
	}()
	return done
}

// unsolicited is how long nothing may answer a SYN that nobody asked for.
const unsolicited = 6 * time.Second

// REQ-4: a SYN that nobody asked for meets silence for 6 s and more: at a port
// that nothing has, and at a mapping whose filtering keeps it out.
func TestNTCP04UnsolicitedSYN(t *testing.T) {
	for _, m := range []mode{{independent, byAddressPort}, {byAddressPort, byAddressPort}} {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Gateway(m.config(""))
			mirrorTCP(l.Srv, 9000)
			mapped, _ := mirrored(t, l, l.Client, clientAt, to(lab.Srv4, 9000))
			wire := l.Other.Capture()
			ends := make(chan error, 3)
			for _, at := range []netip.AddrPort{mapped, to(lab.Outside4, 62345), to(lab.Outside4b, 6234)} {
				go func() {
					ctx, cancel := context.WithTimeout(context.Background(), unsolicited+time.Second)
					defer cancel()
					c, err := l.Other.Dial(ctx, "tcp4", at.String())
					if err == nil {
						_ = c.Close()
					}
					ends <- err
				}()
			}
			for range 3 {
				if err := <-ends; !timedOut(err) {
					t.Errorf("a SYN that nobody asked for: %v, want silence", err)
				}
			}
			if n := len(lab.Select(wire.Stop(), func(s lab.Seen) bool { return !s.Out && s.Dst.Addr() == lab.Other4 })); n != 0 {
				t.Errorf("%d packets came back", n)
			}
		})
	}
}

// And if the client's own SYN comes within that time, the connection is made.
func TestNTCP04TheOutboundSYNFollows(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(mode{independent, byAddressPort}.config(""))
	mirrorTCP(l.Srv, 9000)
	at, _ := mirrored(t, l, l.Client, clientAt, to(lab.Srv4, 9000))
	inside := l.Client.Capture()
	peer := connecting(l, l.Other, to(lab.Other4, 6000), at)
	time.Sleep(silence()) // the time in which nothing answers is what is tested
	select {
	case c := <-peer:
		t.Fatalf("the SYN that came before ended: connected %v", c != nil)
	default:
	}
	if n := len(lab.Select(inside.Stop(), lab.SYN(clientAt))); n != 0 {
		t.Errorf("the client got %d SYNs that it had not asked for", n)
	}
	c, s := <-connecting(l, l.Client, clientAt, to(lab.Other4, 6000)), <-peer
	if c == nil || s == nil {
		t.Fatalf("client: connected %v, peer: connected %v", c != nil, s != nil)
	}
	mustWrite(t, c, "at last")
	(&scene{t: t}).reads(s, "at last")
	if got := addrPortOf(s.RemoteAddr()); got != at {
		t.Errorf("the peer is connected to %v, want %v", got, at)
	}
}

// REQ-7: no external port serves two inside endpoints at a time.
func TestNTCP07NoOverloading(t *testing.T) {
	overloads := func(t *testing.T, l *lab.Lab) bool {
		mirrorTCP(l.Srv, 9000)
		mirrorTCP(l.Other, 9000)
		a, _ := mirrored(t, l, l.Client, clientAt, to(lab.Srv4, 9000))
		b, _ := mirrored(t, l, l.Client2, secondAt, to(lab.Other4, 9000))
		return a == b
	}
	t.Run("gateway", func(t *testing.T) {
		t.Parallel()
		l := lab.New(t)
		l.Gateway(cone.config(""))
		if overloads(t, l) {
			t.Error("two hosts have the same external port")
		}
	})
	t.Run("plain masquerade does", func(t *testing.T) {
		t.Parallel()
		l := lab.New(t)
		masquerade(l, "")
		if !overloads(t, l) {
			t.Error("two hosts have different external ports")
		}
	})
}

// REQ-8: an inside host connects to another one's external address and port;
// each sees the other's external one.
func TestNTCP08Hairpin(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(cone.config(""))
	mirrorTCP(l.Srv, 9000)
	a, _ := mirrored(t, l, l.Client, clientAt, to(lab.Srv4, 9000))
	b, _ := mirrored(t, l, l.Client2, secondAt, to(lab.Srv4, 9000))
	inside := accepting(t, l, l.Client, clientAt)
	c, err := dialFrom(t, l, l.Client2, secondAt, a)
	if err != nil {
		t.Fatalf("the second host to the first one's external address: %v", err)
	}
	echo(t, c, "around the corner")
	if got := <-inside; got != b {
		t.Errorf("the first host saw %v, want the second one's external %v", got, b)
	}
}
