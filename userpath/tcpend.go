package userpath

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// checkError looks at an end whose event told of an error. What the filters
// hold is theirs to find out, behind the bytes that came before the error; if
// they do not within a second, for instance because they wait for the other
// side, the flow is reset all the same. Loop only.
func (f *tcpFlow) checkError(side int) {
	e := &f.ends[side]
	if !e.failed || e.gone || f.over {
		return
	}
	e.failed = false
	if f.heldByFilters() {
		time.AfterFunc(toldWithin, func() {
			f.loop.post(func() {
				if f.over || e.told.Load() {
					return
				}
				if err := socketErrorOf(e); err != nil {
					f.finish(resultOf(err), f.sideName(side)+": "+err.Error())
				}
			})
		})
		return
	}
	if err := socketError(e.fd); err != nil {
		f.broke(side, err)
	}
}

// toldWithin is how long a filter may not notice that its side broke.
const toldWithin = time.Second

// heldByFilters says that filters, or relays in their place, hold a direction
// and the loop carries none.
func (f *tcpFlow) heldByFilters() bool {
	a, b := f.dirs[0].carrier.Load(), f.dirs[1].carrier.Load()
	return (a == byFilters || b == byFilters) && a != byLoop && b != byLoop
}

// settle ends the flow if both ends have said their last. Loop only.
func (f *tcpFlow) settle() {
	if f.over || !f.carrying.Load() {
		return
	}
	f.lingerIfClosed()
	for i := range f.ends {
		if !f.ends[i].eof.Load() || !f.ends[i].shut.Load() {
			return
		}
	}
	if side, err := f.whyBroken(); err != nil {
		f.end(resultOf(err), f.sideName(side)+": "+err.Error(), false)
		return
	}
	f.end(flow.Closed, "", false)
}

// whyBroken is the end that broke first, or the one that the network broke if
// a filter has reset the other. A nil error: neither.
func (f *tcpFlow) whyBroken() (side int, err error) {
	for i := range f.ends {
		if c := f.ends[i].cause.Load(); c != nil && (err == nil || err == errCutByFilter) {
			side, err = i, *c
		}
	}
	return side, err
}

// broke handles an end that failed. Without filters the other end is reset at
// once. With filters the next one in the chain has the error from its call, so
// that it can still say something to the other side. Loop only.
func (f *tcpFlow) broke(side int, err error) {
	if f.over {
		return
	}
	f.ends[side].dead = err == unix.ECONNRESET
	if !f.heldByFilters() {
		f.finish(resultOf(err), f.sideName(side)+": "+err.Error())
		return
	}
	f.ends[side].cause.CompareAndSwap(nil, &err)
	f.closeEnd(side, true)
	f.settle()
}

// closeEnd closes the socket of an end. Loop only.
func (f *tcpFlow) closeEnd(side int, reset bool) {
	e := &f.ends[side]
	e.eof.Store(true)
	e.shut.Store(true)
	e.mu.Lock()
	if !e.gone && e.fd >= 0 {
		if reset && !e.dead {
			resetFD(e.fd)
		} else {
			rawClose(e.fd)
		}
	}
	e.gone = true
	e.mu.Unlock()
	wake(e.rd)
	wake(e.wr)
}

// abort resets both ends, soon. Safe for concurrent use; the first caller's
// words stand in the log.
func (f *tcpFlow) abort(r flow.Result, reason string) {
	f.loop.post(func() { f.finish(r, reason) })
}

// finish ends a flow that did not end by itself: both ends are reset. Loop
// only; the second call does nothing.
func (f *tcpFlow) finish(r flow.Result, reason string) { f.end(r, reason, true) }

// end is the end: sockets closed, slot free, everyone woken. Loop only.
func (f *tcpFlow) end(r flow.Result, reason string, reset bool) {
	if f.over {
		return
	}
	f.mu.Lock()
	f.over = true
	f.mu.Unlock()
	f.result, f.reason = r, reason
	if reset {
		// Before either end closes: a filter must not take the one for an end
		// of stream and send a FIN to the other.
		err := error(unix.ECONNABORTED)
		for i := range f.ends {
			f.ends[i].cause.CompareAndSwap(nil, &err)
		}
	}
	for i := range f.ends {
		f.closeEnd(i, reset)
		f.loop.dropPassage(&f.dirs[i])
	}
	f.loop.leave(f)
	if !f.told {
		f.tcp.asIfs.leave(f)
		if f.dialErr == nil { // it ended before its dial
			f.dialErr = errors.New(reason)
			if f.tcp.stopping.Load() {
				f.dialErr = errStopping
			}
		}
	} else if !f.carrying.Load() {
		f.tcp.waiting.remove(f)
	}
	if f.chain != nil {
		close(f.done)
		f.chain.cancel()
	}
	f.loop.reports.add(report{f, false})
}

// resultOf is the result of a flow whose end failed with err.
func resultOf(err error) flow.Result {
	switch {
	case errors.Is(err, unix.ETIMEDOUT), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return flow.TimedOut // retransmissions or keepalive gave up
	case errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE), errors.Is(err, errCutByFilter):
		return flow.Reset
	}
	return flow.Failed
}

// socketError takes the pending error off a socket (SO_ERROR).
func socketError(fd int) error {
	n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return fmt.Errorf("ask for the socket's error: %w", err)
	}
	if n != 0 {
		return unix.Errno(n)
	}
	return nil
}

// socketErrorOf is socketError, or the cause if the end broke before.
func socketErrorOf(e *tcpEnd) error {
	if cause := e.cause.Load(); cause != nil {
		return *cause
	}
	if e.gone {
		return nil
	}
	return socketError(e.fd)
}
