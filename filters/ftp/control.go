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
//	client ── read ──> commands ── server.out ── flush ──> server
//	client <─ flush ── client.out ── replies <── read ───  server
//
// Two goroutines, the reader of each end: that of the client is the only one
// that takes commands, that of the server the only one that takes replies. What
// an end is to get goes to its out, and whoever has put something there sends it
// (flush), unless the other one is sending to that end just now and takes it
// along: a command or a reply passes without waking anybody. mu guards all
// fields below it and is never held across a call to a socket or to the gateway.
//
// When filtering ends, the readers stop, or wait in Recv until the gateway
// calls them off, and what there is to send is sent:
//
//	filtering --release--> released --nothing left to send--> handed
//
// In released a reader that receives puts it into out; in handed it sends it
// itself, for there is nothing before it.
type control struct {
	log     *zap.Logger
	session filterapi.Session
	opts    *options
	running *sync.WaitGroup // all goroutines of the filter
	conn    filterapi.Connection
	// protocol is the name by which the rules know the connection.
	protocol string
	// published: the server is inside, and the client outside.
	published bool

	mu       sync.Mutex
	changed  sync.Cond // for the readers: there is room, or a reply, or the end
	progress sync.Cond // for Pump: a reader is done, or filtering has ended
	client   side
	server   side
	queue    []*exchange  // commands without a final reply, in order
	current  *negotiation // the last one that the server has answered
	open     int          // code of the multi-line reply in progress, or 0
	held     []byte       // lines of the reply in progress that wait for its end
	epsvOnly bool         // EPSV ALL is in force (RFC 2428, 4)

	// ended: the connection is over, because of cause. released: filtering is
	// over, bytes pass as they are. handed: the gateway carries them.
	ended    bool
	cause    error
	released bool
	handed   bool
}

// side is one end as the filter sees it.
type side struct {
	name    string
	sock    filterapi.Socket
	in      []byte // received and not yet accounted for
	out     []byte // to be sent to it
	fin     bool   // out ends with a FIN
	finSent bool   // that has been sent, or is now
	eof     bool   // it has sent its FIN
	inRecv  bool   // its reader waits for it
	sending bool   // somebody sends to it
	read    bool   // its reader is done
}

func newControl(log *zap.Logger, s filterapi.Session, o *options, running *sync.WaitGroup) *control {
	c := &control{log: log, session: s, opts: o, running: running}
	c.changed.L, c.progress.L = &c.mu, &c.mu
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
	if c.published {
		c.client.sock, c.server.sock = external, internal
	}
	stop := context.AfterFunc(ctx, func() { c.fail(context.Cause(ctx)) })
	defer stop()

	c.running.Go(func() { c.read(&c.client, &c.server, c.commands) })
	c.running.Go(func() { c.read(&c.server, &c.client, c.replies) })
	c.mu.Lock()
	for !c.over() {
		if !c.ended && c.released && c.client.idle() && c.server.idle() {
			c.handed = true
			c.changed.Broadcast()
			break
		}
		c.progress.Wait()
	}
	void := c.takeAll()
	cause, handed := c.cause, c.handed
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

// over: nobody is left who carries anything, and both ends are told so. mu is
// held.
func (c *control) over() bool {
	return c.client.read && c.server.read && (c.ended || c.client.finSent && c.server.finSent)
}

// idle: nothing from or to s is in the filter's hands, but for what a Recv may
// be about to return.
func (s *side) idle() bool {
	return (s.read || s.inRecv) && !s.sending && len(s.out) == 0
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
	defer c.readerDone(s)
	for c.mayReceive(s) {
		buf, err := s.sock.Recv()
		c.mu.Lock()
		s.inRecv = false
		handed := c.handed
		var void []*negotiation
		switch {
		case handed:
		case err == nil:
			s.in = append(s.in, buf.Data...)
		case errors.Is(err, io.EOF):
			void = c.endOf(s, peer)
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
			take()
			c.flush()
		case errors.Is(err, io.EOF):
			c.flush()
			cancel(void...)
			return
		default:
			c.fail(err)
			return
		}
	}
}

// mayReceive waits until s may be read. false: its reader is done, because the
// connection or filtering is over.
func (c *control) mayReceive(s *side) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		pending := len(c.client.out)
		if s == &c.client {
			pending += len(c.server.out)
		}
		switch {
		case c.ended, c.released:
			return false
		case s == &c.client && c.secureOutstanding(), pending >= maxPending:
		default:
			s.inRecv = true
			return true
		}
		c.changed.Wait()
	}
}

func (c *control) readerDone(s *side) {
	c.mu.Lock()
	s.read = true
	c.progress.Signal()
	c.mu.Unlock()
}

// endOf handles the FIN of s. Bytes of an incomplete command are not passed
// on: a server might take them for a command. mu is held; the caller cancels
// what is returned.
func (c *control) endOf(s, peer *side) []*negotiation {
	s.eof, peer.fin = true, true
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

// flush sends what both ends are to get.
func (c *control) flush() {
	c.mu.Lock()
	c.send(&c.client)
	c.send(&c.server)
	if c.released {
		c.progress.Signal()
	}
	c.mu.Unlock()
}

// send sends out, and then the FIN, to s. The other reader may be at it: then it
// goes on with what is new. mu is held, but not across the calls.
func (c *control) send(s *side) {
	if s.sending {
		return
	}
	for !c.ended && (len(s.out) > 0 || s.fin && !s.finSent) {
		// The next hop owns what it gets, up to its capacity.
		n := min(len(s.out), filterapi.DefaultStreamBuffer)
		out := s.out[:n:n]
		s.out = s.out[n:]
		s.sending, s.finSent = true, n == 0
		c.mu.Unlock()
		var err error
		if n > 0 {
			err = s.sock.Send(filterapi.NewBuffer(out, nil))
		} else {
			err = s.sock.Shutdown(false)
		}
		if err != nil {
			c.fail(err)
		}
		c.mu.Lock()
		s.sending = false
		c.changed.Broadcast() // there is room
	}
}

// release ends filtering for good: what is held goes out as it came, what
// comes from now on passes, and nothing that was negotiated stays open. mu is
// held; the caller cancels what is returned.
func (c *control) release() []*negotiation {
	c.released = true
	for _, x := range c.queue {
		c.client.out = append(c.client.out, x.own...)
	}
	void := c.takeAll()
	c.client.out = append(append(c.client.out, c.held...), c.server.in...)
	c.server.out = append(c.server.out, c.client.in...)
	c.held, c.server.in, c.client.in, c.queue = nil, nil, nil, nil
	c.changed.Broadcast()
	c.progress.Signal()
	return void
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
	c.mu.Lock()
	if c.released || c.ended {
		c.mu.Unlock()
		return
	}
	void := c.release()
	c.mu.Unlock()
	c.log.Warn("control connection is not filtered any more", zap.Stringer("flow", c.conn.Tuple()), zap.String("from", s.name), zap.Error(err))
	cancel(void...)
}
