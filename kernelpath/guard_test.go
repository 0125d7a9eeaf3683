package kernelpath

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// guarded is a table that is loaded, with what Guard says of it.
func guarded(t *testing.T) (s space, table *Table, load func(), changed func() bool) {
	s = newSpace(t)
	table = openTable(t, s)
	o := testOptions(t)
	o.Native = false
	r := mustBuild(t, twoZones(), o)
	load = func() { mustLoad(t, table, r) }
	load()
	changed = func() (so bool) {
		t.Helper()
		err := table.do(t.Context(), func() (err error) { so, err = table.changed(); return err })
		if err != nil {
			t.Fatal(err)
		}
		return so
	}
	return s, table, load, changed
}

// What somebody else does to the table is seen, also where a change of ours comes
// upon it, and loading again undoes it.
func TestGuardSees(t *testing.T) {
	for _, does := range []string{
		"delete table inet sluice", "flush chain inet sluice forward", "add chain inet sluice mine",
		"add chain inet sluice forward { policy accept; }", "add table inet sluice { flags dormant; }",
	} {
		for _, takeOver := range []bool{false, true} {
			s, table, load, changed := guarded(t)
			before := s.sh("nft list chain inet sluice forward")
			if changed() {
				t.Fatal("a table that was loaded passes for changed")
			}
			s.sh("nft '" + does + "'")
			if takeOver {
				_ = table.TakeOver() // fails where there is no table
			}
			if !changed() {
				t.Errorf("%s is not seen; a takeover: %t", does, takeOver)
			}
			load()
			if changed() {
				t.Errorf("%s: loaded again, the table passes for changed", does)
			}
			if after := s.sh("nft list chain inet sluice forward"); after != before {
				t.Errorf("%s: the chain was\n%s\nand is\n%s", does, before, after)
			}
			if strings.Contains(s.sh("nft list table inet sluice"), "dormant") {
				t.Errorf("%s: it is dormant", does)
			}
		}
	}
}

// While the table is gone, what is installed fails, all of it at once, and what
// is removed stays away when the table is there again.
func TestGuardGap(t *testing.T) {
	s, table, load, _ := guarded(t)
	permission := func(i int) nat.Permission {
		return nat.Permission{
			ID: uint64(i + 1), Direction: nat.Inbound, Proto: flow.UDP, Multiple: true, AnySource: true,
			Client: netip.MustParseAddrPort("10.0.0.2:5000"), External: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), uint16(6000+i)),
		}
	}
	const n = 1000
	install(t, table, permission(n))
	install(t, table, permission(n+1))
	s.sh("nft delete table inet sluice")
	answers := make(chan error, n)
	for i := range n {
		table.InstallLater(permission(i), func(err error) { answers <- err })
	}
	for range n {
		if err := <-answers; !errors.Is(err, unix.ENOENT) {
			t.Fatalf("an installation without a table: %v", err)
		}
	}
	if err := table.Remove(t.Context(), permission(n)); err != nil {
		t.Fatal(err)
	}
	load()
	held, err := table.Permissions()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range held {
		if p.To != permission(n+1).External {
			t.Errorf("%+v is there again", p)
		}
	}
	if len(held) != 2 { // who may come in, and where that goes
		t.Errorf("%d elements are there again: %+v", len(held), held)
	}
}
