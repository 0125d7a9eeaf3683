package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/sluicegw/sluice/flow"
)

// Of several timers for one port that of the first protocol counts, whatever
// stands before it without one.
func TestTimers(t *testing.T) {
	list := append([]Protocol{
		{Name: "plain", Matches: udp(53)},
		{Name: "games", Matches: append(ports(flow.UDP, 3000, 3010), tcp(1)...), Timeout: 600},
		{Name: "one", Matches: append(udp(3005), udp(3011)...), Timeout: 7},
		{Name: "wide", Matches: ports(flow.UDP, 2990, 65535), Timeout: 30},
	}, Builtin()...)
	p, err := New(nil, nil, list, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := "[{{53 53} 10} {{2990 2999} 30} {{3000 3010} 600} {{3011 3011} 7} {{3012 65535} 30}]"
	if got := fmt.Sprint(p.Timers()); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for port := range 65536 {
		want := uint32(0)
		for _, x := range p.Timers() {
			if int(x.Ports.Lo) <= port && port <= int(x.Ports.Hi) {
				want = x.Seconds
			}
		}
		to := flow.Tuple{Proto: flow.UDP, Dst: netip.AddrPortFrom(netip.IPv6Loopback(), uint16(port))}
		if got := p.Timer(to); got != want {
			t.Fatalf("port %d: %d s, want %d s", port, got, want)
		}
		if to.Proto = flow.TCP; p.Timer(to) != 0 {
			t.Fatalf("TCP port %d has a timer", port)
		}
	}
	if _, err := New(nil, nil, []Protocol{{Name: "x", Matches: tcp(1), Timeout: 1}}, nil); err == nil || !strings.Contains(err.Error(), "timeout") {
		t.Errorf("a timeout without UDP: %v", err)
	}
}
