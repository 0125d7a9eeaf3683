package netns_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// What the reference client says of the three behaviours.
var inWords = map[string]string{
	independent: "endpoint independent", byAddress: "address dependent", byAddressPort: "address and port dependent",
}

// The STUN server and both clients find every behaviour where it is: plain
// rulesets are each of them for one client.
func TestHarnessSTUN(t *testing.T) {
	t.Parallel()
	const everybody, sameAddress = `iifname "wan0" meta l4proto udp dnat to 10.0.0.2`, `iifname "wan0" meta l4proto udp ip saddr . udp dport @peers dnat to 10.0.0.2`
	for _, c := range []struct {
		mode
		out, in string
	}{
		{mode{independent, byAddressPort}, "masquerade", ""},
		{mode{byAddressPort, byAddressPort}, "meta l4proto udp masquerade to :20000-29999 random", ""},
		{mode{independent, independent}, "masquerade", everybody},
		{mode{independent, byAddress}, "masquerade", sameAddress},
	} {
		t.Run(c.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.GW.Run("nft", "-f", l.File("cone.nft", fmt.Sprintf(`
				table ip cone {
					set peers {
						type ipv4_addr . inet_service
						flags dynamic,timeout
						timeout 1m
					}
					chain pre {
						type nat hook prerouting priority dstnat
						%s
					}
					chain forward {
						type filter hook forward priority 0
						oifname "wan0" meta l4proto udp update @peers { ip daddr . udp sport }
					}
					chain post {
						type nat hook postrouting priority srcnat
						oifname "wan0" %s
					}
				}
			`, c.in, c.out)))
			discovers(t, l, c.mode)
		})
	}
}

// discovers holds what the reference client and the test's own find against a
// mode.
func discovers(t *testing.T, l *lab.Lab, want mode) {
	t.Helper()
	s := l.STUN4()
	mapping, filtering, said := l.Client.NATBehaviour(s.Primary)
	if mapping != inWords[want.mapping] || filtering != inWords[want.filtering] {
		t.Errorf("the reference client says %q and %q, want %s:\n%s", mapping, filtering, want, said)
	}
	seen := l.Client.Discover(netip.AddrPortFrom(lab.Client4, 0)).Mapping(s)
	if (want.mapping == independent) != all(seen[:]) {
		t.Errorf("the server saw %v, want %s", seen, want)
	}
	same, otherPort, otherAddr := l.Client.Discover(netip.AddrPortFrom(lab.Client4, 0)).Filtering(s)
	if !same || otherPort != (want.filtering != byAddressPort) || otherAddr != (want.filtering == independent) {
		t.Errorf("the answer came from the same place: %v, another port: %v, another address and port: %v; want %s", same, otherPort, otherAddr, want)
	}
}
