package netns_test

import (
	"strings"
	"testing"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// RFC 6888, REQ-12: what the log says of ports names no destination, where flows
// are kept out of it.
func TestNCGN12NoDestinations(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	c := cone.config("")
	c.Rules = strings.Replace(c.Rules, "protocols: any", "protocols: any, log: false", 1)
	c.Extra = "ports: {block: 64, quota: 128}\n"
	g := l.Gateway(c)
	outside := outsiders(l)
	for i := range 20 {
		seenBy(t, outside[i%len(outside)], socket(l.Client, to(lab.Client4, 5000+i)))
	}
	l.GW.Run("conntrack", "-F") // the flows end
	if blocks := g.Records("port block allocated"); len(blocks) != 1 || blocks[0].Text("client") != lab.Client4.String() {
		t.Errorf("records of blocks: %v, want one of the client", blocks)
	}
	g.Stop()
	for _, at := range []string{lab.Srv4.String(), lab.Other4.String(), ":9000"} {
		if strings.Contains(g.Output.String(), at) {
			t.Errorf("the log names %s:\n%s", at, g.Output)
		}
	}
}
