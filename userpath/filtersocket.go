package userpath

import (
	"errors"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// revocable is a Socket whose Recv can be called off.
type revocable interface {
	filterapi.Socket
	// recv is Recv that gives up with errHandover when stop is closed; then
	// nothing is lost. Once stop is closed it takes nothing.
	recv(stop <-chan struct{}) (*filterapi.Buffer, error)
}

// filterSocket is what a data filter gets for a socket, of a stream or of
// datagrams. A filter that releases the flow from one goroutine while another
// waits in Recv, or is on its way from Recv to Send, could lose or reorder
// bytes. So the handle knows what the filter has in its hands: the waiting Recv
// is called off with ErrReleased and takes nothing, and the direction goes on
// without the filter when the rest has been sent on or released. From then on
// the handle does nothing. The rules are those of filterapi.DataFilter.
type filterSocket struct {
	revocable // nil: there is no such side
	other     *filterSocket
	revoked   *onceChan // of both handles of the filter
	buffers   *bufferPools

	mu        sync.Mutex
	receiving int                 // calls of Recv
	sending   int                 // calls of Send
	held      []*filterapi.Buffer // received here, neither sent on nor released
	barred    bool                // somebody else sends here now

	changed chan struct{} // rings when one of the above shrinks
}

// newFilterSockets makes the two handles of one filter. external is nil where
// the filter emulates that side.
func newFilterSockets(internal, external revocable, buffers *bufferPools) (in, out *filterSocket) {
	revoked := new(onceChan)
	revoked.init()
	in = &filterSocket{revocable: internal, revoked: revoked, buffers: buffers, changed: make(chan struct{}, 1)}
	out = &filterSocket{revocable: external, revoked: revoked, buffers: buffers, changed: make(chan struct{}, 1), other: in}
	in.other = out
	return in, out
}

// external is what the filter gets for this side: nil if there is none.
func (s *filterSocket) external() filterapi.Socket {
	if s.revocable == nil {
		return nil
	}
	return s
}

// Recv implements filterapi.Socket.
func (s *filterSocket) Recv() (*filterapi.Buffer, error) {
	s.mu.Lock()
	s.receiving++
	s.mu.Unlock()
	b, err := s.recv(s.revoked.ch)
	s.mu.Lock()
	s.receiving--
	if err == nil {
		b = s.hold(b)
	}
	s.mu.Unlock()
	wake(s.changed)
	if errors.Is(err, errHandover) {
		err = filterapi.ErrReleased
	}
	return b, err
}

// hold wraps a buffer so that its Release is noticed. The caller has mu.
func (s *filterSocket) hold(b *filterapi.Buffer) *filterapi.Buffer {
	w := s.buffers.lend(b, s)
	s.held = append(s.held, w)
	return w
}

func (s *filterSocket) forget(b *filterapi.Buffer) {
	s.mu.Lock()
	if i := slices.Index(s.held, b); i >= 0 {
		s.held = slices.Delete(s.held, i, i+1)
	}
	s.mu.Unlock()
	wake(s.changed)
}

// Send implements filterapi.Socket.
func (s *filterSocket) Send(b *filterapi.Buffer) error {
	s.mu.Lock()
	if s.barred {
		s.mu.Unlock()
		b.Release()
		return filterapi.ErrReleased
	}
	s.sending++
	s.mu.Unlock()
	// The next owner may give b back to its pool before Send returns, where
	// it must not be counted as held by this filter any more: sending covers
	// it from here on.
	s.other.forget(b)
	s.forget(b)
	err := s.revocable.Send(b)
	s.mu.Lock()
	s.sending--
	s.mu.Unlock()
	wake(s.other.changed)
	return err
}

// Shutdown implements filterapi.Socket.
func (s *filterSocket) Shutdown(abortive bool) error {
	if s.revoked.closed() {
		return filterapi.ErrReleased
	}
	return s.revocable.Shutdown(abortive)
}

// Close implements filterapi.Socket.
func (s *filterSocket) Close(abortive bool) error {
	if s.revoked.closed() {
		return filterapi.ErrReleased
	}
	return s.revocable.Close(abortive)
}

// quiet returns when nothing that came from here is in the filter's hands any
// more, or the flow is over. Then the filter cannot send to the other side any
// more. revoked is closed.
func (s *filterSocket) quiet(over <-chan struct{}, log *zap.Logger) {
	grace := time.NewTimer(filterapi.ReleaseGrace)
	defer grace.Stop()
	expired, waited := false, false
	for {
		kept, sending, quiet := s.settled(expired)
		if quiet {
			if kept > 0 {
				log.Warn("a data filter released its flow and kept buffers", zap.Int("buffers", kept))
			}
			return
		}
		if sending || waited { // the far side may take its time
			grace.Reset(filterapi.ReleaseGrace)
		}
		waited = sending
		select {
		case <-s.changed:
		case <-grace.C:
			expired = !sending // else the next round sets it again
		case <-over:
			return
		}
	}
}

// settled says what the filter has in its hands of what came from here, and
// bars it from sending when that is nothing, or was kept too long.
func (s *filterSocket) settled(expired bool) (kept int, sending, quiet bool) {
	// A buffer that leaves held between the two locks is counted as sending.
	s.mu.Lock()
	receiving := s.receiving > 0
	kept = len(s.held)
	s.mu.Unlock()
	to := s.other
	to.mu.Lock()
	defer to.mu.Unlock()
	sending = to.sending > 0
	quiet = !receiving && !sending && (kept == 0 || expired)
	to.barred = quiet
	return kept, sending, quiet
}
