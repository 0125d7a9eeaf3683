package filtertest

import (
	"errors"
	"io"
	"net/netip"
	"sync"

	"github.com/sluicegw/sluice/filterapi"
)

// ErrReset is what a side reads and writes after the other one, or the
// gateway, has reset the connection.
var ErrReset = errors.New("connection reset by peer")

// segment is what one Recv gives: a TCP segment or a datagram.
type segment struct {
	data []byte
	addr netip.AddrPort
}

// lane is one direction of one leg. Its segments keep their boundaries, as the
// author of the test chose them; a real stream promises less.
type lane struct {
	mu     sync.Mutex
	moved  sync.Cond
	segs   []segment
	size   int // bytes in segs
	window int // what may wait; a put blocks beyond it
	ended  bool
	err    error
	off    bool // the filter's receive was called off
}

func newLane(window int) *lane {
	l := &lane{window: window}
	l.moved.L = &l.mu
	return l
}

// put adds a segment and waits for room, as a send does.
func (l *lane) put(s segment) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.err == nil && !l.ended && l.size > 0 && l.size+len(s.data) > l.window {
		l.moved.Wait()
	}
	switch {
	case l.err != nil:
		return l.err
	case l.ended:
		return io.ErrClosedPipe
	}
	l.segs = append(l.segs, s)
	l.size += len(s.data)
	l.moved.Broadcast()
	return nil
}

// take gives the next segment, at most limit bytes of it; the rest stays. With
// datagrams the rest is lost, as with a short buffer. got, if not nil, makes it
// the receive of a filter: it notes the segment with the lane locked, and a
// callOff ends the wait.
func (l *lane) take(limit int, datagram bool, got func(segment)) (segment, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		switch {
		case got != nil && l.off:
			return segment{}, filterapi.ErrReleased
		case l.err != nil:
			return segment{}, l.err
		case len(l.segs) > 0:
			s := l.first(limit, datagram)
			if got != nil {
				got(s)
			}
			return s, nil
		case l.ended:
			return segment{}, io.EOF
		}
		l.moved.Wait()
	}
}

func (l *lane) first(limit int, datagram bool) segment {
	s := l.segs[0]
	if len(s.data) > limit && !datagram {
		l.segs[0].data = s.data[limit:]
		s.data = s.data[:limit:limit]
	} else {
		l.segs = l.segs[1:]
	}
	l.size -= len(s.data)
	l.moved.Broadcast()
	return s
}

// end is a FIN: what was put before can still be taken.
func (l *lane) end() {
	l.mu.Lock()
	l.ended = true
	l.moved.Broadcast()
	l.mu.Unlock()
}

// fail is a reset: what was put before is lost.
func (l *lane) fail(err error) {
	l.mu.Lock()
	if l.err == nil {
		l.err, l.segs, l.size = err, nil, 0
	}
	l.moved.Broadcast()
	l.mu.Unlock()
}

// callOff ends the filter's receives; they take nothing any more.
func (l *lane) callOff() {
	l.mu.Lock()
	l.off = true
	l.moved.Broadcast()
	l.mu.Unlock()
}

// leg is the connection between the filter and one end.
type leg struct {
	fromEnd, toEnd *lane
}

func newLeg(window int) *leg { return &leg{newLane(window), newLane(window)} }

// newLink joins two data filters: it gives the leg that is external to the one
// on the client's side and the one that is internal to the other.
func newLink(window int) (near, far *leg) {
	out, in := newLane(window), newLane(window)
	return &leg{fromEnd: in, toEnd: out}, &leg{fromEnd: out, toEnd: in}
}

func (g *leg) reset(err error) {
	g.fromEnd.fail(err)
	g.toEnd.fail(err)
}
