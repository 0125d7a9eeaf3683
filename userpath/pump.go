package userpath

import (
	"errors"

	"golang.org/x/sys/unix"
)

// How bytes pass that no filter holds: small pieces are copied through the
// loop's scrap buffer, which costs no more than splicing them; a source that
// fills it is spliced through a pipe (splice(2)), without copying. A direction
// has a pipe only while it has something in it, so that idle flows hold none.
const (
	pipeSize   = 256 << 10 // bytes; a busy direction's bound
	pipesKept  = 64        // idle ones, a loop
	turnPieces = 8         // reads of one direction before others have their turn
	smallPiece = scrapSize / 4
	smallsToGo = 4 // small pieces in a row that end splicing
)

// errDstBroken wraps the error of the end that is written to.
type errDstBroken struct{ err error }

func (e errDstBroken) Error() string { return e.err.Error() }
func (e errDstBroken) Unwrap() error { return e.err }

// pipe is what splice(2) needs between two sockets.
type pipe struct {
	r, w int
	held int // bytes in it
}

func (p *pipe) close() {
	unix.Close(p.r)
	unix.Close(p.w)
}

// takePipe gives an empty pipe, nil if there is none to be had.
func (l *loop) takePipe() *pipe {
	if n := len(l.pipes); n > 0 {
		p := l.pipes[n-1]
		l.pipes = l.pipes[:n-1]
		return p
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil
	}
	// The default size does as well, with more calls.
	unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize)
	return &pipe{r: fds[0], w: fds[1]}
}

// dropPassage gives up what a direction holds.
func (l *loop) dropPassage(d *direction) {
	d.rest = nil
	p := d.pipe
	if p == nil {
		return
	}
	d.pipe = nil
	if p.held > 0 || len(l.pipes) >= pipesKept {
		p.close()
		return
	}
	l.pipes = append(l.pipes, p)
}

// carry moves a direction on until its source is empty, its destination full
// or its turn over. Loop only.
func (f *tcpFlow) carry(dir int) {
	d, src, dst := &f.dirs[dir], &f.ends[dir], &f.ends[dir^oppositeMask]
	if dst.shut.Load() {
		return
	}
	for range turnPieces {
		if err := f.flush(dir); err != nil {
			f.broke(dir^oppositeMask, err)
			return
		}
		if d.pending() {
			return
		}
		if src.eof.Load() {
			f.passEOF(dir)
			return
		}
		if !src.readable || !dst.writable {
			f.loop.dropPassage(d)
			return
		}
		n, err := f.read(dir)
		switch err {
		case nil:
			f.countRead(dir, n)
			if n > 0 {
				continue
			}
			if f.chain != nil && src.wasReset() {
				f.broke(dir, unix.ECONNRESET)
				return
			}
			src.eof.Store(true)
		case unix.EAGAIN:
			src.readable = false
		case unix.EINTR:
		default:
			if errors.As(err, new(errDstBroken)) {
				f.broke(dir^oppositeMask, err)
			} else {
				f.broke(dir, err)
			}
			return
		}
	}
	if !f.queued {
		f.queued = true
		f.loop.again = append(f.loop.again, f)
	}
}

func (d *direction) pending() bool {
	return len(d.rest) > 0 || d.pipe != nil && d.pipe.held > 0
}

// read takes one piece from the source. In bulk it goes into the pipe, else
// it is sent on and what was not taken is kept in rest. 0, nil: EOF.
func (f *tcpFlow) read(dir int) (n int, err error) {
	d, src := &f.dirs[dir], &f.ends[dir]
	if d.bulk {
		if d.pipe == nil {
			d.pipe = f.loop.takePipe()
		}
		if d.pipe != nil {
			return f.spliceIn(d, src)
		}
		d.bulk = false // out of descriptors: copying needs none
	}
	n, err = rawRead(src.fd, f.loop.scrap)
	if n <= 0 {
		return 0, err
	}
	if n < len(f.loop.scrap) {
		src.drained()
	}
	d.bulk, d.small = n == len(f.loop.scrap), 0
	return n, f.sendPiece(dir, f.loop.scrap[:n])
}

// drained notes that a read gave less than was asked for: the queue is empty
// until the next event (epoll(7)), unless the end of the stream is in it.
func (e *tcpEnd) drained() { e.readable = e.hungUp }

func (f *tcpFlow) spliceIn(d *direction, src *tcpEnd) (int, error) {
	n, err := unix.Splice(src.fd, nil, d.pipe.w, nil, pipeSize, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
	if n <= 0 {
		return 0, err
	}
	d.pipe.held += int(n)
	if n >= smallPiece {
		d.small = 0
	} else if d.small++; d.small >= smallsToGo {
		d.bulk = false
	}
	return int(n), nil
}

// sendPiece sends bytes of the scrap buffer.
func (f *tcpFlow) sendPiece(dir int, piece []byte) error {
	dst := &f.ends[dir^oppositeMask]
	dst.hurry()
	n, err := rawWrite(dst.fd, piece)
	if err != nil && err != unix.EAGAIN && err != unix.EINTR {
		return errDstBroken{err}
	}
	n = max(n, 0)
	f.countWritten(dir^oppositeMask, n)
	if n < len(piece) {
		f.dirs[dir].rest = append([]byte(nil), piece[n:]...)
	}
	return nil
}

// flush sends what the direction holds, as far as the destination takes it.
func (f *tcpFlow) flush(dir int) error {
	d, side := &f.dirs[dir], dir^oppositeMask
	dst := &f.ends[side]
	for d.pending() && dst.writable {
		var n int
		var err error
		dst.hurry()
		if len(d.rest) > 0 {
			if n, err = rawWrite(dst.fd, d.rest); n > 0 {
				d.rest = d.rest[n:]
			}
		} else {
			var n64 int64
			n64, err = unix.Splice(d.pipe.r, nil, dst.fd, nil, d.pipe.held, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
			if n = int(n64); n > 0 {
				d.pipe.held -= n
			}
		}
		switch err {
		case nil:
			f.countWritten(side, n)
		case unix.EAGAIN:
			dst.writable = false
		case unix.EINTR:
		default:
			return err
		}
	}
	if len(d.rest) == 0 {
		d.rest = nil
	}
	return nil
}

// passEOF half-closes the destination when the source has ended. The last
// close does the same by itself.
func (f *tcpFlow) passEOF(dir int) {
	f.loop.dropPassage(&f.dirs[dir])
	src, dst := &f.ends[dir], &f.ends[dir^oppositeMask]
	dst.shut.Store(true)
	if dst.eof.Load() && src.shut.Load() {
		return
	}
	// An error says that the end broke, which its event tells as well.
	rawShutdown(dst.fd)
}

// discard reads what nobody wants any more, so that the close is a FIN and not
// a reset that would overtake what was sent (RFC 1122, 4.2.2.13). Loop only.
func (f *tcpFlow) discard(dir int) {
	src := &f.ends[dir]
	for range turnPieces {
		if src.eof.Load() || !src.readable {
			return
		}
		switch n, err := rawRead(src.fd, f.loop.scrap); {
		case err == unix.EAGAIN:
			src.readable = false
		case err == unix.EINTR:
		case err != nil:
			f.broke(dir, err)
			return
		case n == 0:
			src.eof.Store(true)
		default:
			f.countRead(dir, n)
		}
	}
	if !f.queued {
		f.queued = true
		f.loop.again = append(f.loop.again, f)
	}
}
