package filtertest

import (
	"io"

	"github.com/sluicegw/sluice/filterapi"
)

// socket is a filter's side of a leg. It holds the filter to the ownership
// rules: a buffer that was sent or released is overwritten.
type socket struct {
	flow     *Flow
	leg      *leg
	hands    *hands
	sent     What // how the journal calls what is sent here; empty: another filter gets it
	datagram bool
	to, from *way // of what is sent and of what is received here
}

func (s *socket) Recv() (*filterapi.Buffer, error) {
	limit := s.flow.bufferSize()
	for {
		var buf *filterapi.Buffer
		_, err := s.leg.fromEnd.take(limit, s.datagram, func(seg segment) {
			if s.datagram && len(seg.data) > limit {
				return // lost, as the contract of SetBufferSize says
			}
			buf = filterapi.NewBuffer(append([]byte(nil), seg.data...), func(b *filterapi.Buffer) {
				s.hands.forget(b)
				spoil(b)
			})
			buf.Addr = seg.addr
			s.hands.hold(s.from, buf)
		})
		if err != nil || buf != nil {
			return buf, err
		}
	}
}

func (s *socket) Send(buf *filterapi.Buffer) error {
	if !s.hands.begin(s.to, buf) {
		buf.Release()
		return filterapi.ErrReleased
	}
	defer s.hands.sent(s.to)
	seg := segment{append([]byte(nil), buf.Data...), buf.Addr}
	buf.Release()
	spoil(buf)
	if s.sent != "" {
		s.flow.gateway.journal.add(Entry{What: s.sent, Text: string(seg.data)})
	}
	err := s.leg.toEnd.put(seg)
	if err == nil && s.sent != "" && s.datagram {
		s.flow.stand()
	}
	return err
}

func (s *socket) Shutdown(abortive bool) error {
	switch {
	case s.hands.released():
		return filterapi.ErrReleased
	case abortive:
		s.leg.reset(ErrReset)
	case !s.datagram:
		s.leg.toEnd.end()
	}
	return nil
}

func (s *socket) Close(abortive bool) error {
	switch {
	case s.hands.released():
		return filterapi.ErrReleased
	case abortive:
		s.leg.reset(ErrReset)
		return nil
	}
	s.leg.toEnd.end()
	s.leg.fromEnd.fail(io.ErrClosedPipe)
	return nil
}

// spoil makes a use after the buffer was given away visible.
func spoil(buf *filterapi.Buffer) {
	for i := range buf.Data {
		buf.Data[i] = 0xdb
	}
	buf.Data = nil
}
