package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// Very many permissions for one address have one gate, which their packets pass
// as long as any of them lives; the gates of others end by themselves.
func TestGates(t *testing.T) {
	s, table := loadedTable(t)
	gates := func() string { return s.sh("nft list set inet sluice gate4; nft list set inet sluice gate6") }
	for i := range 100 {
		install(t, table, nat.Permission{ID: uint64(i + 1), Direction: nat.Inbound, Proto: flow.UDP, AnySource: true, Timeout: time.Minute,
			Client: netip.MustParseAddrPort("10.0.0.2:5000"), External: netip.MustParseAddrPort(fmt.Sprintf("203.0.113.1:%d", 41000+i))})
	}
	if got := gates(); strings.Count(got, "203.0.113.1 timeout 11m expires") != 1 {
		t.Errorf("gates:\n%s", got)
	}
	if n := table.commits; n != 100 {
		t.Errorf("%d transactions", n)
	}
	for i := range 100 {
		revoke(t, table, nat.Permission{ID: uint64(i + 1), Direction: nat.Inbound, Proto: flow.UDP, AnySource: true, Timeout: time.Minute,
			Client: netip.MustParseAddrPort("10.0.0.2:5000"), External: netip.MustParseAddrPort(fmt.Sprintf("203.0.113.1:%d", 41000+i))})
	}
	// One without an end needs a gate without one.
	lasting := nat.Permission{ID: 200, Direction: nat.Inbound, Proto: flow.UDP, AnySource: true,
		Client: netip.MustParseAddrPort("10.0.0.2:5000"), External: netip.MustParseAddrPort("203.0.113.1:41000")}
	install(t, table, lasting)
	six := nat.Permission{ID: 201, Direction: nat.Outbound, Proto: flow.TCP, Timeout: time.Minute,
		Client: netip.MustParseAddrPort("[fd00:a::2]:0"), Target: netip.MustParseAddrPort("[2001:db8:b::10]:20")}
	install(t, table, six)
	check := func(when string) {
		t.Helper()
		if got := gates(); strings.Contains(got, "203.0.113.1 timeout") || !strings.Contains(got, "203.0.113.1") || !strings.Contains(got, "2001:db8:b::10 timeout 11m") {
			t.Errorf("%s:\n%s", when, got)
		}
	}
	check("installed")
	o := testOptions(t)
	o.Native = false
	mustLoad(t, table, mustBuild(t, twoZones(), o))
	check("after a reload")
	s.sh("nft delete table inet sluice")
	mustLoad(t, table, mustBuild(t, twoZones(), o))
	if got := gates(); !strings.Contains(got, "203.0.113.1") || strings.Contains(got, "203.0.113.1 timeout") || !strings.Contains(got, "2001:db8:b::10 timeout") {
		t.Errorf("after somebody deleted the table:\n%s", got)
	}
	// A change that the kernel refuses opens nothing.
	refused := lasting
	refused.ID, refused.External = 202, netip.MustParseAddrPort("203.0.113.9:41000")
	refused.Client = netip.MustParseAddrPort("10.0.0.2:0")
	if err := table.Install(context.Background(), refused); err == nil {
		t.Error("an impossible permission was installed")
	}
	if got := gates(); strings.Contains(got, "203.0.113.9") {
		t.Errorf("gates after a refusal:\n%s", got)
	}
}

func TestGatesAreForgotten(t *testing.T) {
	g, now := newGates(), time.Now()
	p := nat.Permission{ID: 1, Direction: nat.Outbound, Proto: flow.TCP, Timeout: time.Minute, Client: netip.MustParseAddrPort("10.0.0.2:0")}
	for i := range 1000 {
		p.Target = netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)}), 20)
		g.open(p, now)
		g.opened(now)
		now = now.Add(time.Minute)
	}
	if n := len(g.until); n > 30 {
		t.Errorf("%d gates are known of a thousand that have ended", n)
	}
}

// Clients come and go: their gates go when there are many, those that are needed
// stay.
func TestGatesWithoutEnd(t *testing.T) {
	s, table := loadedTable(t)
	bind := func(id uint64, inside string) nat.Permission {
		at := netip.MustParseAddrPort(inside)
		return nat.Permission{ID: id, Direction: nat.Inbound, Proto: flow.UDP, AnySource: true, Client: at, External: at}
	}
	stays := bind(1, "[fd00:a::ffff:1]:5000")
	install(t, table, stays)
	source := nat.Permission{ID: 2, Direction: nat.Outbound, Proto: flow.TCP, Multiple: true,
		Client: netip.MustParseAddrPort("10.0.0.2:0"), Target: netip.MustParseAddrPort("203.0.113.10:20")}
	install(t, table, source)
	var group errgroup.Group
	group.SetLimit(256)
	for i := range 3 * minGates {
		group.Go(func() error {
			p := bind(uint64(10+i), fmt.Sprintf("[fd00:a::%x]:5000", 10+i))
			return errors.Join(table.Install(context.Background(), p), table.Remove(context.Background(), p))
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(s.sh("nft list set inet sluice gate6"), "fd00:a::"); n > minGates+512 {
		t.Errorf("%d gates are left of clients that have gone", n)
	}
	for set, want := range map[string]string{"gate6": "fd00:a::ffff:1", "gate4": "203.0.113.10"} {
		if got := s.sh("nft list set inet sluice " + set); !strings.Contains(got, want) {
			t.Errorf("%s is not in %s", want, set)
		}
	}
}
