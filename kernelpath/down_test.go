package kernelpath

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var testIdle = Idle{UDP: 300, ICMP: 60, TCPEstablished: 7440, TCPTransitory: 240}

func testSteering(t testing.TB) Steering { return NewSteering(testMarks(t), 4100, 4100) }

// snapshot is all that a gateway could change outside its own sockets.
func (s space) snapshot() string {
	return s.sh(`sysctl -a 2>/dev/null | grep '^net\.' | grep -v 'nf_conntrack_count\|stable_secret'
		ip rule; ip -6 rule; ip route show table all; ip -6 route show table all | sed 's/ expires [0-9]*sec//'
		nft list ruleset; ip -d link | sed 's/ qlen [0-9]*//'`)
}

func difference(a, b string) string {
	x, y := strings.Split(a, "\n"), strings.Split(b, "\n")
	var d []string
	for _, l := range x {
		if !slices.Contains(y, l) {
			d = append(d, "- "+l)
		}
	}
	for _, l := range y {
		if !slices.Contains(x, l) {
			d = append(d, "+ "+l)
		}
	}
	return strings.Join(d, "\n")
}

func newDownSpace(t *testing.T) space {
	s := newSpace(t)
	// One interface forwards although the machine does not. Addresses that come
	// by themselves would come while the test compares.
	s.sh(`ip link add lan0 type veth peer name lan1; ip link add wan.5 type veth peer name wan1
		for x in lan0 lan1 wan.5 wan1; do ip link set $x addrgenmode none up; done
		echo 1 >/proc/sys/net/ipv4/conf/lan0/forwarding; echo 1 >/proc/sys/net/ipv6/conf/wan.5/forwarding
		ip rule add fwmark 0x6 lookup 99 priority 4100; ip route add default dev lan0 table 99`)
	s.nft("table inet other { chain c { type filter hook forward priority 0; policy accept; } \n }")
	return s
}

func TestDownRestoresWhatPrepareChanged(t *testing.T) {
	s := newDownSpace(t)
	dir := filepath.Join(t.TempDir(), "state")
	s.sh("nft list ruleset >/dev/null") // conntrack's sysctls are there
	before := s.snapshot()
	first := made(s, func() (Prepared, error) { return Prepare(dir, testSteering(t), testIdle) })
	if len(first.Missing) > 0 || !slices.Contains(first.Changed, "net/ipv4/ip_forward") || !slices.Contains(first.Changed, "net/ipv6/conf/all/forwarding") ||
		!slices.Contains(first.Changed, "net/netfilter/nf_conntrack_acct") {
		t.Errorf("prepared: %+v", first)
	}
	if rules := s.sh("ip rule; ip -6 rule"); strings.Contains(rules, "lookup 4100") {
		t.Errorf("every flow pays for a rule that none needs yet:\n%s", rules)
	}
	s.in(func() error { _, err := testSteering(t).Install(); return err })
	s.nft("table inet sluice { set x { type ipv4_addr; flags timeout; } \n }")
	s.nft("table inet sluice_probe { counter x { } \n }") // of a probe that was killed
	during := s.snapshot()
	for _, line := range []string{"net.ipv4.ip_forward = 1", "net.ipv6.conf.lan0.forwarding = 1", "net.netfilter.nf_conntrack_events = 1",
		"net.netfilter.nf_conntrack_udp_timeout = 300", "net.netfilter.nf_conntrack_icmp_timeout = 60",
		"net.netfilter.nf_conntrack_tcp_timeout_established = 7440", "net.netfilter.nf_conntrack_tcp_timeout_fin_wait = 240",
		"4100:\tfrom all fwmark 0x6000000/0x7000000 lookup 4100", "local default dev lo table 4100 scope host", "local default dev lo table 4100 metric 1024 pref medium"} {
		if !slices.Contains(strings.Split(strings.ReplaceAll(during, " \n", "\n"), "\n"), line) {
			t.Errorf("prepared without %q", line)
		}
	}
	// A second start after a crash finds everything set and must not take
	// that for the state from before.
	second := made(s, func() (Prepared, error) { return Prepare(dir, testSteering(t), testIdle) })
	if len(second.Changed) > 0 {
		t.Errorf("the second start changed %v", second.Changed)
	}
	if d := difference(during, s.snapshot()); d != "" {
		t.Errorf("the second start changed\n%s", d)
	}
	did := made(s, func() ([]string, error) { return Down(t.Context(), dir, Steering{}) })
	if len(did) < 8 {
		t.Errorf("down did %q", did)
	}
	if d := difference(before, s.snapshot()); d != "" {
		t.Errorf("after down:\n%s", d)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left in the state folder: %v, %v", left, err)
	}
	if again := made(s, func() ([]string, error) { return Down(t.Context(), dir, testSteering(t)) }); len(again) > 0 {
		t.Errorf("down again did %q", again)
	}
}

func TestDownKeepsItsRecordUntilAllIsUndone(t *testing.T) {
	s := newDownSpace(t)
	dir := t.TempDir()
	before := s.snapshot()
	made(s, func() (Prepared, error) { return Prepare(dir, testSteering(t), testIdle) })
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	s.in(func() error {
		if _, err := Down(ctx, dir, Steering{}); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
		return nil
	})
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("state folder: %v", left)
	}
	made(s, func() ([]string, error) { return Down(t.Context(), dir, Steering{}) })
	if d := difference(before, s.snapshot()); d != "" {
		t.Errorf("after down:\n%s", d)
	}
}

func TestPrepareFollowsAMovedMark(t *testing.T) {
	s := newDownSpace(t)
	dir := t.TempDir()
	before := s.snapshot()
	made(s, func() (Prepared, error) { return Prepare(dir, testSteering(t), testIdle) })
	s.in(func() error { _, err := testSteering(t).Install(); return err })
	moved := NewSteering(testMarks(t), 4200, 50)
	made(s, func() (Prepared, error) { return Prepare(dir, moved, testIdle) })
	s.in(func() error { _, err := moved.Install(); return err })
	if rules := s.sh("ip rule; ip -6 rule"); strings.Contains(rules, "4100:\tfrom all fwmark 0x6000000") || strings.Count(rules, "lookup 4200") != 2 {
		t.Errorf("rules:\n%s", rules)
	}
	made(s, func() ([]string, error) { return Down(t.Context(), dir, Steering{}) })
	if d := difference(before, s.snapshot()); d != "" {
		t.Errorf("after down:\n%s", d)
	}
}

func TestStateOfAnotherBootIsNoState(t *testing.T) {
	s := newSpace(t)
	dir := t.TempDir()
	before := s.snapshot()
	file := made(s, func() (string, error) { return StateFile(dir) })
	if other := made(newSpace(t), func() (string, error) { return StateFile(dir) }); other == file {
		t.Errorf("two namespaces share %s", file)
	}
	old := state{Boot: "another", Sysctls: []sysctlValue{{"net/ipv4/ip_forward", "1"}}}
	if err := old.save(file); err != nil {
		t.Fatal(err)
	}
	made(s, func() (Prepared, error) { return Prepare(dir, testSteering(t), testIdle) })
	made(s, func() ([]string, error) { return Down(t.Context(), dir, Steering{}) })
	if d := difference(before, s.snapshot()); d != "" {
		t.Errorf("after down:\n%s", d)
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.in(func() error {
		if _, err := Prepare(dir, testSteering(t), testIdle); err == nil {
			t.Error("a broken state file was overwritten")
		}
		return nil
	})
}

func TestSteeringRefusesATableInUse(t *testing.T) {
	s := newDownSpace(t)
	before := s.snapshot()
	s.in(func() error {
		if _, err := NewSteering(testMarks(t), 99, 77).Install(); err == nil {
			t.Error("the table of others was taken")
		}
		return nil
	})
	if d := difference(before, s.snapshot()); d != "" {
		t.Errorf("a refused set-up left\n%s", d)
	}
	s.in(func() error {
		undo, err := testSteering(t).Install()
		if err != nil {
			return err
		}
		if _, err := testSteering(t).Install(); err != nil {
			return err
		}
		return errors.Join(undo(), undo())
	})
	if d := difference(before, s.snapshot()); d != "" {
		t.Errorf("set-up and undo left\n%s", d)
	}
}

func TestForeignChains(t *testing.T) {
	s := newSpace(t)
	s.nft(`
table inet sluice { 
	chain forward { type filter hook forward priority 0; policy drop
	}
}
table ip docker {
	chain f { type filter hook forward priority 0; policy drop
	}
	chain quiet { type filter hook input priority 5; policy accept
		tcp dport 22 counter accept
	}
}
table ip6 guard {
	chain in { type filter hook input priority -10; policy accept
		jump more
	}
	chain more { 
		tcp dport 25 reject
	}
	chain unused {
		drop
	}
}
table inet maps {
	chain pre { type filter hook prerouting priority -300; policy accept
		ip saddr vmap { 192.0.2.1 : drop }
	}
	chain nat { type nat hook postrouting priority 100; policy accept
		masquerade
	}
}
table netdev x {
}`)
	found := made(s, ForeignChains)
	var got []string
	for _, f := range found {
		if f.Chain != "" {
			got = append(got, f.String())
		}
	}
	want := []string{
		"chain inet maps pre (hook prerouting, priority -300) has rules that drop: it overrules what the gateway accepts",
		"chain ip docker f (hook forward, priority 0) has policy drop: it overrules what the gateway accepts",
		"chain ip6 guard in (hook input, priority -10) has rules that drop: it overrules what the gateway accepts",
	}
	if !slices.Equal(got, want) {
		t.Errorf("found\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
