package config

import (
	"errors"
	"fmt"
	"slices"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// policyText is what policy.New is given.
type policyText struct {
	networks  []policy.Network
	netRules  []policy.NetworkRule
	protocols []policy.Protocol
	rules     []policy.Rule
	pcp       pcpText
}

// entries are the places of a policyText's parts in the file.
type entries map[policy.Section][]entry

type entry struct {
	line int
	node ast.Node // its mapping
	bad  bool     // an error has been noted: what else is wrong may follow from it
}

// enter notes an entry. The function that it returns is called at the entry's
// end.
func (r *reader) enter(s policy.Section, line int, node ast.Node) (leave func()) {
	if r.entries == nil {
		r.entries = entries{}
	}
	before := len(r.errs)
	return func() {
		r.entries[s] = append(r.entries[s], entry{line, node, len(r.errs) > before})
	}
}

// policy builds the policy and finds the lines of what is wrong with it.
func (r *reader) policy(c *Config, p *policyText) {
	if r.maimed {
		return
	}
	all := slices.Clone(p.protocols)
	for _, d := range policy.Builtin() {
		if !slices.ContainsFunc(p.protocols, func(own policy.Protocol) bool { return own.Name == d.Name }) {
			all = append(all, d)
		}
	}
	var err error
	if c.Policy, err = policy.New(p.networks, p.netRules, all, p.rules); err == nil {
		return
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		r.failAt(1, "%v", err)
		return
	}
	for _, err := range joined.Unwrap() {
		var problem *policy.Problem
		if !errors.As(err, &problem) {
			r.failAt(1, "%v", err)
			continue
		}
		// Behind the file's protocols stand the built-in ones, without a place.
		list, at := r.entries[problem.Section], entry{line: 1}
		if problem.Index < len(list) {
			at = list[problem.Index]
		}
		if !at.bad {
			r.failAt(at.place(problem), "%v", problem)
		}
	}
}

// place is the line of the value that a problem is about.
func (e entry) place(p *policy.Problem) int {
	for _, v := range pairs(e.node) {
		if keyOf(v) != p.Field {
			continue
		}
		switch list := v.Value.(type) {
		case *ast.SequenceNode:
			if p.Item >= 0 && p.Item < len(list.Values) {
				return lineOf(list.Values[p.Item])
			}
		case *ast.MappingNode:
			if p.Item >= 0 && p.Item < len(list.Values) {
				return lineOf(list.Values[p.Item].Key)
			}
		}
		return lineOf(v.Key)
	}
	return e.line
}

func (r *reader) networks(n ast.Node, p *policyText) {
	for _, v := range r.mapping(n, "networks") {
		leave := r.enter(policy.SectionNetworks, lineOf(v.Key), v.Value)
		net := policy.Network{Name: keyOf(v)}
		what := fmt.Sprintf("network %q", net.Name)
		r.nameText(v.Key, net.Name, what)
		r.section(v.Value, what, map[string]func(ast.Node){
			"interfaces": func(n ast.Node) {
				for _, item := range oneOrMore(n) {
					if name, ok := r.interfaceName(item, what+": interfaces"); ok {
						net.Interfaces = append(net.Interfaces, name)
					}
				}
			},
			"prefixes": func(n ast.Node) {
				for _, item := range oneOrMore(n) {
					if prefix, ok := r.prefix(item, what+": prefixes"); ok {
						net.Prefixes = append(net.Prefixes, prefix)
					}
				}
			},
		})
		p.networks = append(p.networks, net)
		leave()
	}
}

// The behaviours of RFC 4787, in its words.
const (
	addressAndPort      = "address-and-port-dependent"
	endpointIndependent = "endpoint-independent"
)

var filterings = map[string]policy.Filtering{
	addressAndPort: policy.FilterAddressAndPort, "address-dependent": policy.FilterAddress, endpointIndependent: policy.FilterEndpointIndependent,
}

func (r *reader) networkRules(n ast.Node, p *policyText) {
	if n == nil {
		return
	}
	for i, item := range r.sequence(n, "network_rules") {
		leave := r.enter(policy.SectionNetworkRules, lineOf(item), item)
		var rule policy.NetworkRule
		what := nameIn(item, "network rule", i)
		text := func(key string, at *string) func(ast.Node) {
			return func(n ast.Node) { *at, _ = r.text(n, what+": "+key) }
		}
		r.section(item, what, map[string]func(ast.Node){
			"name": func(n ast.Node) { rule.Name, _ = r.name(n, what+": name") },
			"from": text("from", &rule.From),
			"to":   text("to", &rule.To),
			"relation": func(n ast.Node) {
				switch v, _ := r.choice(n, what+": relation", "route", "nat"); v {
				case "route":
					rule.Relation = policy.Route
				case "nat":
					rule.Relation = policy.NAT
				}
			},
			"address": func(n ast.Node) { r.ruleAddresses(n, what+": address", &rule) },
			"mapping": func(n ast.Node) {
				if v, _ := r.choice(n, what+": mapping", addressAndPort, endpointIndependent); v == endpointIndependent {
					rule.Mapping = policy.MapEndpointIndependent
				}
			},
			"filtering": func(n ast.Node) {
				v, _ := r.choice(n, what+": filtering", addressAndPort, "address-dependent", endpointIndependent)
				rule.Filtering = filterings[v]
			},
			"mss": func(n ast.Node) {
				_, rule.ClampMSS = r.choice(n, what+": mss", "clamp")
			},
			"refresh_inbound": func(n ast.Node) {
				on, ok := r.boolean(n, what+": refresh_inbound")
				rule.IgnoreInbound = ok && !on
			},
		})
		r.required(item, what, "name", "from", "to", "relation")
		p.netRules = append(p.netRules, rule)
		leave()
	}
}

// nameIn is what errors call an entry of a list: by its name, where it has
// one.
func nameIn(item ast.Node, what string, i int) string {
	for _, v := range pairs(item) {
		if s, ok := v.Value.(*ast.StringNode); ok && keyOf(v) == "name" {
			return fmt.Sprintf("%s %q", what, s.Value)
		}
	}
	return fmt.Sprintf("%s %d", what, i+1)
}

// ruleAddresses reads one address or a list of them.
func (r *reader) ruleAddresses(n ast.Node, what string, rule *policy.NetworkRule) {
	for i, item := range oneOrMore(n) {
		a, ok := r.address(item, what)
		switch {
		case !ok:
			return
		case i == 0:
			rule.Address = a
		default:
			rule.More = append(rule.More, a)
		}
	}
}

// required reports keys that an entry lacks.
func (r *reader) required(n ast.Node, what string, keys ...string) {
	list := pairs(n)
	if len(list) == 0 {
		if n.Type() == ast.NullType || n.Type() == ast.MappingType {
			r.fail(n, "%s is empty", what)
		}
		return
	}
	for _, key := range keys {
		if !slices.ContainsFunc(list, func(v *ast.MappingValueNode) bool { return keyOf(v) == key }) {
			r.fail(n, "%s: %q is missing", what, key)
		}
	}
}

func (r *reader) protocols(n ast.Node, p *policyText) {
	for _, v := range r.mapping(n, "protocols") {
		leave := r.enter(policy.SectionProtocols, lineOf(v.Key), v.Value)
		d := policy.Protocol{Name: keyOf(v)}
		what := fmt.Sprintf("protocol %q", d.Name)
		r.nameText(v.Key, d.Name, what)
		spans := func(key string, proto flow.Proto, lo, hi uint64) func(ast.Node) {
			return func(n ast.Node) {
				for _, item := range oneOrMore(n) {
					if s, ok := r.span(item, what+": "+key, lo, hi); ok {
						d.Matches = append(d.Matches, policy.Match{Proto: proto, Ports: policy.PortRange(s)})
					}
				}
			}
		}
		r.section(v.Value, what, map[string]func(ast.Node){
			"tcp":     spans("tcp", flow.TCP, 1, 65535),
			"udp":     spans("udp", flow.UDP, 1, 65535),
			"icmp":    spans("icmp", flow.ICMP, 0, 255),
			"icmpv6":  spans("icmpv6", flow.ICMPv6, 0, 255),
			"ip":      func(n ast.Node) { d.Matches = append(d.Matches, r.ipProtocols(n, what+": ip")...) },
			"filter":  func(n ast.Node) { d.Filter = r.filterName(n, what+": filter") },
			"timeout": func(n ast.Node) { setNumber(r, n, what+": timeout", &d.Timeout, 1, maxIdle) },
		})
		p.protocols = append(p.protocols, d)
		leave()
	}
}

// ipProtocols reads numbers of protocols that have no key of their own.
func (r *reader) ipProtocols(n ast.Node, what string) []policy.Match {
	var list []policy.Match
	for _, item := range oneOrMore(n) {
		v, ok := r.number(item, what, 0, 255)
		if !ok {
			continue
		}
		switch proto := flow.Proto(v); proto {
		case flow.TCP, flow.UDP, flow.ICMP, flow.ICMPv6:
			r.fail(item, "%s: protocol %d has the key %q", what, v, proto)
		default:
			list = append(list, policy.Match{Proto: proto, Ports: policy.PortRange{Lo: 0, Hi: 65535}})
		}
	}
	return list
}

// filterName reads the name of a filter that exists.
func (r *reader) filterName(n ast.Node, what string) string {
	s, ok := r.text(n, what)
	if !ok {
		return ""
	}
	if _, known := r.parsers[s]; !known {
		r.fail(n, "%s: unknown filter %q", what, s)
	}
	return s
}

func (r *reader) rules(n ast.Node, p *policyText, failOpen bool) {
	if n == nil {
		return
	}
	for i, item := range r.sequence(n, "rules") {
		leave := r.enter(policy.SectionRules, lineOf(item), item)
		p.rules = append(p.rules, r.rule(item, nameIn(item, "rule", i), failOpen))
		leave()
	}
}

func (r *reader) rule(item ast.Node, what string, failOpen bool) policy.Rule {
	rule := policy.Rule{Line: lineOf(item)}
	said := false // whether the rule says how it fails
	names := func(key string, at *[]string) func(ast.Node) {
		return func(n ast.Node) { *at, _ = r.names(n, what+": "+key) }
	}
	keys := map[string]func(ast.Node){
		"name": func(n ast.Node) { rule.Name, _ = r.name(n, what+": name") },
		"action": func(n ast.Node) {
			switch v, _ := r.choice(n, what+": action", "allow", "deny", "publish"); v {
			case "allow":
				rule.Action = policy.Allow
			case "publish":
				rule.Action = policy.Publish
			}
		},
		"from":      names("from", &rule.From),
		"to":        names("to", &rule.To),
		"protocols": names("protocols", &rule.Protocols),
		"users":     func(n ast.Node) { rule.Users = r.ruleUsers(n, what+": users") },
		"filters":   func(n ast.Node) { rule.Filters = r.filters(n, what+": filters") },
		"no_kernel_mode": func(n ast.Node) {
			rule.NoKernelMode, _ = r.boolean(n, what+": no_kernel_mode")
		},
		"fail": func(n ast.Node) {
			v, _ := r.choice(n, what+": fail", "closed", "open")
			rule.FailOpen, said = v == "open", true
		},
		"refuse": func(n ast.Node) {
			switch v, _ := r.choice(n, what+": refuse", "auto", "reject", "drop"); v {
			case "reject":
				rule.Refusal = policy.RefuseReject
			case "drop":
				rule.Refusal = policy.RefuseDrop
			}
		},
		"log": func(n ast.Node) {
			v, ok := r.boolean(n, what+": log")
			rule.NoLog = ok && !v
		},
	}
	publication := policy.Publication{}
	r.publication(keys, what, &publication)
	r.section(item, what, keys)
	if rule.Action == policy.Publish {
		r.required(item, what, "name", "from", "protocols", "server")
		rule.Publication = &publication
	} else {
		r.required(item, what, "name", "action", "from", "to", "protocols")
		r.unpublished(item, what)
	}
	if !said && rule.Action != policy.Deny {
		rule.FailOpen = failOpen
	}
	return rule
}

// filters reads the filters of a rule with their options; their order is that
// of the file.
func (r *reader) filters(n ast.Node, what string) []policy.FilterUse {
	var list []policy.FilterUse
	for _, v := range r.mapping(n, what) {
		use := policy.FilterUse{Name: r.filterName(v.Key, what)}
		if parse, known := r.parsers[use.Name]; known {
			use.Options = r.options(v, what+": "+use.Name, parse)
		}
		list = append(list, use)
	}
	return list
}
