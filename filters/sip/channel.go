package sip

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime/debug"
	"sync"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// maxPending is how many bytes may wait for a slow end before nothing more is
// read that could add to them.
const maxPending = 64 << 10

// channel is the data filter of one TCP connection, or of the datagrams of one
// client's port and one far end.
//
//	client ── read ──> messages ── far.out ─── write ──> far end
//	client <─ write ── client.out ── messages <── read ─ far end
//
// Four goroutines, one for each arrow at an end. A message waits for its turn in
// the session, which decides on it, and leaves after that. mu guards all fields
// below it and is never held across a call.
//
// When the filtering of a stream ends, the readers stop, or wait in Recv until
// the gateway calls them off, and the writers send what there is:
//
//	filtering --release--> released --nothing left to send--> handed
type channel struct {
	session *session
	opts    *options
	stream  bool           // TCP
	inside  netip.AddrPort // the client's end
	conn    filterapi.Connection
	name    netip.AddrPort // the gateway's end outside, or the client's own
	peer    netip.AddrPort // the far end

	mu      sync.Mutex
	changed sync.Cond
	client  side
	far     side

	ended    bool
	cause    error
	released bool
	handed   bool
}

// side is one end as the filter sees it.
type side struct {
	name    string
	sock    filterapi.Socket
	in      []byte   // received and not yet accounted for
	out     [][]byte // to be sent to it
	pending int      // bytes in out
	fin     bool     // out ends with a FIN
	finSent bool     // its writer has sent that, or does so now
	inRecv  bool     // its reader waits for it
	sending bool     // its writer waits for it
	read    bool     // its reader is done
	written bool     // its writer is done
}

func (s *side) push(b []byte) {
	if len(b) > 0 {
		s.out = append(s.out, b)
		s.pending += len(b)
	}
}

// done: nobody is left who carries anything from or to s.
func (s *side) done() bool { return s.read && s.written }

// idle: nothing from or to s is in the filter's hands, but for what a Recv may
// be about to return.
func (s *side) idle() bool { return (s.read || s.inRecv) && !s.sending && len(s.out) == 0 }

func newChannel(s *session, o *options, client netip.AddrPort, stream bool) *channel {
	c := &channel{session: s, opts: o, inside: client, stream: stream}
	c.changed.L = &c.mu
	return c
}

// Pump carries the signalling. The end of a TCP connection ends the calls that
// were made over it.
func (c *channel) Pump(ctx context.Context, conn filterapi.Connection, internal, external filterapi.Socket) error {
	var err error
	c.conn = conn
	if c.name, err = conn.ExternalName(); err == nil {
		c.peer, err = conn.ExternalPeer()
	}
	if err != nil {
		return fmt.Errorf("addresses of the far side: %w", err)
	}
	c.client = side{name: "client", sock: internal}
	c.far = side{name: "far end", sock: external}
	stop := context.AfterFunc(ctx, func() { c.fail(context.Cause(ctx)) })
	defer stop()
	running := &c.session.filter.running
	running.Go(func() { c.read(ctx, &c.client, &c.far) })
	running.Go(func() { c.read(ctx, &c.far, &c.client) })
	running.Go(func() { c.write(&c.client) })
	running.Go(func() { c.write(&c.far) })

	c.mu.Lock()
	for !c.client.done() || !c.far.done() {
		if !c.ended && c.released && c.client.idle() && c.far.idle() {
			c.handed = true
			c.changed.Broadcast()
			break
		}
		c.changed.Wait()
	}
	cause, handed := c.cause, c.handed
	c.mu.Unlock()
	if c.stream {
		// A session that has ended has no calls any more.
		_ = c.session.take(context.Background(), func() { c.session.lost(c) })
	}
	switch {
	case cause != nil:
		return cause
	case handed:
		return filterapi.ErrReleased
	}
	return errors.Join(internal.Close(false), external.Close(false))
}

// fail ends the connection with a reset on both sides. The first cause counts.
func (c *channel) fail(cause error) {
	c.mu.Lock()
	if !c.ended {
		c.ended, c.cause = true, cause
	}
	c.changed.Broadcast()
	c.mu.Unlock()
	// The sockets are reset already, or become so now; there is nobody to
	// tell about an error.
	_ = c.client.sock.Close(true)
	_ = c.far.sock.Close(true)
}

// read is the reader of s.
func (c *channel) read(ctx context.Context, s, peer *side) {
	defer c.readerDone(s)
	defer func() {
		if p := recover(); p != nil {
			c.session.log.Error("panic in the SIP filter", zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
			c.fail(fmt.Errorf("panic: %v", p))
		}
	}()
	for c.mayReceive(s) {
		buf, err := s.sock.Recv()
		c.mu.Lock()
		s.inRecv = false
		handed := c.handed
		switch {
		case handed:
		case err == nil:
			s.in = append(s.in, buf.Data...)
		case errors.Is(err, io.EOF):
			// Bytes of an incomplete message go nowhere.
			s.in, peer.fin = nil, true
			c.changed.Broadcast()
		}
		c.mu.Unlock()
		switch {
		case handed:
			// Whoever carries the connection now meets an end of it as well.
			if err == nil {
				_ = peer.sock.Send(buf)
			}
			return
		case err == nil:
			buf.Release()
			c.messages(ctx, s, peer)
		case errors.Is(err, io.EOF):
			return
		default:
			c.fail(err)
			return
		}
	}
}

// mayReceive waits until s may be read. false: its reader is done, because the
// connection or filtering is over.
func (c *channel) mayReceive(s *side) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		pending := c.far.pending + c.client.pending
		if s == &c.far {
			pending = c.client.pending
		}
		switch {
		case c.ended, c.released:
			return false
		case pending < maxPending:
			s.inRecv = true
			return true
		}
		c.changed.Wait()
	}
}

func (c *channel) readerDone(s *side) {
	c.mu.Lock()
	s.read = true
	c.changed.Broadcast()
	c.mu.Unlock()
}

// messages takes what is in s.in, one message after the other.
func (c *channel) messages(ctx context.Context, s, peer *side) {
	for {
		c.mu.Lock()
		if c.released { // by the other reader
			peer.push(s.in)
			s.in = nil
			c.changed.Broadcast()
		}
		in, ended := s.in, c.ended
		c.mu.Unlock()
		if len(in) == 0 || ended {
			return
		}
		m, n, err := c.cut(in)
		if err != nil {
			c.malformed(ctx, s, err)
			continue
		}
		if n == 0 {
			return
		}
		if m == nil { // a keep-alive
			c.commit(s, peer, n, outcome{forward: append([]byte(nil), in[:n]...)})
			continue
		}
		var out outcome
		if err := c.session.take(ctx, func() { out = c.session.decide(c, s == &c.client, m) }); err != nil {
			c.fail(err)
			return
		}
		c.commit(s, peer, n, out)
	}
}

// cut takes the first message off in. A datagram is used up by it.
func (c *channel) cut(in []byte) (*message, int, error) {
	if c.stream {
		return cutMessage(in)
	}
	m, err := readDatagram(in)
	return m, len(in), err
}

// commit accounts for n bytes of s.in. A released connection has passed them
// already.
func (c *channel) commit(s, peer *side, n int, out outcome) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.released {
		return
	}
	s.in = s.in[n:]
	if len(s.in) == 0 {
		s.in = nil
	}
	peer.push(out.forward)
	s.push(out.answer)
	c.changed.Broadcast()
}

// malformed handles what is not SIP. It ends the filtering of a stream. A
// datagram says nothing of the next one, and anybody can forge it: it is lost,
// or passes unread, and the next one is read from its first byte on.
func (c *channel) malformed(ctx context.Context, s *side, err error) {
	peer := &c.far
	if s == &c.far {
		peer = &c.client
	}
	note := []zap.Field{zap.Stringer("flow", c.conn.Tuple()), zap.String("from", s.name), zap.Error(err)}
	switch {
	case !c.stream:
		c.session.log.Debug("datagram is not SIP", note...)
		c.mu.Lock()
		if c.opts.passMalformed {
			peer.push(s.in)
		}
		s.in = nil
		c.changed.Broadcast()
		c.mu.Unlock()
	case !c.opts.passMalformed:
		c.session.log.Warn("signalling is cut", note...)
		c.fail(err)
	default:
		c.session.log.Warn("signalling is not filtered any more", note...)
		// What was negotiated here is void before anything passes unread.
		_ = c.session.take(ctx, func() { c.session.lost(c) })
		c.mu.Lock()
		c.released = true
		c.far.push(c.client.in)
		c.client.push(c.far.in)
		c.client.in, c.far.in = nil, nil
		c.changed.Broadcast()
		c.mu.Unlock()
	}
}

// write is the writer of s: it sends out, then the FIN.
func (c *channel) write(s *side) {
	for {
		out, ok := c.toSend(s)
		if !ok {
			return
		}
		var err error
		if len(out) > 0 {
			err = s.sock.Send(filterapi.NewBuffer(out, nil))
		} else {
			err = s.sock.Shutdown(false)
		}
		if err != nil {
			c.fail(err)
		}
	}
}

// toSend waits for bytes to be sent to s; none: its FIN is due. false: the
// writer is done.
func (c *channel) toSend(s *side) (out []byte, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.changed.Broadcast()
	if s.sending {
		s.sending = false
		c.changed.Broadcast()
	}
	for len(s.out) == 0 && !c.ended && !s.fin && !c.handed {
		c.changed.Wait()
	}
	if c.ended || c.handed || s.finSent && len(s.out) == 0 {
		s.written = true
		return nil, false
	}
	if len(s.out) > 0 {
		out = s.out[0]
		if c.stream && len(out) > filterapi.DefaultStreamBuffer {
			// The next hop owns what it gets, up to its capacity.
			out = out[:filterapi.DefaultStreamBuffer:filterapi.DefaultStreamBuffer]
			s.out[0] = s.out[0][len(out):]
		} else {
			s.out = s.out[1:]
		}
		s.pending -= len(out)
	}
	s.sending, s.finSent = true, len(out) == 0
	return out, true
}
