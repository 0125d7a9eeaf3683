package config

import (
	"fmt"
	"slices"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluicegw/sluice/policy"
	"github.com/sluicegw/sluice/users"
)

// maxUser is the longest name that SOCKS can say, in bytes (RFC 1929).
const maxUser = 255

// users reads who there is, with the hashes of the passwords.
func (r *reader) users(n ast.Node, c *Config) {
	for _, v := range r.mapping(n, "users") {
		name := keyOf(v)
		what := fmt.Sprintf("user %q", name)
		switch {
		case !r.nameText(v.Key, name, what):
			continue
		case name == policy.AnyUser:
			r.fail(v.Key, "%s: the name stands for every user", what)
			continue
		case len(name) > maxUser:
			r.fail(v.Key, "%s: the name is longer than %d bytes", what, maxUser)
			continue
		}
		hash, ok := r.text(v.Value, what)
		if !ok {
			continue
		}
		if err := users.Valid(hash); err != nil {
			r.fail(v.Value, "%s: %v", what, err)
			continue
		}
		if c.Users == nil {
			c.Users = map[string]string{}
		}
		c.Users[name] = hash
	}
}

// ruleUsers reads the users of a rule.
func (r *reader) ruleUsers(n ast.Node, what string) []string {
	list, _ := r.names(n, what)
	if len(list) == 0 {
		r.fail(n, "%s: names nobody", what)
	}
	for i, item := range oneOrMore(n) {
		if i < len(list) && list[i] != policy.AnyUser && !slices.Contains(r.known, list[i]) {
			r.fail(item, "%s: unknown user %q", what, list[i])
		}
	}
	return list
}

// userNames are the keys of users, whatever is wrong with them.
func userNames(n ast.Node) (list []string) {
	for _, v := range pairs(n) {
		list = append(list, keyOf(v))
	}
	return list
}

// The bounds of socks.
const (
	maxSocksTimeout = 3600
	maxPerClient    = 65536
	maxResolvers    = 8
)

func (r *reader) socks(n ast.Node, s *Socks) {
	seconds := func(key string, at *uint32) func(ast.Node) {
		return func(n ast.Node) { setNumber(r, n, "socks."+key, at, 1, maxSocksTimeout) }
	}
	r.section(n, "socks", map[string]func(ast.Node){
		"networks": func(n ast.Node) { s.Networks, _ = r.names(n, "socks.networks") },
		"port":     func(n ast.Node) { setNumber(r, n, "socks.port", &s.Port, 1, 65535) },
		"authentication": func(n ast.Node) {
			v, _ := r.choice(n, "socks.authentication", "none", "password")
			s.Password = v == "password"
		},
		"approve_binds": func(n ast.Node) { s.Approve, _ = r.boolean(n, "socks.approve_binds") },
		"resolvers": func(n ast.Node) {
			for _, item := range oneOrMore(n) {
				if a, ok := r.address(item, "socks.resolvers"); ok {
					s.Resolvers = append(s.Resolvers, a)
				}
			}
			if len(s.Resolvers) > maxResolvers {
				r.fail(n, "socks.resolvers: more than %d", maxResolvers)
			}
		},
		"connections":       func(n ast.Node) { setNumber(r, n, "socks.connections", &s.PerClient, 1, maxPerClient) },
		"handshake_timeout": seconds("handshake_timeout", &s.HandshakeTimeout),
		"connect_timeout":   seconds("connect_timeout", &s.ConnectTimeout),
		"bind_timeout":      seconds("bind_timeout", &s.BindTimeout),
	})
	if n != nil {
		r.required(n, "socks", "networks")
	}
}

// socksNetworks checks that the outside is not served.
func (r *reader) socksNetworks(n ast.Node, c *Config) {
	if c.Policy == nil || n == nil {
		return
	}
	at := n
	for _, v := range pairs(n) {
		if keyOf(v) == "networks" {
			at = v.Value
		}
	}
	for i, item := range oneOrMore(at) {
		if i >= len(c.Socks.Networks) {
			break
		}
		if err := c.Policy.Inside(c.Socks.Networks[i]); err != nil {
			r.fail(item, "socks.networks: %v", err)
		}
	}
	if c.Socks.Password && len(c.Users) == 0 {
		r.fail(n, "socks: authentication by password, and no users")
	}
}
