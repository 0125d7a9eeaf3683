package policy

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/sluicegw/sluice/flow"
)

func prefixes(list ...string) (out []netip.Prefix) {
	for _, p := range list {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

// The office: inside is hidden behind the gateway, the servers are routed.
var (
	officeNetworks = []Network{
		{Name: "internal", Interfaces: []string{"lan0"}, Prefixes: prefixes("10.0.0.0/24", "fd00:a::/64")},
		{Name: "boss", Prefixes: prefixes("10.0.0.7/32")},
		{Name: "dmz", Interfaces: []string{"dmz0", "dmz1"}},
		{Name: "external", Interfaces: []string{"wan0"}},
	}
	officeJoins = []NetworkRule{
		{Name: "to-dmz", From: "internal", To: "dmz", Relation: Route},
		{Name: "internet", From: "internal", To: "external", Relation: NAT},
	}
	officeProtocols = append([]Protocol{
		{Name: "game", Matches: []Match{{flow.TCP, PortRange{5000, 5010}}, {flow.TCP, PortRange{2121, 2121}}}},
		{Name: "ftp-alt", Matches: tcp(2121), Filter: "ftp"},
		{Name: "chat", Matches: append(tcp(7000), ip(132)...), Filter: "chat"},
	}, Builtin()...)
	officeRules = []Rule{
		{Name: "boss-may", Action: Allow, From: []string{"boss"}, To: []string{"external"}, Protocols: []string{Any}, NoKernelMode: true},
		{Name: "no-telnet", From: []string{Any}, To: []string{Any}, Protocols: []string{"telnet"}},
		{Name: "no-irc", From: []string{Any}, To: []string{Any}, Protocols: []string{"irc"}, Refusal: RefuseDrop},
		{Name: "no-smtp", From: []string{Any}, To: []string{Any}, Protocols: []string{"smtp"}, Refusal: RefuseReject},
		{Name: "web", Action: Allow, From: []string{"internal"}, To: []string{"external"}, Protocols: []string{"http", "https"}},
		{Name: "files", Action: Allow, From: []string{"internal"}, To: []string{"external", "dmz"}, Protocols: []string{"game", "ftp", "ftp-alt", "chat"}, FailOpen: true,
			Filters: []FilterUse{{Name: "ftp"}, {Name: "chat"}}},
		{Name: "back", Action: Allow, From: []string{Any}, To: []string{"internal"}, Protocols: []string{"ssh"}},
		{Name: "everything-odd", Action: Allow, From: []string{"internal"}, To: []string{"dmz"}, Protocols: []string{AnyProtocol}},
		{Name: "admin", Action: Allow, From: []string{"internal"}, To: []string{Gateway}, Protocols: []string{"ssh"}},
		{Name: "no-gateway", From: []string{Any}, To: []string{Gateway}, Protocols: []string{"http", "esp"}},
	}
)

func office(t testing.TB) *Policy {
	t.Helper()
	p, err := New(officeNetworks, officeJoins, officeProtocols, officeRules)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// ask makes a question of "tcp 10.0.0.2 lan0 > 203.0.113.9:80 wan0".
func question(t testing.TB, text string) Question {
	t.Helper()
	w := strings.Fields(text)
	q := Question{InIface: w[2]}
	q.Proto = map[string]flow.Proto{"tcp": flow.TCP, "udp": flow.UDP, "icmp": flow.ICMP, "icmpv6": flow.ICMPv6, "gre": 47, "sctp": 132, "esp": 50}[w[0]]
	q.Src = netip.AddrPortFrom(netip.MustParseAddr(w[1]), 40000)
	q.Dst = netip.MustParseAddrPort(w[4])
	q.OutIface = w[5]
	q.ToGateway = w[5] == "self"
	return q
}

func TestJudge(t *testing.T) {
	const (
		drop    = ClassDrop
		reject  = ClassReject
		kernel  = ClassKernel
		asked   = ClassAsk
		askOpen = ClassAskOpen
	)
	p := office(t)
	c, err := p.Compile()
	if err != nil {
		t.Fatal(err)
	}
	checkStages(t, c)
	for _, x := range []struct {
		why, flow string
		want      answer
	}{
		{"a rule allows, nobody needs to look", "tcp 10.0.0.2 lan0 > 203.0.113.9:80 wan0", answer{kernel, "web", "http", "internet", false, "", ""}},
		{"IPv6 alike", "tcp fd00:a::2 lan0 > [2001:db8::1]:443 wan0", answer{kernel, "web", "https", "internet", false, "", ""}},
		{"the right address on the wrong interface is nobody", "tcp 10.0.0.2 other > 203.0.113.9:80 wan0", answer{drop, "", "http", "", false, "", ReasonNetwork}},
		{"the wrong address on the right interface alike", "tcp 10.9.0.2 lan0 > 203.0.113.9:80 wan0", answer{drop, "", "http", "", false, "", ReasonNetwork}},
		{"no kernel mode", "tcp 10.0.0.7 lan0 > 203.0.113.9:80 wan0", answer{asked, "boss-may", "http", "internet", false, "", ""}},
		{"no kernel mode, no definition", "udp 10.0.0.7 lan0 > 203.0.113.9:9 wan0", answer{asked, "boss-may", "", "internet", false, "", ""}},
		{"ICMP stays in the kernel", "icmp 10.0.0.7 lan0 > 203.0.113.9:8 wan0", answer{kernel, "boss-may", "ping", "internet", false, "", ""}},
		{"so does what has no ports", "gre 10.0.0.7 lan0 > 203.0.113.9:0 wan0", answer{kernel, "boss-may", "gre", "internet", false, "", ""}},
		{"an earlier rule wins", "tcp 10.0.0.7 lan0 > 203.0.113.9:23 wan0", answer{asked, "boss-may", "telnet", "internet", false, "", ""}},
		{"a denied inside client is told", "tcp 10.0.0.2 lan0 > 203.0.113.9:23 wan0", answer{reject, "no-telnet", "telnet", "internet", false, "", ReasonRule}},
		{"unless the rule is silent", "tcp 10.0.0.2 lan0 > 203.0.113.9:6667 wan0", answer{drop, "no-irc", "irc", "internet", false, "", ReasonRule}},
		{"the far side of a network rule is not told", "tcp 10.3.0.2 dmz1 > 10.0.0.2:23 lan0", answer{drop, "no-telnet", "telnet", "to-dmz", true, "", ReasonRule}},
		{"unless the rule speaks", "tcp 10.3.0.2 dmz0 > 10.0.0.2:25 lan0", answer{reject, "no-smtp", "smtp", "to-dmz", true, "", ReasonRule}},
		{"default: told inside", "tcp 10.0.0.2 lan0 > 203.0.113.9:3306 wan0", answer{reject, "", "mysql", "internet", false, "", ReasonDefault}},
		{"default: an undefined protocol is dropped", "tcp 10.0.0.2 lan0 > 203.0.113.9:31999 wan0", answer{drop, "", "", "internet", false, "", ReasonDefault}},
		{"default: silent from the far side", "tcp 10.3.0.2 dmz0 > 10.0.0.2:3306 lan0", answer{drop, "", "mysql", "to-dmz", true, "", ReasonDefault}},
		{"no network rule joins these", "tcp 10.3.0.2 dmz0 > 203.0.113.9:80 wan0", answer{drop, "", "http", "", false, "", ReasonNetwork}},
		{"NAT joins one direction for IPv4", "tcp 203.0.113.9 wan0 > 10.0.0.2:22 lan0", answer{drop, "", "ssh", "", false, "", ReasonNetwork}},
		{"and both for IPv6", "tcp 2001:db8::1 wan0 > [fd00:a::2]:22 lan0", answer{kernel, "back", "ssh", "internet", true, "", ""}},
		{"a route joins both", "tcp 10.3.0.2 dmz0 > 10.0.0.2:22 lan0", answer{kernel, "back", "ssh", "to-dmz", true, "", ""}},
		{"a filter of the rule for its protocol", "tcp 10.0.0.2 lan0 > 203.0.113.9:21 wan0", answer{askOpen, "files", "ftp", "internet", false, "ftp ", ""}},
		{"the first listed protocol names the flow, any of them brings its filter", "tcp 10.0.0.2 lan0 > 203.0.113.9:2121 wan0", answer{askOpen, "files", "game", "internet", false, "ftp ", ""}},
		{"a protocol of the rule without a filter", "tcp 10.0.0.2 lan0 > 203.0.113.9:5000 wan0", answer{kernel, "files", "game", "internet", false, "", ""}},
		{"a filter sees TCP and UDP only", "sctp 10.0.0.2 lan0 > 203.0.113.9:0 wan0", answer{kernel, "files", "chat", "internet", false, "", ""}},
		{"the protocol any lets in what nobody defined", "sctp 10.0.0.2 lan0 > 10.3.0.2:9 dmz0", answer{kernel, "files", "chat", "to-dmz", false, "", ""}},
		{"and names what somebody did", "tcp 10.0.0.2 lan0 > 10.3.0.2:3306 dmz0", answer{kernel, "everything-odd", "mysql", "to-dmz", false, "", ""}},
		{"ICMP of the other family is undefined", "icmpv6 10.0.0.2 lan0 > 203.0.113.9:128 wan0", answer{drop, "", "", "internet", false, "", ReasonDefault}},
		{"the gateway needs no network rule", "tcp 10.0.0.2 lan0 > 10.0.0.1:22 self", answer{kernel, "admin", "ssh", "", false, "", ""}},
		{"from inside the gateway tells", "tcp 10.0.0.2 lan0 > 10.0.0.1:80 self", answer{reject, "no-gateway", "http", "", false, "", ReasonRule}},
		{"by default too", "tcp 10.0.0.2 lan0 > 10.0.0.1:3306 self", answer{reject, "", "mysql", "", false, "", ReasonDefault}},
		{"not about what nobody defined", "tcp 10.0.0.2 lan0 > 10.0.0.1:31999 self", answer{drop, "", "", "", false, "", ReasonDefault}},
		{"and to outside it is silent", "tcp 203.0.113.9 wan0 > 203.0.113.1:80 self", answer{drop, "no-gateway", "http", "", false, "", ReasonRule}},
		{"by default too, outside", "tcp 203.0.113.9 wan0 > 203.0.113.1:22 self", answer{drop, "", "ssh", "", false, "", ReasonDefault}},
		{"any does not mean the gateway", "tcp 10.0.0.2 lan0 > 10.0.0.1:23 self", answer{reject, "", "telnet", "", false, "", ReasonDefault}},
	} {
		q := question(t, x.flow)
		if got := plain(p.Judge(q)); got != x.want {
			t.Errorf("%s: %s\n got %+v\nwant %+v", x.why, x.flow, got, x.want)
		}
		if got, _ := simulate(t, c, q); got != x.want.class {
			t.Errorf("%s: %s: compiled to %d, want %d", x.why, x.flow, got, x.want.class)
		}
	}
}

func TestJudgeNonsense(t *testing.T) {
	p := office(t)
	mixed := question(t, "tcp 10.0.0.7 lan0 > [2001:db8::1]:80 wan0")
	for _, q := range []Question{{}, mixed} {
		if v := p.Judge(q); v.Class != ClassDrop || v.Rule != nil {
			t.Errorf("%v: %+v", q, v)
		}
	}
	scoped := question(t, "tcp fd00:a::2 lan0 > [2001:db8::1]:80 wan0")
	scoped.Src = netip.AddrPortFrom(scoped.Src.Addr().WithZone("lan0"), 1)
	if v := p.Judge(scoped); v.Class != ClassKernel {
		t.Errorf("an address with a zone: %+v", v)
	}
}

func TestWith(t *testing.T) {
	p := office(t)
	q := question(t, "tcp 10.0.0.2 lan0 > 203.0.113.9:80 wan0")
	other := question(t, "tcp 10.0.0.2 lan0 > 203.0.113.9:5000 wan0")
	on, err := p.With("web", true)
	if err != nil {
		t.Fatal(err)
	}
	if p.Judge(q).Class != ClassKernel || on.Judge(q).Class != ClassAsk || on.Judge(other).Class != ClassKernel {
		t.Error("the switch moved the wrong flows")
	}
	c, err := on.Compile()
	class, _ := simulate(t, c, q)
	rest, _ := simulate(t, c, other)
	if err != nil || class != ClassAsk || rest != ClassKernel {
		t.Errorf("the compiled switch: %v", err)
	}
	off, err := on.With("web", false)
	if err != nil || off.Judge(q).Class != ClassKernel {
		t.Errorf("switched back: %v", err)
	}
	if _, err := p.With("nobody", true); !errors.Is(err, ErrUnknownRule) {
		t.Errorf("unknown rule: %v", err)
	}
	for _, name := range []string{"no-telnet", "admin"} {
		var problem *Problem
		if _, err := p.With(name, true); !errors.As(err, &problem) || problem.Field != "no_kernel_mode" || problem.Name != name {
			t.Errorf("rule %s: %v", name, err)
		}
		if _, err := p.With(name, false); err != nil {
			t.Errorf("rule %s, off: %v", name, err)
		}
	}
}

func TestImmutable(t *testing.T) {
	networks := []Network{{Name: "a", Interfaces: []string{"lan0"}}}
	rules := []Rule{{Name: "r", Action: Allow, From: []string{"a"}, To: []string{Any}, Protocols: []string{"ssh"}}}
	p, err := New(networks, []NetworkRule{{Name: "j", From: "a", To: Any, Relation: Route}}, Builtin(), rules)
	if err != nil {
		t.Fatal(err)
	}
	networks[0].Interfaces[0], rules[0].Action, rules[0].From[0] = "wan0", Deny, "x"
	p.Rules()[0].Action = Deny
	if v := p.Judge(question(t, "tcp 10.0.0.2 lan0 > 203.0.113.9:22 wan0")); v.Class != ClassKernel || v.Rule != p.Rule("r") {
		t.Errorf("a change from outside got in: %+v", v)
	}
	if p.Rule("none") != nil {
		t.Error("found a rule that is not there")
	}
	if got := p.NetworksOf(netip.MustParseAddr("10.0.0.1"), "lan0"); !slices.Equal(got, []string{"a", Any}) {
		t.Errorf("networks: %v", got)
	}
}
