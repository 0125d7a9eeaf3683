package userpath

import (
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/filterapi"
)

// linkDepth is how many buffers a link holds in each direction.
const linkDepth = 4

// link joins two data filters: a virtual socket for each. Buffers change
// hands, nothing is copied.
type link struct {
	toExternal, toInternal *half
}

// newLink makes a link that fails when over is closed. linger is how long a
// filter that has closed may be sent to.
func newLink(over <-chan struct{}, linger time.Duration) *link {
	aborted := new(onceChan)
	aborted.init()
	return &link{newHalf(over, linger, aborted), newHalf(over, linger, aborted)}
}

// internal is the socket that the filter on the client's side has as its
// external one; external is the other filter's.
func (l *link) internal() hop { return &linkSocket{in: l.toInternal, out: l.toExternal} }
func (l *link) external() hop { return &linkSocket{in: l.toExternal, out: l.toInternal} }

// onceChan is a channel that may be closed again.
type onceChan struct {
	ch   chan struct{}
	once sync.Once
}

func (o *onceChan) init()  { o.ch = make(chan struct{}) }
func (o *onceChan) close() { o.once.Do(func() { close(o.ch) }) }

func (o *onceChan) closed() bool {
	select {
	case <-o.ch:
		return true
	default:
		return false
	}
}

// half is one direction of a link: one goroutine sends, another receives.
type half struct {
	queue   chan *filterapi.Buffer
	over    <-chan struct{} // the flow has ended
	aborted *onceChan       // the link was reset; both halves share it
	ended   onceChan        // the sender has said its last
	endErr  error           // why; written before ended is closed
	endOnce sync.Once
	deaf    onceChan // the receiver has closed
	until   atomic.Pointer[time.Time]
	linger  time.Duration
}

func newHalf(over <-chan struct{}, linger time.Duration, aborted *onceChan) *half {
	h := &half{queue: make(chan *filterapi.Buffer, linkDepth), over: over, aborted: aborted, linger: linger}
	h.ended.init()
	h.deaf.init()
	return h
}

// stopped is the error of a half that takes and gives nothing any more.
func (h *half) stopped() error {
	select {
	case <-h.aborted.ch:
		return unix.ECONNRESET
	case <-h.over:
		return unix.ECONNABORTED
	default:
		return nil
	}
}

func (h *half) send(b *filterapi.Buffer) error {
	err := h.stopped()
	if err == nil && h.deaf.closed() {
		err = h.ignored()
		b.Release()
		return err
	}
	if err == nil && h.ended.closed() {
		err = unix.EPIPE
	}
	if err == nil {
		select {
		case h.queue <- b:
			return nil
		case <-h.aborted.ch:
			err = unix.ECONNRESET
		case <-h.deaf.ch:
			err = h.ignored()
		case <-h.ended.ch: // Close by another goroutine of the same filter
			err = unix.EPIPE
		case <-h.over:
			err = unix.ECONNABORTED
		}
	}
	b.Release()
	return err
}

func (h *half) recv(stop <-chan struct{}) (*filterapi.Buffer, error) {
	if err := h.stopped(); err != nil {
		return nil, err
	}
	select {
	case <-stop:
		return nil, errHandover
	default:
	}
	if h.deaf.closed() {
		return nil, io.ErrClosedPipe
	}
	select {
	case b := <-h.queue:
		return b, nil
	case <-h.aborted.ch:
		return nil, unix.ECONNRESET
	case <-h.over:
		return nil, unix.ECONNABORTED
	case <-h.deaf.ch:
		return nil, io.ErrClosedPipe
	case <-stop:
		return nil, errHandover
	case <-h.ended.ch:
	}
	select { // what was sent before the end comes before it
	case b := <-h.queue:
		return b, nil
	default:
		return nil, h.endErr
	}
}

// end lets the receiver have what is queued and then err. The first call
// counts.
func (h *half) end(err error) {
	h.endOnce.Do(func() {
		h.endErr = err
		h.ended.close()
	})
}

// ignored is the result of sending to a receiver that has closed: as at the
// network ends, what still comes is forgotten, and is an error in the end.
func (h *half) ignored() error {
	if until := h.until.Load(); until != nil && time.Now().After(*until) {
		return unix.EPIPE
	}
	return nil
}

// close is the receiver's.
func (h *half) close() {
	until := time.Now().Add(h.linger)
	h.until.CompareAndSwap(nil, &until)
	h.deaf.close()
}

// drain releases what is queued.
func (h *half) drain() {
	for {
		select {
		case b := <-h.queue:
			b.Release()
		default:
			return
		}
	}
}

// linkSocket is one end of a link. It implements filterapi.Socket.
type linkSocket struct{ in, out *half }

func (s *linkSocket) Recv() (*filterapi.Buffer, error) { return s.in.recv(nil) }

func (s *linkSocket) recv(stop <-chan struct{}) (*filterapi.Buffer, error) { return s.in.recv(stop) }

func (s *linkSocket) Send(b *filterapi.Buffer) error { return s.out.send(b) }

func (s *linkSocket) handover() { s.out.end(errHandover) }

func (s *linkSocket) Shutdown(abortive bool) error {
	if abortive {
		s.out.aborted.close()
		return nil
	}
	s.out.end(io.EOF)
	return nil
}

func (s *linkSocket) Close(abortive bool) error {
	if err := s.Shutdown(abortive); err != nil || abortive {
		return err
	}
	s.in.close()
	return nil
}
