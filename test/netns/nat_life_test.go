package netns_test

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// REQ-1, in a hurry: a socket that sends to many peers at once, before anybody
// can have answered, has one external address and port for all of them.
func TestNUDP01Burst(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(cone.config(""))
	const peers = 60
	var outside []*net.UDPConn
	for i := range peers {
		h, at := l.Srv, lab.Srv4
		if i%2 == 1 {
			h, at = l.Other, lab.Other4
		}
		outside = append(outside, socket(h, to(at, 9000+i)))
	}
	for round := range 5 {
		client, second := socket(l.Client, to(lab.Client4, 5000+round)), socket(l.Client2, to(lab.Second4, 5000+round))
		texts := map[*net.UDPConn][]string{}
		for _, from := range []*net.UDPConn{client, second} {
			for _, o := range outside {
				texts[from] = append(texts[from], sends(t, from, addrPort(o)))
			}
		}
		// What one socket sent comes in two orders: a socket's own, and the hosts'.
		seen := map[string]netip.AddrPort{}
		for _, o := range outside {
			for range 2 {
				text, from, ok := anything(t, o)
				if !ok {
					t.Fatalf("%v got less than it was sent", o.LocalAddr())
				}
				seen[text] = from
			}
		}
		for from, list := range texts {
			var places []netip.AddrPort
			for _, text := range list {
				places = append(places, seen[text])
			}
			if !all(places) || !places[0].IsValid() {
				t.Errorf("%v is seen as %v", from.LocalAddr(), places)
			}
		}
	}
}

// anything waits for any datagram.
func anything(t testing.TB, c *net.UDPConn) (string, netip.AddrPort, bool) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(lab.Patience(3 * time.Second))); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2000)
	n, from, err := c.ReadFromUDPAddrPort(b)
	return string(b[:n]), netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), err == nil
}

// The same with TCP: connections from one port to many servers at once.
func TestNTCP01Burst(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(cone.config(""))
	const peers = 20
	for i := range peers {
		mirrorTCP(l.Srv, 9000+i)
		mirrorTCP(l.Other, 9000+i)
	}
	var wg sync.WaitGroup
	conns := make([]net.Conn, 2*peers)
	for i := range conns {
		at := to([]netip.Addr{lab.Srv4, lab.Other4}[i%2], 9000+i/2)
		wg.Go(func() { conns[i] = <-connecting(l, l.Client, clientAt, at) })
	}
	wg.Wait()
	var seen []netip.AddrPort
	for i, c := range conns {
		if c == nil {
			t.Fatalf("connection %d was not made", i)
		}
		seen = append(seen, toldBy(t, c))
	}
	if !all(seen) {
		t.Errorf("the servers saw %v", seen)
	}
}

// REQ-3: a port that the gateway itself uses is no client's.
func TestNUDP03TheGatewaysOwnPorts(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	for port := 61001; port <= 61006; port++ {
		socket(l.GW, netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(port)))
	}
	c := cone.config("")
	c.Extra = "ports: {leases: 61000-61007, well_known: off}\n"
	l.Gateway(c)
	outside := outsiders(l)
	for _, at := range []netip.AddrPort{clientAt, secondAt} {
		h := map[netip.AddrPort]*lab.Host{clientAt: l.Client, secondAt: l.Client2}[at]
		if seen := seenBy(t, outside[0], socket(h, at)); seen.Port() != 61000 && seen.Port() != 61007 {
			t.Errorf("%v is seen as %v", at, seen)
		}
	}
}

// The mapping of a socket is one for all of its flows, also where one of them is
// carried in user space.
func TestNUDP01UserSpace(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	c := cone.config("")
	c.Protocols = "  carried: {udp: 9001, tcp: 9001}\n"
	c.Rules = "  - {name: carried, action: allow, from: lan, to: wan, protocols: carried, no_kernel_mode: true}\n" + c.Rules
	l.Gateway(c)
	outside := outsiders(l)
	for i, order := range [][]int{{0, 1, 2, 3}, {2, 3, 0, 1}} {
		client := socket(l.Client, to(lab.Client4, 5000+i))
		var seen []netip.AddrPort
		for _, o := range order {
			seen = append(seen, seenBy(t, outside[o], client))
		}
		if !all(seen) {
			t.Errorf("%s is seen as %v", fmt.Sprint(order), seen)
		}
	}
}
