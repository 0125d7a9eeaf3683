package pcp

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

// portOf is a FILTER for one port of a host.
func portOf(a netip.AddrPort) []byte {
	b := filterOf(a.Addr())
	binary.BigEndian.PutUint16(b[6:], a.Port())
	return b
}

// TestPortsOfFilters: what a FILTER says of a port holds from the bind's first
// moment, and as long as the FILTER; nothing of it is left behind.
func TestPortsOfFilters(t *testing.T) {
	play(t, usual(), func(s *scene) {
		one := s.client("10.0.0.2")
		for _, proto := range []flow.Proto{flow.TCP, flow.UDP} {
			filtered(one, proto, "with the first request")
			one.must(success, wants{proto, 5000, 600, 1, nil}, "everybody may come")
			filtered(one, proto, "later")
		}
		begun, over := 0, 0
		for _, e := range s.g.Journal() {
			switch {
			case e.What == filtertest.Factory:
				begun++
			case e.What == filtertest.Cancelled && strings.HasPrefix(e.Text, "factory"):
				over++
			}
		}
		if begun != 8 || over != begun || len(s.g.Open()) != 0 {
			t.Errorf("%d gates, %d over; open %v", begun, over, s.g.Open())
		}
	})
}

// filtered has one mapping go through several FILTERs.
func filtered(one *client, proto flow.Proto, way string) {
	t := one.s.t
	t.Helper()
	ask := wants{proto, 5000, 600, 1, nil}
	for _, step := range []struct {
		when    string
		options []byte
		want    [3]bool
	}{
		{"one port of one host", portOf(netip.MustParseAddrPort("203.0.113.10:5060")), [3]bool{true, false, false}},
		{"another host, too", filterOf(netip.MustParseAddr("203.0.113.11")), [3]bool{true, false, true}},
		{"another port instead", append(filterOf(netip.Addr{}), portOf(netip.MustParseAddrPort("203.0.113.10:5061"))...), [3]bool{false, true, false}},
		{"no FILTER", filterOf(netip.Addr{}), [3]bool{true, true, true}},
		{"one again", portOf(netip.MustParseAddrPort("203.0.113.10:5060")), [3]bool{true, false, false}},
		{"given back", nil, [3]bool{}},
	} {
		if ask.options = step.options; step.options == nil {
			ask.lifetime = 0
		}
		at := one.must(success, ask, step.when)
		for i, a := range []string{"203.0.113.10:5060", "203.0.113.10:5061", "203.0.113.11:5060"} {
			if _, err := one.s.g.Inbound(proto, netip.MustParseAddrPort(a), at); (err == nil) != step.want[i] {
				t.Errorf("%v, %s, %s: %s: %v, want %v", proto, way, step.when, a, err, step.want[i])
			}
		}
	}
}
