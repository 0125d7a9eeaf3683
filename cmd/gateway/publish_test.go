package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// publishing is a policy that publishes ports of 10.0.0.5.
func publishing(t *testing.T, ports ...policy.PortRange) *policy.Policy {
	t.Helper()
	d := policy.Protocol{Name: "p"}
	for _, p := range ports {
		d.Matches = append(d.Matches, policy.Match{Proto: flow.TCP, Ports: p})
	}
	p, err := policy.New([]policy.Network{{Name: "wan", Interfaces: []string{"wan0"}}}, nil, []policy.Protocol{d}, []policy.Rule{{
		Name: "r", Action: policy.Publish, From: []string{"wan"}, Protocols: []string{"p"},
		Publication: &policy.Publication{Servers: []netip.Addr{netip.MustParseAddr("10.0.0.5")}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestKernelPortsAroundPublished(t *testing.T) {
	all := nat.Range{Lo: 10000, Hi: 20000}
	for _, x := range []struct {
		published []policy.PortRange
		want      nat.Range
	}{
		{[]policy.PortRange{{Lo: 80, Hi: 80}}, all},
		{[]policy.PortRange{{Lo: 12000, Hi: 12000}}, nat.Range{Lo: 12001, Hi: 20000}},
		{[]policy.PortRange{{Lo: 19000, Hi: 30000}, {Lo: 9000, Hi: 10001}}, nat.Range{Lo: 10002, Hi: 18999}},
		{[]policy.PortRange{{Lo: 12000, Hi: 12999}, {Lo: 18000, Hi: 18000}}, nat.Range{Lo: 13000, Hi: 17999}},
		{[]policy.PortRange{{Lo: 1, Hi: 65535}}, nat.Range{}},
	} {
		got, err := kernelPorts(all, publishing(t, x.published...))
		if got != x.want || (err != nil) != (x.want == nat.Range{}) {
			t.Errorf("%v: %v, %v; want %v", x.published, got, err, x.want)
		}
	}
}

func TestListenersOfThisMachine(t *testing.T) {
	proc := t.TempDir()
	for name, text := range map[string]string{
		"tcp":  "  sl  local_address rem_address   st\n   0: 0100000A:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1\n   1: 0100000A:0017 0200000A:1000 01 00000000:00000000 00:00000000 00000000     0        0 12 1\n",
		"tcp6": "  sl\n   0: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 13 1\n   1: 00000000000000000000000000000000:0051 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 15 1\n",
		"udp":  "  sl\n  10: 00000000:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 14 2\n  11: 00000000:0036 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 15 2\n",
	} {
		path := filepath.Join(proc, "self/net", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(proc, "self/fd"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("socket:[15]", filepath.Join(proc, "self/fd/3")); err != nil {
		t.Fatal(err)
	}
	got, err := listeners(proc)
	want := []nat.Endpoint{{Proto: flow.TCP, Addr: netip.MustParseAddrPort("10.0.0.1:22")},
		{Proto: flow.TCP, Addr: netip.MustParseAddrPort("[::]:80")}, {Proto: flow.UDP, Addr: netip.MustParseAddrPort("0.0.0.0:53")}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
}

// A filter that cannot serve a rule that publishes is an error in the rule's
// line; one that can is none.
func TestFilterCannotServePublishing(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f.yaml")
	for filter, want := range map[string]string{"ftp": "", "tftp": ":3: rule \"r\": filters: tftp cannot serve", "sip": ":3: rule \"r\": filters: sip cannot serve"} {
		text := "networks: {out: {interfaces: wan0}}\nrules:\n- {name: r, action: publish, from: out, protocols: " + filter + ", server: 10.0.0.5, filters: {" + filter + ": {}}}\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := loadConfig(file, builtin())
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", filter, err, want)
		}
	}
}
