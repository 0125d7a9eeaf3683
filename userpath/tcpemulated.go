package userpath

import (
	"context"
	"errors"
	"fmt"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// A flow with an emulating filter has one end on the network, which is the
// client's:
//
//	initiator --TPROXY--> accepted socket == chain, last filter emulates    Takeover
//	first filter emulates == dialled socket --> client                      Originate
//
// The other end counts as closed from the beginning, so that the end of the
// flow is that of its only socket.

var (
	errNoEmulation = errors.New("no data filter emulates the external side")
	// errNothingToRelease is what becomes of ErrReleased, which it must not
	// wrap.
	errNothingToRelease = errors.New("the filter gave an emulated flow back, which nobody else can carry")
)

// originated says that no initiator's packet began the flow.
func (j *tcpJob) originated() bool { return j.emulated && j.initiatorExternal }

// leaveOut closes the end that a filter emulates.
func (f *tcpFlow) leaveOut() {
	side := sideFar
	if f.job.initiatorExternal {
		side = sideInit
	}
	e := &f.ends[side]
	e.gone = true
	e.eof.Store(true)
	e.shut.Store(true)
	f.shaken = side == sideFar // nobody is dialled
}

// watchFar begins to wait for the dialled socket.
func (f *tcpFlow) watchFar() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over { // the descriptor is closed, and the loop may be as well
		return errStopping
	}
	return f.loop.watch(f, sideFar)
}

// Originate dials a client in the name of a filter that emulates its peer, and
// returns when the connection stands. The filter gets the client's socket as
// its internal one, and no external. Originate owns the takeover from the call
// on and reports its end in any case. ctx bounds the dial alone.
func (t *TCP) Originate(ctx context.Context, takeover *engine.Takeover) error {
	return t.originate(ctx, jobOf(takeover))
}

func (t *TCP) originate(ctx context.Context, job tcpJob) error {
	job.emulated, job.initiatorExternal = true, true
	if len(job.chain) == 0 {
		job.Ended(flow.Counts{}, flow.Failed, errNoEmulation.Error())
		return fmt.Errorf("dial %s from %s: %w", job.dial.Target, job.dial.Source, errNoEmulation)
	}
	f, err := t.dial(ctx, job)
	if err != nil {
		if errors.Is(err, errLost) {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("dial %s from %s: %w", job.dial.Target, job.dial.Source, err)
	}
	job.Connected(f.name(), job.dial.Target)
	if !f.originated() {
		return fmt.Errorf("dial %s from %s: %w", job.dial.Target, job.dial.Source, filterapi.ErrTerminating)
	}
	return nil
}

// originated starts a flow whose only end is the dialled one. False: it is
// over.
func (f *tcpFlow) originated() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		return false
	}
	f.begin()
	// What the far end did meanwhile was noted, and nobody was told.
	f.loop.post(f.step)
	return true
}
