package userpath

import (
	"context"
	"encoding/binary"
	"testing"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// From the message that has a packet to its verdict no garbage is made of one
// that can be decided at once.
func TestQueueAllocatesNothing(t *testing.T) {
	marks, err := flow.NewMarks(flow.DefaultMask)
	if err != nil {
		t.Fatal(err)
	}
	q := &Queues{
		cfg: QueueConfig{Marks: marks, Logger: zap.NewNop(), DecideNow: func(p flow.Packet) (flow.Path, bool) { return flow.Kernel, p.InIface == "lan0" },
			IfaceName: func(int) string { return "lan0" }},
		table: newTable(10),
	}
	x := &queue{q: q}
	r := &reader{x: x, q: q, sock: &queueSocket{number: 7}, v: newVerdicts(marks, &q.count)}
	p := make([]byte, 32)
	p[0], p[8], p[9], p[3] = 0x45, 64, byte(flow.UDP), 32
	binary.BigEndian.PutUint16(p[24:], 12)
	message := packetMessage(1, 0, 3, p)
	n := 0
	if allocs := testing.AllocsPerRun(1000, func() {
		n++
		binary.BigEndian.PutUint16(message[len(message)-12:], uint16(n)) // another source port
		r.datagram(message)
		if r.v.n != 1 || r.batch != nil {
			t.Fatalf("%d verdicts, batch %v", r.v.n, r.batch)
		}
		r.v.buf, r.v.n = r.v.buf[:0], 0
	}); allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
	if got := q.count.decisions.Load(); got != uint64(n) {
		t.Errorf("%d decisions of %d packets", got, n)
	}
}

// What cannot be decided at once goes to Decide, with all packets of its flow;
// what can, does not wait for it.
func TestQueueDecidesNow(t *testing.T) {
	l := newQueueLab(t, false)
	slow, release := make(chan struct{}), make(chan struct{})
	l.start(QueueConfig{
		DecideNow: func(p flow.Packet) (flow.Path, bool) { return flow.Kernel, p.Dst.Port() == 7001 },
		Decide: func(context.Context, flow.Packet) engine.Decision {
			close(slow) // once
			<-release
			return engine.Decision{Path: flow.Kernel}
		},
	})
	waits, passes := l.udpServer("10.0.0.1:7000"), l.udpServer("10.0.0.1:7001")
	first := l.udpClient("10.0.0.1:7000")
	send(t, first, "one")
	<-slow
	send(t, first, "two")
	send(t, l.udpClient("10.0.0.1:7001"), "quick")
	if got := receive(t, passes); got != "quick" {
		t.Errorf("received %q", got)
	}
	l.eventually("the second waits as well", func() bool { return l.q.Stats().Held == 1 })
	close(release)
	for _, want := range []string{"one", "two"} {
		if got := receive(t, waits); got != want {
			t.Errorf("received %q, want %q", got, want)
		}
	}
	if s := l.q.Stats(); s.Decisions != 2 {
		t.Errorf("%+v", s)
	}
}
