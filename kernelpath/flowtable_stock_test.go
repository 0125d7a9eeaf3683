//go:build stockkernel

package kernelpath

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// These tests need a kernel with flowtables and with nft's own queue, such as
// Debian's.

func TestStockLoadEqualsText(t *testing.T) {
	o := testOptions(t)
	o.Flowtable = []string{"lan0", "wan0"}
	r := mustBuild(t, twoZones(), o)
	byText, byGo := newJourney(t).gw, newJourney(t).gw
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
			t.Errorf("%s\n%s", list, firstDifference(want, got))
		}
	}
	if !strings.Contains(byGo.sh("nft list ruleset"), "queue to 100-103") {
		t.Error("no queue of nft's own")
	}
}

// newOffloading is a gateway whose flowtable has both interfaces, and where no
// protocol has a timer of its own.
func newOffloading(t *testing.T) (journey, *Table, Options) {
	t.Helper()
	in := flowPolicy()
	in.Timers = nil
	return newOffloadingOf(t, in)
}

func newOffloadingOf(t *testing.T, in Input) (journey, *Table, Options) {
	t.Helper()
	j := newJourney(t)
	j.client.sh("ping -6 -n -c 1 -i 0.2 -w 5 2001:db8:b::10")
	table := openTable(t, j.gw)
	o := testOptions(t)
	o.Flowtable = []string{"lan0", "wan0"}
	mustLoad(t, table, mustBuild(t, in, o))
	for _, n := range sysctlNeeds {
		j.gw.sh("sysctl -qw " + n.path + "=" + n.value)
	}
	return j, table, o
}

func newUnoffloader(t *testing.T, j journey, table *Table) *Cutter {
	t.Helper()
	c := made(j.gw, func() (*Cutter, error) {
		return NewCutter(CutConfig{Marks: testMarks(t), Unoffload: table.Unoffload, Logger: zaptest.NewLogger(t)})
	})
	t.Cleanup(func() { c.Close() })
	await(t, c.Run)
	return c
}

// isOffloaded asks conntrack.
func isOffloaded(t *testing.T, j journey, tuple flow.Tuple) bool {
	t.Helper()
	living := made(j.gw, func() ([]KernelFlow, error) { return Dump(t.Context(), testMarks(t), flow.Kernel) })
	for _, f := range living {
		if f.Tuple == tuple {
			return f.Offloaded()
		}
	}
	t.Fatalf("%v is not among %+v", tuple, living)
	return false
}

// offloadedTCP is an idle connection that the flowtable carries.
func offloadedTCP(t *testing.T, j journey, to string) (client, server *net.TCPConn, tuple flow.Tuple) {
	t.Helper()
	client, server = connectTCP(j, to)
	t.Cleanup(func() { client.Close(); server.Close() })
	tuple = tupleOf(flow.TCP, client)
	exchange(t, client, server, 1)
	exchange(t, server, client, 1)
	if !isOffloaded(t, j, tuple) {
		t.Fatalf("%v is not offloaded", tuple)
	}
	return client, server, tuple
}

func watchEnds(t *testing.T, j journey) chan KernelFlow {
	t.Helper()
	ended := make(chan KernelFlow, 10)
	w := made(j.gw, func() (*Watch, error) {
		return NewWatch(testMarks(t), func(f KernelFlow) { ended <- f }, func() { t.Error("events were lost") })
	})
	await(t, w.Run)
	return ended
}

// What the flowtable carried is in the counts of the end.
func TestStockOffloadedFlowsAreCounted(t *testing.T) {
	j, _, _ := newOffloading(t)
	j.gw.sh("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_close=1")
	ended := watchEnds(t, j)
	for _, to := range []string{"203.0.113.10:80", "[2001:db8:b::10]:80"} {
		client, server, tuple := offloadedTCP(t, j, to)
		const out, in = 3 << 20, 1 << 20
		exchange(t, client, server, out)
		exchange(t, server, client, in)
		if !isOffloaded(t, j, tuple) {
			t.Errorf("%v does not stay offloaded", tuple)
		}
		client.SetLinger(0)
		client.Close()
		f := nextEnd(t, j, ended)
		for _, x := range []struct {
			way            string
			bytes, packets uint64
			payload        uint64
		}{{"out", f.Counts.OutBytes, f.Counts.OutPackets, out}, {"in", f.Counts.InBytes, f.Counts.InPackets, in}} {
			// Besides the payload there are headers and acknowledgements.
			if x.bytes < x.payload || x.bytes > x.payload+x.payload/4 || x.packets < x.payload/65536 {
				t.Errorf("%s %s: %d bytes in %d packets for %d of payload", to, x.way, x.bytes, x.packets, x.payload)
			}
		}
		if f.Tuple != tuple {
			t.Errorf("ended %v, want %v", f.Tuple, tuple)
		}
	}
}

// nextEnd waits for an end; the kernel collects expired entries when they are
// looked at.
func nextEnd(t *testing.T, j journey, ended chan KernelFlow) KernelFlow {
	t.Helper()
	for range 40 {
		select {
		case f := <-ended:
			return f
		case <-time.After(500 * time.Millisecond):
			j.gw.sh("conntrack -L 2>/dev/null; conntrack -f ipv6 -L 2>/dev/null")
		}
	}
	t.Fatal("no end")
	panic("unreachable")
}

func TestStockCutOffloadedIdle(t *testing.T) {
	j, table, _ := newOffloading(t)
	c := newUnoffloader(t, j, table)
	ended := watchEnds(t, j)
	for _, to := range []string{"203.0.113.10:80", "[2001:db8:b::10]:80"} {
		client, server, tuple := offloadedTCP(t, j, to)
		other, otherServer, otherTuple := offloadedTCP(t, j, to)
		if err := c.Cut(t.Context(), tuple); err != nil {
			t.Fatal(err)
		}
		resetWithin(t, "client of "+to, client, 2*time.Second)
		resetWithin(t, "server "+to, server, 2*time.Second)
		if f := next(t, "end of "+tuple.String(), ended); f.Tuple != tuple || !testMarks(t).IsCut(f.Mark) {
			t.Errorf("ended %+v", f)
		}
		exchange(t, other, otherServer, 1000)
		exchange(t, otherServer, other, 1000)
		if !isOffloaded(t, j, otherTuple) {
			t.Errorf("%v did not come back into the flowtable", otherTuple)
		}
		other.Close()
	}
}

func TestStockCutOffloadedBusy(t *testing.T) {
	j, table, _ := newOffloading(t)
	c := newUnoffloader(t, j, table)
	client, server, tuple := offloadedTCP(t, j, "203.0.113.10:80")
	type end struct {
		err error
		at  time.Time
	}
	clientEnd, serverEnd := make(chan end, 1), make(chan end, 1)
	var received atomic.Int64
	flowing := make(chan struct{})
	go func() {
		b := make([]byte, 64<<10)
		for {
			if _, err := client.Write(b); err != nil {
				clientEnd <- end{err, time.Now()}
				return
			}
		}
	}()
	go func() {
		b := make([]byte, 64<<10)
		for {
			n, err := server.Read(b)
			if err != nil {
				serverEnd <- end{err, time.Now()}
				return
			}
			if before := received.Add(int64(n)); before >= 4<<20 && before-int64(n) < 4<<20 {
				close(flowing)
			}
		}
	}()
	<-flowing
	if err := c.Cut(t.Context(), tuple); err != nil {
		t.Fatal(err)
	}
	cut, carried := time.Now(), received.Load()
	for who, ch := range map[string]chan end{"client": clientEnd, "server": serverEnd} {
		e := next(t, "end of the "+who, ch)
		late := e.at.Sub(cut)
		if !errors.Is(e.err, unix.ECONNRESET) && !errors.Is(e.err, unix.EPIPE) || late > 2*time.Second {
			t.Errorf("%s: %v after %v, want a reset", who, e.err, late)
		}
		t.Logf("the %s knows after %v", who, late)
	}
	t.Logf("%d bytes arrived after the cut", received.Load()-carried)
}

func TestStockCutOffloadedUDP(t *testing.T) {
	j, table, _ := newOffloading(t)
	c := newUnoffloader(t, j, table)
	serveUDP(t, j.server, "203.0.113.10:53")
	client := made(j.client, func() (net.Conn, error) { return net.Dial("udp", "203.0.113.10:53") })
	defer client.Close()
	asks := func() error { return askUDP(client) }
	for range 4 {
		if err := asks(); err != nil {
			t.Fatal(err)
		}
	}
	tuple := tupleOf(flow.UDP, client)
	if !isOffloaded(t, j, tuple) {
		t.Fatalf("%v is not offloaded", tuple)
	}
	if err := c.Cut(t.Context(), tuple); err != nil {
		t.Fatal(err)
	}
	if err := asks(); err == nil {
		t.Error("an answer after the cut")
	}
}

// askUDP sends a datagram to a server of serveUDP and waits for the answer.
func askUDP(client net.Conn) error {
	if _, err := client.Write([]byte("?")); err != nil {
		return err
	}
	client.SetReadDeadline(time.Now().Add(short))
	_, err := client.Read(make([]byte, 64))
	return err
}

// A flow whose protocol has a timer of its own passes the rules, since the
// flowtable knows one time for all.
func TestStockTimedUDPIsNotOffloaded(t *testing.T) {
	j, _, _ := newOffloadingOf(t, flowPolicy())
	serveUDP(t, j.server, "203.0.113.10:53")
	client := made(j.client, func() (net.Conn, error) { return net.Dial("udp", "203.0.113.10:53") })
	defer client.Close()
	for range 4 {
		if err := askUDP(client); err != nil {
			t.Fatal(err)
		}
	}
	if tuple := tupleOf(flow.UDP, client); isOffloaded(t, j, tuple) {
		t.Errorf("%v is offloaded", tuple)
	}
}

// Datagrams in one direction alone are a flow as well, and no cut of another
// flow ends it.
func TestStockUnoffloadKeepsOneWayUDP(t *testing.T) {
	j, table, _ := newOffloading(t)
	server := made(j.server, func() (net.PacketConn, error) { return net.ListenPacket("udp", "203.0.113.10:53") })
	defer server.Close()
	client := made(j.client, func() (net.Conn, error) { return net.Dial("udp", "203.0.113.10:53") })
	defer client.Close()
	tuple, seen := tupleOf(flow.UDP, client), ""
	say := func() string {
		t.Helper()
		if _, err := client.Write([]byte("one way")); err != nil {
			t.Fatal(err)
		}
		server.SetReadDeadline(time.Now().Add(2 * time.Second))
		_, peer, err := server.ReadFrom(make([]byte, 64))
		if err != nil {
			t.Fatal(err)
		}
		return peer.String()
	}
	for range 3 {
		seen = say()
	}
	if !isOffloaded(t, j, tuple) {
		t.Fatalf("%v is not offloaded", tuple)
	}
	id := entryID(t, j, tuple)
	if err := table.Unoffload(t.Context()); err != nil {
		t.Fatal(err)
	}
	for isOffloaded(t, j, tuple) {
		t.Log("still offloaded")
	}
	if now := say(); now != seen || entryID(t, j, tuple) != id {
		t.Errorf("the flow was %s, entry %d, and is %s, entry %d", seen, id, now, entryID(t, j, tuple))
	}
}

func entryID(t *testing.T, j journey, tuple flow.Tuple) uint32 {
	t.Helper()
	for _, f := range made(j.gw, func() ([]KernelFlow, error) { return Dump(t.Context(), testMarks(t), flow.Kernel) }) {
		if f.Tuple == tuple {
			return f.ID
		}
	}
	t.Fatalf("%v is gone", tuple)
	return 0
}

// A reload leaves flows where they are, and so does a device that comes.
func TestStockReloadKeepsFlowsOffloaded(t *testing.T) {
	j, table, o := newOffloading(t)
	client, server, tuple := offloadedTCP(t, j, "203.0.113.10:80")
	load := func(devices ...string) {
		t.Helper()
		o.Flowtable = devices
		mustLoad(t, table, mustBuild(t, flowPolicy(), o))
	}
	offloaded := func(when string) {
		t.Helper()
		if !isOffloaded(t, j, tuple) {
			t.Errorf("%s: %v is not offloaded", when, tuple)
		}
	}
	devices := func(want string) {
		t.Helper()
		if list := j.gw.sh("nft list flowtables"); !strings.Contains(list, "devices = { "+want+" }") || !strings.Contains(list, "counter") {
			t.Errorf("want %s in\n%s", want, list)
		}
	}
	load("lan0", "wan0")
	offloaded("the same again")
	j.gw.sh("ip link add dmz0 type dummy; ip link set dmz0 up")
	load("dmz0", "lan0", "wan0")
	offloaded("a device more")
	devices("dmz0, lan0, wan0")
	j.gw.sh("ip link del dmz0")
	devices("lan0, wan0")
	load("dmz0", "lan0", "wan0") // it went between Build and Load
	devices("lan0, wan0")
	offloaded("a device that has gone")
	load("lan0", "wan0")
	offloaded("without it")
	// With fewer devices the flowtable is another one; no flow is lost.
	load("lan0")
	devices("lan0")
	exchange(t, client, server, 100_000)
	exchange(t, server, client, 100_000)
	load()
	if list := j.gw.sh("nft list flowtables"); strings.Contains(list, "devices") {
		t.Errorf("a flowtable stays:\n%s", list)
	}
	exchange(t, client, server, 100_000)
	load("lan0", "wan0")
	exchange(t, client, server, 1)
	exchange(t, server, client, 1)
	offloaded("back again")
}

// A device that vanishes between the list of the flowtable and its renewal.
func TestStockUnoffloadWhileDevicesVanish(t *testing.T) {
	j, table, o := newOffloading(t)
	_, _, tuple := offloadedTCP(t, j, "203.0.113.10:80")
	o.Flowtable = append(o.Flowtable, "dmz0")
	ctx, cancel := context.WithCancel(t.Context())
	flapping := make(chan struct{})
	go func() {
		defer close(flapping)
		for ctx.Err() == nil {
			_, _ = j.gw.try("ip link add dmz0 type dummy; ip link del dmz0")
		}
	}()
	for range 30 {
		mustLoad(t, table, mustBuild(t, flowPolicy(), o))
		if err := table.Unoffload(t.Context()); err != nil {
			t.Error(err)
		}
	}
	cancel()
	<-flapping
	if list := j.gw.sh("nft list flowtables; nft list chain inet sluice carry"); !strings.Contains(list, "lan0") || !strings.Contains(list, "flow add @fast") {
		t.Errorf("%v: offloading has ended:\n%s", tuple, list)
	}
}

// BenchmarkStockUnoffload measures one renewal of the flowtable.
func BenchmarkStockUnoffload(b *testing.B) {
	s := newSpace(b)
	s.sh("ip link add lan0 type dummy; ip link add wan0 type dummy")
	table := openTable(b, s)
	o := testOptions(b)
	o.Flowtable = []string{"lan0", "wan0"}
	mustLoad(b, table, mustBuild(b, twoZones(), o))
	for b.Loop() {
		if err := table.Unoffload(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
