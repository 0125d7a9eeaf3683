package netns_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// eachMapped plays a scene with PCP for each kind of filtering of a network rule
// that maps endpoints.
func eachMapped(t *testing.T, more string, run func(s *scene, c *pcpHost, m mode)) {
	t.Parallel()
	for _, m := range modes[:3] {
		t.Run(m.filtering, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			c := m.config("")
			c.Extra = served(more).Extra
			s := play(t, l, families[0], c)
			run(s, s.pcp(l.Client), m)
		})
	}
}

// A mapping that the network rule has made for an endpoint is the one that MAP
// gives: with the same external address and port (RFC 6887, section 11).
func TestPCPOfAMapping(t *testing.T) {
	eachMapped(t, "", func(s *scene, c *pcpHost, m mode) {
		own, srv, other := socket(s.Client, to(s.client, 4000)), socket(s.Srv, to(s.srv, 7)), socket(s.Other, to(s.other, 3000))
		at := seenBy(s.t, srv, own)
		ask := pcpAsk{lifetime: 600, nonce: "n", proto: pcpUDP, port: 4000, suggested: to(s.any(), 50999)}
		if a := c.maps(ask); a.external != at {
			s.t.Errorf("mapped to %v, seen as %v", a.external, at)
		}
		exact := ask
		exact.options = pcpPreferFailure
		c.gets(pcpCannotProvide, pcpMap, exact, "another port or none")
		reaches(s.t, other, at, own)
		reaches(s.t, own, addrPort(srv), srv)
		ask.options = append(append([]byte{}, pcpClear...), only(s.srv)...)
		c.maps(ask)
		stranger := socket(s.Other, to(s.other, 3001))
		lost(s.t, stranger, at, own) // whatever the network rule says
		reaches(s.t, socket(s.Srv, to(s.srv, 3001)), at, own)
		ask.options = append(append([]byte{}, pcpClear...), pcpFilter(128, to(s.srv, 3003))...)
		c.maps(ask)
		lost(s.t, socket(s.Srv, to(s.srv, 3004)), at, own) // another port
		reaches(s.t, socket(s.Srv, to(s.srv, 3003)), at, own)
		ask.lifetime, ask.options = 0, nil
		c.gets(pcpSuccess, pcpMap, ask, "given back")
		// What is left is the network rule's.
		if m.filtering == independent {
			reaches(s.t, socket(s.Other, to(s.other, 3002)), at, own)
		} else {
			lost(s.t, socket(s.Other, to(s.other, 3002)), at, own)
		}
		if again := seenBy(s.t, socket(s.Other, to(s.other, 7)), own); again != at {
			s.t.Errorf("seen as %v, before %v", again, at)
		}
	})
}

// The other way round: what MAP has given is where the endpoint leaves from, also
// while a filter has not allowed anybody in.
func TestPCPBeforeAMapping(t *testing.T) {
	for _, approve := range []string{"true", "false"} {
		t.Run("approve "+approve, func(t *testing.T) {
			eachMapped(t, "  approve: "+approve+"\n", func(s *scene, c *pcpHost, m mode) {
				a := c.maps(pcpAsk{lifetime: 600, nonce: "n", proto: pcpUDP, port: 4000, suggested: to(s.any(), 50999)})
				if a.external != to(s.outside, 50999) {
					s.t.Errorf("mapped to %v", a.external)
				}
				own, other := socket(s.Client, to(s.client, 4000)), socket(s.Other, to(s.other, 3000))
				if approve == "true" || m.filtering == independent {
					reaches(s.t, other, a.external, own)
				} else {
					lost(s.t, other, a.external, own)
				}
				for _, srv := range []*lab.Host{s.Srv, s.Other} {
					addr := map[*lab.Host]int{s.Srv: 7, s.Other: 8}[srv]
					ip := s.srv
					if srv == s.Other {
						ip = s.other
					}
					if at := seenBy(s.t, socket(srv, to(ip, addr)), own); at != a.external {
						s.t.Errorf("seen as %v, mapped to %v", at, a.external)
					}
				}
				b := s.open()
				pcp := slices.IndexFunc(b, func(x listedBind) bool { return x.By == "pcp" && x.External == a.external.String() })
				if pcp < 0 || approve == "true" && len(b) != 1 {
					s.t.Errorf("binds %+v", b)
				}
			})
		})
	}
}

// The mapping lives as long as PCP's lifetime, though nothing flows, and goes
// with it.
func TestPCPKeepsAMapping(t *testing.T) {
	life := lab.Patience(6 * time.Second) // longer than a mapping that nothing uses
	eachMapped(t, fmt.Sprintf("  min_lifetime: %d\n", life/time.Second), func(s *scene, c *pcpHost, _ mode) {
		own, other := socket(s.Client, to(s.client, 4000)), socket(s.Other, to(s.other, 3000))
		start := time.Now()
		a := c.maps(pcpAsk{lifetime: 1, nonce: "n", proto: pcpUDP, port: 4000})
		lab.Eventually(s.t, 10*time.Second, "most of the time is over", func() bool { return time.Since(start) > life*2/3 })
		reaches(s.t, other, a.external, own)
		lab.Eventually(s.t, 15*time.Second, "the bind is over", func() bool { return len(s.open()) == 0 || s.open()[0].By != "pcp" })
	})
}
