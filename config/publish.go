package config

import (
	"net/netip"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluicegw/sluice/policy"
)

// publicationKeys are those that only a rule with the action publish has.
var publicationKeys = []string{"server", "server_port", "address", "source"}

// publication adds the keys of a rule that publishes.
func (r *reader) publication(keys map[string]func(ast.Node), what string, p *policy.Publication) {
	addresses := func(key string, at *[]netip.Addr) {
		keys[key] = func(n ast.Node) {
			for _, item := range oneOrMore(n) {
				if a, ok := r.address(item, what+": "+key); ok {
					*at = append(*at, a)
				}
			}
		}
	}
	addresses("server", &p.Servers)
	addresses("address", &p.Addresses)
	keys["server_port"] = func(n ast.Node) {
		if v, ok := r.number(n, what+": server_port", 1, 65535); ok {
			p.ServerPort = uint16(v)
		}
	}
	keys["source"] = func(n ast.Node) {
		v, _ := r.choice(n, what+": source", "client", "gateway")
		p.FromGateway = v == "gateway"
	}
}

// unpublished reports keys that a rule without a server has.
func (r *reader) unpublished(item ast.Node, what string) {
	for _, v := range pairs(item) {
		for _, key := range publicationKeys {
			if keyOf(v) == key {
				r.fail(v.Key, "%s: %s: only a rule with the action publish has it", what, key)
			}
		}
	}
}
