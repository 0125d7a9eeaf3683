package netns_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// idle is the idle timer of the tests below, and what is certainly beyond it.
const idle, beyond = 4 * time.Second, 7 * time.Second

// timed is a configuration whose mappings of UDP last for idle.
func timed(more string) lab.Config {
	c := cone.config(more)
	c.Extra = "timeouts: {udp: 4}\n"
	return c
}

// REQ-6: what the inside sends keeps a mapping alive, always; what comes from
// outside does too, unless the rule says that it does not.
func TestNUDP06Refresh(t *testing.T) {
	// A datagram every second, longer than beyond.
	steadily := func(t *testing.T, once func() bool) (lasted time.Duration) {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for begun := time.Now(); time.Since(begun) < beyond+2*time.Second; <-tick.C {
			lasted = time.Since(begun)
			if !once() {
				break
			}
		}
		return lasted
	}
	run := func(name, more string, test func(t *testing.T, l *lab.Lab)) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Gateway(timed(more))
			test(t, l)
		})
	}
	outbound := func(t *testing.T, l *lab.Lab) {
		server, client := socket(l.Srv, to(lab.Srv4, 9000)), socket(l.Client, clientAt)
		at := seenBy(t, server, client)
		if lasted := steadily(t, func() bool { return seenBy(t, server, client) == at }); lasted < beyond {
			t.Errorf("the mapping in use lasted %v", lasted)
		}
		reaches(t, socket(l.Other, to(lab.Other4, 9500)), at, client)
	}
	run("outbound", "", outbound)
	run("outbound, inbound does not count", ", refresh_inbound: false", outbound)
	inbound := func(t *testing.T, l *lab.Lab) time.Duration {
		server, client := socket(l.Srv, to(lab.Srv4, 9000)), socket(l.Client, clientAt)
		at := seenBy(t, server, client)
		stranger := socket(l.Other, to(lab.Other4, 9500))
		return steadily(t, func() bool {
			sends(t, server, at)
			_, ok := hears(t, client, sends(t, stranger, at), silence())
			return ok
		})
	}
	run("inbound", "", func(t *testing.T, l *lab.Lab) {
		if lasted := inbound(t, l); lasted < beyond {
			t.Errorf("the mapping lasted %v although datagrams came in", lasted)
		}
	})
	run("inbound does not count", ", refresh_inbound: false", func(t *testing.T, l *lab.Lab) {
		if lasted := inbound(t, l); lasted < idle-time.Second || lasted > beyond+time.Second {
			t.Errorf("the mapping lasted %v although nothing went out", lasted)
		}
	})
}

// REQ-11: a daemon that is started again gives no port away that a mapping of
// before has, and finds what it needs to end them.
func TestNUDP11Restart(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	c := timed("")
	c.Extra += "ports: {leases: 61000-61031, well_known: off, quota: 32, quarantine: 1}\n"
	g := l.Gateway(c)
	server := socket(l.Srv, to(lab.Srv4, 9000))
	before := map[netip.AddrPort]*net.UDPConn{}
	for i := range 12 {
		client := socket(l.Client, to(lab.Client4, 5000+i))
		before[seenBy(t, server, client)] = client
	}
	g.Kill()
	for at, client := range before {
		if seen := seenBy(t, server, client); seen != at {
			t.Errorf("without the daemon %v is seen as %v, not %v", client.LocalAddr(), seen, at)
		}
	}
	l.Gateway(c)
	for i := range 12 {
		if seen := seenBy(t, server, socket(l.Client2, to(lab.Second4, 5000+i))); before[seen] != nil {
			t.Errorf("%v is taken twice", seen)
		}
	}
	for at, client := range before {
		if seen := seenBy(t, server, client); seen != at {
			t.Errorf("after the restart %v is seen as %v, not %v", client.LocalAddr(), seen, at)
		}
	}
	// All of them end; then there are ports for as many others. The kernel may
	// take a minute to clear what is over out of a table that is nearly empty,
	// unless somebody reads the table.
	for i := range 24 {
		from := socket(l.Client, netip.AddrPortFrom(lab.Client4, uint16(6000+i)))
		lab.Eventually(t, 3*beyond, "a port of before is free", func() bool {
			l.GW.Conntrack()
			_, ok := hears(t, server, sends(t, from, addrPort(server)), silence())
			return ok
		})
	}
}

// As long as one of its client's flows is allowed a mapping goes on.
func TestNUDP08PartlyRevoked(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	c := cone.config("")
	g := l.Gateway(c)
	outside, client := outsiders(l), socket(l.Client, clientAt)
	seen := eachSeen(t, client, outside)
	c.Protocols = "  first: {udp: 9000}\n"
	c.Rules = "  - {name: first, action: deny, from: lan, to: wan, protocols: first}\n" + c.Rules
	g.Reload(c)
	reaches(t, socket(l.Other, to(lab.Other4, 9500)), seen[0], client)
	lost(t, client, addrPort(outside[0]), outside[0])
	if again := seenBy(t, outside[2], client); again != seen[0] {
		t.Errorf("seen as %v, before as %v", again, seen[0])
	}
}

// A mapping ends with what allowed it: after a reload that denies its client, or
// takes the mapping from its network rule, strangers find nobody.
func TestNUDP08Revoked(t *testing.T) {
	deny := cone.config("")
	deny.Rules = "  - {name: none, action: deny, from: lan, to: wan, protocols: any}\n"
	strict := mode{independent, byAddressPort}.config("")
	for name, after := range map[string]lab.Config{
		"the rule denies": deny, "no mapping any more": modes[3].config(""), "another filtering": strict,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			g := l.Gateway(cone.config(""))
			server, stranger, client := socket(l.Srv, to(lab.Srv4, 9000)), socket(l.Other, to(lab.Other4, 9000)), socket(l.Client, clientAt)
			at := seenBy(t, server, client)
			reaches(t, stranger, at, client)
			g.Reload(after)
			lost(t, socket(l.Other, to(lab.Other4, 9001)), at, client)
			lost(t, socket(l.Srv, to(lab.Srv4, 9001)), at, client)
		})
	}
}
