package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{[]float64{3}, 3}, {[]float64{9, 1, 2}, 2}, {[]float64{4, 1, 3, 2}, 2.5}} {
		before := append([]float64(nil), c.in...)
		if got := median(c.in); got != c.want {
			t.Errorf("median(%v) = %v, want %v", before, got, c.want)
		}
		for i := range before {
			if c.in[i] != before[i] {
				t.Errorf("median changed its argument %v to %v", before, c.in)
			}
		}
	}
}

// A NAT that keeps ports must never meet the same (server, source port) twice:
// the baseline would search for a free one, and not be the baseline.
func TestEndsAreDistinct(t *testing.T) {
	type end struct {
		server [4]byte
		sport  uint16
	}
	seen := map[end]uint32{}
	clients := map[[4]byte]bool{}
	for k := range uint32(1_000_000) {
		client, server, sport := ends(k)
		e := end{server, sport}
		if other, twice := seen[e]; twice {
			t.Fatalf("flows %d and %d share %v", other, k, e)
		}
		seen[e] = k
		clients[client] = true
		if sport < 32768 || sport > 60999 {
			t.Fatalf("flow %d: source port %d is not one that Linux chooses", k, sport)
		}
	}
	if len(clients) != 16 {
		t.Errorf("%d clients, want 16", len(clients))
	}
}

func TestBatchAddressesPackets(t *testing.T) {
	b := newBatch(5003, smallPacket)
	b.fill(70, 70, newFlows)
	for i, p := range b.packets {
		client, server, sport := ends(70 + uint32(i))
		if !bytes.Equal(p[12:16], client[:]) || !bytes.Equal(p[16:20], server[:]) || b.to[i].Addr != server {
			t.Fatalf("packet %d: addresses % x", i, p[12:20])
		}
		if got := binary.BigEndian.Uint16(p[20:]); got != sport {
			t.Fatalf("packet %d: source port %d, want %d", i, got, sport)
		}
		if got := binary.BigEndian.Uint16(p[22:]); got != 5003 {
			t.Fatalf("packet %d: destination port %d", i, got)
		}
		if got := binary.BigEndian.Uint16(p[24:]); int(got) != len(p)-20 {
			t.Fatalf("packet %d: UDP length %d of %d", i, got, len(p)-20)
		}
	}
	b.fill(70, 70, oneFlow)
	if !bytes.Equal(b.packets[0], b.packets[sendmmsgMany-1]) {
		t.Error("packets of one flow differ")
	}
}

// One endpoint's flows go to as many servers; new endpoints are each another.
func TestEndpoints(t *testing.T) {
	const first, n = 1000, burstFlows
	servers, endpoints, clashes := map[[4]byte]bool{}, map[string]bool{}, map[string]bool{}
	for k := range uint32(n) {
		client, server, sport := oneEndpoint.ends(first, first+k)
		wantClient, _, wantPort := ends(first)
		if client != wantClient || sport != wantPort {
			t.Fatalf("flow %d is from %v, port %d", k, client, sport)
		}
		servers[server] = true
		client, server, sport = newEndpoints.ends(first, first+k)
		endpoints[fmt.Sprint(client, sport)] = true
		clashes[fmt.Sprint(server, sport)] = true
	}
	if len(servers) != n || len(endpoints) != n || len(clashes) != n {
		t.Errorf("%d flows: %d servers of one endpoint; %d endpoints, %d without a clash", n, len(servers), len(endpoints), len(clashes))
	}
}

func TestLeftover(t *testing.T) {
	alive := func(pid int) bool { return pid == 7 }
	for name, want := range map[string]bool{
		"slc-8-1700000000-1-benchg": true,
		"slc-7-1700000000-1-benchg": false, // it lives
		"slc-8-1700000000-1-client": false, // not ours
		"slc-x-1700000000-1-benchg": false,
		"other":                     false,
	} {
		if got := leftover(name, alive); got != want {
			t.Errorf("leftover(%q) = %v", name, got)
		}
	}
}

func TestProcessorTime(t *testing.T) {
	got, err := cpuOf([]byte("12 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 25 0 0 20"))
	if err != nil || got != 1750*time.Millisecond {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := cpuOf([]byte("12 (a) S 1")); err == nil {
		t.Error("a short line was read")
	}
}

func TestReport(t *testing.T) {
	got := result{
		Of:     []sample{{Rate: 8}, {Rate: 9}, {Rate: 10}},
		Than:   []sample{{Rate: 10}, {Rate: 10}, {Rate: 10}},
		Ratios: []float64{0.8, 0.9, 1},
	}
	r := newReport(options{rounds: 5})
	r.add(benchCase{name: "(x) one", unit: "Gbit/s", expect: 0.95, baseline: "bare"}, got)
	if r.met() {
		t.Error("0.9 meets 0.95")
	}
	table := r.table()
	if want := "| (x) one | 9.00 Gbit/s | bare: 10.0 Gbit/s | **0.90** | 0.80..1.00 | >= 0.95, **missed** |\n"; !strings.Contains(table, want) {
		t.Errorf("no line %q in\n%s", want, table)
	}
	var out bytes.Buffer
	if err := r.print(&out, true); err != nil {
		t.Fatal(err)
	}
	var back report
	if err := json.Unmarshal(out.Bytes(), &back); err != nil || len(back.Rows) != 1 || back.Rows[0].Ratio != 0.9 || back.Rows[0].Met {
		t.Errorf("JSON: %v\n%s", err, out.String())
	}
	r.Rows = nil
	r.skip(benchCase{name: "(z)"}, notHere("no such thing"))
	if table := r.table(); !strings.Contains(table, "| (z) | not measured: no such thing | | | | |\n") {
		t.Errorf("nothing of what was not measured in\n%s", table)
	}
	r.add(benchCase{name: "(y)"}, got)
	if !r.met() {
		t.Error("a row for information misses")
	}
}

// In a self-check too much is as wrong as too little.
func TestSelfCheckIsTwoSided(t *testing.T) {
	for ratio, want := range map[float64]bool{0.85: false, 0.95: true, 1.05: true, 1.2: false} {
		r := newReport(options{selfCheck: true})
		r.add(benchCase{expect: selfCheckLeast}, result{
			Of: []sample{{Rate: ratio}}, Than: []sample{{Rate: 1}}, Ratios: []float64{ratio},
		})
		if r.met() != want {
			t.Errorf("ratio %v: met %v", ratio, r.met())
		}
	}
}

func TestRate(t *testing.T) {
	if got := (amount{units: 50, time: 250 * time.Millisecond}).rate(); math.Abs(got-200) > 1e-9 {
		t.Errorf("rate %v, want 200", got)
	}
}

func TestSizeRows(t *testing.T) {
	if got, err := memoryOf("Name:\tgateway\nVmHWM:\t   30000 kB\nVmRSS:\t   20480 kB\n"); err != nil || got != 20<<20 {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := memoryOf("Name:\tgateway\n"); err == nil {
		t.Error("no memory, and no error")
	}
	var b strings.Builder
	rows := []sizeRow{{"flows", 0.5, "B", 1}, {"new ones", 200, "1000/s", 0}}
	if !printSizes(&b, rows) || !strings.Contains(b.String(), "| flows | 0.50 B | <= 1.00, met |\n| new ones | 200 1000/s | - |") {
		t.Error(b.String())
	}
	if printSizes(&b, []sizeRow{{"flows", 2, "B", 1}}) || !strings.Contains(b.String(), "**missed**") {
		t.Error(b.String())
	}
}
