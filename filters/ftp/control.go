package ftp

import (
	"context"
	"errors"
	"io"
	"sync"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// Bounds of one control connection.
const (
	// maxPending is how many bytes may wait for a slow end before the other
	// one is not read any more.
	maxPending = 32 << 10
	// maxOutstanding is how many pipelined commands may wait for their
	// replies.
	maxOutstanding = 64
	// maxHeld bounds a reply that is held back until its last line.
	maxHeld = 16 << 10
)

// control is the data filter of one control connection.
//
//	client ── read ──> commands ── server.out ── write ──> server
//	client <─ write ── client.out ── replies <── read ───  server
//
// Four goroutines, one for each arrow at an end. The reader of the client is
// the only one that takes commands, the reader of the server the only one that
// takes replies. mu guards all fields below it and is never held across a call
// to a socket or to the gateway.
type control struct {
	log     *zap.Logger
	session filterapi.Session
	opts    *options
	conn    filterapi.Connection

	mu       sync.Mutex
	changed  sync.Cond
	client   side
	server   side
	queue    []*exchange  // commands without a final reply, in order
	current  *negotiation // the last one that the server has answered
	open     int          // code of the multi-line reply in progress, or 0
	held     []byte       // lines of the reply in progress that wait for its end
	epsvOnly bool         // EPSV ALL is in force (RFC 2428, 4)

	// ended: the connection is over, because of cause. released: filtering is
	// over, bytes pass as they are. handOver: released, and nobody is left in
	// a Recv that cannot be called back.
	ended    bool
	cause    error
	released bool
	handOver bool
}

// side is one end as the filter sees it.
type side struct {
	name   string
	sock   filterapi.Socket
	in     []byte // received and not yet accounted for
	out    []byte // to be sent to it
	fin    bool   // out ends with a FIN
	eof    bool   // it has sent its FIN
	inRecv bool
	called bool // its Recv was interrupted and has not answered yet
	handed bool // its reader has stopped for the hand-over
}

func newControl(log *zap.Logger, s filterapi.Session, o *options) *control {
	c := &control{log: log, session: s, opts: o}
	c.changed.L = &c.mu
	// The server speaks first: 220, or 120 and then 220 (RFC 959, 5.4).
	c.queue = []*exchange{{verb: "greeting"}}
	return c
}

// Pump carries the control connection. Everything that was negotiated on it
// and not used is void when it returns.
func (c *control) Pump(ctx context.Context, conn filterapi.Connection, internal, external filterapi.Socket) error {
	c.conn = conn
	c.client = side{name: "client", sock: internal}
	c.server = side{name: "server", sock: external}
	stop := context.AfterFunc(ctx, func() { c.fail(context.Cause(ctx)) })
	defer stop()

	var wg sync.WaitGroup
	wg.Go(func() { c.read(&c.client, &c.server, c.commands) })
	wg.Go(func() { c.read(&c.server, &c.client, c.replies) })
	wg.Go(func() { c.write(&c.client) })
	wg.Go(func() { c.write(&c.server) })
	wg.Wait()

	c.mu.Lock()
	void := c.takeAll()
	cause, handed := c.cause, c.client.handed && c.server.handed
	c.mu.Unlock()
	cancel(void...)
	switch {
	case cause != nil:
		return cause
	case handed:
		return filterapi.ErrReleased
	}
	return errors.Join(internal.Close(false), external.Close(false))
}

// fail ends the connection with a reset on both sides. The first cause counts.
func (c *control) fail(cause error) {
	c.mu.Lock()
	if !c.ended {
		c.ended, c.cause = true, cause
	}
	c.changed.Broadcast()
	c.mu.Unlock()
	// The sockets are reset already, or become so now; there is nobody to
	// tell about an error.
	_ = c.client.sock.Close(true)
	_ = c.server.sock.Close(true)
}

// read is the reader of s. take accounts for what is in s.in.
func (c *control) read(s, peer *side, take func()) {
	for c.mayReceive(s) {
		buf, err := s.sock.Recv()
		c.mu.Lock()
		s.inRecv = false
		switch {
		case err == nil:
			s.in = append(s.in, buf.Data...)
			c.mu.Unlock()
			buf.Release()
			take()
		case errors.Is(err, filterapi.ErrInterrupted):
			s.called = false
			c.mu.Unlock()
		case errors.Is(err, io.EOF):
			void := c.endOf(s, peer)
			c.mu.Unlock()
			cancel(void...)
			return
		default:
			c.mu.Unlock()
			c.fail(err)
			return
		}
	}
}

// mayReceive waits until s may be read. false: its reader is done, because the
// connection is over or because both readers have stopped for the hand-over.
func (c *control) mayReceive(s *side) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		pending := len(c.client.out)
		if s == &c.client {
			pending += len(c.server.out)
		}
		switch {
		case c.ended, c.client.handed && c.server.handed:
			return false
		case c.handOver && !s.called:
			s.handed = true
			c.changed.Broadcast()
			if c.client.handed && c.server.handed {
				return false
			}
		case s == &c.client && c.secureOutstanding(), pending >= maxPending:
		default:
			s.handed, s.inRecv = false, true
			return true
		}
		c.changed.Wait()
	}
}

// endOf handles the FIN of s. Bytes of an incomplete command are not passed
// on: a server might take them for a command. mu is held; the caller cancels
// what is returned.
func (c *control) endOf(s, peer *side) []*negotiation {
	s.eof, peer.fin = true, true
	c.handOver, s.handed, peer.handed = false, false, false
	var void []*negotiation
	if s == &c.server {
		peer.out = append(append(peer.out, c.held...), s.in...)
		c.held = nil
		void = c.takeAll()
		c.queue = nil // no reply comes any more
	}
	s.in = nil
	c.changed.Broadcast()
	return void
}

// write is the writer of s: it sends out, then the FIN.
func (c *control) write(s *side) {
	for {
		c.mu.Lock()
		for len(s.out) == 0 && !c.ended && !s.fin && !(c.client.handed && c.server.handed) {
			c.changed.Wait()
		}
		out := s.out
		if len(out) > filterapi.DefaultStreamBuffer {
			out = out[:filterapi.DefaultStreamBuffer:filterapi.DefaultStreamBuffer]
		}
		s.out = s.out[len(out):]
		ended, fin := c.ended, s.fin && len(out) == 0
		c.changed.Broadcast()
		c.mu.Unlock()

		var err error
		switch {
		case ended:
			return
		case len(out) > 0:
			err = s.sock.Send(filterapi.NewBuffer(out, nil))
		case fin:
			if err = s.sock.Shutdown(false); err == nil {
				return
			}
		default: // handed over
			return
		}
		if err != nil {
			c.fail(err)
			return
		}
	}
}

// release ends filtering for good: what is held goes out as it came, what
// comes from now on passes, and nothing that was negotiated stays open. mu is
// held; the caller calls after without it. The calling reader is not in Recv.
func (c *control) release() (after func()) {
	c.released, c.handOver = true, !c.client.eof && !c.server.eof
	for _, x := range c.queue {
		c.client.out = append(c.client.out, x.own...)
	}
	void := c.takeAll()
	c.client.out = append(append(c.client.out, c.held...), c.server.in...)
	c.server.out = append(c.server.out, c.client.in...)
	c.held, c.server.in, c.client.in = nil, nil, nil

	var call []filterapi.Interrupter
	for _, s := range []*side{&c.client, &c.server} {
		if !s.inRecv {
			continue
		}
		i, ok := s.sock.(filterapi.Interrupter)
		if !ok {
			c.handOver = false
			continue
		}
		s.called = true
		call = append(call, i)
	}
	c.changed.Broadcast()
	return func() {
		cancel(void...)
		for _, i := range call {
			i.Interrupt()
		}
	}
}

// pass accounts for s.in after the release. mu is held.
func (c *control) pass(s, peer *side) {
	peer.out = append(peer.out, s.in...)
	s.in = nil
	c.changed.Broadcast()
}

// malformed is the end of filtering because one side does not speak FTP.
func (c *control) malformed(s *side, err error) {
	if !c.opts.passMalformed {
		c.log.Warn("control connection is cut", zap.Stringer("flow", c.conn.Tuple()), zap.String("from", s.name), zap.Error(err))
		c.fail(err)
		return
	}
	c.log.Warn("control connection is not filtered any more", zap.Stringer("flow", c.conn.Tuple()), zap.String("from", s.name), zap.Error(err))
	c.mu.Lock()
	if c.released || c.ended {
		c.mu.Unlock()
		return
	}
	after := c.release()
	c.mu.Unlock()
	after()
}
