package netns_test

import (
	"net"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// The inside endpoints of most tests: two hosts with the same source port.
var (
	clientAt = netip.AddrPortFrom(lab.Client4, 5000)
	secondAt = netip.AddrPortFrom(lab.Second4, 5000)
)

// outsiders are sockets of the outside at two addresses and two ports.
func outsiders(l *lab.Lab) []*net.UDPConn {
	var list []*net.UDPConn
	for _, port := range []int{9000, 9001} {
		list = append(list, socket(l.Srv, to(lab.Srv4, port)), socket(l.Other, to(lab.Other4, port)))
	}
	return list
}

// masquerade is the plain router that the tests compare with.
func masquerade(l *lab.Lab, more string) {
	l.GW.Run("nft", "-f", l.File("plain.nft", `
		table ip plain {
			chain post {
				type nat hook postrouting priority srcnat
				oifname "wan0" masquerade `+more+`
			}
		}
	`))
}

// eachSeen is what the outsiders see of a client.
func eachSeen(t testing.TB, client *net.UDPConn, outside []*net.UDPConn) (seen []netip.AddrPort) {
	t.Helper()
	for _, o := range outside {
		seen = append(seen, seenBy(t, o, client))
	}
	return seen
}

// RFC 4787, REQ-1: a socket has one external address and port, whomever it
// sends to, and although another host uses the same source port. Once it is
// there, the kernel alone makes it so.
func TestNUDP01EndpointIndependentMapping(t *testing.T) {
	for _, m := range modes[:3] {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			g := l.Gateway(m.config(""))
			outside := outsiders(l)
			client, second := socket(l.Client, clientAt), socket(l.Client2, secondAt)
			before := seenBy(t, outside[0], client)
			seen := append(eachSeen(t, second, []*net.UDPConn{outside[1], outside[0]}), seenBy(t, outside[1], client))
			g.Freeze()
			seen = append(append(seen, eachSeen(t, second, outside[2:])...), eachSeen(t, client, outside[2:])...)
			g.Thaw()
			ofClient, ofSecond := []netip.AddrPort{before, seen[2], seen[5], seen[6]}, []netip.AddrPort{seen[0], seen[1], seen[3], seen[4]}
			if !all(ofClient) || !all(ofSecond) || before == seen[0] {
				t.Errorf("the outside saw %v of one host and %v of the other; want one address and port of each", ofClient, ofSecond)
			}
			if before.Addr() != lab.Outside4 || seen[0].Addr() != lab.Outside4 {
				t.Errorf("the outside saw %v and %v; want %v", before, seen[0], lab.Outside4)
			}
		})
	}
	t.Run("plain masquerade does not", func(t *testing.T) {
		t.Parallel()
		l := lab.New(t)
		masquerade(l, "")
		outside := outsiders(l)
		client, second := socket(l.Client, clientAt), socket(l.Client2, secondAt)
		seenBy(t, outside[0], client)
		// Where there is no clash the port stays.
		if seen := eachSeen(t, second, []*net.UDPConn{outside[1], outside[0]}); all(seen) {
			t.Errorf("the outside saw %v", seen)
		}
	})
}

// The other mapping, which is the default, needs nobody: also the first packet
// of an endpoint passes while the daemon stands still.
func TestNUDP01TheDefaultStaysInTheKernel(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(mode{byAddressPort, byAddressPort}.config(""))
	outside := outsiders(l)
	client := socket(l.Client, clientAt)
	g.Freeze()
	seen := eachSeen(t, client, outside)
	g.Thaw()
	if seen[0].Addr() != lab.Outside4 {
		t.Errorf("the outside saw %v", seen)
	}
}

// REQ-3: no external port serves two endpoints at a time, also if they have
// different peers.
func TestNUDP03NoPortServesTwo(t *testing.T) {
	const hosts, each = 2, 40
	overloads := func(t *testing.T, l *lab.Lab) (twice int) {
		outside := outsiders(l)
		of := map[netip.AddrPort]netip.AddrPort{}
		for i := range hosts * each {
			host, inside := l.Client, netip.AddrPortFrom(lab.Client4, uint16(20000+i/hosts))
			if i%hosts == 1 {
				host, inside = l.Client2, netip.AddrPortFrom(lab.Second4, inside.Port())
			}
			seen := seenBy(t, outside[i%len(outside)], socket(host, inside))
			if before, ok := of[seen]; ok {
				t.Logf("%v is both %v and %v", seen, before, inside)
				twice++
			}
			of[seen] = inside
		}
		return twice
	}
	t.Run("gateway", func(t *testing.T) {
		t.Parallel()
		l := lab.New(t)
		l.Gateway(cone.config(""))
		if n := overloads(t, l); n > 0 {
			t.Errorf("%d external ports serve two endpoints", n)
		}
	})
	t.Run("plain masquerade does", func(t *testing.T) {
		t.Parallel()
		l := lab.New(t)
		masquerade(l, "")
		if overloads(t, l) == 0 {
			t.Error("no external port serves two endpoints")
		}
	})
}

// REQ-11: the NAT behaves the same under a clash, at any time, and after its
// daemon was killed and its configuration read again.
func TestNUDP11Deterministic(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	c := cone.config("")
	g := l.Gateway(c)
	outside := outsiders(l)
	client, second := socket(l.Client, clientAt), socket(l.Client2, secondAt)
	a, b := seenBy(t, outside[0], client), seenBy(t, outside[0], second)
	same := func(when string) {
		t.Helper()
		for range 3 {
			if seen := append(eachSeen(t, client, outside), a); !all(seen) {
				t.Errorf("%s the outside saw %v of the one, want %v", when, seen, a)
			}
			if seen := append(eachSeen(t, second, outside), b); !all(seen) {
				t.Errorf("%s the outside saw %v of the other, want %v", when, seen, b)
			}
		}
		// A stranger still finds both of them.
		stranger := socket(l.Other, netip.AddrPortFrom(lab.Other4, 0))
		reaches(t, stranger, a, client)
		reaches(t, stranger, b, second)
	}
	same("in the beginning")
	// More endpoints than before: none takes the place of another.
	for i := range 20 {
		from := socket(l.Client2, to(lab.Second4, 5001+i))
		if seen := seenBy(t, outside[i%len(outside)], from); seen == a || seen == b {
			t.Errorf("%v is taken twice", seen)
		}
	}
	same("after other endpoints")
	c.Rules += "  - {name: more, action: deny, from: lan, to: wan, protocols: telnet}\n"
	g.Reload(c)
	same("after a reload")
	g.Kill()
	l.Gateway(c)
	same("after the daemon was killed")
}
