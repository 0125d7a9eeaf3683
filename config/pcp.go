package config

import (
	"slices"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// PCP is the section pcp: whom the server for PCP and NAT-PMP serves. Without
// networks it is off.
type PCP struct {
	Networks    []string    // networks
	NATPMP      bool        // natpmp
	Approve     bool        // approve
	Ports       []nat.Range // ports: of hosts, that may be mapped
	MinLifetime uint32      // min_lifetime, in seconds
	MaxLifetime uint32      // max_lifetime, in seconds
	Quota       uint32      // quota: mappings of one host
}

// pcpText is where things stand in the file.
type pcpText struct {
	node     ast.Node
	networks map[string]ast.Node
}

// The bounds of pcp. The shortest lifetime is the RFC's; what is longer than a
// day outlives every host (RFC 6887, section 15).
const (
	minLifetime = 120
	maxLifetime = 86400
	maxQuota    = 64 // what a client may hold of permissions altogether
)

func defaultPCP() PCP {
	return PCP{
		NATPMP: true, Approve: true, Ports: []nat.Range{{Lo: firstPort, Hi: 65535}},
		MinLifetime: minLifetime, MaxLifetime: maxLifetime, Quota: 32,
	}
}

func (r *reader) pcp(n ast.Node, p *PCP, text *pcpText) {
	if n == nil {
		return
	}
	*text = pcpText{n, make(map[string]ast.Node)}
	flag := func(key string, at *bool) func(ast.Node) {
		return func(n ast.Node) {
			if v, ok := r.boolean(n, key); ok {
				*at = v
			}
		}
	}
	r.section(n, "pcp", map[string]func(ast.Node){
		"networks": func(n ast.Node) {
			for _, item := range oneOrMore(n) {
				if name, ok := r.text(item, "pcp.networks"); ok {
					p.Networks = append(p.Networks, name)
					text.networks[name] = item
				}
			}
		},
		"natpmp":  flag("pcp.natpmp", &p.NATPMP),
		"approve": flag("pcp.approve", &p.Approve),
		"ports": func(n ast.Node) {
			p.Ports = nil
			for _, item := range oneOrMore(n) {
				if v, ok := r.span(item, "pcp.ports", 1, 65535); ok {
					p.Ports = append(p.Ports, v)
				}
			}
		},
		"min_lifetime": func(n ast.Node) {
			setNumber(r, n, "pcp.min_lifetime", &p.MinLifetime, 1, maxLifetime)
		},
		"max_lifetime": func(n ast.Node) {
			setNumber(r, n, "pcp.max_lifetime", &p.MaxLifetime, 1, maxLifetime)
		},
		"quota": func(n ast.Node) { setNumber(r, n, "pcp.quota", &p.Quota, 1, maxQuota) },
	})
	if p.MinLifetime > p.MaxLifetime {
		r.fail(n, "pcp: min_lifetime %d is more than max_lifetime %d", p.MinLifetime, p.MaxLifetime)
	}
}

// pcpNetworks checks that what is served is inside: hosts that network rules
// join from, by interfaces that lead to nobody from whom they are hidden.
func (r *reader) pcpNetworks(c *Config, p *policyText) {
	if len(c.PCP.Networks) > 0 && c.ReversePath != ReversePathStrict {
		r.fail(p.pcp.node, "pcp: needs reverse_path: strict, or hosts outside could ask in the name of others")
	}
	for _, name := range c.PCP.Networks {
		if why := outside(name, p); why != "" {
			r.fail(p.pcp.networks[name], "pcp.networks: %q %s", name, why)
		}
	}
}

// outside says why a network cannot be served; empty: it can.
func outside(name string, p *policyText) string {
	i := slices.IndexFunc(p.networks, func(n policy.Network) bool { return n.Name == name })
	if i < 0 {
		return "is no network that is defined here"
	}
	if len(p.networks[i].Interfaces) == 0 {
		return "names no interfaces, so that nothing says where it is served"
	}
	if !slices.ContainsFunc(p.netRules, func(n policy.NetworkRule) bool { return n.From == name }) {
		return "is in the from of no network rule: only hosts inside are served"
	}
	for _, rule := range p.netRules {
		if rule.Relation != policy.NAT {
			continue
		}
		for _, n := range p.networks {
			if n.Name != rule.To {
				continue
			}
			if n.Name == name || slices.ContainsFunc(n.Interfaces, func(x string) bool { return slices.Contains(p.networks[i].Interfaces, x) }) {
				return "is outside: network rule \"" + rule.Name + "\" hides others from hosts there"
			}
		}
	}
	return ""
}
