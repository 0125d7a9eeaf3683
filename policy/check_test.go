package policy

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/sluicegw/sluice/flow"
)

func TestNewRefuses(t *testing.T) {
	lan := Network{Name: "lan", Interfaces: []string{"lan0"}}
	web := Protocol{Name: "web", Matches: tcp(80), Filter: "http"}
	ok := Rule{Name: "r", Action: Allow, From: []string{"lan"}, To: []string{Any}, Protocols: []string{"web"}}
	type parts struct {
		networks  []Network
		netRules  []NetworkRule
		protocols []Protocol
		rules     []Rule
	}
	rule := func(change func(*Rule)) parts {
		r := ok
		change(&r)
		return parts{rules: []Rule{r}}
	}
	for _, x := range []struct {
		parts
		want string // the whole error
	}{
		{parts{networks: []Network{lan}}, `network "lan": name: is defined twice`},
		{parts{networks: []Network{{Name: Gateway, Interfaces: []string{"x"}}}}, `network "gateway": name: is built in and cannot be defined`},
		{parts{networks: []Network{{Name: "", Interfaces: []string{"x"}}}}, `network "": name: is empty`},
		{parts{networks: []Network{{Name: "x"}}}, `network "x": has neither interfaces nor prefixes`},
		{parts{networks: []Network{{Name: "x", Interfaces: []string{"a", "a", ""}}}}, "network \"x\": interfaces: \"a\" stands there twice\nnetwork \"x\": interfaces: an interface without a name"},
		{parts{networks: []Network{{Name: "x", Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24"), {}, netip.MustParsePrefix("::ffff:10.0.0.0/104")}}}},
			"network \"x\": prefixes: 10.0.0.1/24 has host bits set; the network is 10.0.0.0/24\nnetwork \"x\": prefixes: invalid prefix\nnetwork \"x\": prefixes: ::ffff:10.0.0.0/104: IPv4 is written as IPv4"},
		{parts{netRules: []NetworkRule{{Name: "j", From: "nix", To: Gateway, Relation: Route}}}, "network rule \"j\": from: unknown network \"nix\"\nnetwork rule \"j\": to: the gateway itself needs no network rule"},
		{parts{netRules: []NetworkRule{{Name: "j", From: "lan", To: Any}}}, `network rule "j": relation: is neither route nor nat`},
		{parts{netRules: []NetworkRule{{Name: "j", From: "lan", To: Any, Relation: Route, Address: netip.MustParseAddr("::1")}}}, "network rule \"j\": address: only a nat rule hides addresses\nnetwork rule \"j\": address: ::1 is no IPv4 address of a host"},
		{parts{netRules: []NetworkRule{{Name: "j", From: "lan", To: Any, Relation: NAT, Address: netip.MustParseAddr("192.0.2.1"), More: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("::1")}}}},
			"network rule \"j\": address: only mappings that are endpoint-independent leave from several addresses\nnetwork rule \"j\": address: 192.0.2.1 stands there twice\nnetwork rule \"j\": address: ::1 is no IPv4 address of a host"},
		{parts{protocols: []Protocol{web}}, `protocol "web": name: is defined twice`},
		{parts{protocols: []Protocol{{Name: AnyProtocol, Matches: tcp(1)}}}, `protocol "any": name: is built in and cannot be defined`},
		{parts{protocols: []Protocol{{Name: "x"}}}, `protocol "x": matches nothing`},
		{parts{protocols: []Protocol{{Name: "x", Matches: []Match{{flow.TCP, PortRange{9, 8}}, {flow.ICMP, PortRange{0, 256}}, {47, PortRange{1, 2}}}}}},
			"protocol \"x\": tcp: the range 9-8 is upside down\nprotocol \"x\": icmp: 256 is no ICMP type\nprotocol \"x\": ip: protocol 47 has no ports to choose from"},
		{parts{protocols: []Protocol{{Name: "x", Matches: icmp(8), Filter: "f"}}}, `protocol "x": filter: a filter sees TCP and UDP only, and the protocol has neither`},
		{parts{rules: []Rule{ok, ok}}, `rule "r": name: is defined twice`},
		{rule(func(r *Rule) { r.From = nil }), `rule "r": from: names no network`},
		{rule(func(r *Rule) { r.To = []string{Any, "nix", Any} }), "rule \"r\": to: unknown network \"nix\"\nrule \"r\": to: network \"any\" stands there twice"},
		{rule(func(r *Rule) { r.From = []string{Gateway} }), `rule "r": from: what the gateway itself sends is not subject to rules`},
		{rule(func(r *Rule) { r.Protocols = []string{"nix"} }), `rule "r": protocols: unknown protocol "nix"`},
		{rule(func(r *Rule) { r.Filters = []FilterUse{{Name: "ftp"}} }), `rule "r": filters: filter "ftp" fits none of the rule's protocols`},
		{rule(func(r *Rule) { r.Filters, r.Protocols = []FilterUse{{Name: "http"}}, []string{AnyProtocol} }), `rule "r": filters: filter "http" fits none of the rule's protocols`},
		{rule(func(r *Rule) { r.Filters = []FilterUse{{Name: "http"}, {Name: "http"}} }), `rule "r": filters: filter "http" stands there twice`},
		{rule(func(r *Rule) { r.Filters, r.To = []FilterUse{{Name: "http"}}, []string{Any, Gateway} }), `rule "r": filters: what reaches the gateway itself is never taken over; use a rule of its own for it`},
		{rule(func(r *Rule) { r.NoKernelMode, r.To = true, []string{Gateway} }), `rule "r": no_kernel_mode: what reaches the gateway itself is never taken over; use a rule of its own for it`},
		{rule(func(r *Rule) { r.NoKernelMode, r.Action = true, Deny }), `rule "r": no_kernel_mode: a rule that denies carries nothing`},
		{rule(func(r *Rule) { r.FailOpen, r.Action = true, Deny }), `rule "r": fail: a rule that denies has no way to fail open`},
		{rule(func(r *Rule) { r.Refusal = RefuseDrop }), `rule "r": refuse: only a rule that denies refuses`},
	} {
		_, err := New(append([]Network{lan}, x.networks...), x.netRules, append([]Protocol{web}, x.protocols...), x.rules)
		if err == nil || err.Error() != x.want {
			t.Errorf("got:  %v\nwant: %s", err, x.want)
		}
	}
	if _, err := New([]Network{lan}, nil, []Protocol{web}, []Rule{ok}); err != nil {
		t.Error(err)
	}
}

func TestProblemPlace(t *testing.T) {
	_, err := New(nil, nil, Builtin(), []Rule{{Name: "r", From: []string{Any, "nix"}, To: []string{Any}, Protocols: []string{"ssh"}}})
	var p *Problem
	if !errors.As(err, &p) || *p != (Problem{SectionRules, 0, "r", "from", 1, `unknown network "nix"`}) {
		t.Errorf("%+v", p)
	}
}

func TestBuiltin(t *testing.T) {
	list := Builtin()
	if _, err := New(nil, nil, list, nil); err != nil {
		t.Fatal(err)
	}
	for _, d := range list {
		if d.Filter != "" && d.Filter != d.Name {
			t.Errorf("%s has the filter %q", d.Name, d.Filter)
		}
		if d.Name != strings.ToLower(d.Name) || strings.ContainsAny(d.Name, " _") {
			t.Errorf("the name %q", d.Name)
		}
	}
	list[0].Matches[0].Ports.Lo = 1
	if Builtin()[0].Matches[0].Ports.Lo == 1 {
		t.Error("two callers share a definition")
	}
}
