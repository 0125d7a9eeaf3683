package userpath

import (
	"context"
	"errors"
	"time"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// A dial has no goroutine: whoever begins it goes on at once, and the loop that
// sees the handshake's end tells who waits for it.
//
//	start --> dialling --handshake, ICMP, deadline, Lost, Cut, stop--> told
//
// What is told goes to the held first packet (expect, undialled), or to the
// goroutine that waits in dial.

// The ends of a dial that are nobody's error.
var (
	errStopping = errors.New("the gateway stops")
	errKilled   = errors.New("killed")
	errLost     = errors.New("the first packet is not held any more")
)

// Takeover dials the far end while the initiator's SYN is held, and answers
// User when the connection stands; then the initiator's is expected at the
// listener. Otherwise it answers what the initiator is to be told. It owns the
// takeover from the call on and reports its end in any case.
func (t *TCP) Takeover(takeover *engine.Takeover, within time.Duration, first Held) Dialling {
	job := jobOf(takeover)
	job.held, job.within = first, within
	return t.takeOver(job)
}

// takeOver is Takeover. job.held is set.
func (t *TCP) takeOver(job tcpJob) Dialling {
	f, err := t.start(job)
	if err != nil {
		job.held.Answer(job.undialled(err))
		job.held.Release()
		return nil
	}
	return f
}

// dial makes the upstream connection and waits for it. After an error the end
// is reported.
func (t *TCP) dial(ctx context.Context, job tcpJob) (*tcpFlow, error) {
	job.dialled = make(chan error, 1)
	f, err := t.start(job)
	if err != nil {
		job.undialled(err)
		return nil, err
	}
	select {
	case err = <-job.dialled:
		return f, err
	case <-ctx.Done():
		err = errLost
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			err = errDialTimeout
		}
	}
	f.loop.post(func() { f.dialEnds(err) })
	return f, <-job.dialled // it may have stood before
}

// start begins a dial, or what stands for it where a filter emulates the far
// end. After an error nobody has been told.
func (t *TCP) start(job tcpJob) (*tcpFlow, error) {
	if job.emulated && !job.initiatorExternal {
		if len(job.chain) == 0 {
			return nil, errNoEmulation
		}
		if err := t.cfg.Steer(); err != nil {
			return nil, err
		}
		f, err := t.begin(job, -1, -1)
		if err != nil {
			return nil, err
		}
		f.loop.post(func() { f.dialEnds(nil) })
		f.job.CarriedBy(f)
		return f, nil
	}
	if err := t.cfg.Steer(); err != nil {
		return nil, err
	}
	fd, err := startDial(job.dial, t.cfg.Marks)
	if err != nil {
		return nil, err
	}
	f, err := t.begin(job, -1, fd)
	if err != nil {
		resetFD(fd)
		return nil, err
	}
	t.asIfs.enter(f)
	if err := f.watchFar(); err != nil {
		f.loop.post(func() { f.dialEnds(err) })
	}
	f.job.CarriedBy(f)
	return f, nil
}

// dialEnds tells how the dial went; only the first word counts. Loop only.
func (f *tcpFlow) dialEnds(err error) {
	if f.told || f.over {
		return
	}
	if err != nil {
		f.dialErr = err
		f.finish(flow.Failed, "")
		return
	}
	f.told = true
	f.tcp.asIfs.leave(f)
	f.tcp.stats.flows.Add(1)
	if f.job.dialled != nil {
		f.job.dialled <- nil
		return
	}
	f.expect()
}

// expect lets the initiator's SYN go and waits for its connection. Loop only.
func (f *tcpFlow) expect() {
	if !f.job.emulated { // else there is no external side to name
		f.job.Connected(f.name(), f.job.dial.Target)
	}
	f.mu.Lock()
	f.since = f.tcp.now()
	f.mu.Unlock()
	if old := f.tcp.waiting.put(f); old != nil {
		old.abort(flow.TimedOut, "the initiator began anew")
	}
	f.job.held.Answer(flow.User)
	f.loop.answered = f.job.held
}

// undialled reports the end of a flow that did not come about, and gives the
// answer to its initiator.
func (j *tcpJob) undialled(err error) flow.Path {
	path, result := classifyDial(err)
	switch {
	case errors.Is(err, errKilled):
		path, result = flow.Reject, flow.CutByPolicy
	case errors.Is(err, errStopping):
		result = flow.CutByPolicy
	}
	j.Ended(flow.Counts{}, result, err.Error())
	return path
}

// Lost implements Dialling.
func (f *tcpFlow) Lost() { f.loop.post(func() { f.dialEnds(errLost) }) }

// Cut implements engine.Carrier.
func (f *tcpFlow) Cut() {
	f.loop.post(func() {
		f.dialEnds(errKilled)
		f.finish(flow.CutByPolicy, "killed")
	})
}

// release lets the packets go whose answers the loop has given. Loop only.
func (l *loop) release() {
	if l.answered != nil {
		l.answered.Release()
		l.answered = nil
	}
}
