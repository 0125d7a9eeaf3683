package kernelpath

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/nftables"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

var update = flag.Bool("update", false, "write the golden files anew")

func defaultMarks(t testing.TB) flow.Marks {
	t.Helper()
	m, err := flow.NewMarks(flow.DefaultMask)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func testOptions(t testing.TB) Options {
	return Options{
		Marks: defaultMarks(t), Native: true,
		FirstClosed: 100, NumClosed: 4, FirstOpen: 110, NumOpen: 1,
		TProxyPort: 8000, Zone: 77, LogGroup: 5, ReversePath: ReversePathStrict,
		Ranges: nat.Ranges{Kernel: nat.Range{Lo: 20000, Hi: 29999}, Leases: []nat.Range{{Lo: 40000, Hi: 49999}}},
	}
}

func box(src, dst string, lo, hi flow.Proto, p0, p1 uint16, c policy.Class) policy.Box {
	return policy.Box{Src: netip.MustParsePrefix(src), Dst: netip.MustParsePrefix(dst),
		Protos: [2]flow.Proto{lo, hi}, Ports: policy.PortRange{Lo: p0, Hi: p1}, Class: c}
}

func ports4(boxes ...policy.Box) policy.Stage {
	return policy.Stage{Kind: policy.KindPorts, Boxes: boxes}
}

// twoZones is a network behind NAT: lan0 inside, wan0 outside.
func twoZones() Input {
	any4, any6 := "0.0.0.0/0", "::/0"
	return Input{
		Networks: []policy.Network{
			{Name: "lan", Interfaces: []string{"lan0"}, Prefixes: []netip.Prefix{
				netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("10.0.0.128/25"), netip.MustParsePrefix("fd00:a::/64")}},
			{Name: "internet", Interfaces: []string{"wan0"}},
		},
		NetworkRules: []policy.NetworkRule{{Name: "out", From: "lan", To: "internet", Relation: policy.NAT}},
		Timers: []policy.Timer{
			{Ports: policy.PortRange{Lo: 53, Hi: 53}, Seconds: 10},
			{Ports: policy.PortRange{Lo: 900, Hi: 1100}, Seconds: 600},
			{Ports: policy.PortRange{Lo: 65000, Hi: 65535}, Seconds: 10},
		},
		Compiled: policy.Compiled{
			Zones: []policy.Zone{{}, {ID: 1, Interfaces: []string{"lan0"}}, {ID: 2, Interfaces: []string{"wan0"}}},
			Forward: []policy.Table{{In: 1, Out: 2, Stages: []policy.Stage{
				ports4(box("10.0.0.0/24", "203.0.113.10/32", flow.TCP, flow.TCP, 666, 666, policy.ClassReject),
					box("10.0.0.0/24", any4, flow.TCP, flow.TCP, 21, 21, policy.ClassAsk)),
				ports4(box("10.0.0.0/24", any4, flow.TCP, flow.UDP, 53, 1000, policy.ClassKernel),
					box("10.0.0.0/24", any4, flow.TCP, flow.TCP, 5060, 5061, policy.ClassAskOpen)),
				{Kind: policy.KindICMP, Boxes: []policy.Box{box("10.0.0.0/24", any4, 0, 0, 8, 8, policy.ClassKernel)}},
				{Kind: policy.KindOther, Boxes: []policy.Box{box("10.0.0.0/24", any4, 47, 50, 0, 65535, policy.ClassKernel)}},
				{Is6: true, Kind: policy.KindPorts, Boxes: []policy.Box{box("fd00:a::/64", any6, flow.TCP, flow.UDP, 0, 65535, policy.ClassKernel)}},
				{Is6: true, Kind: policy.KindICMP, Boxes: []policy.Box{box("fd00:a::/64", any6, 0, 0, 128, 128, policy.ClassKernel)}},
			}}},
			Input: []policy.Table{{In: 1, Stages: []policy.Stage{
				ports4(box(any4, any4, flow.TCP, flow.TCP, 22, 22, policy.ClassKernel), box(any4, any4, flow.UDP, flow.UDP, 53, 53, policy.ClassReject)),
			}}},
		},
	}
}

// routedZones are three networks without translation, one of them without
// interfaces of its own.
func routedZones() Input {
	any4 := "0.0.0.0/0"
	in := Input{
		Networks: []policy.Network{
			{Name: "lan", Interfaces: []string{"lan0", "lan1"}},
			{Name: "dmz", Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("255.255.255.0/24")}},
			{Name: "internet", Interfaces: []string{"wan0"}},
		},
		NetworkRules: []policy.NetworkRule{
			{Name: "servers", From: "lan", To: "dmz", Relation: policy.Route},
			{Name: "hidden", From: "lan", To: "internet", Relation: policy.NAT, Address: netip.MustParseAddr("203.0.113.1")},
			{Name: "rest", From: "dmz", To: policy.Any, Relation: policy.Route},
		},
		Timers: []policy.Timer{{Ports: policy.PortRange{Lo: 53, Hi: 53}, Seconds: 10}},
		Compiled: policy.Compiled{
			Zones: []policy.Zone{{}, {ID: 1, Interfaces: []string{"lan0", "lan1"}}, {ID: 2, Interfaces: []string{"wan0"}}},
		},
	}
	for _, pair := range [][2]int{{0, 0}, {0, 2}, {1, 0}, {1, 2}} {
		in.Compiled.Forward = append(in.Compiled.Forward, policy.Table{In: pair[0], Out: pair[1], Stages: []policy.Stage{
			ports4(box(any4, "192.0.2.0/24", flow.TCP, flow.TCP, 80, 80, policy.ClassAsk)),
			ports4(box(any4, any4, flow.TCP, flow.UDP, 0, 65535, policy.ClassKernel)),
		}})
	}
	return in
}

// mappedZones has two hidden networks whose endpoints are mapped, each in its
// own way.
func mappedZones() Input {
	any4 := "0.0.0.0/0"
	in := twoZones()
	in.Networks = append(in.Networks, policy.Network{Name: "guests", Interfaces: []string{"lan1"}})
	in.NetworkRules = []policy.NetworkRule{
		{Name: "out", From: "lan", To: "internet", Relation: policy.NAT, Mapping: policy.MapEndpointIndependent, Filtering: policy.FilterEndpointIndependent},
		{Name: "guests", From: "guests", To: "internet", Relation: policy.NAT, Mapping: policy.MapEndpointIndependent, Filtering: policy.FilterAddress, ClampMSS: true},
	}
	in.Compiled.Zones = append(in.Compiled.Zones, policy.Zone{ID: 3, Interfaces: []string{"lan1"}})
	in.Compiled.Forward[0].Stages = []policy.Stage{
		ports4(box("10.0.0.0/24", any4, flow.TCP, flow.TCP, 21, 21, policy.ClassAsk), box("10.0.0.0/24", any4, flow.TCP, flow.UDP, 53, 80, policy.ClassMap)),
		{Kind: policy.KindICMP, Boxes: []policy.Box{box("10.0.0.0/24", any4, 0, 0, 8, 8, policy.ClassMap)}},
	}
	guests := box(any4, any4, flow.UDP, flow.UDP, 0, 65535, policy.ClassMapOpen)
	guests.NetworkRule = 1
	in.Compiled.Forward = append(in.Compiled.Forward, policy.Table{In: 3, Out: 2, Stages: []policy.Stage{ports4(guests)}})
	return in
}

func samples(t testing.TB) map[string]Ruleset {
	t.Helper()
	hard := testOptions(t)
	hard.ReversePath, hard.Native, hard.Ranges, hard.Sessions = ReversePathLoose, false, nat.Ranges{}, 100
	off := testOptions(t)
	off.ReversePath = ReversePathOff
	all := map[string]Ruleset{}
	for name, s := range map[string]struct {
		in Input
		o  Options
	}{
		"nat": {twoZones(), testOptions(t)}, "published": {publishing(), testOptions(t)}, "routed": {routedZones(), hard}, "empty": {Input{}, off}, "mapped": {mappedZones(), testOptions(t)},
	} {
		r, err := Build(s.in, s.o)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		all[name] = r
	}
	return all
}

func TestBuildGolden(t *testing.T) {
	for name, r := range samples(t) {
		path := filepath.Join("testdata", name+".nft")
		if *update {
			if err := os.WriteFile(path, []byte(r.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.String(); got != string(want) {
			t.Errorf("%s differs from the ruleset:\n%s", path, got)
		}
	}
}

// Every chain and set that a statement names is there, no name is there twice,
// and nothing is there that nobody can reach.
func TestBuildNamesFitTogether(t *testing.T) {
	for name, r := range samples(t) {
		defined, used := map[string]int{}, map[string]bool{}
		for _, s := range r.sets {
			defined["@"+s.name]++
			for _, e := range s.elems {
				if e.verdict != nil && e.verdict.Chain != "" {
					used[e.verdict.Chain] = true
				}
			}
		}
		for _, c := range r.chains {
			defined[c.name]++
			if c.hook != nil {
				used[c.name] = true
			}
			for _, rule := range c.rules {
				words := strings.FieldsFunc(rule.String(), func(r rune) bool { return strings.ContainsRune(" ,{}", r) })
				for i, w := range words {
					if strings.HasPrefix(w, "@") {
						name, _, _ := strings.Cut(w, ":") // a range of ports may follow
						used[name] = true
					}
					if i > 0 && (words[i-1] == "goto" || words[i-1] == "jump") {
						used[w] = true
					}
				}
			}
		}
		// Elements that are installed while traffic flows go to these.
		used[chainAsk], used[chainListed], used[chainUse], used[chainAskOpen] = true, true, true, true
		used[chainRefuse], used[chainCarryFirst] = true, true
		used[chainCarryUntold] = defined[chainCarryUntold] > 0 // the same
		used[chainCarryPlain] = true                           // no rule, none that the kernel decides
		used[chainUseMapped], used[chainUsePeer] = true, true
		for _, r := range []string{"out", "guests", "hidden"} {
			// Where endpoints are not mapped, they wait for a reload.
			name := "@" + setKnown(r)
			used[name] = defined[name] > 0 || used[name]
		}
		for _, r := range mappedZones().NetworkRules {
			for _, open := range []bool{false, true} {
				name := mappedChain(r.Name, open)
				used[name] = defined[name] > 0 || used[name]
			}
		}
		for _, name := range []string{chainWide, chainUseOneWay, chainListedOneWay, chainUseLocal, chainListedLocal, chainSeenGateway} {
			used[name] = true
		}
		for _, f := range []family{ipv4, ipv6} {
			used[mapSourceAddr(f)], used[mapSourcePort(f)] = true, true
		}
		for n, named := range used {
			if named && defined[n] != 1 {
				t.Errorf("%s: %s is defined %d times", name, n, defined[n])
			}
		}
		for n := range defined {
			if !used[n] {
				t.Errorf("%s: %s is used nowhere", name, n)
			}
		}
	}
}

// A packet of a known kernel flow meets two base chains and leaves each with its
// first rule, which looks nothing up.
func TestBuildKnownFlowsPassFirst(t *testing.T) {
	r := samples(t)["nat"]
	first := map[string]string{}
	for _, c := range r.chains {
		forwarded := c.hook != nil && c.hook.typ != nftables.ChainTypeNAT && (c.hook.name == "prerouting" || c.hook.name == "forward" || c.hook.name == "postrouting")
		if forwarded && !c.onDemand {
			first[c.name] = c.rules[0].String()
		}
	}
	const known = "ct mark and 0x0f000000 == 0x05000000 "
	if len(first) != 2 || first["arrive"] != known+"accept" || !strings.HasPrefix(first["forward"], known) {
		t.Errorf("what every packet passes begins with %q", first)
	}
}

func TestBuildRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*Input, *Options){
		"queues overlap":    func(_ *Input, o *Options) { o.FirstOpen = 103 },
		"no queue":          func(_ *Input, o *Options) { o.NumClosed = 0 },
		"no zone":           func(_ *Input, o *Options) { o.Zone = 0 },
		"reverse path mode": func(_ *Input, o *Options) { o.ReversePath = "maybe" },
		"interface name":    func(in *Input, _ *Options) { in.Compiled.Zones[1].Interfaces = []string{`a"b`} },
		"wildcard":          func(in *Input, _ *Options) { in.Compiled.Zones[1].Interfaces = []string{"ppp*"} },
		"interface twice":   func(in *Input, _ *Options) { in.Compiled.Zones[2].Interfaces = []string{"lan0"} },
		"unknown zone":      func(in *Input, _ *Options) { in.Compiled.Forward[0].Out = 3 },
		"family of a box": func(in *Input, _ *Options) {
			in.Compiled.Forward[0].Stages[0].Boxes[0].Src = netip.MustParsePrefix("::/0")
		},
		"class":                func(in *Input, _ *Options) { in.Compiled.Forward[0].Stages[0].Boxes[0].Class = 9 },
		"ask about the host":   func(in *Input, _ *Options) { in.Compiled.Input[0].Stages[0].Boxes[0].Class = policy.ClassAsk },
		"icmp type":            func(in *Input, _ *Options) { in.Compiled.Forward[0].Stages[2].Boxes[0].Ports.Hi = 256 },
		"network not defined":  func(in *Input, _ *Options) { in.NetworkRules[0].To = "mars" },
		"address cannot hide":  func(in *Input, _ *Options) { in.NetworkRules[0].Address = netip.IPv6Loopback() },
		"relation":             func(in *Input, _ *Options) { in.NetworkRules[0].Relation = 0 },
		"empty range of ports": func(_ *Input, o *Options) { o.Ranges.Kernel = nat.Range{Lo: 2, Hi: 1} },
	} {
		in, o := twoZones(), testOptions(t)
		spoil(&in, &o)
		if _, err := Build(in, o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
