package lab

import (
	"fmt"
	"testing"
	"time"
)

func TestStale(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	dead := func(int) bool { return false }
	living := func(int) bool { return true }
	for _, c := range []struct {
		name  string
		alive func(int) bool
		want  bool
	}{
		{fmt.Sprintf("slc-77-%d-1-gw", now.Unix()-3601), dead, true},
		{fmt.Sprintf("slc-77-%d-1-gw", now.Unix()-3601), living, false},
		{fmt.Sprintf("slc-77-%d-1-gw", now.Unix()-3500), dead, false},
		{fmt.Sprintf("other-77-%d-1-gw", now.Unix()-7200), dead, false},
		{fmt.Sprintf("slc-x-%d-1-gw", now.Unix()-7200), dead, false},
		{"slc-77", dead, false},
		{"slc-77-x-1-gw", dead, false},
	} {
		if got := stale(c.name, now, c.alive); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestParseTracked(t *testing.T) {
	for line, want := range map[string]string{
		"ipv4     2 tcp      6 431999 ESTABLISHED src=10.0.0.2 dst=203.0.113.10 sport=4000 dport=7 packets=3 bytes=170 src=203.0.113.10 dst=203.0.113.1 sport=7 dport=10001 packets=2 bytes=110 [ASSURED] mark=83886080 use=1": "tcp ESTABLISHED 10.0.0.2:4000 203.0.113.10:7 203.0.113.10:7 203.0.113.1:10001 kernel 170 110 true false",
		"ipv6     10 udp      17 29 src=fd00:a::2 dst=2001:db8:b::10 sport=5 dport=6 [UNREPLIED] src=2001:db8:b::10 dst=fd00:a::2 sport=6 dport=5 mark=100663296 use=1":                                                        "udp  [fd00:a::2]:5 [2001:db8:b::10]:6 [2001:db8:b::10]:6 [fd00:a::2]:5 user 0 0 false false",
		"ipv4     2 tcp      6 src=10.0.0.2 dst=203.0.113.10 sport=4000 dport=7 src=203.0.113.10 dst=203.0.113.1 sport=7 dport=10001 [OFFLOAD] mark=0 use=2":                                                                   "tcp  10.0.0.2:4000 203.0.113.10:7 203.0.113.10:7 203.0.113.1:10001  0 0 false true",
	} {
		f, ok := parseTracked(line)
		got := fmt.Sprint(f.Proto, " ", f.State, " ", f.Src, " ", f.Dst, " ", f.ReplySrc, " ", f.ReplyDst, " ", f.Path(), " ", f.OutBytes, " ", f.InBytes, " ", f.Assured, " ", f.Offloaded)
		if !ok || got != want {
			t.Errorf("%s\n got %s\nwant %s", line, got, want)
		}
	}
	if _, ok := parseTracked("conntrack v1.4.7 (conntrack-tools): 3 flow entries have been shown."); ok {
		t.Error("the closing line is taken for an entry")
	}
}

func TestSnapshotDiff(t *testing.T) {
	a := Snapshot{"same": "1", "changed": "1", "gone": "1"}
	if d := a.Diff(Snapshot{"same": "1", "changed": "1", "gone": "1"}); d != "" {
		t.Errorf("equal snapshots differ: %s", d)
	}
	for _, b := range []Snapshot{{"same": "1", "changed": "2", "gone": "1"}, {"same": "1", "changed": "1"}, {"same": "1", "changed": "1", "gone": "1", "new": ""}} {
		if a.Diff(b) == "" {
			t.Errorf("%v and %v do not differ", a, b)
		}
	}
}
