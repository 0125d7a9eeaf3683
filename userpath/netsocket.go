package userpath

import (
	"errors"
	"io"
	"net"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/filterapi"
)

// errCutByFilter is what broke an end that a filter has reset.
var errCutByFilter = errors.New("reset by a data filter")

// netSocket is the network end of a chain. It implements filterapi.Socket.
// The loop tells it when its end can be read or written again.
type netSocket struct {
	f      *tcpFlow
	side   int
	e      *tcpEnd
	pool   *bufferPool
	closed onceChan
}

func newNetSocket(f *tcpFlow, side int, pool *bufferPool) *netSocket {
	n := &netSocket{f: f, side: side, e: &f.ends[side], pool: pool}
	n.closed.init()
	return n
}

func (n *netSocket) Recv() (*filterapi.Buffer, error) { return n.recv(nil) }

func (n *netSocket) recv(stop <-chan struct{}) (*filterapi.Buffer, error) {
	for {
		select {
		case <-stop:
			return nil, errHandover
		default:
		}
		if err := n.unusable(); err != nil {
			return nil, err
		}
		if n.e.eof.Load() {
			// A flow that is being ended sets this as well, after the cause.
			if err := n.unusable(); err != nil {
				return nil, err
			}
			return nil, io.EOF
		}
		b := n.pool.get()
		got, err := n.e.io(unix.Read, b.Data)
		switch {
		case err == nil && got > 0:
			n.f.countRead(n.side, got)
			b.Data = b.Data[:got]
			return b, nil
		case err == nil:
			b.Release()
			if n.e.wasReset() {
				return nil, n.broke(unix.ECONNRESET)
			}
			n.e.eof.Store(true)
			n.f.loop.post(n.f.settle)
			return nil, io.EOF
		}
		b.Release()
		switch err {
		case unix.EAGAIN:
			select {
			case <-n.e.rd:
			case <-stop:
			case <-n.closed.ch:
			case <-n.f.done:
			}
		case unix.EINTR:
		default:
			return nil, n.broke(err)
		}
	}
}

// Send sends all of the buffer.
func (n *netSocket) Send(b *filterapi.Buffer) error {
	defer b.Release()
	data := b.Data
	for len(data) > 0 {
		if err := n.unusable(); err != nil {
			return err
		}
		if n.e.shut.Load() {
			return unix.EPIPE
		}
		n.e.hurryLocked()
		sent, err := n.e.io(unix.Write, data)
		switch err {
		case nil:
			n.f.countWritten(n.side, sent)
			data = data[sent:]
		case unix.EAGAIN:
			select {
			case <-n.e.wr:
			case <-n.closed.ch:
			case <-n.f.done:
			}
		case unix.EINTR:
		default:
			return n.broke(err)
		}
	}
	return nil
}

// unusable is the error of an end that is closed, broken, or whose flow is
// over.
func (n *netSocket) unusable() error {
	if cause := n.e.cause.Load(); cause != nil {
		n.e.told.Store(true)
		return *cause
	}
	if n.closed.closed() {
		return net.ErrClosed
	}
	select {
	case <-n.f.done:
		return unix.ECONNABORTED
	default:
		return nil
	}
}

// broke hands an error on to the loop.
func (n *netSocket) broke(err error) error {
	if errors.Is(err, net.ErrClosed) {
		if why := n.unusable(); why != nil {
			return why
		}
		return err
	}
	n.e.cause.CompareAndSwap(nil, &err)
	n.e.told.Store(true)
	n.f.loop.post(func() { n.f.broke(n.side, err) })
	return err
}

// io makes a system call on the end's socket, which is not closed meanwhile.
func (e *tcpEnd) io(call func(int, []byte) (int, error), p []byte) (int, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.gone {
		return 0, net.ErrClosed
	}
	return call(e.fd, p)
}

// wasReset tells an end of stream from a reset whose error another goroutine
// has taken by its send: without a FIN of ours, only a reset closes a socket.
// shut is looked at last: it is set before the FIN is sent.
func (e *tcpEnd) wasReset() bool {
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.gone {
		return false
	}
	info, err := unix.GetsockoptTCPInfo(e.fd, unix.SOL_TCP, unix.TCP_INFO)
	return err == nil && info.State == tcpStateClose && !e.shut.Load()
}

// tcpStateClose is TCP_CLOSE in the kernel's include/net/tcp_states.h.
const tcpStateClose = 7

func (e *tcpEnd) hurryLocked() {
	if e.nodelay {
		return
	}
	e.mu.RLock()
	defer e.mu.RUnlock()
	if !e.gone {
		e.hurry()
	}
}

// Shutdown sends a FIN, or a reset and closes the end.
func (n *netSocket) Shutdown(abortive bool) error {
	if abortive {
		n.cut()
		return nil
	}
	// The loop may not have come yet to the reset of an end that was cut.
	if n.e.cause.Load() != nil || n.e.shut.Swap(true) {
		return nil
	}
	n.e.mu.RLock()
	if !n.e.gone {
		// An error says that the end broke, which its event tells as well.
		rawShutdown(n.e.fd)
	}
	n.e.mu.RUnlock()
	n.f.loop.post(n.f.settle)
	return nil
}

// Close sends a FIN or a reset. After a FIN the loop reads what still comes
// until the far side is done too, for a bounded time.
func (n *netSocket) Close(abortive bool) error {
	n.closed.close()
	if err := n.Shutdown(abortive); err != nil || abortive {
		return err
	}
	f := n.f
	f.loop.post(func() {
		f.dirs[n.side].carrier.CompareAndSwap(byFilters, byNobody)
		n.e.readable = true
		f.step()
	})
	return nil
}

// cut resets the end; the other one lives on.
func (n *netSocket) cut() {
	n.closed.close()
	if n.e.eof.Load() && n.e.shut.Load() {
		return // both sides have said their last
	}
	err := errCutByFilter
	n.e.cause.CompareAndSwap(nil, &err)
	n.f.loop.post(func() {
		if !n.f.over {
			n.f.closeEnd(n.side, true)
			n.f.settle()
		}
	})
}

// handover gives the direction to the loop, behind everything that was sent.
func (n *netSocket) handover() {
	f, dir := n.f, n.side^oppositeMask
	f.loop.post(func() {
		if f.over {
			return
		}
		f.dirs[dir].carrier.Store(byLoop)
		f.ends[dir].readable, n.e.writable = true, true
		f.step()
	})
}

// lingerIfClosed starts the clock when filters hold neither direction any
// more and one of the ends is not done. Loop only.
func (f *tcpFlow) lingerIfClosed() {
	for i := range f.dirs {
		if f.dirs[i].carrier.Load() != byNobody && !f.ends[i].eof.Load() {
			return
		}
		if !f.ends[i].shut.Load() {
			return
		}
	}
	if f.lingerBy.IsZero() {
		f.lingerBy = f.tcp.now().Add(f.tcp.cfg.Linger)
	}
}
