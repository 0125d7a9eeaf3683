package userpath

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// One filter that thinks delays neither its neighbours in the same drain nor
// the reader.
func TestSlowDecisionDelaysNobodyElse(t *testing.T) {
	l := newQueueLab(t, false)
	answer := make(chan struct{})
	var asked atomic.Int32
	l.start(QueueConfig{DecideWithin: 10 * time.Second, Decide: func(context.Context, flow.Packet) engine.Decision {
		if asked.Add(1)%2 == 1 {
			<-answer
		}
		return engine.Decision{Path: flow.Kernel}
	}})
	s := l.udpServer("10.0.0.1:7000")
	for range 40 {
		send(t, l.udpClient("10.0.0.1:7000"), "x")
	}
	for range 20 {
		receive(t, s)
	}
	close(answer)
	for range 20 {
		receive(t, s)
	}
}

// More decisions than workers: the rest waits its turn.
func TestFewWorkersServeAll(t *testing.T) {
	l := newQueueLab(t, false)
	l.start(QueueConfig{Workers: 2, Decide: func(context.Context, flow.Packet) engine.Decision {
		time.Sleep(2 * time.Millisecond)
		return engine.Decision{Path: flow.Kernel}
	}})
	s := l.udpServer("10.0.0.1:7000")
	for range 60 {
		send(t, l.udpClient("10.0.0.1:7000"), "x")
	}
	for range 60 {
		receive(t, s)
	}
}

// A rule that fails open passes when nobody listens, and when the queue of a
// daemon that does not answer is full.
func TestFailOpenQueuePassesWhenFull(t *testing.T) {
	l := newQueueLab(t, true)
	s := l.udpServer("10.0.0.1:7000")
	send(t, l.udpClient("10.0.0.1:7000"), "nobody listens")
	if got := receive(t, s); got != "nobody listens" {
		t.Fatalf("got %q", got)
	}
	answer := make(chan struct{})
	l.start(QueueConfig{NumberOpen: 1, Length: 1, Decide: func(context.Context, flow.Packet) engine.Decision {
		<-answer
		return engine.Decision{Path: flow.Kernel}
	}})
	send(t, l.udpClient("10.0.0.1:7000"), "held")
	l.eventually("the first is judged", func() bool { _, n := l.questions(); return n == 1 })
	send(t, l.udpClient("10.0.0.1:7000"), "the queue is full")
	if got := receive(t, s); got != "the queue is full" {
		t.Fatalf("got %q", got)
	}
	close(answer)
	if got := receive(t, s); got != "held" {
		t.Fatalf("got %q", got)
	}
}

// Stop drops what is held and cancels who waits.
func TestQueueStop(t *testing.T) {
	l := newQueueLab(t, false)
	cancelled := make(chan struct{}, 1)
	l.start(QueueConfig{
		Decide: func(context.Context, flow.Packet) engine.Decision {
			return engine.Decision{Path: flow.User, Takeover: &engine.Takeover{}}
		},
		Takeovers: labTakeovers(func(ctx context.Context, _ *engine.Takeover) flow.Path {
			<-ctx.Done()
			cancelled <- struct{}{}
			return flow.Drop
		}),
	})
	send(t, l.udpClient("10.0.0.1:7000"), "held")
	l.eventually("the dial is pending", func() bool { return l.q.Stats().Dials == 1 })
	l.stop()
	<-cancelled
	if s := l.q.Stats(); s.Flows != 0 || s.Dials != 0 {
		t.Fatalf("%+v", s)
	}
}

func TestOpenQueuesFailsWhenTaken(t *testing.T) {
	l := newQueueLab(t, false)
	l.start(QueueConfig{Decide: always(flow.Kernel)})
	l.gw.must(t, func() error {
		q, err := OpenQueues(l.q.cfg)
		if err == nil {
			q.Close()
			return errors.New("the queue was taken twice")
		}
		if !errors.Is(err, os.ErrPermission) && !errors.Is(err, unix.EBUSY) {
			return err
		}
		return nil
	})
}
