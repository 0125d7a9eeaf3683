package userpath

import (
	"errors"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// filterSocket is what a data filter gets for a hop. A filter that releases
// the flow from one goroutine while another waits in Recv, or is on its way
// from Recv to Send, could lose or reorder bytes. So the handle knows what
// the filter has in its hands: the waiting Recv is called off with
// ErrReleased and takes nothing, and the relay begins when the rest has been
// sent on or released. From then on the handle does nothing.
type filterSocket struct {
	hop
	other   *filterSocket
	revoked *onceChan // of both handles of the filter

	mu        sync.Mutex
	receiving int                 // calls of Recv
	sending   int                 // calls of Send
	held      []*filterapi.Buffer // received here, neither sent on nor released

	changed chan struct{} // rings when one of the above shrinks
}

// newFilterSockets makes the two handles of one filter.
func newFilterSockets(internal, external hop) (in, out *filterSocket) {
	revoked := new(onceChan)
	revoked.init()
	in = &filterSocket{hop: internal, revoked: revoked, changed: make(chan struct{}, 1)}
	out = &filterSocket{hop: external, revoked: revoked, changed: make(chan struct{}, 1), other: in}
	in.other = out
	return in, out
}

// Recv implements filterapi.Socket.
func (s *filterSocket) Recv() (*filterapi.Buffer, error) {
	s.mu.Lock()
	s.receiving++
	s.mu.Unlock()
	b, err := s.hop.recv(s.revoked.ch)
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
	w := filterapi.NewBuffer(b.Data, func(w *filterapi.Buffer) {
		s.forget(w)
		b.Release()
	})
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
	s.sending++
	s.mu.Unlock()
	// The next owner may give b back to its pool before Send returns, where
	// it must not be counted as held by this filter any more: sending covers
	// it from here on.
	s.other.forget(b)
	s.forget(b)
	err := s.hop.Send(b)
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
	return s.hop.Shutdown(abortive)
}

// Close implements filterapi.Socket.
func (s *filterSocket) Close(abortive bool) error {
	if s.revoked.closed() {
		return filterapi.ErrReleased
	}
	return s.hop.Close(abortive)
}

// heldTooLong is how long a filter may keep a buffer after it has released the
// flow. Then the buffer counts as thrown away: most likely it was forgotten.
const heldTooLong = time.Second

// quiet returns when the filter holds nothing that came from here, or the flow
// is over. revoked is closed.
func (s *filterSocket) quiet(over <-chan struct{}, log *zap.Logger) {
	late := time.NewTimer(heldTooLong)
	defer late.Stop()
	expired := false
	for {
		s.mu.Lock()
		receiving, held := s.receiving, len(s.held)
		s.mu.Unlock()
		s.other.mu.Lock()
		sending := s.other.sending
		s.other.mu.Unlock()
		if receiving == 0 && sending == 0 && (held == 0 || expired) {
			if held > 0 {
				log.Warn("a data filter released its flow and kept buffers", zap.Int("buffers", held))
			}
			return
		}
		select {
		case <-s.changed:
		case <-late.C:
			expired = true
		case <-over:
			return
		}
	}
}
