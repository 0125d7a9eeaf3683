package policy

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/flow"
)

// hosts has n inside networks of one address each, and a rule for each.
func hosts(n int, relation Relation, protocols ...string) ([]Network, []NetworkRule, []Rule) {
	networks := []Network{
		{Name: "internal", Interfaces: []string{"lan0"}, Prefixes: prefixes("10.0.0.0/8")},
		{Name: "external", Interfaces: []string{"wan0"}},
	}
	var rules []Rule
	for i := range n {
		name := fmt.Sprint("host", i)
		a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		networks = append(networks, Network{Name: name, Interfaces: []string{"lan0"}, Prefixes: []netip.Prefix{netip.PrefixFrom(a, 32)}})
		rules = append(rules, Rule{Name: name, Action: Allow, From: []string{name}, To: []string{"external"}, Protocols: protocols})
	}
	return networks, []NetworkRule{{Name: "j", From: "internal", To: "external", Relation: relation}}, rules
}

// count is the number of stages for IPv4 ports between two interfaces, and of
// their boxes.
func count(c Compiled, in, out string) (stages, boxes int) {
	for _, t := range c.Forward {
		if len(c.Zones[t.In].Interfaces) == 0 || len(c.Zones[t.Out].Interfaces) == 0 || c.Zones[t.In].Interfaces[0] != in || c.Zones[t.Out].Interfaces[0] != out {
			continue
		}
		for _, s := range t.Stages {
			if !s.Is6 && s.Kind == KindPorts {
				stages++
				boxes += len(s.Boxes)
			}
		}
	}
	return stages, boxes
}

func TestStagesOf10000Rules(t *testing.T) {
	const n = 10_000
	services := func() ([]Network, []NetworkRule, []Protocol, []Rule) {
		networks, joins, _ := hosts(0, NAT)
		protocols, rules := []Protocol(nil), []Rule(nil)
		for i := range n {
			name := fmt.Sprint("service", i)
			protocols = append(protocols, Protocol{Name: name, Matches: tcp(uint16(1000 + 2*i))})
			rules = append(rules, Rule{Name: name, Action: Action(i % 2), From: []string{"internal"}, To: []string{"external"}, Protocols: []string{name}})
		}
		return networks, joins, protocols, rules
	}
	for _, x := range []struct {
		name          string
		make          func() ([]Network, []NetworkRule, []Protocol, []Rule)
		in, out       string
		stages, boxes int
	}{
		{"disjoint hosts, seen from the side that is not told: one stage", func() ([]Network, []NetworkRule, []Protocol, []Rule) {
			networks, joins, rules := hosts(n, Route, "ssh")
			for i := range rules {
				rules[i].From, rules[i].To = rules[i].To, rules[i].From
			}
			return networks, joins, Builtin(), rules
		}, "wan0", "lan0", 1, n},
		{"disjoint hosts: one stage, one more for the default", func() ([]Network, []NetworkRule, []Protocol, []Rule) {
			networks, joins, rules := hosts(n, NAT, "http", "https", "ssh")
			return networks, joins, []Protocol{{Name: "http", Matches: tcp(80)}, {Name: "https", Matches: both(443)}, {Name: "ssh", Matches: tcp(22)}}, rules
		}, "lan0", "wan0", 2, 3*n + 3},
		{"disjoint services: the default lies inside them", services, "lan0", "wan0", 1, n},
		{"one exception in front, one wall in the middle", func() ([]Network, []NetworkRule, []Protocol, []Rule) {
			networks, joins, rules := hosts(n, NAT, "ssh")
			first := Rule{Name: "first", From: []string{Any}, To: []string{Any}, Protocols: []string{"telnet"}}
			wall := Rule{Name: "wall", From: []string{Any}, To: []string{Any}, Protocols: []string{AnyProtocol}}
			rules = append(append([]Rule{first}, append(rules[:n/2:n/2], wall)...), rules[n/2:]...)
			return networks, joins, Builtin(), rules
		}, "lan0", "wan0", 2, n/2 + 2},
		{"services under a wider deny each", func() ([]Network, []NetworkRule, []Protocol, []Rule) {
			networks, joins, protocols, rules := services()
			for i := range rules {
				rules[i].Action = Allow
				rules[i].From = []string{Any}
			}
			networks = append(networks, Network{Name: "guests", Prefixes: prefixes("10.66.0.0/16")})
			for i := range n / 2 {
				rules = append(rules, Rule{Name: fmt.Sprint("g", i), From: []string{"guests"}, To: []string{Any}, Protocols: []string{fmt.Sprint("service", i), fmt.Sprint("service", i+1)}})
			}
			return networks, joins, protocols, rules
		}, "lan0", "wan0", 1, n},
	} {
		t.Run(x.name, func(t *testing.T) {
			p, err := New(x.make())
			if err != nil {
				t.Fatal(err)
			}
			c, err := p.Compile()
			if err != nil {
				t.Fatal(err)
			}
			if stages, boxes := count(c, x.in, x.out); stages != x.stages || boxes != x.boxes {
				t.Errorf("%d stages with %d boxes, want %d with %d", stages, boxes, x.stages, x.boxes)
			}
		})
	}
}

// A policy that multiplies beyond all bounds is refused before it fills the
// memory.
func TestCompileBound(t *testing.T) {
	var many []netip.Prefix
	for i := range 2000 {
		many = append(many, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1}), 32))
	}
	p, err := New([]Network{{Name: "a", Prefixes: many}}, []NetworkRule{{Name: "j", From: "a", To: "a", Relation: Route}}, Builtin(),
		[]Rule{{Name: "r", Action: Allow, From: []string{"a"}, To: []string{"a"}, Protocols: []string{"http"}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Compile(); err == nil {
		t.Error("four million boxes were made")
	}
}

// tenThousand is a policy whose rules differ in source and in port.
func tenThousand(b testing.TB) *Policy {
	networks, joins, rules := hosts(10_000, NAT)
	protocols := Builtin()
	for i := range rules {
		name := fmt.Sprint("service", i)
		protocols = append(protocols, Protocol{Name: name, Matches: []Match{{flow.TCP, PortRange{uint16(10_000 + i), uint16(10_009 + i)}}}})
		rules[i].Protocols = []string{name, "https"}
		if i%3 == 0 {
			rules[i].From = []string{"internal"}
		}
	}
	p, err := New(networks, joins, protocols, rules)
	if err != nil {
		b.Fatal(err)
	}
	return p
}

func BenchmarkJudge10k(b *testing.B) {
	p := tenThousand(b)
	for _, x := range []struct{ name, flow string }{
		{"first", "tcp 10.0.0.0 lan0 > 203.0.113.9:443 wan0"},
		{"last", "tcp 10.0.39.14 lan0 > 203.0.113.9:19998 wan0"},
		{"none", "tcp 10.200.39.14 lan0 > 203.0.113.9:22 wan0"},
		{"unjoined", "tcp 203.0.113.9 wan0 > 10.0.0.1:22 lan0"},
	} {
		q := question(b, x.flow)
		b.Run(x.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p.Judge(q)
			}
		})
	}
}

func BenchmarkCompile10k(b *testing.B) {
	p := tenThousand(b)
	for b.Loop() {
		if _, err := p.Compile(); err != nil {
			b.Fatal(err)
		}
	}
}

// Judge does not allocate for a usual flow.
func TestJudgeAllocates(t *testing.T) {
	p := tenThousand(t)
	q := question(t, "tcp 10.0.39.14 lan0 > 203.0.113.9:443 wan0")
	if n := testing.AllocsPerRun(100, func() { p.Judge(q) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
