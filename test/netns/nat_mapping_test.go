package netns_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// Hosts behind the gateway reach each other by their external endpoints, and
// see these, under every filtering that lets them.
func TestNUDP09HairpinMapping(t *testing.T) {
	t.Parallel()
	for _, m := range modes[:3] {
		t.Run(m.filtering, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Gateway(m.config(""))
			one, two := socket(l.Client, to(lab.Client4, 5000)), socket(l.Client2, to(lab.Second4, 5000))
			srv := socket(l.Srv, to(lab.Srv4, 2000))
			at := seenBy(t, srv, one)
			if m.filtering == independent {
				// The sender has no mapping yet.
				from := reaches(t, two, at, one)
				if b := seenBy(t, srv, two); from != b {
					t.Errorf("the host saw %s, the server %s", from, b)
				}
				reaches(t, one, from, two)
				return
			}
			b := seenBy(t, srv, two)
			lost(t, two, at, one)
			// Now that one has sent to two as well, they reach each other.
			if from := reaches(t, one, b, two); from != at {
				t.Errorf("the host saw %s, the server %s", from, at)
			}
			if from := reaches(t, two, at, one); from != b {
				t.Errorf("the other host saw %s, the server %s", from, b)
			}
		})
	}
}

// mappings are the inside endpoints that have one.
func mappings(g *lab.Gateway) (inside []string) {
	var binds []struct{ By, Client, External string }
	g.JSON(&binds, "binds")
	for _, b := range binds {
		if strings.HasPrefix(b.By, "network rule ") {
			inside = append(inside, b.Client+" "+b.External)
		}
	}
	return inside
}

// A mapping lives as long as a flow of it, keeps its external endpoint so long,
// and is gone then; its port is nobody else's for a while.
func TestNUDP05MappingLives(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(cone.config(""))
	own := socket(l.Client, to(lab.Client4, 5000))
	srv, other := socket(l.Srv, to(lab.Srv4, 2000)), socket(l.Other, to(lab.Other4, 2000))
	at := seenBy(t, srv, own)
	seenBy(t, other, own)
	l.GW.Run("conntrack", "-D", "-p", "udp", "-d", lab.Srv4.String())
	if again := seenBy(t, srv, own); again != at {
		t.Errorf("one flow has ended, and the next has %s instead of %s", again, at)
	}
	l.GW.Run("conntrack", "-D", "-p", "udp", "-s", lab.Client4.String())
	lab.Eventually(t, 15*time.Second, "the end of the mapping", func() bool { return len(mappings(g)) == 0 })
	lost(t, srv, at, own)
	if again := seenBy(t, srv, own); again == at {
		t.Errorf("the port of %s was not resting", at)
	}
}

// What lives survives the daemon, and is known to the next one.
func TestB55MappingsSurvive(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(cone.config(""))
	own := socket(l.Client, to(lab.Client4, 5000))
	srv, other := socket(l.Srv, to(lab.Srv4, 2000)), socket(l.Other, to(lab.Other4, 2000))
	at := seenBy(t, srv, own)
	g.Kill()
	if again := seenBy(t, srv, own); again != at {
		t.Errorf("without the daemon the flow has %s instead of %s", again, at)
	}
	if again := seenBy(t, other, own); again != at {
		t.Errorf("without the daemon another flow has %s instead of %s", again, at)
	}
	g = l.Gateway(cone.config(""))
	third := socket(l.Srv, to(lab.Srv4, 2001))
	if again := seenBy(t, third, own); again != at {
		t.Errorf("after the restart another flow has %s instead of %s", again, at)
	}
	reaches(t, other, at, own)
	if got := mappings(g); len(got) != 1 || got[0] != "10.0.0.2:5000 "+at.String() {
		t.Errorf("mappings after the restart: %q", got)
	}
	l.GW.Run("conntrack", "-D", "-p", "udp", "-s", lab.Client4.String())
	lab.Eventually(t, 15*time.Second, "the end of the mapping", func() bool { return len(mappings(g)) == 0 })
}

// A reload that does not touch the network rule changes nothing; one that takes
// the mapping away ends it for what is new, and living flows go on.
func TestB46MappingsAndReload(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(cone.config(""))
	own := socket(l.Client, to(lab.Client4, 5000))
	srv, other := socket(l.Srv, to(lab.Srv4, 2000)), socket(l.Other, to(lab.Other4, 2000))
	at := seenBy(t, srv, own)
	reaches(t, other, at, own) // an inbound flow

	same := cone.config("")
	same.Rules += "  - {name: more, action: deny, from: lan, to: wan, protocols: telnet}\n"
	g.Reload(same)
	if again := seenBy(t, socket(l.Srv, to(lab.Srv4, 2001)), own); again != at {
		t.Errorf("after a reload the next flow has %s instead of %s", again, at)
	}
	reaches(t, other, at, own)

	// Nobody may come in any more that was not asked.
	g.Reload(modes[2].config(""))
	lost(t, socket(l.Other, to(lab.Other4, 2001)), at, own)
	if again := seenBy(t, srv, own); again != at {
		t.Errorf("with another filtering the flow has %s instead of %s", again, at)
	}

	g.Reload(cone.config(", address: " + lab.Outside4b.String()))
	if again := seenBy(t, srv, own); again != at {
		t.Errorf("the living flow has %s instead of %s", again, at)
	}
	fresh := seenBy(t, socket(l.Srv, to(lab.Srv4, 2002)), own)
	if fresh.Addr() != lab.Outside4b {
		t.Errorf("with another address the next flow has %s", fresh)
	}
	lost(t, socket(l.Other, to(lab.Other4, 2003)), at, own)
}

// The flows of a mapping have the timers of their protocols, the first one and
// those that nobody is asked about.
func TestNUDP05MappedTimers(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	c := cone.config("")
	c.Protocols = "  brief: {udp: 9001, timeout: 100}\n"
	l.Gateway(c)
	for i, ports := range [][]int{{9001, 53, 9000}, {9000, 53, 9001}} {
		own := socket(l.Client, to(lab.Client4, 5000+i))
		for _, port := range ports {
			srv := socket(l.Srv, to(lab.Srv4, port))
			seenBy(t, srv, own)
			_ = srv.Close()
			want := map[int]int{9001: 100, 53: 10, 9000: 300}[port]
			l.GW.Run("sh", "-c", fmt.Sprintf("conntrack -L -p udp --orig-port-src %d --orig-port-dst %d 2>/dev/null | awk '$3 > %d || $3 < %d { exit 1 }'",
				5000+i, port, want, want-5))
		}
	}
}
