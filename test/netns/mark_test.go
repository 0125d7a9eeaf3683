package netns_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// The mark of a verdict does not outlive its packet's way to the gateway itself:
// what a tunnel of the machine unpacks of it would have it still, and pass without
// a judgement of its own.
func TestMarkEndsAtTheGateway(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	c := cone.config("")
	c.Rules = "  - {name: all, action: allow, from: lan, to: [wan, gateway], protocols: any}\n"
	c.Extra = "ports: {leases: 61000-61009, well_known: off}\n"
	g := l.Gateway(c)
	l.GW.Run("nft", "table inet seen { chain c { type filter hook input priority 10; policy accept; udp dport 61000 meta mark != 0 counter comment \"marked\"; udp dport 61000 counter comment \"all\"; }; }")
	sends(t, socket(l.Client, clientAt), netip.AddrPortFrom(lab.Inside4, 61000))
	seen := ""
	lab.Eventually(t, lab.Patience(5*time.Second), "the packet comes to the gateway", func() bool {
		seen = l.GW.Run("nft", "list", "table", "inet", "seen")
		return strings.Contains(seen, `packets 1 bytes`)
	})
	if n := counter(g, "table.queued"); n == 0 {
		t.Error("it was not queued")
	}
	if strings.Count(seen, "packets 0 bytes 0") != 1 {
		t.Errorf("it has a mark:\n%s", seen)
	}
}
