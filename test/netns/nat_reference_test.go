package netns_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// RFC 4787, REQ-1: pion's client for RFC 5780 finds the mapping that a network
// rule promises. Address-and-port-dependent is what the kernel's own translation
// is under a clash, which is made first.
func TestNUDP01ReferenceClient(t *testing.T) {
	for _, m := range []mode{{independent, byAddressPort}, {byAddressPort, byAddressPort}} {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			c := m.config("")
			c.Extra = "ports: {kernel: 20000-20007, leases: 61000-61999}\n"
			l.Gateway(c)
			if m.mapping == byAddressPort {
				clash(t, l)
			}
			discovers(t, l, m)
		})
	}
}

// REQ-8: and the filtering.
func TestNUDP08ReferenceClient(t *testing.T) {
	for _, m := range modes {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			c := m.config("")
			c.Extra = "ports: {kernel: 20000-20007, leases: 61000-61999}\n"
			l.Gateway(c)
			if m.mapping == byAddressPort {
				clash(t, l)
			}
			discovers(t, l, m)
		})
	}
}

// clash lets the second host have most of the external ports 20000 to 20007
// towards the alternate address of the STUN server, where the kernel leaves a
// port of that range as it is: all but 20006 and 20007 at its primary port, all but
// 20004 and 20005 at the other. The client's sockets get 20000 to 20003.
func clash(t *testing.T, l *lab.Lab) {
	t.Helper()
	if err := l.Client.Sysctl("net/ipv4/ip_local_port_range", "20000 20003"); err != nil {
		t.Fatal(err)
	}
	wire := l.Other.Capture()
	for port := 20000; port <= 20007; port++ {
		from := socket(l.Client2, to(lab.Second4, port))
		for _, at := range []netip.AddrPort{to(lab.Other4, 3478), to(lab.Other4, 3479)} {
			free := at.Port() == 3478 && port >= 20006 || at.Port() == 3479 && (port == 20004 || port == 20005)
			if !free {
				sends(t, from, at)
			}
		}
	}
	lab.Eventually(t, 3*time.Second, "the second host has its ports", func() bool {
		return len(lab.Select(wire.Peek(), func(s lab.Seen) bool { return s.Src.Addr() == lab.Outside4 && s.Proto == "udp" })) == 12
	})
}

// IPv6 is routed, whatever the rule says of mapping: everybody sees the client's
// own address and port, and strangers do not get in.
func TestNATLeavesIPv6Alone(t *testing.T) {
	for _, m := range modes {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Gateway(m.config(""))
			s := l.STUN6()
			at := netip.AddrPortFrom(lab.Client6, 5000)
			if seen := l.Client.Discover(at).Mapping(s); seen != [3]netip.AddrPort{at, at, at} {
				t.Errorf("the server saw %v", seen)
			}
			same, otherPort, otherAddr := l.Client.Discover(netip.AddrPortFrom(lab.Client6, 0)).Filtering(s)
			if !same || otherPort || otherAddr {
				t.Errorf("the answer came from the same place: %v, another port: %v, another address and port: %v", same, otherPort, otherAddr)
			}
		})
	}
}
