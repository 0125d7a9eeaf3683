package main

import (
	"os"
	"regexp"
	"testing"
)

// Rules name filters, so names are unique and plain; and every filter of the
// plain binary has its page.
func TestBuiltinFilters(t *testing.T) {
	other := map[string]bool{}
	for _, f := range extra() {
		other[f.Name()] = true
	}
	seen := map[string]bool{}
	for _, f := range builtin() {
		name := f.Name()
		if seen[name] || !regexp.MustCompile(`^[a-z][a-z0-9-]*$`).MatchString(name) {
			t.Errorf("filter %q: there are two, or rules cannot name it", name)
		}
		seen[name] = true
		if _, ok := parsers(builtin())[name]; !ok {
			t.Errorf("filter %q: no rule can give it options", name)
		}
		if _, err := os.Stat("../../docs/filters/" + name + ".md"); err != nil && !other[name] {
			t.Errorf("filter %q has no page: %v", name, err)
		}
	}
}
