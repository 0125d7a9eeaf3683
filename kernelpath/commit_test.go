package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

func loadedTable(t testing.TB) (space, *Table) {
	t.Helper()
	s := newSpace(t)
	table := openTable(t, s)
	o := testOptions(t)
	o.Native = false
	mustLoad(t, table, mustBuild(t, twoZones(), o))
	return s, table
}

// together makes calls that all wait while the owner is busy, so that they go
// out together; it gives their errors in order.
func together(t testing.TB, table *Table, calls ...func() error) []error {
	t.Helper()
	busy, release := make(chan struct{}), make(chan struct{})
	go func() {
		_ = table.do(context.Background(), func() error { close(busy); <-release; return nil })
	}()
	<-busy
	errs := make([]error, len(calls))
	var wg sync.WaitGroup
	for i, call := range calls {
		wg.Add(1)
		go func() { defer wg.Done(); errs[i] = call() }()
		for waiting := 0; waiting <= i; { // in this order
			table.mu.Lock()
			waiting = len(table.waiting)
			table.mu.Unlock()
		}
	}
	close(release)
	wg.Wait()
	return errs
}

func outbound(id uint64, port uint16) nat.Permission {
	return nat.Permission{ID: id, Direction: nat.Outbound, Proto: flow.TCP, Client: netip.MustParseAddrPort("10.0.0.2:0"),
		Target: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.10"), port), Timeout: time.Hour}
}

func published(id uint64, port uint16, client string) nat.Permission {
	return nat.Permission{ID: id, Direction: nat.Inbound, Proto: flow.TCP, Client: netip.MustParseAddrPort(client),
		External: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), port), AnySource: true, Multiple: true}
}

func commitsOf(table *Table) (n int) {
	_ = table.do(context.Background(), func() error { n = table.commits; return nil })
	return n
}

func TestCommitTogether(t *testing.T) {
	_, table := loadedTable(t)
	var calls []func() error
	for i := range 200 {
		p := outbound(uint64(i+1), uint16(2000+i))
		calls = append(calls, func() error { return table.Install(context.Background(), p) })
	}
	before := commitsOf(table)
	for i, err := range together(t, table, calls...) {
		if err != nil {
			t.Errorf("call %d: %v", i, err)
		}
	}
	if n := commitsOf(table) - before; n != 1 {
		t.Errorf("200 changes took %d transactions", n)
	}
	if held, err := table.Permissions(); err != nil || len(held) != 200 {
		t.Errorf("%d permissions, %v", len(held), err)
	}
}

// Each caller gets its own error and no other.
func TestCommitOwnErrors(t *testing.T) {
	s, table := loadedTable(t)
	// What an earlier run left behind makes the kernel refuse the whole batch.
	s.sh("nft add element inet sluice bind4 { 203.0.113.1 . tcp . 8080 : 10.0.0.9 . 99 }")
	bad := outbound(3, 2003)
	bad.Proto = flow.ICMP
	gone, cancel := context.WithCancel(context.Background())
	errs := together(t, table,
		func() error { return table.Install(context.Background(), outbound(1, 2001)) },
		func() error { return table.Install(context.Background(), published(2, 8080, "10.0.0.2:80")) },
		func() error { return table.Install(context.Background(), bad) },
		func() error { return table.Remove(context.Background(), outbound(4, 2004)) },
		func() error { return table.Install(context.Background(), published(5, 8080, "10.0.0.3:80")) },
		func() error { cancel(); return table.Install(gone, outbound(6, 2006)) })
	for i, want := range []error{nil, nil, ErrPermission, nil, nat.ErrConflict, context.Canceled} {
		if !errors.Is(errs[i], want) || (want == nil) != (errs[i] == nil) {
			t.Errorf("call %d: %v, want %v", i, errs[i], want)
		}
	}
	held, err := table.Permissions()
	got := heldNames(held)
	want := []string{"bind tcp invalid IP > 203.0.113.1:8080 = 10.0.0.2:80", "many tcp invalid IP > 203.0.113.1:8080", "once tcp 10.0.0.2 > 203.0.113.10:2001"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("the kernel holds %q, %v", got, err)
	}
	s.sh("nft delete table inet sluice")
	for i, err := range together(t, table,
		func() error { return table.Install(context.Background(), outbound(7, 2007)) },
		func() error { return table.Install(context.Background(), outbound(8, 2008)) }) {
		if !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), fmt.Sprintf("permission %d: table sluice is gone", 7+i)) {
			t.Errorf("without a table, call %d: %v", i, err)
		}
	}
}

func sourceName(p netip.Prefix) string {
	if !p.IsValid() || p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

func heldNames(held []Permitted) []string {
	var names []string
	for _, p := range held {
		name := fmt.Sprintf("%s %s %s > %s", p.Use, p.Proto, sourceName(p.Source), p.To)
		if p.Becomes.IsValid() {
			name += " = " + p.Becomes.String()
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// A packet may use an element up, or its time may pass, at any moment.
func TestCommitAbsentElement(t *testing.T) {
	s, table := loadedTable(t)
	p := outbound(1, 2000)
	install(t, table, p)
	s.sh("nft delete element inet sluice once4 { 10.0.0.2 . 203.0.113.10 . tcp . 2000 }")
	for range 2 {
		if err := table.Remove(context.Background(), p); err != nil {
			t.Error(err)
		}
	}
	install(t, table, p)
	s.sh("nft delete element inet sluice once4 { 10.0.0.2 . 203.0.113.10 . tcp . 2000 }")
	p.Timeout = 2 * time.Hour
	install(t, table, p)
	if held, err := table.Permissions(); err != nil || len(held) != 1 || held[0].Expires < time.Hour {
		t.Errorf("after it was used up and installed again: %+v, %v", held, err)
	}
	p.Timeout = time.Minute
	install(t, table, p)
	if held, err := table.Permissions(); err != nil || len(held) != 1 || held[0].Expires > time.Minute {
		t.Errorf("its time did not begin anew: %+v, %v", held, err)
	}
}

// Two permissions with one key: it is there as long as one of them is, and as
// long as the longer one is.
func TestCommitTwoHolders(t *testing.T) {
	_, table := loadedTable(t)
	long, brief := outbound(1, 2000), outbound(2, 2000)
	brief.Timeout = time.Minute
	install(t, table, long)
	install(t, table, brief)
	expires := func() time.Duration {
		held, err := table.Permissions()
		if err != nil || len(held) != 1 {
			t.Fatalf("%+v, %v", held, err)
		}
		return held[0].Expires
	}
	if e := expires(); e < 50*time.Minute {
		t.Errorf("the brief one made the long one brief: %s", e)
	}
	if err := table.Remove(context.Background(), long); err != nil {
		t.Fatal(err)
	}
	if e := expires(); e == 0 || e > time.Minute {
		t.Errorf("the brief one has %s left", e)
	}
	if err := table.Remove(context.Background(), brief); err != nil {
		t.Fatal(err)
	}
	if held, err := table.Permissions(); err != nil || len(held) != 0 {
		t.Errorf("%+v, %v", held, err)
	}
}

func TestCommitAfterClose(t *testing.T) {
	_, table := loadedTable(t)
	if err := table.Close(); err != nil {
		t.Fatal(err)
	}
	if err := table.Install(context.Background(), outbound(1, 1)); !errors.Is(err, ErrClosed) {
		t.Errorf("install after Close: %v", err)
	}
}

// Random changes, many at a time, against a plain model: the union of what all
// living permissions ask for.
func TestCommitAgainstModel(t *testing.T) {
	_, table := loadedTable(t)
	const seed = 7
	r := rand.New(rand.NewPCG(seed, seed))
	model := map[uint64]nat.Permission{}
	for round := range 60 {
		var calls []func() error
		var want []error
		for range 1 + r.IntN(12) {
			p := randomPermission(r)
			if r.IntN(3) == 0 {
				delete(model, p.ID)
				want = append(want, nil)
				calls = append(calls, func() error { return table.Remove(context.Background(), p) })
				continue
			}
			delete(model, p.ID)
			var err error
			if conflicts(model, p) {
				err = nat.ErrConflict
			} else {
				model[p.ID] = p
			}
			want = append(want, err)
			calls = append(calls, func() error { return table.Install(context.Background(), p) })
		}
		for i, err := range together(t, table, calls...) {
			if !errors.Is(err, want[i]) || (want[i] == nil) != (err == nil) {
				t.Fatalf("seed %d, round %d, call %d: %v, want %v", seed, round, i, err, want[i])
			}
		}
		held, err := table.Permissions()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := heldNames(held), modelNames(model); !slices.Equal(got, want) {
			t.Fatalf("seed %d, round %d: the kernel holds\n%s\nwant\n%s", seed, round, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

func randomPermission(r *rand.Rand) nat.Permission {
	p := nat.Permission{ID: 1 + r.Uint64N(12), Proto: flow.TCP, Direction: nat.Outbound, Multiple: r.IntN(2) == 0, ToUser: r.IntN(4) == 0}
	if r.IntN(2) == 0 {
		p.Timeout = time.Hour
	}
	p.Client = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + r.IntN(2))}), 80)
	to := netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), uint16(2000+r.IntN(3)))
	p.Target = to
	if r.IntN(2) == 0 {
		p.Direction, p.External, p.AnySource = nat.Inbound, to, r.IntN(2) == 0
		for i := range r.IntN(3) {
			p.Sources = append(p.Sources, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 32))
		}
	}
	return p
}

// modelNames is what a table with these permissions holds.
func modelNames(model map[uint64]nat.Permission) []string {
	names := map[string]bool{}
	for _, p := range model {
		for n := range namesOf(p) {
			names[n] = true
		}
	}
	return sortedKeys(names)
}

// namesOf gives each element of a permission and what it must not meet.
func namesOf(p nat.Permission) map[string]string {
	names := map[string]string{}
	use := "once"
	switch {
	case p.ToUser:
		use = "ask"
	case p.Multiple:
		use = "many"
	}
	sources, to := p.Sources, p.External
	if p.Direction == nat.Outbound {
		sources, to = []netip.Prefix{netip.PrefixFrom(p.Client.Addr(), 32)}, p.Target
	}
	if p.Direction == nat.Inbound && p.AnySource {
		sources = []netip.Prefix{{}}
	} else if use == "once" && len(sources) > 1 {
		use = "listed"
		names[fmt.Sprintf("token tcp invalid IP > %s", to)] = ""
	}
	for _, s := range sources {
		at := fmt.Sprintf("%s > %s", sourceName(s), to)
		if use == "once" {
			at = ""
		}
		names[fmt.Sprintf("%s tcp %s > %s", use, sourceName(s), to)] = at
	}
	if p.Direction == nat.Inbound {
		names[fmt.Sprintf("bind tcp invalid IP > %s = %s", to, p.Client)] = "bind " + to.String()
	}
	return names
}

// conflicts: another one holds the key of a map with another value.
func conflicts(model map[uint64]nat.Permission, p nat.Permission) bool {
	for _, other := range model {
		for name, key := range namesOf(other) {
			for mine, at := range namesOf(p) {
				if at != "" && at == key && mine != name {
					return true
				}
			}
		}
	}
	return false
}

func BenchmarkInstallRemove(b *testing.B) {
	_, table := loadedTable(b)
	p := outbound(1, 2000)
	for b.Loop() {
		install(b, table, p)
		if err := table.Remove(context.Background(), p); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkInstallTogether(b *testing.B) {
	_, table := loadedTable(b)
	var id sync.Mutex
	n := uint64(0)
	b.SetParallelism(64)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			id.Lock()
			n++
			p := outbound(n, uint16(1+n%60000))
			id.Unlock()
			if err := table.Install(context.Background(), p); err != nil {
				b.Error(err)
			}
		}
	})
	b.ReportMetric(float64(commitsOf(table)), "transactions")
}
