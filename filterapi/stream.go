package filterapi

import (
	"errors"
	"io"
)

// Stream is a Socket of a TCP connection as an io.Reader and io.Writer, for a
// filter that would rather use bufio than move buffers. One goroutine may read
// while another writes.
//
// A Stream holds at most one Buffer, of which a part was read. Whoever stops
// reading before the end takes the rest out with Take. This and what a
// bufio.Reader has read ahead must be sent before Pump returns ErrReleased:
//
//	if b := in.Take(); b != nil {
//		err = external.Send(b)
//	}
//	return filterapi.ErrReleased
//
// A Read that waits when another goroutine has Pump return ErrReleased gives
// that error, has read nothing, and its goroutine ends.
type Stream struct {
	socket Socket
	rest   *Buffer // received, and not read to its end
}

// NewStream makes a Stream of a socket, which must not be received from in any
// other way. A nil Socket gives a nil Stream.
func NewStream(s Socket) *Stream {
	if s == nil {
		return nil
	}
	return &Stream{socket: s}
}

// fill has a Buffer that is not empty in rest.
func (s *Stream) fill() error {
	for s.rest == nil || len(s.rest.Data) == 0 {
		s.rest.Release()
		s.rest = nil
		b, err := s.socket.Recv()
		if err != nil {
			return err
		}
		s.rest = b
	}
	return nil
}

// Read implements io.Reader; io.EOF: the far side will send no more.
func (s *Stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.fill(); err != nil {
		return 0, err
	}
	n := copy(p, s.rest.Data)
	s.rest.Data = s.rest.Data[n:]
	if len(s.rest.Data) == 0 {
		s.rest.Release()
		s.rest = nil
	}
	return n, nil
}

// Take gives what was received and not read, nil if there is nothing. The
// Buffer is the caller's.
func (s *Stream) Take() *Buffer {
	b := s.rest
	s.rest = nil
	if b != nil && len(b.Data) == 0 {
		b.Release()
		return nil
	}
	return b
}

// Write implements io.Writer: it copies p and returns when the next hop has
// taken it.
func (s *Stream) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		piece := p[n:min(len(p), n+DefaultStreamBuffer)]
		if err := s.socket.Send(NewBuffer(append([]byte(nil), piece...), nil)); err != nil {
			return n, err
		}
		n += len(piece)
	}
	return n, nil
}

// CloseWrite says that nothing more is written: the far side gets a FIN.
func (s *Stream) CloseWrite() error { return s.socket.Shutdown(false) }

// Close gives back what was not read and closes both directions. It must not
// be called while another goroutine reads; to wake that one, close the Socket.
func (s *Stream) Close() error {
	s.Take().Release()
	return s.socket.Close(false)
}

// WriteTo implements io.WriterTo: it writes all that comes until the end, and
// to another Stream it moves the buffers without copying. The end itself is
// not passed on; see Pass.
func (s *Stream) WriteTo(w io.Writer) (n int64, err error) {
	to, move := w.(*Stream)
	for {
		if err := s.fill(); err != nil {
			if err == io.EOF {
				err = nil
			}
			return n, err
		}
		b := s.Take()
		size := len(b.Data)
		if move {
			err = to.socket.Send(b)
		} else {
			size, err = w.Write(b.Data)
			b.Release()
		}
		if err != nil {
			if move {
				size = 0
			}
			return n + int64(size), err
		}
		n += int64(size)
	}
}

// ReadFrom implements io.ReaderFrom: it sends all that r gives until its end.
// Each piece is read into a buffer of its own and not copied again; those of
// another Stream are moved.
func (s *Stream) ReadFrom(r io.Reader) (n int64, err error) {
	if from, ok := r.(*Stream); ok {
		return from.WriteTo(s)
	}
	for {
		piece := make([]byte, DefaultStreamBuffer)
		size, err := r.Read(piece)
		if size > 0 {
			if err := s.socket.Send(NewBuffer(piece[:size], nil)); err != nil {
				return n, err
			}
			n += int64(size)
		}
		switch {
		case err == io.EOF:
			return n, nil
		case err != nil:
			return n, err
		}
	}
}

// Pass carries one direction of a connection to its end without looking: it
// moves buffers, passes a FIN on, and resets both sides after an error, which
// also wakes whoever carries the other direction. It returns that error, nil
// after a FIN, and ErrReleased when Pump has given the flow back.
func Pass(from, to Socket) error {
	for {
		b, err := from.Recv()
		if err == nil {
			err = to.Send(b)
		}
		switch {
		case err == nil:
		case err == io.EOF:
			return to.Shutdown(false)
		case errors.Is(err, ErrReleased):
			return err
		default:
			// They may be reset already; err is what counts.
			_ = from.Close(true)
			_ = to.Close(true)
			return err
		}
	}
}
