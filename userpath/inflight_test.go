package userpath

import (
	"context"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

func packetOf(proto flow.Proto, port uint16) flow.Packet {
	return flow.Packet{Tuple: flow.Tuple{
		Proto: proto, Src: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.2"), port), Dst: netip.MustParseAddrPort("192.0.2.1:53"),
	}}
}

// arriveAs enters a packet and says what became of it.
func arriveAs(t *testing.T, tb *table, p flow.Packet, id uint32, want arrival, path flow.Path) *inflight {
	t.Helper()
	f, what, got := tb.arrive(p, heldPacket{id: id}, false, tb.now(), 4)
	if what != want || got != path {
		t.Fatalf("packet %d: arrival %d, path %v; want %d, %v", id, what, got, want, path)
	}
	return f
}

// markReleased marks a flow as release does when its verdicts are sent.
func (f *inflight) markReleased() {
	f.shard.mu.Lock()
	defer f.shard.mu.Unlock()
	f.releasedLocked(f.shard.table.now())
}

// An answer stays for a moment after its verdict, for packets that were queued
// before the kernel had it.
func TestAnswerOutlivesItsVerdict(t *testing.T) {
	for _, c := range []struct {
		proto flow.Proto
		path  flow.Path
		want  arrival
	}{
		{flow.UDP, flow.Kernel, arrivalAnswered},
		{flow.UDP, flow.Drop, arrivalAnswered},
		{flow.TCP, flow.Kernel, arrivalAbsorbed}, // its connection stands already
		{flow.TCP, flow.Reject, arrivalAnswered}, // the next one is refused too
	} {
		t.Run(fmt.Sprint(c.proto, c.path), func(t *testing.T) {
			q := &Queues{cfg: QueueConfig{HoldAfter: time.Second}, table: newTable(8)}
			w := &sweeper{q: q, v: newVerdicts(flow.Marks{}, &q.count)}
			p := packetOf(c.proto, 1)
			f := arriveAs(t, q.table, p, 1, arrivalNew, flow.Drop)
			if release, late := f.settle(c.path); !release || late {
				t.Fatalf("release %v, late %v", release, late)
			}
			if _, late := f.settle(flow.Kernel); !late {
				t.Fatal("a second answer was taken")
			}
			f.markReleased()
			path := c.path
			if c.want == arrivalAbsorbed {
				path = flow.Drop
			}
			w.sweep(q.table.now(), true)
			arriveAs(t, q.table, p, 2, c.want, path)
			w.sweep(q.table.now()+2*releasedGrace, true)
			arriveAs(t, q.table, p, 3, arrivalNew, flow.Drop)
			if n := q.table.live.Load(); n != 1 {
				t.Fatalf("%d flows live", n)
			}
		})
	}
}

// An answer that comes while packets are between two queues waits for the last
// of them; one that never arrives costs its flow, not more.
func TestAnswerWaitsForMovingPackets(t *testing.T) {
	for _, arrives := range []bool{true, false} {
		t.Run(fmt.Sprintf("arrives %v", arrives), func(t *testing.T) {
			q := &Queues{cfg: QueueConfig{HoldAfter: time.Second, DecideWithin: time.Minute}, table: newTable(8),
				holding: []*queue{{number: labHolding}}}
			p := packetOf(flow.UDP, 1)
			f := arriveAs(t, q.table, p, 1, arrivalNew, flow.Drop)
			arriveAs(t, q.table, p, 2, arrivalHeld, flow.Drop)
			w := &sweeper{q: q}
			now := q.table.now() + 2*time.Second
			w.sweepShard(f.shard, now, false)
			if len(w.moves) != 2 || w.moves[0].id != 1 || w.moves[1].id != 2 || w.moves[0].number != labHolding {
				t.Fatalf("%+v", w.moves)
			}
			if release, late := f.settle(flow.Kernel); release || late {
				t.Fatalf("release %v, late %v", release, late)
			}
			if g, ok := q.table.parked(p.Tuple, heldPacket{id: 11, parked: true}); g != nil || !ok {
				t.Fatal("released before the second packet was there")
			}
			if !arrives {
				w.sweepShard(f.shard, now+2*moveWithin, true)
				if q.table.live.Load() != 0 || q.count.lost.Load() != 1 {
					t.Fatal("the flow waits for ever")
				}
				arriveAs(t, q.table, p, 3, arrivalNew, flow.Drop)
				return
			}
			if g, ok := q.table.parked(p.Tuple, heldPacket{id: 12, parked: true}); g != f || !ok {
				t.Fatal("not released with the last packet")
			}
			if f.held[0].id != 11 || f.held[1].id != 12 {
				t.Fatalf("%+v", f.held)
			}
			if _, ok := q.table.parked(p.Tuple, heldPacket{id: 13}); ok {
				t.Fatal("a packet that nobody waits for was taken")
			}
		})
	}
}

// An answer stays longer while its queue has packets that nobody has read, but
// not for ever.
func TestAnswerWaitsForTheReader(t *testing.T) {
	for _, c := range []struct {
		name      string
		read, now time.Duration // since the release
		want      arrival
	}{
		{"unread", 0, 20 * releasedGrace, arrivalAnswered},
		{"read", 2 * releasedGrace, 2 * releasedGrace, arrivalNew},
		{"never read", 0, 2 * releasedMost, arrivalNew},
	} {
		t.Run(c.name, func(t *testing.T) {
			q := &Queues{table: newTable(8)}
			p := packetOf(flow.UDP, 1)
			f := arriveAs(t, q.table, p, 1, arrivalNew, flow.Drop)
			f.settle(flow.Kernel)
			f.markReleased()
			w := &sweeper{q: q, read: f.since + c.read}
			w.sweepShard(f.shard, f.since+c.now, false)
			path := flow.Kernel
			if c.want == arrivalNew {
				path = flow.Drop
			}
			arriveAs(t, q.table, p, 2, c.want, path)
		})
	}
}

// A queue counts as read only when nothing waits and nothing is on its way.
func TestQueueIsRead(t *testing.T) {
	l := newQueueLab(t, false)
	l.start(QueueConfig{Decide: func(context.Context, flow.Packet) engine.Decision { return engine.Decision{Path: flow.Kernel} }})
	l.udpServer("10.0.0.1:7000")
	send(t, l.udpClient("10.0.0.1:7000"), "x")
	l.eventually("the packet was read", func() bool {
		now := l.q.table.now()
		return l.q.Stats().Packets > 0 && l.q.read(now) == now
	})
	x := l.q.queues[0]
	before := time.Duration(x.read.Load())
	if before == 0 {
		t.Fatal("the reader has not said how far it is")
	}
	x.reading.Store(true)
	if got := l.q.read(l.q.table.now()); got != before {
		t.Errorf("while it is being read: %v, want %v", got, before)
	}
	x.reading.Store(false)
}
