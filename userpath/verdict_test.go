package userpath

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// said are the messages of a send, each as its kind, verdict, id, and mark.
func said(b []byte) (list []string) {
	for {
		kind, _, body, rest, ok := netlinkMessage(b)
		if !ok {
			return list
		}
		name, mark := "one", uint32(0)
		if kind == nfqMsgBatch {
			name = "up to"
		}
		if len(body) > 16 {
			mark = binary.BigEndian.Uint32(body[20:])
		}
		list = append(list, fmt.Sprintf("%s %d: %d %x", name, binary.BigEndian.Uint32(body[12:]), binary.BigEndian.Uint32(body[8:]), mark))
		b = rest
	}
}

// Packets that fare alike share a message, but none covers a packet that waits
// for somebody else's verdict.
func TestVerdictsAreSharedByNeighbours(t *testing.T) {
	marks, err := flow.NewMarks(flow.DefaultMask)
	if err != nil {
		t.Fatal(err)
	}
	v := newVerdicts(marks, &counters{})
	v.reader = true
	s := &queueSocket{number: 7}
	pass := func(id, mark uint32) { v.path(heldPacket{sock: s, id: id, mark: mark}, flow.Kernel) }
	pass(1, 0)
	pass(2, 0)
	pass(3, 0)
	v.drop(heldPacket{sock: s, id: 4})
	pass(5, 0)
	pass(6, 0xf0) // somebody else's bits
	pass(7, 0)
	s.held.Add(1) // 8 waits
	pass(9, 0)
	pass(10, 0)
	s.held.Add(-1) // and has its own verdict
	pass(11, 0)
	want := []string{
		"up to 3: 4 5000000", "one 4: 0 0", "one 5: 4 5000000", "one 6: 4 50000f0", "one 7: 4 5000000",
		"one 9: 4 5000000", "up to 11: 4 5000000",
	}
	if got := said(v.buf); !slices.Equal(got, want) {
		t.Errorf("said %q, want %q", got, want)
	}
	others := newVerdicts(marks, &counters{})
	for id := range uint32(3) {
		others.path(heldPacket{sock: s, id: id}, flow.Kernel)
	}
	if got := said(others.buf); len(got) != 3 {
		t.Errorf("of held packets it said %q", got)
	}
}

// Packets behind and before one that waits are let pass together; the one that
// waits stays, and has its own answer.
func TestQueueHoldsAmongNeighbours(t *testing.T) {
	l := newQueueLab(t, false)
	read, asked, drop := make(chan struct{}), make(chan struct{}), make(chan struct{})
	await := sync.OnceFunc(func() { <-read })
	l.start(QueueConfig{
		DecideNow: func(p flow.Packet) (flow.Path, bool) {
			await() // until all have queued
			switch p.Dst.Port() {
			case 7000:
				return flow.Drop, false
			case 7001:
				return flow.Drop, true
			}
			return flow.Kernel, true
		},
		Decide: func(context.Context, flow.Packet) engine.Decision {
			close(asked) // once
			<-drop
			return engine.Decision{}
		},
	})
	const many = 100
	passes := l.udpServer("10.0.0.1:7002")
	waits, never := l.udpServer("10.0.0.1:7000"), l.udpServer("10.0.0.1:7001")
	quick := l.udpClient("10.0.0.1:7002")
	for i := range many {
		switch i {
		case 10:
			send(t, l.udpClient("10.0.0.1:7000"), "waits")
		case 20:
			send(t, l.udpClient("10.0.0.1:7001"), "never")
		}
		send(t, quick, fmt.Sprint(i))
	}
	close(read)
	for i := range many {
		if got := receive(t, passes); got != fmt.Sprint(i) {
			t.Fatalf("received %q, want %d", got, i)
		}
	}
	<-asked
	nothing := func() {
		t.Helper()
		for _, c := range []*net.UDPConn{waits, never} {
			raw, err := c.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			if err := raw.Control(func(fd uintptr) {
				if rawReadable(int(fd)) {
					t.Errorf("%v: a packet came out of the queue", c.LocalAddr())
				}
			}); err != nil {
				t.Fatal(err)
			}
		}
	}
	nothing()
	close(drop)
	l.eventually("the one that waited has its verdict", func() bool { return l.q.Stats().Flows == 0 })
	nothing()
	if s := l.q.Stats(); s.Dropped != 2 || s.Gone+s.Refused+s.Unsent != 0 {
		t.Errorf("%+v", s)
	}
}
