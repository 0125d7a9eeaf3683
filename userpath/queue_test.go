package userpath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

func always(p flow.Path) func(context.Context, flow.Packet) engine.Decision {
	return func(context.Context, flow.Packet) engine.Decision { return engine.Decision{Path: p} }
}

func TestQueueHoldsDatagramsInOrder(t *testing.T) {
	for _, addr := range []string{"10.0.0.1:7000", "[fd00::1]:7000"} {
		for _, holding := range []int{0, 1} {
			t.Run(fmt.Sprintf("%s/holding %d", addr, holding), func(t *testing.T) {
				l := newQueueLab(t, false)
				answer := make(chan struct{})
				l.start(QueueConfig{
					FirstHolding: labHolding, NumberHolding: holding,
					Decide: func(context.Context, flow.Packet) engine.Decision {
						<-answer
						return engine.Decision{Path: flow.Kernel}
					},
				})
				s, c := l.udpServer(addr), l.udpClient(addr)
				for i := range 6 {
					send(t, c, fmt.Sprint(i))
				}
				l.eventually("6 packets came", func() bool { return l.q.Stats().Held == 5 })
				l.eventually("they were moved", func() bool { return l.q.Stats().Requeued == uint64(6*holding) })
				close(answer)
				for i := range 6 {
					if got := receive(t, s); got != fmt.Sprint(i) {
						t.Fatalf("datagram %d was %q", i, got)
					}
				}
				send(t, c, "later") // by the mark of the connection
				if got := receive(t, s); got != "later" {
					t.Fatalf("got %q", got)
				}
				if _, all := l.questions(); all != 1 {
					t.Fatalf("%d questions for one flow", all)
				}
				l.eventually("the flow is forgotten", func() bool { return l.q.Stats().Flows == 0 && !l.q.table.busy() })
			})
		}
	}
}

func TestQueueHoldsNoMoreThanItsBound(t *testing.T) {
	l := newQueueLab(t, false)
	answer := make(chan struct{})
	l.start(QueueConfig{MaxHeld: 4, MaxFlows: 1, Decide: func(context.Context, flow.Packet) engine.Decision {
		<-answer
		return engine.Decision{Path: flow.Kernel}
	}})
	s, c, other := l.udpServer("10.0.0.1:7000"), l.udpClient("10.0.0.1:7000"), l.udpClient("10.0.0.1:7000")
	for i := range 10 {
		send(t, c, fmt.Sprint(i))
	}
	l.eventually("the rest was dropped", func() bool { return l.q.Stats().OverHeld == 6 })
	send(t, other, "one flow too many")
	l.eventually("another flow was dropped", func() bool { return l.q.Stats().Overload == 1 })
	close(answer)
	for i := range 4 {
		if got := receive(t, s); got != fmt.Sprint(i) {
			t.Fatalf("datagram %d was %q", i, got)
		}
	}
}

func TestQueueAbsorbsRetransmittedSYN(t *testing.T) {
	l := newQueueLab(t, false)
	l.start(QueueConfig{
		DecideWithin: 5 * time.Second, FirstHolding: labHolding, NumberHolding: 1,
		Decide: func(ctx context.Context, _ flow.Packet) engine.Decision {
			for l.q.Stats().Absorbed == 0 { // until the client repeats itself, after 1 s
				select {
				case <-ctx.Done():
					return engine.Decision{}
				case <-time.After(5 * time.Millisecond):
				}
			}
			return engine.Decision{Path: flow.Kernel}
		},
	})
	l.tcpServer("10.0.0.1:8000")
	if _, err := l.dial("10.0.0.1:8000", 4*time.Second); err != nil {
		t.Fatal(err)
	}
	if s := l.q.Stats(); s.Absorbed != 1 || s.Decisions != 1 {
		t.Fatalf("%+v", s)
	}
}

func TestQueueRejectIsConnectionRefused(t *testing.T) {
	for _, addr := range []string{"10.0.0.1:8001", "[fd00::1]:8001"} {
		l := newQueueLab(t, false)
		l.start(QueueConfig{Decide: always(flow.Reject)})
		l.tcpServer(addr)
		if _, err := l.dial(addr, 3*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatalf("got %v", err)
		}
	}
}

func TestQueueDropsAfterDeadline(t *testing.T) {
	l := newQueueLab(t, false)
	var late atomic.Int32
	abandoned := make(chan string, 1)
	l.start(QueueConfig{
		DecideWithin: 100 * time.Millisecond,
		Decide: func(ctx context.Context, p flow.Packet) engine.Decision {
			if late.Add(1) > 1 {
				return engine.Decision{Path: flow.Kernel}
			}
			<-ctx.Done()
			l.eventually("the flow was dropped", func() bool { return l.q.Stats().Late == 1 })
			return engine.Decision{Path: flow.User, Takeover: &engine.Takeover{}}
		},
	})
	l.q.abandon = func(_ *engine.Takeover, reason string) { abandoned <- reason }
	s, c := l.udpServer("10.0.0.1:7000"), l.udpClient("10.0.0.1:7000")
	send(t, c, "dropped")
	l.eventually("the flow was dropped", func() bool { return l.q.Stats().Dropped == 1 })
	<-abandoned
	l.eventually("the flow is forgotten", func() bool { return !l.q.table.busy() })
	send(t, c, "judged anew")
	if got := receive(t, s); got != "judged anew" {
		t.Fatalf("got %q", got)
	}
}

func TestFailOpenQueuePassesAfterDeadline(t *testing.T) {
	l := newQueueLab(t, true)
	l.start(QueueConfig{
		NumberOpen: 1, DecideWithin: 50 * time.Millisecond,
		Decide: func(ctx context.Context, _ flow.Packet) engine.Decision {
			<-ctx.Done()
			return engine.Decision{}
		},
	})
	s, c := l.udpServer("10.0.0.1:7000"), l.udpClient("10.0.0.1:7000")
	send(t, c, "unjudged")
	if got := receive(t, s); got != "unjudged" {
		t.Fatalf("got %q", got)
	}
}

func TestQueueMovesSlowDial(t *testing.T) {
	for _, want := range []flow.Path{flow.User, flow.Reject} {
		l := newQueueLab(t, false)
		dialled := make(chan struct{})
		l.start(QueueConfig{
			FirstHolding: labHolding, NumberHolding: 2, DecideWithin: 50 * time.Millisecond,
			Decide: func(context.Context, flow.Packet) engine.Decision {
				return engine.Decision{Path: flow.User, Takeover: &engine.Takeover{}}
			},
			Takeovers: labTakeovers(func(ctx context.Context, _ *engine.Takeover) flow.Path {
				<-dialled
				if ctx.Err() != nil {
					return flow.Drop
				}
				return want
			}),
		})
		l.tcpServer("10.0.0.1:8000")
		go func() {
			defer close(dialled) // the deadline of the decision is not the dial's
			l.eventually("the SYN was moved", func() bool { return l.q.Stats().Packets == 2 })
		}()
		_, err := l.dial("10.0.0.1:8000", 4*time.Second)
		if want == flow.User && err != nil || want == flow.Reject && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatalf("%v: client got %v; %+v", want, err, l.q.Stats())
		}
		if s := l.q.Stats(); s.Requeued != 1 || s.Late != 0 || s.Gone != 0 {
			t.Fatalf("%+v", s)
		}
	}
}

// A queue may be lost in two ways: its socket dies, or the kernel's queue goes
// and the socket lives on.
func TestQueueHeals(t *testing.T) {
	unbind := func(q *Queues) error {
		b := appendNfHeader(nil, nfqMsgConfig, unix.NLM_F_REQUEST, 9, labQueue)
		b = appendAttr(b, nfqaCfgCmd, []byte{2, 0, 0, 0})
		b[0] = byte(len(b))
		var sent error
		err := q.queues[0].sock.Load().raw.Control(func(fd uintptr) { sent = sendNetlink(fd, b) })
		return errors.Join(err, sent)
	}
	for name, hurt := range map[string]func(*Queues) error{
		"socket closed": func(q *Queues) error { return q.queues[0].sock.Load().nf.Con.Close() },
		"queue unbound": unbind,
	} {
		t.Run(name, func(t *testing.T) {
			l := newQueueLab(t, false)
			waiting, answer := make(chan struct{}, 8), make(chan struct{})
			l.start(QueueConfig{
				WatchEvery: 20 * time.Millisecond,
				Decide: func(context.Context, flow.Packet) engine.Decision {
					waiting <- struct{}{}
					<-answer
					return engine.Decision{Path: flow.Kernel}
				},
			})
			s, c := l.udpServer("10.0.0.1:7000"), l.udpClient("10.0.0.1:7000")
			send(t, c, "lost with the queue")
			<-waiting
			if err := hurt(l.q); err != nil {
				t.Fatal(err)
			}
			l.eventually("the queue was taken again", func() bool { return l.q.Stats().Reopened == 1 })
			if n := l.q.Stats().Flows; n != 0 {
				t.Fatalf("%d flows outlived their queue", n)
			}
			close(answer)
			send(t, c, "after")
			if got := receive(t, s); got != "after" {
				t.Fatalf("got %q", got)
			}
		})
	}
}

// When a base chain goes, the packets that it queued go too: the verdict is
// answered with ENOENT and the flow may be judged again.
func TestQueueForgetsPacketsThatAreGone(t *testing.T) {
	l := newQueueLab(t, false)
	waiting, answer := make(chan struct{}, 8), make(chan struct{})
	l.start(QueueConfig{Decide: func(context.Context, flow.Packet) engine.Decision {
		waiting <- struct{}{}
		<-answer
		return engine.Decision{Path: flow.Kernel}
	}})
	s, c := l.udpServer("10.0.0.1:7000"), l.udpClient("10.0.0.1:7000")
	send(t, c, "lost with the chain")
	<-waiting
	l.gw.must(t, func() error {
		if err := runCommand("flush ruleset\n"+queueRules, "nft", "-f", "-"); err != nil {
			return err
		}
		return addQueueRule(labQueue, false)
	})
	close(answer)
	l.eventually("ENOENT was heard", func() bool { return l.q.Stats().Gone == 1 })
	l.eventually("the flow is forgotten", func() bool { return !l.q.table.busy() })
	send(t, c, "after")
	if got := receive(t, s); got != "after" {
		t.Fatalf("got %q", got)
	}
}

func TestQueueCountsWhatTheKernelDrops(t *testing.T) {
	l := newQueueLab(t, false)
	answer := make(chan struct{})
	l.start(QueueConfig{
		Length: 4, WatchEvery: 10 * time.Millisecond,
		Decide: func(context.Context, flow.Packet) engine.Decision {
			<-answer
			return engine.Decision{Path: flow.Kernel}
		},
	})
	c := l.udpClient("10.0.0.1:7000")
	for range 10 {
		send(t, c, "x")
	}
	l.eventually("the queue was full", func() bool {
		s := l.q.Stats().Queues[0]
		return s.Number == labQueue && s.Depth == 4 && s.Full == 6
	})
	close(answer)
}

// Every flow is asked for once, however many packets come before its answer
// and whichever way they go. What came before the answer keeps its order. (A
// datagram that finds the kernel's mark already there may overtake one that was
// queued just before: no verdict can prevent that.)
func TestQueueAsksOncePerFlow(t *testing.T) {
	for _, allFirst := range []bool{false, true} {
		t.Run(fmt.Sprintf("all before the answer %v", allFirst), func(t *testing.T) { askOncePerFlow(t, allFirst) })
	}
}

func askOncePerFlow(t *testing.T, allFirst bool) {
	l := newQueueLab(t, false)
	gate := make(chan struct{})
	open := sync.OnceFunc(func() { close(gate) })
	defer open()
	l.start(QueueConfig{
		FirstHolding: labHolding, NumberHolding: 2, DecideWithin: 5 * time.Second,
		Decide: func(_ context.Context, p flow.Packet) engine.Decision {
			<-gate
			switch p.Src.Port() % 5 {
			case 0:
				time.Sleep(5 * time.Millisecond) // a filter that thinks
			case 1:
				time.Sleep(30 * time.Millisecond) // and is moved for it
			case 2:
				return engine.Decision{Path: flow.User, Takeover: &engine.Takeover{Tuple: p.Tuple}}
			}
			return engine.Decision{Path: flow.Kernel}
		},
		Takeovers: labTakeovers(func(_ context.Context, t *engine.Takeover) flow.Path {
			time.Sleep(time.Duration(t.Tuple.Src.Port()%40) * time.Millisecond)
			return flow.User
		}),
	})
	s := l.udpServer("10.0.0.1:7000")
	const flows, each = 150, 20
	var clients []*net.UDPConn
	for range flows {
		clients = append(clients, l.udpClient("10.0.0.1:7000"))
	}
	if !allFirst {
		open()
	}
	for i := range each {
		for _, c := range clients {
			send(t, c, string(rune('a'+i)))
		}
	}
	if allFirst {
		l.eventually("all packets came", func() bool { return l.q.Stats().Held == flows*(each-1) })
		open()
	}
	got := receiveByPeer(t, s, flows*each)
	for from, text := range got {
		if allFirst && text != "abcdefghijklmnopqrst" {
			t.Errorf("%v came as %q", from, text)
		}
	}
	if n, all := l.questions(); n != flows || all != flows {
		t.Fatalf("%d flows, %d questions; %+v", n, all, l.q.Stats())
	}
	if l.q.Stats().Requeued == 0 {
		t.Fatal("no packet was moved")
	}
}
