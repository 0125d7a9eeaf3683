package userpath

import (
	"bytes"
	"io"
	"strconv"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// counters are the running totals behind Stats.
type counters struct {
	packets, decisions, absorbed, held, dropped, requeued, late, noBuffers, reopened,
	overHeld, overDials, overload, malformed, lost, gone, refused, unsent, exhausted atomic.Uint64
}

// QueueStats is what the queues did so far, and where they stand.
type QueueStats struct {
	Packets   uint64 // received, also those from a holding queue
	Decisions uint64 // asked and answered
	Absorbed  uint64 // retransmitted SYNs dropped while their flow was judged
	Held      uint64 // further packets held for their flow's answer
	Dropped   uint64 // NF_DROP verdicts, for whatever reason
	Requeued  uint64 // packets moved to a holding queue
	Late      uint64 // flows whose decision missed its deadline
	NoBuffers uint64 // ENOBUFS on a queue socket
	Reopened  uint64 // queues that were lost and taken again
	OverHeld  uint64 // packets dropped because their flow held MaxHeld
	OverDials uint64 // flows dropped because of MaxDials
	Overload  uint64 // flows not judged because of MaxFlows or Workers
	Malformed uint64 // packets that could not be read, or TCP other than SYN
	Lost      uint64 // flows whose packet did not reach its holding queue
	Gone      uint64 // verdicts for packets that were gone (ENOENT)
	Refused   uint64 // verdicts refused for another reason
	Unsent    uint64 // verdicts that could not be sent
	Exhausted uint64 // packets for whose flow there was no external port

	Flows int // under judgement now
	Dials int // pending now
	// Queues in the order closed, open, holding; as the watchdog last saw them.
	Queues []QueueDepth
}

// QueueDepth is one queue as the kernel counts it.
type QueueDepth struct {
	Number uint16
	Depth  uint64 // packets that wait for a verdict
	Full   uint64 // packets dropped because the queue was full
	Missed uint64 // packets dropped because the socket's buffer was full
}

// Stats reads the counters.
func (q *Queues) Stats() QueueStats {
	c := &q.count
	s := QueueStats{
		Packets: c.packets.Load(), Decisions: c.decisions.Load(), Absorbed: c.absorbed.Load(),
		Held: c.held.Load(), Dropped: c.dropped.Load(), Requeued: c.requeued.Load(), Late: c.late.Load(),
		NoBuffers: c.noBuffers.Load(), Reopened: c.reopened.Load(), OverHeld: c.overHeld.Load(),
		OverDials: c.overDials.Load(), Overload: c.overload.Load(), Malformed: c.malformed.Load(),
		Lost: c.lost.Load(), Gone: c.gone.Load(), Refused: c.refused.Load(), Unsent: c.unsent.Load(),
		Exhausted: c.exhausted.Load(),
		Flows:     int(q.table.live.Load()), Dials: int(q.dials.Load()),
	}
	for _, x := range q.queues {
		s.Queues = append(s.Queues, QueueDepth{x.number, x.state.depth.Load(), x.state.full.Load(), x.state.missed.Load()})
	}
	return s
}

// queueState is a queue as the kernel last described it. The totals go on
// when the queue is taken again and the kernel counts from zero.
type queueState struct {
	depth, full, missed atomic.Uint64

	socket             *queueSocket // that the kernel's totals are of
	kernFull, kernMiss uint64
	warned             time.Time
}

// warnEvery bounds how often a full queue is logged.
const warnEvery = 10 * time.Second

// watchLoop compares the kernel's account of the queues with ours.
func (q *Queues) watchLoop(stop <-chan struct{}) {
	if q.proc == nil {
		return
	}
	tick := time.NewTicker(q.cfg.WatchEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case now := <-tick.C:
			q.watch(now)
		}
	}
}

// watch looks at each queue. A queue that is not in the account, or belongs to
// another socket, is lost although our socket lives: closing it makes the
// reader take the queue again.
func (q *Queues) watch(now time.Time) {
	socks := make([]*queueSocket, len(q.queues))
	for i, x := range q.queues {
		socks[i] = x.sock.Load() // before reading: it is bound by now
	}
	text, err := io.ReadAll(io.NewSectionReader(q.proc, 0, 1<<20))
	if err != nil {
		q.cfg.Logger.Warn("read the account of the queues", zap.Error(err))
		return
	}
	lines := parseQueueAccount(text)
	for i, x := range q.queues {
		line, ok := lines[x.number]
		if !ok || line.portID != socks[i].portID {
			x.state.depth.Store(0)
			socks[i].close()
			continue
		}
		if x.saw(socks[i], line) && now.Sub(x.state.warned) >= warnEvery {
			x.state.warned = now
			q.cfg.Logger.Warn("packets dropped at a queue", zap.Uint16("queue", x.number), zap.Uint64("depth", line.depth),
				zap.Uint64("full", x.state.full.Load()), zap.Uint64("missed", x.state.missed.Load()))
		}
	}
}

// saw takes the kernel's numbers over; true if it dropped packets since.
func (x *queue) saw(s *queueSocket, line queueLine) (drops bool) {
	st := &x.state
	if st.socket != s {
		st.socket, st.kernFull, st.kernMiss = s, 0, 0
	}
	full, missed := line.full-st.kernFull, line.missed-st.kernMiss
	st.kernFull, st.kernMiss = line.full, line.missed
	st.depth.Store(line.depth)
	st.full.Add(full)
	st.missed.Add(missed)
	return full+missed > 0
}

// queueLine is one line of /proc/net/netfilter/nfnetlink_queue.
type queueLine struct {
	portID              uint32
	depth, full, missed uint64
}

// parseQueueAccount reads the columns queue number, port id, waiting, copy
// mode, copy range, dropped (full), dropped (socket), id sequence, 1
// (seq_show in net/netfilter/nfnetlink_queue.c).
func parseQueueAccount(text []byte) map[uint16]queueLine {
	lines := make(map[uint16]queueLine)
	for line := range bytes.Lines(text) {
		fields := bytes.Fields(line)
		if len(fields) < 7 {
			continue
		}
		var n [7]uint64
		var err error
		for i := range n {
			if n[i], err = strconv.ParseUint(string(fields[i]), 10, 32); err != nil {
				break
			}
		}
		if err == nil && n[0] <= 65535 {
			lines[uint16(n[0])] = queueLine{portID: uint32(n[1]), depth: n[2], full: n[5], missed: n[6]}
		}
	}
	return lines
}
