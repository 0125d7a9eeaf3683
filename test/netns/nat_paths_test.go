package netns_test

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// carried is a scene whose clients are mapped, and a probe that holds every flow
// of the protocol probed in user space.
func carried(t *testing.T, m mode) *scene {
	t.Helper()
	l := lab.New(t)
	c := probed()
	c.NetworkRules = m.config("").NetworkRules
	s := play(t, l, families[0], c)
	s.on("UDPDestination", "attach")
	s.on("ConnectTCP", "attach")
	return s
}

// What user space carries leaves from the same external endpoint as what the
// kernel carries.
func TestNUDP01MappingOnBothPaths(t *testing.T) {
	t.Parallel()
	for _, m := range modes[:3] {
		t.Run(m.filtering, func(t *testing.T) {
			t.Parallel()
			s := carried(t, m)
			own := socket(s.Client, to(s.client, 4000))
			user, kernel := socket(s.Srv, to(s.srv, 7)), socket(s.Srv, to(s.srv, 8))
			at := seenBy(t, user, own)
			if got := seenBy(t, kernel, own); got != at {
				t.Errorf("by the kernel it is %s, by user space %s", got, at)
			}
			if got := seenBy(t, socket(s.Other, to(s.other, 7)), own); got != at {
				t.Errorf("for another peer in user space it is %s, first %s", got, at)
			}
			if reaches(t, user, at, own) != to(s.srv, 7) || reaches(t, kernel, at, own) != to(s.srv, 8) {
				t.Error("the peers have changed their addresses")
			}
			if m.filtering == byAddress {
				reaches(t, socket(s.Srv, to(s.srv, 9)), at, own)
			}
			if n := len(mappings(s.g)); n != 1 {
				t.Errorf("%d mappings", n)
			}
		})
	}
}

func TestNTCP01MappingOnBothPaths(t *testing.T) {
	t.Parallel()
	s := carried(t, cone)
	mirrorTCP(s.Srv, 7)
	mirrorTCP(s.Srv, 8)
	mirrorTCP(s.Other, 7)
	at, _ := mirrored(t, s.Lab, s.Client, to(s.client, 4000), to(s.srv, 7))
	for _, server := range []netip.AddrPort{to(s.srv, 8), to(s.other, 7)} {
		if got, _ := mirrored(t, s.Lab, s.Client, to(s.client, 4000), server); got != at {
			t.Errorf("%s saw %s, the first one %s", server, got, at)
		}
	}
}

// Who gets no port is told (RFC 5508, REQ-8): ICMP "administratively prohibited".
func TestNICMP08Exhausted(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	c := cone.config("")
	c.Extra = "ports: {leases: 61000-61001}\n"
	g := l.Gateway(c)
	seen := l.Client.Capture()
	srv := socket(l.Srv, to(lab.Srv4, 2000))
	first := seenBy(t, srv, socket(l.Client, to(lab.Client4, 5000)))
	seenBy(t, srv, socket(l.Client, to(lab.Client4, 5001)))
	if first.Port() != 61000 && first.Port() != 61001 {
		t.Errorf("the first one has %s", first)
	}
	c2 := l.Client.MustDial("udp4", to(lab.Srv4, 2000).String(), time.Second)
	mustWrite(t, c2, "no port is left")
	deadline(t, c2, 3*time.Second)
	if _, err := c2.Read(make([]byte, 10)); !errors.Is(err, syscall.EHOSTUNREACH) && !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the client reads %v", err)
	}
	prohibited := func(p lab.Seen) bool { return p.Proto == "icmp" && !p.Out }
	if n := len(lab.Select(seen.Stop(), prohibited)); n == 0 {
		t.Error("no ICMP error")
	}
	if n := len(mappings(g)); n != 2 {
		t.Errorf("%d mappings", n)
	}
}

// In user space, too, hosts of the inside reach each other as if they were
// outside.
func TestNUDP09HairpinInUserSpace(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	c := probed()
	c.NetworkRules = cone.config("").NetworkRules
	c.Protocols += "  leased: {udp: 1024-65535, filter: probe}\n"
	c.Rules += "  - {name: leased, action: allow, from: lan, to: wan, protocols: leased, filters: {probe: {}}}\n"
	s := play(t, l, families[0], c)
	one, two := socket(l.Client, to(s.client, 4000)), socket(l.Client2, to(lab.Second4, 4000))
	srv := socket(l.Srv, to(s.srv, 8))
	at, second := seenBy(t, srv, one), seenBy(t, srv, two)
	s.on("UDPDestination", "attach")
	if from := reaches(t, two, at, one); from != second {
		t.Errorf("the host saw %s, the server %s", from, second)
	}
	if from := reaches(t, one, second, two); from != at {
		t.Errorf("the other host saw %s, the server %s", from, at)
	}
}
