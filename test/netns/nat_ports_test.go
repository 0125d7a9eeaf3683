package netns_test

import (
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// RFC 4787, REQ-2: all mappings of a host have one external address, also where
// the gateway has several: of UDP, TCP and queries, whomever they are for.
func TestNUDP02PairedPooling(t *testing.T) {
	for _, m := range modes {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Gateway(m.config(", address: 203.0.113.2"))
			outside, servers := outsiders(l), mirrors(l)
			srv := ping(t, l, l.Srv)
			for _, h := range []*lab.Host{l.Client, l.Client2} {
				inside := addrOf(h, lab.Srv4)
				var seen []netip.Addr
				for i := range 8 {
					for _, a := range eachSeen(t, socket(h, to(inside, 5000+i)), outside) {
						seen = append(seen, a.Addr())
					}
				}
				for _, at := range servers {
					a, _ := mirrored(t, l, h, netip.AddrPortFrom(inside, 0), at)
					seen = append(seen, a.Addr())
				}
				seen = append(seen, ping(t, l, h).pings(srv, lab.Srv4, 7).from)
				for _, a := range seen {
					if a != lab.Outside4b {
						t.Fatalf("%s is seen as %v", h.Name, seen)
					}
				}
			}
		})
	}
}

// ownPorts are source ports of all classes: below 1024, odd and even.
var ownPorts = []int{601, 702, 1023, 1024, 5000, 5001, 19999, 32768, 61001, 65535}

// REQ-3a: a source port below 1024 is seen as one below 1024, another as one
// above.
func TestNUDP03aPortClasses(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(cone.config(""))
	outside, servers := outsiders(l), mirrors(l)
	for i, port := range ownPorts {
		if seen := seenBy(t, outside[i%4], socket(l.Client, to(lab.Client4, port))); (seen.Port() < 1024) != (port < 1024) {
			t.Errorf("UDP port %d is seen as %v", port, seen)
		}
		if seen, _ := mirrored(t, l, l.Client, to(lab.Client4, port), servers[i%4]); (seen.Port() < 1024) != (port < 1024) {
			t.Errorf("TCP port %d is seen as %v", port, seen)
		}
	}
}

// The kernel's own translation gives a user's port no port of the system's.
func TestNUDP03aTheKernelsPorts(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(mode{byAddressPort, byAddressPort}.config(""))
	outside := outsiders(l)
	for i, port := range ownPorts {
		if seen := seenBy(t, outside[i%4], socket(l.Client, to(lab.Client4, port))); seen.Port() < 1024 {
			t.Errorf("port %d is seen as %v", port, seen)
		}
	}
}

// REQ-4: an even source port is seen as an even one, an odd one as an odd one.
func TestNUDP04Parity(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(cone.config(""))
	outside := outsiders(l)
	for i, port := range ownPorts {
		for _, h := range []*lab.Host{l.Client, l.Client2} {
			if seen := seenBy(t, outside[i%4], socket(h, to(addrOf(h, lab.Srv4), port))); int(seen.Port())%2 != port%2 {
				t.Errorf("port %d is seen as %v", port, seen)
			}
		}
	}
}

// Who asks for a pair of ports, for RTP and RTCP, gets an even one and the next,
// also beside mappings.
func TestNUDP04Pairs(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	echoes(l)
	for _, port := range []int{4000, 4001} {
		l.Client.EchoUDP(port)
	}
	c := probed()
	c.NetworkRules = cone.config("").NetworkRules
	s := play(t, l, families[0], c)
	for range 30 {
		s.talk(l.Client2, to(lab.Srv4, 7)) // mappings among the pairs
	}
	e := s.connect()
	clients := []string{to(s.client, 4000).String(), to(s.client, 4001).String()}
	for range 10 {
		r := s.must("bind", e, lab.ProbeArgs{Proto: "udp", Clients: clients, Flags: []string{"EvenPort", "Bidirectional"}})
		low, high := netip.MustParseAddrPort(r.Addrs[0]), netip.MustParseAddrPort(r.Addrs[1])
		if low.Port()%2 != 0 || high != next(low, 1) {
			t.Fatalf("the pair is %v", r.Addrs)
		}
		s.talk(l.Srv, low)
		s.talk(l.Srv, high)
	}
}
