package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// openTable opens the Table of a namespace for the length of a test.
func openTable(t testing.TB, s space) *Table {
	t.Helper()
	ns, err := os.Open("/run/netns/" + s.name)
	if err != nil {
		t.Fatal(err)
	}
	table, err := Open(int(ns.Fd()), zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := table.Close(); err != nil {
			t.Error(err)
		}
		_ = ns.Close()
	})
	return table
}

func mustLoad(t testing.TB, table *Table, r Ruleset) {
	t.Helper()
	if err := table.Load(r); err != nil {
		t.Fatal(err)
	}
}

// mustBuild builds with the queue form that the kernel has.
func mustBuild(t testing.TB, in Input, o Options) Ruleset {
	t.Helper()
	r, err := Build(in, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// nativeQueue says whether this kernel has nft's queue expression.
func nativeQueue(t testing.TB) bool {
	t.Helper()
	_, err := newSpace(t).try(`nft 'add table inet q; add chain inet q c { type filter hook prerouting priority 0; }; add rule inet q c queue to 1'`)
	return err == nil
}

// withoutQueues replaces the queue statements, for a kernel that does not have
// nft's own and in whose other form nft cannot be written.
func withoutQueues(r Ruleset) Ruleset {
	chains := make([]*chain, len(r.chains))
	for i, c := range r.chains {
		copied := *c
		copied.rules = nil
		for _, old := range c.rules {
			row := rule{}
			for _, s := range old {
				if strings.HasPrefix(s.text, "queue ") || strings.HasPrefix(s.text, "# ") {
					s = drop()
				}
				row = append(row, s)
			}
			copied.rules = append(copied.rules, row)
		}
		chains[i] = &copied
	}
	r.chains = chains
	return r
}

// The text and the kernel form of a ruleset are the same, to the last
// instruction of every rule.
func TestLoadEqualsText(t *testing.T) {
	native := nativeQueue(t)
	for name, r := range samples(t) {
		if !native || name == "routed" {
			r = withoutQueues(r)
		}
		byText, byGo := newSpace(t), newSpace(t)
		byText.nft(r.String())
		table := openTable(t, byGo)
		if err := table.TakeOver(); err != nil {
			t.Fatal(err)
		}
		mustLoad(t, table, r)
		for _, list := range []string{"nft list ruleset", "nft --debug=netlink list ruleset"} {
			want, got := byText.sh(list), byGo.sh(list)
			if strings.Contains(list, "debug") {
				want, got = instructions(want), instructions(got)
			}
			if want != got {
				t.Errorf("%s: %s\n%s", name, list, firstDifference(want, got))
			}
		}
	}
}

var (
	ruleNumber = regexp.MustCompile(`(?m)^(inet sluice \w+).*$`)
	anonymous  = regexp.MustCompile(`__(set|map)\d+`)
	// nft marks where no range is in an interval set; the kernel needs none.
	setElements = regexp.MustCompile(`(?m)^(inet sluice @|\telement ).*\n`)
	// nft swaps a single byte of a range, which changes nothing.
	byteSwap = regexp.MustCompile(`(?m)^  \[ byteorder reg (\d+) = hton\(reg \d+, 2, 1\) \]\n`)
)

// instructions are the rules of a debug list, without handles and elements.
func instructions(list string) string {
	list, _, _ = strings.Cut(list, "\ntable inet ")
	list = byteSwap.ReplaceAllString(setElements.ReplaceAllString(list, ""), "")
	return anonymous.ReplaceAllString(ruleNumber.ReplaceAllString(list, "$1"), "__$1")
}

func firstDifference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range max(len(w), len(g)) {
		if i >= len(w) || i >= len(g) || w[i] != g[i] {
			at := func(s []string) string { return strings.Join(s[max(0, min(i-2, len(s))):min(i+4, len(s))], "\n") }
			return fmt.Sprintf("line %d\nby text:\n%s\nby Go:\n%s", i+1, at(w), at(g))
		}
	}
	return "equal"
}

// The form of the queue that nft's language has no word for.
func TestLoadXTQueue(t *testing.T) {
	o := testOptions(t)
	o.Native = false
	s := newSpace(t)
	mustLoad(t, openTable(t, s), mustBuild(t, twoZones(), o))
	if list := s.sh("nft list chain inet sluice ask"); !strings.Contains(list, "NFQUEUE") {
		t.Errorf("no queue in\n%s", list)
	}
}

// A reload keeps base chains (their handles), counters, and elements; it
// replaces rules and policy maps, and what is stale disappears.
func TestLoadAgainKeeps(t *testing.T) {
	s := newSpace(t)
	table := openTable(t, s)
	o := testOptions(t)
	o.Native = false
	mustLoad(t, table, mustBuild(t, routedZones(), o))
	p := nat.Permission{ID: 1, Direction: nat.Inbound, Proto: flow.TCP, Client: netip.MustParseAddrPort("10.0.0.2:80"),
		External: netip.MustParseAddrPort("203.0.113.1:8080"), AnySource: true, Timeout: time.Hour}
	q := nat.Permission{ID: 2, Direction: nat.Outbound, Proto: flow.TCP, Client: netip.MustParseAddrPort("10.0.0.2:0"),
		Target: netip.MustParseAddrPort("203.0.113.10:2000"), Multiple: true}
	install(t, table, p)
	install(t, table, q)
	before := s.sh("nft -a list table inet sluice | grep -B1 'type .* hook' | grep -o 'chain .*'")

	mustLoad(t, table, mustBuild(t, twoZones(), o))
	if after := s.sh("nft -a list table inet sluice | grep -B1 'type .* hook' | grep -o 'chain .*'"); after != before {
		t.Errorf("base chains were\n%s\nand are\n%s", before, after)
	}
	held, err := table.Permissions()
	if err != nil || len(held) != 3 {
		t.Errorf("permissions after the reload: %v, %v", held, err)
	}
	list := s.sh("nft list table inet sluice")
	for _, stale := range []string{"pair_0_0", "p0_0_ports4_0", "net1_addr4", "203.0.113.1:"} {
		if strings.Contains(list, stale) {
			t.Errorf("%s is still there", stale)
		}
	}
	fresh := newSpace(t)
	mustLoad(t, openTable(t, fresh), mustBuild(t, twoZones(), o))
	mustLoad(t, table, mustBuild(t, twoZones(), o))
	if err := table.FlushPermissions(); err != nil {
		t.Fatal(err)
	}
	want, got := sorted(fresh.sh("nft list table inet sluice")), sorted(s.sh("nft list table inet sluice"))
	if want != got {
		t.Errorf("a table that was loaded three times differs from a fresh one\n%s", firstDifference(want, got))
	}
}

// sorted makes lists comparable whose objects were made in another order.
func sorted(list string) string {
	parts := strings.Split(list, "\n\t}\n")
	m := map[string]string{}
	for _, p := range parts {
		p = strings.TrimSpace(strings.TrimPrefix(p, "table inet sluice {\n"))
		m[p] = p
	}
	return strings.Join(sortedKeys(m), "\n")
}

// A refused load leaves everything as it was and names what was refused.
func TestLoadFailedChangesNothing(t *testing.T) {
	s := newSpace(t)
	table := openTable(t, s)
	o := testOptions(t)
	o.Native = false
	mustLoad(t, table, mustBuild(t, twoZones(), o))
	before := s.sh("nft -a list ruleset")
	bad := twoZones()
	stage := &bad.Compiled.Forward[0].Stages[0]
	stage.Boxes = append(stage.Boxes, box("10.0.0.0/24", "203.0.113.10/32", flow.TCP, flow.TCP, 666, 666, policy.ClassKernel))
	err := table.Load(mustBuild(t, bad, o))
	if err == nil || !strings.Contains(err.Error(), "map p1_2_ports4_1") {
		t.Errorf("boxes that overlap: %v", err)
	}
	if after := s.sh("nft -a list ruleset"); after != before {
		t.Errorf("the table changed\n%s", firstDifference(before, after))
	}
	unknown := withoutQueues(mustBuild(t, twoZones(), o))
	unknown.chains[3].rules = append(unknown.chains[3].rules, rule{count("nowhere")})
	if err := table.Load(unknown); !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), `counter name "nowhere"`) {
		t.Errorf("a counter that is not there: %v", err)
	}
	mustLoad(t, table, mustBuild(t, twoZones(), o))
}

// A table of another form is replaced; one that somebody deleted comes back
// with its permissions; other people's tables are left alone.
func TestLoadReplacesAndRestores(t *testing.T) {
	s := newSpace(t)
	s.nft(`table inet sluice {
		set once4 { type ipv4_addr; }
		chain arrive { type filter hook prerouting priority 5; }
		chain steer { ip saddr @once4 drop; }
	}
	table ip other { chain c { type filter hook forward priority 7; counter; }; }`)
	other := s.sh("nft -a list table ip other")
	table := openTable(t, s)
	o := testOptions(t)
	o.Native = false
	r := mustBuild(t, twoZones(), o)
	mustLoad(t, table, r)
	p := nat.Permission{ID: 1, Direction: nat.Outbound, Proto: flow.UDP, Client: netip.MustParseAddrPort("[fd00:a::2]:0"),
		Target: netip.MustParseAddrPort("[2001:db8::1]:2000"), Timeout: time.Hour}
	install(t, table, p)
	s.sh("nft delete table inet sluice")
	if err := table.Install(context.Background(), nat.Permission{ID: 2, Direction: nat.Outbound, Proto: flow.UDP,
		Client: p.Client, Target: p.Target, Multiple: true}); !errors.Is(err, unix.ENOENT) {
		t.Errorf("install without a table: %v", err)
	}
	mustLoad(t, table, r)
	held, err := table.Permissions()
	if err != nil || len(held) != 1 || held[0].Use != "once" || held[0].Expires > time.Hour || held[0].Expires < time.Minute {
		t.Errorf("permissions in the new table: %+v, %v", held, err)
	}
	if got := s.sh("nft -a list table ip other"); got != other {
		t.Errorf("another table became\n%s", got)
	}
	for range 2 {
		if err := table.Delete(); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.sh("nft list tables"); got != "table ip other\n" {
		t.Errorf("after Delete: %s", got)
	}
}

// The chains that only flows of user space need are there from the first such
// flow on, and stay.
func TestChainsOnDemand(t *testing.T) {
	s := newSpace(t)
	table := openTable(t, s)
	o := testOptions(t)
	o.Native = false
	r := mustBuild(t, twoZones(), o)
	there := func(want bool, when string) {
		t.Helper()
		list := s.sh("nft list table inet sluice")
		if got := strings.Contains(list, "chain zone_in {\n\t\ttype filter hook prerouting priority raw; policy accept;\n\t\tiifname"); got != want {
			t.Errorf("%s: zone_in is there: %v\n%s", when, got, list)
		}
	}
	mustLoad(t, table, r)
	there(false, "loaded")
	for range 2 {
		if err := table.TakeOver(); err != nil {
			t.Fatal(err)
		}
		there(true, "after a takeover")
		mustLoad(t, table, r)
		there(true, "loaded again")
	}
	s.sh("nft delete table inet sluice")
	mustLoad(t, table, r)
	there(true, "after somebody deleted the table")
	next := openTable(t, s)
	mustLoad(t, next, r)
	there(true, "adopted by the next run")
}

// Ten thousand boxes load: their elements need more than one message.
func TestLoadManyBoxes(t *testing.T) {
	in := twoZones()
	stage := &in.Compiled.Forward[0].Stages[0]
	stage.Boxes = nil
	for i := range 10_000 {
		src := fmt.Sprintf("10.%d.%d.%d/32", i>>14, i>>6&255, i&63)
		stage.Boxes = append(stage.Boxes, box(src, "0.0.0.0/0", flow.TCP, flow.TCP, uint16(i), uint16(i)+10, policy.ClassKernel))
	}
	o := testOptions(t)
	o.Native = false
	s := newSpace(t)
	table := openTable(t, s)
	start := time.Now()
	mustLoad(t, table, mustBuild(t, in, o))
	t.Logf("10000 boxes in %s", time.Since(start))
	if n := strings.Count(s.sh("nft list map inet sluice p1_2_ports4_0"), "goto carry_plain"); n != 10_000 {
		t.Errorf("the kernel has %d boxes", n)
	}
	mustLoad(t, table, mustBuild(t, twoZones(), o))
}

func TestConcatenatedKeysArePadded(t *testing.T) {
	if got := pack([]byte{1, 2, 3, 4}, []byte{6}, []byte{0, 80}); string(got) != "\x01\x02\x03\x04\x06\x00\x00\x00\x00\x50\x00\x00" {
		t.Errorf("key %x", got)
	}
	got := registers([]nftables.SetDatatype{nftables.TypeIP6Addr, nftables.TypeInetProto, nftables.TypeInetService})
	if fmt.Sprint(got) != "[1 12 13]" {
		t.Errorf("registers %v", got)
	}
}

func install(t testing.TB, table *Table, p nat.Permission) {
	t.Helper()
	if err := table.Install(context.Background(), p); err != nil {
		t.Fatal(err)
	}
}
