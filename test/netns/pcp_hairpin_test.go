package netns_test

import (
	"testing"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// Another host inside reaches a mapped port by its external address (RFC 4787,
// REQ-9), and both ends are who the other one takes them for.
func TestPCPHairpin(t *testing.T) {
	t.Parallel()
	for name, rule := range map[string]string{"plain": "", "mapped": cone.config("").NetworkRules} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Client.EchoTCP(4000)
			l.Client.EchoUDP(4000)
			c := served("")
			c.NetworkRules = rule
			c.Rules = "  - {name: all, action: allow, from: lan, to: wan, protocols: any}\n"
			s := play(t, l, families[0], c)
			one := s.pcp(l.Client)
			tcp := one.maps(pcpAsk{lifetime: 600, nonce: "n", proto: pcpTCP, port: 4000})
			udp := one.maps(pcpAsk{lifetime: 600, nonce: "n", proto: pcpUDP, port: 4000})
			s.dial(l.Client2, tcp.external)
			s.talk(l.Client2, udp.external)
			s.dial(l.Client, tcp.external) // itself, too
		})
	}
}

// Whom FILTER keeps out does not come in from the inside either, whatever the
// network rule says of strangers; who it lets in does.
func TestPCPFilterHairpin(t *testing.T) {
	t.Parallel()
	for _, m := range modes[:3] {
		t.Run(m.filtering, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			c := served("")
			c.NetworkRules = m.config("").NetworkRules
			c.Rules = "  - {name: all, action: allow, from: lan, to: [wan, gateway], protocols: any}\n"
			s := play(t, l, families[0], c)
			own, inside := socket(l.Client, to(s.client, 4000)), socket(l.Client2, to(lab.Second4, 4000))
			ask := pcpAsk{lifetime: 600, nonce: "n", proto: pcpUDP, port: 4000, options: only(s.srv)}
			at := s.pcp(l.Client).maps(ask).external
			seen := seenBy(t, socket(l.Other, to(s.other, 7)), inside)
			lost(t, inside, at, own)
			reaches(t, socket(l.Srv, to(s.srv, 3000)), at, own)
			if m.filtering == independent {
				reaches(t, own, seen, inside)
				reaches(t, inside, at, own) // an answer
			}
		})
	}
}
