package kernelpath

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// everyKind has a permission of each kind, in both families.
func everyKind() []nat.Permission {
	var all []nat.Permission
	for _, e := range bothFamilies {
		host, sourced, inbound := netip.PrefixFrom(e.server, e.server.BitLen()), e.redirect(0, flow.TCP), e.published(0, flow.UDP)
		sourced.Source = e.at(e.extra, 40000)
		portless := nat.Permission{Direction: nat.Outbound, Proto: flow.TCP, Client: e.at(e.client, 0), Target: e.at(e.server, 2001), Source: e.at(e.extra, 0)}
		ranges, oneWay := inbound, inbound
		ranges.External, ranges.AnySource, ranges.Sources = e.at(e.extra, 8081), false, []netip.Prefix{e.any, netip.PrefixFrom(e.client, e.client.BitLen())}
		oneWay.External, oneWay.OneWay = e.at(e.extra, 8082), true
		local := nat.Permission{Direction: nat.Local, Proto: flow.TCP, External: e.at(e.extra, 4000), Multiple: true, Sources: []netip.Prefix{host}}
		asked := nat.Permission{Direction: nat.Inbound, Proto: flow.TCP, Client: e.at(e.client, 81), External: e.at(e.client, 81),
			AnySource: true, Multiple: true, ToUser: true}
		all = append(all, sourced, portless, inbound, ranges, oneWay, local, asked)
	}
	for i := range all {
		all[i].ID, all[i].Timeout = uint64(i+1), time.Hour
	}
	return all
}

// A table of an earlier run is taken over with what it holds, which is listed,
// may be installed again, and goes with FlushPermissions.
func TestAdoptEveryKind(t *testing.T) {
	s, first := loadedTable(t)
	for _, p := range everyKind() {
		install(t, first, p)
	}
	before := listed(t, first)
	for _, want := range []string{
		"source tcp 10.0.0.2 > 10.0.0.1:3000 = 203.0.113.2:40000", "source tcp fd00:a::2 > [2001:db8:b::10]:2001 = [2001:db8:b::2]:0",
		"bind tcp invalid IP > [fd00:a::1]:3000 = [2001:db8:b::10]:2000", "refuse tcp invalid IP > 10.0.0.1:3000",
		"listed udp 203.0.113.0/24 > 203.0.113.2:8081", "listed udp 2001:db8:b::/64 > [2001:db8:b::2]:8081", "ranges udp invalid IP > 203.0.113.2:8081",
		"listed one way udp invalid IP > 203.0.113.2:8082", "many local tcp 2001:db8:b::10 > [2001:db8:b::2]:4000", "ask tcp invalid IP > 10.0.0.2:81",
	} {
		if !slices.Contains(before, want) {
			t.Errorf("%q is not among\n%s", want, strings.Join(before, "\n"))
		}
	}
	chains := s.sh("nft -a list table inet sluice | grep 'chain arrive'")

	second := openTable(t, s)
	o := testOptions(t)
	o.Native = false
	mustLoad(t, second, mustBuild(t, twoZones(), o))
	if after := listed(t, second); !slices.Equal(after, before) {
		t.Errorf("after the takeover the kernel holds\n%s\nit held\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
	}
	if after := s.sh("nft -a list table inet sluice | grep 'chain arrive'"); after != chains {
		t.Errorf("%s became %s", chains, after)
	}
	for range 2 {
		for _, p := range everyKind() {
			install(t, second, p)
		}
		if after := listed(t, second); !slices.Equal(after, before) {
			t.Errorf("after they were installed again the kernel holds\n%s", strings.Join(after, "\n"))
		}
	}
	if err := second.FlushPermissions(); err != nil {
		t.Fatal(err)
	}
	if after := listed(t, second); len(after) != 0 {
		t.Errorf("after the flush: %q", after)
	}
	for _, p := range everyKind() {
		install(t, second, p)
		if err := second.Remove(context.Background(), p); err != nil {
			t.Error(err)
		}
	}
	for _, x := range listed(t, second) {
		if !strings.HasPrefix(x, "refuse ") {
			t.Errorf("after all were removed: %s", x)
		}
	}
	s.in(func() error {
		_, err := Down(context.Background(), t.TempDir(), Steering{})
		return err
	})
	if list := s.sh("nft list tables"); list != "" {
		t.Errorf("after going down: %s", list)
	}
}

// A table whose sets are too small is replaced as a whole.
func TestAdoptSmallSets(t *testing.T) {
	s := newSpace(t)
	o := testOptions(t)
	o.Native = false
	s.nft(strings.ReplaceAll(withoutQueues(mustBuild(t, twoZones(), o)).String(), "size 1048576", "size 65535"))
	s.sh("nft add element inet sluice once4 { 10.0.0.2 . 203.0.113.10 . tcp . 2000 }")
	table := openTable(t, s)
	mustLoad(t, table, mustBuild(t, twoZones(), o))
	if list := s.sh("nft list set inet sluice once4"); !strings.Contains(list, "size 1048576") || strings.Contains(list, "elements") {
		t.Errorf("once4 is\n%s", list)
	}
}

// Ranges of two permissions for one address that overlap, and are not the same,
// cannot both be in a table; the one that was there stays as it is.
func TestCommitRangesThatOverlap(t *testing.T) {
	_, table := loadedTable(t)
	e := bothFamilies[1]
	wide := nat.Permission{ID: 1, Direction: nat.Inbound, Proto: flow.TCP, Client: e.at(e.client, 80), External: e.at(e.client, 80),
		Sources: []netip.Prefix{netip.MustParsePrefix("2001:db8::/32")}, Multiple: true}
	same, narrow := wide, wide
	same.ID, narrow.ID = 2, 3
	narrow.Sources = []netip.Prefix{netip.MustParsePrefix("2001:db8:1::/48"), netip.MustParsePrefix("2001:db9::/64")}
	first := []string{"many tcp 2001:db8::/32 > [fd00:a::2]:80", "ranges tcp invalid IP > [fd00:a::2]:80"}
	install(t, table, wide)
	install(t, table, same)
	for range 2 {
		if err := table.Install(context.Background(), narrow); !errors.Is(err, nat.ErrConflict) {
			t.Errorf("a range inside another one: %v", err)
		}
		revoke(t, table, narrow)
		if got := listed(t, table); !slices.Equal(got, first) {
			t.Errorf("the first ones: %q", got)
		}
	}
	revoke(t, table, wide)
	if got := listed(t, table); !slices.Equal(got, first) {
		t.Errorf("one of two with the same range is left: %q", got)
	}
	// A permission may replace its own ranges, and others use what is free.
	other := narrow
	narrow.ID = same.ID
	install(t, table, narrow)
	revoke(t, table, narrow)
	install(t, table, other)
	if got := listed(t, table); len(got) != 3 {
		t.Errorf("the next one: %q", got)
	}
	revoke(t, table, other)
	if got := listed(t, table); len(got) != 0 {
		t.Errorf("nobody is left: %q", got)
	}
}
