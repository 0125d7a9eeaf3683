package kernelpath

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
)

const reportRules = `
table inet reporting {
	chain arrive { type filter hook prerouting priority -155; policy accept;
		iifname "lan0" udp dport 1000 meta mark set 0x77 log prefix "use" group 77
		iifname "lan0" udp dport 2000 log prefix "deny" group 77 drop
		iifname "lan0" udp dport 3000 log prefix "other" group 77
	}
}`

func TestReports(t *testing.T) {
	j := newJourney(t)
	j.gw.nft(reportRules)
	routes := made(j.gw, NewRoutes)
	defer routes.Close()
	type report struct {
		kind string
		flow.Packet
	}
	told := make(chan report, 100)
	r := made(j.gw, func() (*Reports, error) {
		return NewReports(77, func(i int) string { name, _ := routes.InterfaceName(i); return name },
			Heard{Used: func(p flow.Packet) { told <- report{"use", p} }, Denied: func(p flow.Packet) { told <- report{"deny", p} }})
	})
	// What is reported before Run waits.
	send := func(to string) flow.Tuple {
		c := made(j.client, func() (net.Conn, error) { return net.Dial("udp", to) })
		defer c.Close()
		c.Write(make([]byte, 1000))
		return tupleOf(flow.UDP, c)
	}
	early := send("203.0.113.10:1000")
	await(t, r.Run)
	if got, want := next(t, "early report", told), (report{"use", flow.Packet{Tuple: early, InIface: "lan0", Mark: 0x77}}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	soonest := time.Hour
	for to, kind := range map[string]string{"203.0.113.10:2000": "deny", "[2001:db8:b::10]:1000": "use", "[2001:db8:b::10]:2000": "deny"} {
		send("203.0.113.10:3000")
		start := time.Now()
		want := report{kind, flow.Packet{Tuple: send(to), InIface: "lan0"}}
		if kind == "use" {
			want.Mark = 0x77
		}
		if got := next(t, "report of "+to, told); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		soonest = min(soonest, time.Since(start))
	}
	// A kernel that gathers reports holds each of them for a second.
	if soonest > 900*time.Millisecond {
		t.Errorf("the soonest report took %v", soonest)
	}
	if r.Lost() != 0 || len(told) != 0 {
		t.Errorf("lost %d, %d more", r.Lost(), len(told))
	}
}

// TestReportsEndWithTheirSocket: an error ends Run although its context lives.
func TestReportsEndWithTheirSocket(t *testing.T) {
	s := newSpace(t)
	r := made(s, func() (*Reports, error) {
		return NewReports(78, func(int) string { return "" }, Heard{})
	})
	ended := make(chan error, 1)
	go func() { ended <- r.Run(context.Background()) }()
	r.Close()
	if err := next(t, "end of Run", ended); err == nil {
		t.Error("no error")
	}
}

func TestReportsGroupInUse(t *testing.T) {
	s := newSpace(t)
	open := func() (*Reports, error) {
		return NewReports(79, func(int) string { return "" }, Heard{})
	}
	first := made(s, open)
	defer first.Close()
	s.in(func() error {
		if second, err := open(); err == nil {
			second.Close()
			t.Error("a group has two readers")
		}
		return nil
	})
}
