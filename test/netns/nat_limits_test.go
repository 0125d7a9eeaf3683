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

// limited is a gateway that maps endpoints, with settings of ports.
func limited(l *lab.Lab, ports string) *lab.Gateway {
	c := cone.config("")
	c.Extra = "ports: {" + ports + "}\n"
	return l.Gateway(c)
}

// tells sends a datagram from a socket of a host and says what comes of it: an
// answer, or the error of an ICMP message that came back. Neither is a failure.
// (One host gets six such messages at once and then one a second: that is
// net.ipv4.icmp_ratelimit.)
func tells(t testing.TB, c net.Conn) error {
	t.Helper()
	mustWrite(t, c, "hello")
	err := udpAnswer(c, 5*time.Second)
	if timedOut(err) {
		t.Fatalf("nothing at all comes of a datagram from %s", c.LocalAddr())
	}
	return err
}

// counter reads a counter of a gateway.
func counter(g *lab.Gateway, name string) uint64 {
	all := map[string]uint64{}
	g.JSON(&all, "counters")
	return all[name]
}

// RFC 6888, REQ-4: a client has as many ports of each protocol as its quota says
// and not one more, the next is refused with an ICMP error, what it has lives
// on, and other clients notice nothing.
func TestNCGN04PortsOfOneClient(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoUDP(9000)
	l.Srv.EchoTCP(9000)
	g := limited(l, "quota: 5")
	at := netip.AddrPortFrom(lab.Srv4, 9000)
	var granted []net.Conn
	for i := range 8 {
		c := l.Client.MustDial("udp4", at.String(), time.Second)
		switch err := tells(t, c); {
		case err == nil && i < 5:
			granted = append(granted, c)
		case i < 5 || !errors.Is(err, syscall.EHOSTUNREACH):
			t.Errorf("socket %d: %v", i+1, err)
		}
	}
	for i := range 7 {
		c, err := dialIn(l.Client, "tcp4", at, 5*time.Second)
		if i < 5 && err != nil || i >= 5 && !errors.Is(err, syscall.EHOSTUNREACH) {
			t.Errorf("connection %d: %v", i+1, err)
		}
		if err == nil {
			granted = append(granted, c)
		}
	}
	for range 5 {
		if err := tells(t, l.Client2.MustDial("udp4", at.String(), time.Second)); err != nil {
			t.Errorf("the other client: %v", err)
		}
	}
	for _, c := range granted {
		echo(t, c, "still here")
	}
	if refused, told := counter(g, "ports.over_quota"), counter(g, "queue.exhausted"); refused < 5 || told < 5 {
		t.Errorf("counted: %d refused, %d told", refused, told)
	}
}

func dialIn(h *lab.Host, network string, to netip.AddrPort, d time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), lab.Patience(d))
	defer cancel()
	return h.Dial(ctx, network, to.String())
}

// RFC 5508, REQ-8: who gets no port because none is left is told so by
// "administratively prohibited", TCP too, and not each time.
func TestNICMP08Exhaustion(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoUDP(9000)
	l.Srv.EchoTCP(9000)
	g := limited(l, "leases: 61000-61003, well_known: off")
	at := netip.AddrPortFrom(lab.Srv4, 9000)
	seen := l.Client.Capture()
	for range 4 {
		echo(t, l.Client.MustDial("udp4", at.String(), time.Second), "hello")
		echo(t, l.Client.MustDial("tcp4", at.String(), 5*time.Second), "hello")
	}
	if err := tells(t, l.Client.MustDial("udp4", at.String(), time.Second)); !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Errorf("UDP: %v", err)
	}
	begun := time.Now()
	if _, err := dialIn(l.Client, "tcp4", at, 10*time.Second); !errors.Is(err, syscall.EHOSTUNREACH) || time.Since(begun) > lab.Patience(5*time.Second) {
		t.Errorf("TCP: %v after %v", err, time.Since(begun))
	}
	const many = 700
	for range many {
		c := l.Client.MustDial("udp4", at.String(), time.Second)
		mustWrite(t, c, "hello")
		c.Close()
	}
	lab.Eventually(t, lab.Patience(10*time.Second), "all are counted", func() bool { return counter(g, "queue.exhausted") >= many })
	took := time.Since(begun)
	told := lab.Select(seen.Stop(), func(s lab.Seen) bool { return s.Proto == "icmp" && s.ICMPType == 3 })
	for _, s := range told {
		if s.ICMPCode != 13 {
			t.Errorf("ICMP 3/%d", s.ICMPCode)
		}
	}
	if most := 150 + int(took.Seconds()+1)*100; len(told) < 2 || len(told) > most {
		t.Errorf("told %d times in %v", len(told), took)
	}
	if list := l.GW.Run("nft", "list", "counter", "inet", "sluice", "exhausted"); !strings.Contains(list, "packets 7") {
		t.Errorf("the table counts %s", list)
	}
}

// A flow in user space needs a port of the gateway's own; where none is left its
// sender is told the same.
func TestNICMP08ExhaustionInUserSpace(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(9000)
	if err := l.GW.Sysctl("net/ipv4/ip_local_port_range", "40000 40003"); err != nil {
		t.Fatal(err)
	}
	l.Gateway(lab.Config{
		Protocols: "  carried: {tcp: 9000}\n",
		Rules:     "  - {name: carried, action: allow, from: lan, to: wan, protocols: carried, no_kernel_mode: true}\n",
	})
	at := netip.AddrPortFrom(lab.Srv4, 9000)
	var granted []net.Conn
	for range 4 {
		c, err := dialIn(l.Client, "tcp4", at, 10*time.Second)
		if err != nil {
			break // the kernel leaves some unused
		}
		granted = append(granted, c)
	}
	lab.Eventually(t, lab.Patience(10*time.Second), "a connection is refused as unreachable", func() bool {
		c, err := dialIn(l.Client, "tcp4", at, 10*time.Second)
		if err == nil {
			granted = append(granted, c)
		} else if !errors.Is(err, syscall.EHOSTUNREACH) {
			t.Fatalf("the connection after %d: %v", len(granted), err)
		}
		return err != nil
	})
	for _, c := range granted {
		echo(t, c, "still here")
	}
}

// RFC 6888, REQ-8: a port that one client has given up serves no other one for a
// time, and then it does.
func TestNCGN08Quarantine(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoUDP(9000)
	c := cone.config("")
	c.Extra = "ports: {leases: 61000, well_known: off, quarantine: 4}\n"
	c.Protocols = "  brief: {udp: 9000, timeout: 1}\n"
	g := l.Gateway(c)
	at := netip.AddrPortFrom(lab.Srv4, 9000)
	echo(t, l.Client.MustDial("udp4", at.String(), time.Second), "hello")
	expires(l, "the port rests", func() bool { return counter(g, "ports.resting") == 1 })
	begun, refused := time.Now(), 0
	lab.Eventually(t, lab.Patience(20*time.Second), "another client gets the port", func() bool {
		c := l.Client2.MustDial("udp4", at.String(), time.Second)
		defer c.Close()
		mustWrite(t, c, "hello")
		// The kernel tells one host no more than one a second.
		err := udpAnswer(c, 200*time.Millisecond)
		if err != nil {
			refused++
		}
		return err == nil
	})
	// Until it was seen to rest it had rested for a moment.
	if d := time.Since(begun); d < 3*time.Second || refused == 0 {
		t.Errorf("it was another's after %v; %d times refused before", d, refused)
	}
}

// RFC 6888, REQ-13 and REQ-14: a client gets ports in blocks, and the log has one
// record for a block and none for its ports or whom they were used for.
func TestNCGN13Blocks(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoUDP(9000)
	server := socket(l.Srv, to(lab.Srv4, 9001))
	g := limited(l, "leases: 61000-61063, quota: 32, block: 16")
	blockOf := func(h *lab.Host, n int) map[uint16]int {
		out := map[uint16]int{}
		for range n {
			a := seenBy(t, server, socket(h, netip.AddrPortFrom(addrOf(h, lab.Srv4), 0)))
			out[(a.Port()-61000)/16]++
		}
		return out
	}
	if got := blockOf(l.Client, 16); len(got) != 1 {
		t.Errorf("16 ports of one client are of blocks %v", got)
	}
	if got := blockOf(l.Client2, 3); len(got) != 1 {
		t.Errorf("3 ports of the other are of blocks %v", got)
	}
	if got := blockOf(l.Client, 16); len(got) != 1 {
		t.Errorf("16 more are of blocks %v", got)
	}
	if err := tells(t, l.Client.MustDial("udp4", netip.AddrPortFrom(lab.Srv4, 9000).String(), time.Second)); !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Errorf("the port after two blocks: %v", err)
	}
	seen := map[string]string{}
	for _, r := range g.Records("port block allocated") {
		if of, twice := seen[r.Text("ports")]; twice {
			t.Errorf("block %s is %s's and %s's", r.Text("ports"), of, r.Text("client"))
		}
		seen[r.Text("ports")] = r.Text("client")
	}
	if len(seen) != 3 {
		t.Errorf("blocks: %v", seen)
	}
}

// REQ-12 and REQ-14: see there; a block is returned when its last port has rested.
func TestNCGN14OneRecordForABlock(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoUDP(9000)
	c := cone.config("")
	c.Extra = "ports: {leases: 61000-61063, quota: 32, block: 16, quarantine: 1}\n"
	c.Protocols = "  brief: {udp: 9000, timeout: 1}\n"
	g := l.Gateway(c)
	at := netip.AddrPortFrom(lab.Srv4, 9000)
	for range 16 {
		echo(t, l.Client.MustDial("udp4", at.String(), time.Second), "hello")
	}
	expires(l, "the block is returned", func() bool { return len(g.Records("port block returned")) > 0 })
	returned, all := g.Records("port block returned")[0], g.Records("port block allocated")
	if len(all) != 1 || all[0].Text("client") != lab.Client4.String() || all[0].Text("external") != lab.Outside4.String() ||
		all[0].Text("ports") != returned.Text("ports") || returned.Text("client") != lab.Client4.String() {
		t.Errorf("records: %v, then %v", all, returned)
	}
	for field, text := range all[0] {
		if strings.Contains(fmt.Sprint(text), lab.Srv4.String()) {
			t.Errorf("the record has a destination: %s %v", field, text)
		}
	}
}

// RFC 6888, REQ-15 asks for ports that are hard to guess: they do not follow
// one another, in blocks and without.
func TestNCGN15PortsAreHardToGuess(t *testing.T) {
	for name, ports := range map[string]string{"ports": "quota: 512", "blocks": "quota: 512, block: 256"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			server := socket(l.Srv, to(lab.Srv4, 9001))
			limited(l, ports)
			steps, last := map[int]int{}, 0
			for range 40 {
				a := seenBy(t, server, socket(l.Client, netip.AddrPortFrom(lab.Client4, 0)))
				steps[int(a.Port())-last]++
				last = int(a.Port())
			}
			if len(steps) < 25 {
				t.Errorf("the steps from one port to the next: %v", steps)
			}
		})
	}
}

// RFC 6888, REQ-5: a client has as many sessions at a time as it may and not one
// more, of all protocols and on all paths; what it has lives on, one that ends
// makes room, and other clients notice nothing.
func TestNCGN05SessionsOfOneClient(t *testing.T) {
	for name, m := range map[string]mode{"in the kernel": {byAddressPort, byAddressPort}, "mapped": cone} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Srv.EchoUDP(9000)
			l.Srv.EchoTCP(9000)
			l.Srv.EchoTCP(9001)
			c := m.config("")
			c.Protocols = "  carried: {tcp: 9001}\n"
			c.Rules = "  - {name: carried, action: allow, from: lan, to: wan, protocols: carried, no_kernel_mode: true}\n" + c.Rules
			c.Extra = "ports: {sessions: 9}\n"
			g := l.Gateway(c)
			at, carried := netip.AddrPortFrom(lab.Srv4, 9000), netip.AddrPortFrom(lab.Srv4, 9001)
			var granted []net.Conn
			for range 3 {
				u := l.Client.MustDial("udp4", at.String(), time.Second)
				granted = append(granted, u, l.Client.MustDial("tcp4", at.String(), 5*time.Second), l.Client.MustDial("tcp4", carried.String(), 5*time.Second))
				echo(t, u, "hello")
			}
			for range 2 { // the kernel tells one host six times at once
				if err := tells(t, l.Client.MustDial("udp4", at.String(), time.Second)); !errors.Is(err, syscall.EHOSTUNREACH) {
					t.Errorf("UDP beyond the limit: %v", err)
				}
				for _, to := range []netip.AddrPort{at, carried} {
					if _, err := dialIn(l.Client, "tcp4", to, 5*time.Second); !errors.Is(err, syscall.EHOSTUNREACH) {
						t.Errorf("TCP to %v beyond the limit: %v", to, err)
					}
				}
				echo(t, l.Client2.MustDial("udp4", at.String(), time.Second), "hello")
				echo(t, l.Client2.MustDial("tcp4", at.String(), 5*time.Second), "hello")
			}
			if n := counter(g, "table.exhausted"); n < 6 {
				t.Errorf("%d refused packets are counted", n)
			}
			for _, c := range granted {
				echo(t, c, "still here")
			}
			last := granted[len(granted)-2].(*net.TCPConn) // in the kernel
			if err := errors.Join(last.SetLinger(0), last.Close()); err != nil {
				t.Fatal(err)
			}
			lab.Eventually(t, lab.Patience(10*time.Second), "there is room again", func() bool {
				c, err := dialIn(l.Client, "tcp4", at, 5*time.Second)
				if err == nil {
					echo(t, c, "hello")
				}
				return err == nil
			})
		})
	}
}

// Flows to another client's external address count as well.
func TestNCGN05SessionsAround(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	c := cone.config("")
	c.Extra = "ports: {sessions: 5}\n"
	g := l.Gateway(c)
	second := socket(l.Client2, secondAt)
	at := seenBy(t, socket(l.Srv, to(lab.Srv4, 9001)), second)
	for i := range 5 {
		reaches(t, socket(l.Client, to(lab.Client4, 6000+i)), at, second)
	}
	lost(t, socket(l.Client, to(lab.Client4, 6005)), at, second)
	if n := counter(g, "table.exhausted"); n == 0 {
		t.Error("beyond the limit no refused packet is counted")
	}
}

// A reload changes the ports that are leased, and the quota; what lives goes on.
func TestNCGN04Reload(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoUDP(9000)
	server := socket(l.Srv, to(lab.Srv4, 9001))
	c := cone.config("")
	c.Extra = "ports: {leases: 61000-61009, quota: 2, well_known: off}\n"
	g := l.Gateway(c)
	at := netip.AddrPortFrom(lab.Srv4, 9000)
	old := l.Client.MustDial("udp4", at.String(), time.Second)
	echo(t, old, "hello")
	echo(t, l.Client.MustDial("udp4", at.String(), time.Second), "hello")
	if err := tells(t, l.Client.MustDial("udp4", at.String(), time.Second)); !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Errorf("beyond the quota: %v", err)
	}
	c.Extra = "ports: {leases: 62000-62009, quota: 3, well_known: off}\n"
	g.Reload(c)
	if a := seenBy(t, server, socket(l.Client, netip.AddrPortFrom(lab.Client4, 0))); a.Port() < 62000 || a.Port() > 62009 {
		t.Errorf("after the reload a socket is seen as %v", a)
	}
	if err := tells(t, l.Client.MustDial("udp4", at.String(), time.Second)); !errors.Is(err, syscall.EHOSTUNREACH) {
		t.Errorf("beyond the new quota: %v", err)
	}
	echo(t, old, "still here")
	c.Extra = "ports: {quarantine: 7}\n"
	if out, status := g.Rewrite(l.Text(c)); status == 0 || !strings.Contains(out, "ports cannot change") {
		t.Errorf("another quarantine: status %d\n%s", status, out)
	}
}

// RFC 4787, REQ-2: of several external addresses a client has one, for all that it
// sends, and its binds; and the clients are spread over them.
func TestNUDP02OneOfSeveralAddresses(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(cone.config(", address: [" + lab.Outside4.String() + ", " + lab.Outside4b.String() + "]"))
	server := socket(l.Srv, to(lab.Srv4, 9001))
	seen := map[netip.Addr]int{}
	for _, h := range []*lab.Host{l.Client, l.Client2} {
		mine := map[netip.Addr]bool{}
		for range 12 {
			mine[seenBy(t, server, socket(h, netip.AddrPortFrom(addrOf(h, lab.Srv4), 0))).Addr()] = true
		}
		if len(mine) != 1 {
			t.Errorf("%s is seen as %v", h.Name, mine)
		}
		for a := range mine {
			seen[a]++
		}
	}
	if seen[lab.Outside4] != 1 || seen[lab.Outside4b] != 1 {
		t.Errorf("the clients are seen as %v", seen)
	}
}
