package kernelpath

import (
	"strings"
	"testing"
)

// A device that is not there, and a kernel without flowtables, are no reasons
// to fail. What is offloaded is tested on the kernel that can: see
// flowtable_stock_test.go.
func TestFlowtableIsNoReasonToFail(t *testing.T) {
	s := newSpace(t)
	table := openTable(t, s)
	o := testOptions(t)
	o.Native, o.Flowtable = false, []string{"lo", "vanished0"}
	for range 2 {
		mustLoad(t, table, mustBuild(t, twoZones(), o))
		list := s.sh("nft list table inet sluice")
		offloads := strings.Contains(list, "flow add @fast")
		if offloads != strings.Contains(list, "devices = { lo }") || strings.Contains(list, "vanished0") {
			t.Errorf("the table is\n%s", list)
		}
		if tables := s.sh("nft list tables"); tables != "table inet sluice\n" {
			t.Errorf("tables that stay:\n%s", tables)
		}
	}
	if err := table.Unoffload(t.Context()); err != nil {
		t.Error(err)
	}
	if carry := s.sh("nft list chain inet sluice carry"); !strings.Contains(carry, "accept") {
		t.Errorf("the carry chain is\n%s", carry)
	}
}

func TestUnoffloadWithoutTable(t *testing.T) {
	if err := openTable(t, newSpace(t)).Unoffload(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestFlowtableText(t *testing.T) {
	o := testOptions(t)
	o.Flowtable = []string{"lan0", "wan0"}
	r := mustBuild(t, twoZones(), o)
	for _, want := range []string{
		"flowtable fast {\n\t\thook ingress priority 0\n\t\tdevices = { \"lan0\", \"wan0\" }\n\t\tcounter\n\t}",
		"chain carry {\n\t\tmeta l4proto { tcp, udp } flow add @fast\n\t\taccept\n\t}",
	} {
		if !strings.Contains(r.String(), want) {
			t.Errorf("no %q in\n%s", want, r)
		}
	}
	without := r.offloadingOn(nil).String()
	if strings.Contains(without, "flow") || !strings.Contains(r.String(), "flow add") {
		t.Errorf("without devices:\n%s", without)
	}
}
