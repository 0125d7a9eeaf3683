package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/nat"
)

// enforceAgain is the pause after which a closing that the kernel refused is
// tried again.
const enforceAgain = time.Second

// enforce brings the kernel to what the state of a permission asks for, and
// frees a permission that is over. Every change of state is followed by it; the
// last one to run sees the last state. A closing that fails is tried again
// until the kernel has acknowledged it, and the port is not free before.
func (e *Engine) enforce(p *permission) error {
	p.change.Lock()
	defer p.change.Unlock()
	e.bringToUser(p)
	p.mu.Lock()
	want, form := p.wanted()
	over, listens := p.over(), p.listens(want)
	p.mu.Unlock()
	var err error
	if want == holdsOpening {
		err = e.yield(p)
	}
	if err == nil {
		err = e.bring(p, want, form, listens)
	}
	if err == nil && want != holdsOpening {
		err = e.yield(p)
		e.regain(p)
	}
	if err != nil {
		if want != holdsOpening {
			e.log.Error("closing a permission failed; it is tried again", zap.Uint64("permission", p.id), zap.Error(err))
			e.later(enforceAgain, func() { _ = e.enforce(p) }) // it logs
		}
		return err
	}
	if over && p.did&wasAllDone == 0 {
		p.did |= wasAllDone
		e.perms.drop(p)
		e.giveMappingBack(p)
		if p.leased {
			e.unlease(p)
		}
	}
	return nil
}

// unlease returns the leased port. One that was never open need not rest, so
// that a client which only ever asks cannot use them all up.
func (e *Engine) unlease(p *permission) {
	if p.did&wasOpened != 0 {
		e.ports.Return(p.proto, p.at())
	} else {
		e.ports.Unlease(p.proto, p.at())
	}
}

// bring makes the kernel hold what is wanted. Its reports of established flows
// are there before the first flow may be. p.change is held.
func (e *Engine) bring(p *permission, want inKernel, form nat.Permission, listens bool) (err error) {
	if listens {
		if err := e.watch(p, true); err != nil {
			return err
		}
	}
	switch {
	case want == holdsNothing && p.holds != holdsNothing:
		err = e.kernel.Remove(context.Background(), form)
	case want == holdsOpening, want == holdsTranslation && p.holds != holdsTranslation:
		p.did |= wasOpened
		if want == holdsOpening {
			p.noteOpening(true, e.now())
		}
		err = e.put(form)
	}
	switch {
	case err != nil:
		p.holds = holdsUnknown
		return err
	case want != holdsWhatItHas:
		p.holds = want
	}
	if want != holdsOpening {
		p.noteOpening(false, e.now())
	}
	if listens {
		return nil
	}
	return e.watch(p, false)
}

// put has the kernel hold a permission. Where it holds another one for the same
// addresses, filters are told so.
func (e *Engine) put(p nat.Permission) error {
	err := e.kernel.Install(context.Background(), p)
	if errors.Is(err, nat.ErrConflict) {
		return fmt.Errorf("%w: %w", filterapi.ErrAlreadyExists, err)
	}
	return err
}

// noteOpening notes that the kernel is about to let flows in, or lets none in
// any more.
func (p *permission) noteOpening(open bool, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !open:
		if u := p.used(); u.openUntil == 0 {
			u.openUntil = now.UnixNano()
		}
		return
	case p.openSince == 0:
		p.openSince = now.UnixNano()
	}
	if p.use != nil {
		p.use.openUntil = 0
	}
}
