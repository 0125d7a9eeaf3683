package netns_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// pinger is a raw ICMP socket of a host; it hears all ICMP that the host gets.
type pinger struct {
	*icmp.PacketConn
	t    testing.TB
	host *lab.Host
}

func ping(t testing.TB, l *lab.Lab, h *lab.Host) pinger {
	t.Helper()
	p := pinger{t: t, host: h}
	if err := h.Do(func() (err error) {
		p.PacketConn, err = icmp.ListenPacket("ip4:icmp", "0.0.0.0")
		return err
	}); err != nil {
		t.Fatalf("%s: a socket for ICMP: %v", h.Name, err)
	}
	l.OnClose(func() { _ = p.Close() })
	return p
}

// query is what an echo request or reply says.
type query struct {
	from netip.Addr
	id   int
	text string
}

// asks sends an echo request.
func (p pinger) asks(to netip.Addr, id int, text string) {
	p.t.Helper()
	m := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: id, Seq: 1, Data: []byte(text)}}
	b, err := m.Marshal(nil)
	if err == nil {
		_, err = p.WriteTo(b, &net.IPAddr{IP: to.AsSlice()})
	}
	if err != nil {
		p.t.Fatalf("%s: ping %s: %v", p.host.Name, to, err)
	}
}

// gets waits for an echo message of a type with this text.
func (p pinger) gets(kind ipv4.ICMPType, text string, d time.Duration) (query, bool) {
	p.t.Helper()
	if err := p.SetReadDeadline(time.Now().Add(d)); err != nil {
		p.t.Fatal(err)
	}
	b := make([]byte, 1500)
	for {
		n, from, err := p.ReadFrom(b)
		if err != nil {
			return query{}, false
		}
		m, err := icmp.ParseMessage(1, b[:n]) // 1 is ICMP's number
		if err != nil || m.Type != kind {
			continue
		}
		if e, ok := m.Body.(*icmp.Echo); ok && string(e.Data) == text {
			a, _ := netip.AddrFromSlice(from.(*net.IPAddr).IP)
			return query{a.Unmap(), e.ID, text}, true
		}
	}
}

// pings sends an echo request to a server and gives how the server saw it; the
// reply must come back to the identifier that was used.
func (p pinger) pings(server pinger, at netip.Addr, id int) query {
	p.t.Helper()
	text := fmt.Sprintf("%s %s %d %d", p.host.Name, at, id, time.Now().UnixNano())
	p.asks(at, id, text)
	seen, ok := server.gets(ipv4.ICMPTypeEcho, text, lab.Patience(3*time.Second))
	if !ok {
		p.t.Fatalf("%s: a ping to %s never came", p.host.Name, at)
	}
	back, ok := p.gets(ipv4.ICMPTypeEchoReply, text, lab.Patience(3*time.Second))
	if !ok || back.from != at || back.id != id {
		p.t.Errorf("%s: the reply of %s: %+v, it came: %v", p.host.Name, at, back, ok)
	}
	return query{seen.from, seen.id, ""}
}

// RFC 5508, REQ-1: queries pass, and with endpoint-independent mapping one
// identifier of a host is one outside, for all that it asks; another host's is
// another.
func TestNICMP01QueryMapping(t *testing.T) {
	for _, m := range []mode{cone, {byAddressPort, byAddressPort}} {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			g := l.Gateway(m.config(""))
			client, second, srv, other := ping(t, l, l.Client), ping(t, l, l.Client2), ping(t, l, l.Srv), ping(t, l, l.Other)
			a, b := client.pings(srv, lab.Srv4, 7), second.pings(srv, lab.Srv4, 7)
			if m.mapping == independent {
				g.Freeze()
			}
			a2, b2 := client.pings(other, lab.Other4, 7), second.pings(other, lab.Other4, 7)
			g.Thaw()
			if a == b || a2 == b2 || a.from != lab.Outside4 {
				t.Errorf("the servers saw %+v and %+v, then %+v and %+v", a, b, a2, b2)
			}
			if m.mapping == independent && (a != a2 || b != b2) {
				t.Errorf("one server saw %+v and %+v, the other %+v and %+v; want the same", a, b, a2, b2)
			}
		})
	}
}

// REQ-7: ICMP errors find the way between two inside hosts that reach each other
// by their external addresses.
func TestNICMP07Hairpin(t *testing.T) {
	t.Run("gateway", func(t *testing.T) {
		t.Parallel()
		l := lab.New(t)
		l.Gateway(cone.config(""))
		server := socket(l.Srv, to(lab.Srv4, 9000))
		second := socket(l.Client2, secondAt)
		at := seenBy(t, server, second)
		_ = second.Close()
		wire := l.Client.Capture()
		c := l.Client.MustDial("udp4", at.String(), time.Second)
		mustWrite(t, c, "nobody is at home")
		if err := udpAnswer(c, 3*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("the error of the host behind %v comes as %v", at, err)
		}
		for _, s := range lab.Select(wire.Stop(), func(s lab.Seen) bool { return s.Proto == "icmp" }) {
			if s.Src.Addr() == lab.Second4 {
				t.Errorf("the error came from %v, the inside address", s.Src.Addr())
			}
		}
	})
	t.Run("plain masquerade does not", func(t *testing.T) {
		t.Parallel()
		l := lab.New(t)
		masquerade(l, "")
		server := socket(l.Srv, to(lab.Srv4, 9000))
		second := socket(l.Client2, secondAt)
		at := seenBy(t, server, second)
		_ = second.Close()
		wire := l.Client2.Capture()
		c := l.Client.MustDial("udp4", at.String(), time.Second)
		mustWrite(t, c, "nobody is at home")
		_ = udpAnswer(c, time.Second)
		if len(lab.Select(wire.Stop(), lab.UDPTo(secondAt))) != 0 {
			t.Error("the datagram came")
		}
	})
}

// RFC 4787, REQ-12: an ICMP error reaches the inside socket, in the words of the
// inside, and does not end its mapping.
func TestNUDP12ICMPErrors(t *testing.T) {
	for _, m := range []mode{cone, {byAddressPort, byAddressPort}} {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Gateway(m.config(""))
			outside := outsiders(l)
			client := socket(l.Client, clientAt)
			before := seenBy(t, outside[0], client)
			wire := l.Client.Capture()
			for range 3 {
				sends(t, client, to(lab.Srv4, 9999)) // where nobody listens
			}
			var quoted lab.Seen
			lab.Eventually(t, 3*time.Second, "the error comes in", func() bool {
				for _, s := range lab.Select(wire.Peek(), func(s lab.Seen) bool { return s.Proto == "icmp" && s.ICMPType == 3 && s.ICMPCode == 3 }) {
					quoted = s
				}
				return quoted.Src.IsValid()
			})
			if about := quotedFlow(quoted.Payload); about != [2]netip.AddrPort{clientAt, to(lab.Srv4, 9999)} || quoted.Src.Addr() != lab.Srv4 {
				t.Errorf("the error of %v is about %v", quoted.Src.Addr(), about)
			}
			if seen := append(eachSeen(t, client, outside), before); m.mapping == independent && !all(seen) {
				t.Errorf("after the error the outside sees %v", seen)
			}
			reaches(t, outside[0], before, client)
		})
	}
}

// quotedFlow gives the addresses of the UDP datagram that an ICMP error quotes;
// payload begins behind the ICMP header.
func quotedFlow(payload []byte) (ends [2]netip.AddrPort) {
	if len(payload) < 28 {
		return ends
	}
	src, _ := netip.AddrFromSlice(payload[12:16])
	dst, _ := netip.AddrFromSlice(payload[16:20])
	at := int(payload[0]&15) * 4
	port := func(i int) uint16 { return uint16(payload[at+i])<<8 | uint16(payload[at+i+1]) }
	return [2]netip.AddrPort{netip.AddrPortFrom(src, port(0)), netip.AddrPortFrom(dst, port(2))}
}

// REQ-13: a datagram that is too large for the way out and may not be cut comes
// back as "fragmentation needed" with the way's MTU; one that may be cut arrives.
func TestNUDP13DontFragment(t *testing.T) {
	for _, m := range []mode{cone, {byAddressPort, byAddressPort}} {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			narrow(l)
			l.Gateway(m.config(""))
			server, client := socket(l.Srv, to(lab.Srv4, 9000)), socket(l.Client, clientAt)
			seenBy(t, server, client)
			wire := l.Client.Capture()
			large := strings.Repeat("x", 1400)
			discover(t, client, syscall.IP_PMTUDISC_DO)
			if _, err := client.WriteToUDPAddrPort([]byte(large), addrPort(server)); err != nil {
				t.Fatal(err)
			}
			if _, ok := hears(t, server, large, silence()); ok {
				t.Error("a datagram with DF set arrived")
			}
			told := lab.Select(wire.Stop(), func(s lab.Seen) bool { return s.Proto == "icmp" && s.ICMPType == 3 && s.ICMPCode == 4 })
			if len(told) == 0 || quotedFlow(told[0].Payload) != [2]netip.AddrPort{clientAt, addrPort(server)} {
				t.Errorf("%d errors came, want one about this datagram", len(told))
			}
			discover(t, client, syscall.IP_PMTUDISC_DONT)
			if _, err := client.WriteToUDPAddrPort([]byte(large), addrPort(server)); err != nil {
				t.Fatal(err)
			}
			if _, ok := hears(t, server, large, lab.Patience(3*time.Second)); !ok {
				t.Error("a datagram without DF did not arrive")
			}
		})
	}
}

// discover sets whether a socket's datagrams may be cut (ip(7)).
func discover(t testing.TB, c *net.UDPConn, how int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		var inner error
		err = errors.Join(raw.Control(func(fd uintptr) {
			inner = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_MTU_DISCOVER, how)
		}), inner)
	}
	if err != nil {
		t.Fatalf("IP_MTU_DISCOVER: %v", err)
	}
}
