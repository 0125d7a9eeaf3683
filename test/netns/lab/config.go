package lab

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Config is a gateway's configuration: the lab's own networks, and the parts
// that a test writes in the configuration's language. A zero part is left out.
type Config struct {
	// Rules is the list under `rules:`, as YAML; tabs before it are cut off.
	Rules string
	// Protocols is the mapping under `protocols:`.
	Protocols string
	// NetworkRules replaces the default: lan to wan by NAT.
	NetworkRules string
	// Networks adds to lan and wan.
	Networks string
	// Form is the queue form; empty: what the run forces, or auto.
	Form string
	// Queue adds settings under `queue:`, Extra adds top-level settings.
	Queue, Extra string
}

// Text is the configuration file of a gateway in this lab.
func (l *Lab) Text(c Config) string {
	var b strings.Builder
	b.WriteString("networks:\n  lan: {interfaces: [lan0]}\n  wan: {interfaces: [wan0]}\n")
	b.WriteString(block(c.Networks))
	rules := c.NetworkRules
	if rules == "" {
		rules = "  - {name: out, from: lan, to: wan, relation: nat}\n"
	}
	b.WriteString("network_rules:\n" + block(rules))
	if c.Protocols != "" {
		b.WriteString("protocols:\n" + block(c.Protocols))
	}
	if c.Rules != "" {
		b.WriteString("rules:\n" + block(c.Rules))
	}
	form := cmp.Or(c.Form, os.Getenv(envForm), "auto")
	fmt.Fprintf(&b, "queue:\n  form: %s\n%s", form, block(c.Queue))
	if answer := min(Patience(usualAnswer), longestAnswer); answer != usualAnswer && !strings.Contains(c.Queue, "answer_ms") {
		fmt.Fprintf(&b, "  answer_ms: %d\n", answer.Milliseconds())
	}
	fmt.Fprintf(&b, "control:\n  socket: %s\n%s", filepath.Join(l.dir, "control"), block(c.Extra))
	return b.String()
}

// usualAnswer is how long a gateway has its filters wait by default; on a slow
// machine that is not enough for a test's answer to the probe filter.
const (
	usualAnswer   = 800 * time.Millisecond
	longestAnswer = 4 * time.Second
)

// block strips the indentation that a Go literal brings along beyond two
// spaces, so that tests can indent their YAML with their code.
func block(s string) string {
	s = strings.ReplaceAll(strings.Trim(s, "\n"), "\t", "")
	if strings.TrimSpace(s) == "" {
		return ""
	}
	return s + "\n"
}
