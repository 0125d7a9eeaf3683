package ftp

import (
	"fmt"

	"go.uber.org/zap"
)

// errHeld: a server that never ends the reply which a data connection hangs on.
var errHeld = fmt.Errorf("%w: reply of more than %d bytes to a negotiation", errNotFTP, maxHeld)

// exchange is one command and its reply, or the greeting.
type exchange struct {
	verb string
	// own is the gateway's answer to a command that the server never sees. It
	// waits here for its turn among the server's replies.
	own []byte
	// neg is what the command negotiates, or nil.
	neg *negotiation
	// secures: AUTH or ADAT. The client is not read until the reply.
	secures bool
	// epsvAll: EPSV ALL.
	epsvAll bool
	// unsolicited stands for a multi-line reply that no command asked for, so
	// that nothing is written into its middle.
	unsolicited bool
}

// commands takes the client's commands one after the other.
func (c *control) commands() {
	for {
		c.mu.Lock()
		for !c.ended && !c.released && (c.secureOutstanding() || len(c.queue) >= maxOutstanding && !c.server.eof) {
			c.changed.Wait()
		}
		if c.released {
			c.pass(&c.client, &c.server)
		}
		in, ended := c.client.in, c.ended
		c.mu.Unlock()
		if len(in) == 0 || ended {
			return
		}
		cmd, n, err := cutCommand(in, c.opts.classOf)
		if err != nil {
			c.malformed(&c.client, err)
			return
		}
		if n == 0 {
			return
		}
		c.command(cmd)
		c.flush()
	}
}

// secureOutstanding: an AUTH or ADAT waits for a reply that can still come. mu
// is held.
func (c *control) secureOutstanding() bool {
	return !c.server.eof && len(c.queue) > 0 && c.queue[len(c.queue)-1].secures
}

// forward sends a line to the server, in the place of raw, which is at the
// front of client.in, and waits for nothing. A released connection has passed
// raw already.
func (c *control) forward(x *exchange, raw, line []byte) {
	c.lockSuperseded(x)
	if c.ended || c.released {
		c.mu.Unlock()
		cancel(x.neg)
		return
	}
	var void *negotiation
	if c.server.eof {
		void = x.neg // no reply comes any more
	} else {
		c.queue = append(c.queue, x)
	}
	c.client.in = c.client.in[len(raw):]
	c.server.out = append(c.server.out, line...)
	c.changed.Broadcast()
	c.mu.Unlock()
	cancel(void)
}

// lockSuperseded takes mu when x, about to begin, has voided what it
// supersedes: at once if no command is outstanding, else when its turn comes.
// The kernel has forgotten the former negotiation before the server hears of
// the new one.
func (c *control) lockSuperseded(x *exchange) {
	c.mu.Lock()
	for len(c.queue) == 0 {
		former := c.supersede(x)
		if former == nil {
			return
		}
		c.mu.Unlock()
		cancel(former)
		c.mu.Lock()
	}
}

// answer is the gateway's own reply to the command raw, at the front of
// client.in. It leaves when all earlier commands have theirs; a client that has
// got the server's FIN gets none.
func (c *control) answer(raw []byte, text string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.released {
		return
	}
	c.client.in = c.client.in[len(raw):]
	own := []byte(text + "\r\n")
	switch {
	case c.client.fin:
	case len(c.queue) == 0:
		c.client.out = append(c.client.out, own...)
	default:
		c.queue = append(c.queue, &exchange{own: own})
	}
	c.changed.Broadcast()
}

// replies takes the server's lines one after the other.
func (c *control) replies() {
	for {
		c.mu.Lock()
		if c.released {
			c.pass(&c.server, &c.client)
		}
		in, open, ended := c.server.in, c.open, c.ended
		c.mu.Unlock()
		if len(in) == 0 || ended {
			return
		}
		line, n, err := cutReply(in, open)
		if err == nil && n == 0 {
			return
		}
		if err == nil {
			err = c.reply(line)
		}
		if err != nil {
			c.malformed(&c.server, err)
			return
		}
		c.flush()
	}
}

// reply gives one line of the server's its place.
func (c *control) reply(line replyLine) error {
	c.mu.Lock()
	if c.ended || c.released {
		c.mu.Unlock()
		return nil
	}
	c.skipAborted(line)
	if !line.last {
		defer c.mu.Unlock()
		return c.keepLine(line)
	}
	var x *exchange
	if len(c.queue) > 0 {
		x = c.queue[0]
	}
	if x == nil || x.unsolicited || line.code < 200 {
		// Nobody asked, or more is to come: it opens nothing.
		c.passLine(line, line.raw)
		var void *negotiation
		if x != nil && x.unsolicited {
			void = c.pop()
		}
		c.mu.Unlock()
		cancel(void)
		return nil
	}
	c.mu.Unlock()

	c.finish(x, line, c.settle(x, line))
	return nil
}

// keepLine handles a line that does not end its reply. Those of a negotiation
// wait for the last one, which decides whether they are true. mu is held.
func (c *control) keepLine(line replyLine) error {
	if len(c.queue) == 0 {
		c.queue = append(c.queue, &exchange{unsolicited: true})
	}
	c.open = line.code
	c.server.in = c.server.in[len(line.raw):]
	if c.queue[0].neg == nil {
		c.client.out = append(c.client.out, line.raw...)
		c.changed.Broadcast()
		return nil
	}
	c.held = append(c.held, line.raw...)
	if len(c.held) > maxHeld {
		return errHeld
	}
	return nil
}

// passLine sends out in the place of a reply's last line, after what was held
// of the reply. mu is held.
func (c *control) passLine(line replyLine, out []byte) {
	c.server.in = c.server.in[len(line.raw):]
	c.client.out = append(append(c.client.out, c.held...), out...)
	c.held, c.open = nil, 0
	c.changed.Broadcast()
}

// finish passes the final reply of x, the head of the queue, or the gateway's
// own instead of it, and then every answer of the gateway's that waited for it.
func (c *control) finish(x *exchange, line replyLine, instead []byte) {
	c.mu.Lock()
	if c.ended || c.released {
		c.mu.Unlock()
		return
	}
	if instead != nil {
		c.held = nil
		c.passLine(line, instead)
	} else {
		c.passLine(line, line.raw)
	}
	positive := line.code < 300
	void := []*negotiation{}
	if x.neg != nil {
		c.current = x.neg
	}
	if x.verb == "REIN" && positive {
		void, c.current, c.epsvOnly = append(void, c.current), nil, false
	}
	if x.epsvAll && positive {
		c.epsvOnly = true
	}
	void = append(void, c.pop())
	secured := x.secures && (line.code == 234 || line.code == 235)
	if secured {
		void = append(void, c.release()...)
	}
	c.mu.Unlock()
	if secured {
		c.log.Info("control connection is encrypted and not filtered any more", zap.Stringer("flow", c.conn.Tuple()))
	}
	cancel(void...)
}

// pop takes the head off the queue and lets the next one become head. It
// returns the negotiation that thereby is void. mu is held.
func (c *control) pop() *negotiation {
	c.queue = c.queue[1:]
	for len(c.queue) > 0 && c.queue[0].own != nil {
		c.client.out = append(c.client.out, c.queue[0].own...)
		c.queue = c.queue[1:]
	}
	c.changed.Broadcast()
	if len(c.queue) == 0 {
		return nil
	}
	return c.supersede(c.queue[0])
}

// supersede takes the current negotiation away when x, which has become the
// head of the queue, begins another. mu is held.
func (c *control) supersede(x *exchange) (former *negotiation) {
	if x.neg != nil {
		former, c.current = c.current, nil
	}
	return former
}

// skipAborted drops an ABOR that the server answered together with the
// transfer, with one reply instead of two: the reply in hand can only belong
// to the command behind it. mu is held.
func (c *control) skipAborted(line replyLine) {
	if len(c.queue) < 2 || c.queue[0].verb != "ABOR" || c.open != 0 {
		return
	}
	next := c.queue[1]
	if line.code == 227 && next.verb == "PASV" || line.code == 229 && next.verb == "EPSV" {
		c.queue = c.queue[1:]
	}
}
