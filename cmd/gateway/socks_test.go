package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sluicegw/sluice/users"
)

// Rules for users that nobody can be are worth a word.
func TestRulesOfNobody(t *testing.T) {
	hash, err := users.Hash("secret")
	if err != nil {
		t.Fatal(err)
	}
	base := "networks: {in: {interfaces: lan0}, out: {interfaces: wan0}}\nnetwork_rules: [{name: n, from: in, to: out, relation: nat}]\n" +
		"users: {alice: \"" + hash + "\"}\nrules:\n- {name: r, action: allow, from: in, to: out, protocols: ssh, users: alice}\n" +
		"- {name: all, action: allow, from: in, to: out, protocols: http}\n"
	file := filepath.Join(t.TempDir(), "f.yaml")
	for socks, want := range map[string]int{"": 1, "socks: {networks: in}\n": 1, "socks: {networks: in, authentication: password}\n": 0} {
		if err := os.WriteFile(file, []byte(base+socks), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, err := loadConfig(file, builtin())
		if err != nil {
			t.Fatal(err)
		}
		got := nobodysRules(cfg)
		if len(got) != want || want == 1 && !strings.Contains(got[0], `rule "r"`) {
			t.Errorf("%q: %q", socks, got)
		}
	}
}
