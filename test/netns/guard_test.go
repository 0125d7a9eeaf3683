package netns_test

import (
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// B56: what somebody else does to the ruleset is noticed, logged, and undone
// within a second: living flows go on, permissions are there, and what was
// refused is refused.
func TestB56RulesetPutBack(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		c := probed()
		c.Protocols += "  user: {tcp: 2101}\n"
		c.Rules += "  - {name: user, action: allow, from: lan, to: wan, protocols: [user], no_kernel_mode: true}\n"
		s := play(t, l, f, c)
		e := s.connect()
		user, denied := s.dial(s.Client, to(s.srv, 2101)), to(s.srv, 2102)
		inUser(t, l, s.g, "tcp", s.client, to(s.srv, 2101))
		whole := s.rules()
		for i, do := range []string{
			"flush ruleset", "delete table inet sluice", "flush table inet sluice", "flush chain inet sluice forward",
			"insert rule inet sluice forward accept", "add chain inet sluice mine",
			"add chain inet sluice forward { policy accept; }", "add table inet sluice { flags dormant; }", "delete counter inet sluice exhausted",
		} {
			if do == "delete counter inet sluice exhausted" {
				do = "flush chain inet sluice exhausted; " + do
			}
			s.must("future", e, lab.ProbeArgs{Proto: "tcp", Targets: []string{to(s.srv, 2100).String()}})
			s.GW.Run("nft", do)
			done := time.Now()
			s.g.AwaitRecord("the gateway's table is there again", 10*time.Second, func(lab.Record) bool {
				return len(s.g.Records("the gateway's table is there again")) == i+1
			})
			if took := time.Since(done); took > lab.Patience(time.Second) {
				t.Errorf("%s: undone after %s", do, took)
			}
			if now := s.rules(); now != whole {
				t.Errorf("after %s the table is\n%s\nand was\n%s", do, now, whole)
			}
			for _, living := range []net.Conn{e, user} {
				echo(t, living, "after "+do)
			}
			s.silent(s.Client, denied, "after "+do)
			s.dial(s.Client, to(s.srv, 2100)) // what was permitted before
			s.dial(s.Client, to(s.srv, 7))
			s.dial(s.Client, to(s.srv, 2101))
		}
	})
}

// rules are the table's chains as text, in an order of their own.
func (s *scene) rules() string {
	s.t.Helper()
	table := strings.TrimSuffix(s.GW.Run("nft", "-s", "list", "table", "inet", "sluice"), "}\n")
	chains := strings.Split(table, "\tchain ")[1:]
	for i := range chains {
		chains[i] = strings.TrimSpace(chains[i])
	}
	slices.Sort(chains)
	return strings.Join(chains, "\n")
}
