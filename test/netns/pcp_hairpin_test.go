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
