package sip

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
)

// maxCallTime ends a call that has no session timer (RFC 4028) and of which
// nothing was heard for so long.
const maxCallTime = 12 * time.Hour

// call is one dialog, from its INVITE to its BYE:
//
//	early --2xx--> confirmed --BYE, timer, end of the connection--> ended
//	   \--negative answer, no answer----------------------------------^
type call struct {
	id        string
	peers     []netip.Addr // who may speak in it, outside
	channel   *channel     // that carried the last INVITE
	confirmed bool
	until     time.Time // zero: while its INVITE has no answer
	streams   []*stream // by media line
	// offer is the last one that came in an answer, and is answered by an ACK
	// or a PRACK.
	offer *offer
	// offers counts them; agreed is the number of the last one with an answer.
	offers, agreed int
}

// maxPeers bounds the hosts outside that speak in one call: a proxy, and the
// far end itself.
const maxPeers = 4

// offer is a description that waits for its answer.
type offer struct {
	number  int
	outward bool // the client made it
	lines   []offered
}

// offered is a media line of an offer: the client's stream, or what the far end
// named. Neither: the line is not opened.
type offered struct {
	stream *stream
	far    endpoints
	held   bool // the far end wants no media now
}

func (c *call) use() string { return "call " + c.id }

// callOf finds the call of a message. ok is false for a message of a host that
// has no part in it.
func (s *session) callOf(c *channel, outward bool, m *message) (found *call, ok bool) {
	found = s.calls[m.value("call-id")]
	if found == nil || slices.Contains(found.peers, c.peer.Addr()) {
		return found, true
	}
	// The client goes on with another host, as its peer has told it.
	if outward && len(found.peers) < maxPeers {
		found.peers = append(found.peers, c.peer.Addr())
		return found, true
	}
	return nil, false
}

// beginCall makes the call of an INVITE; nil: the client has too many.
func (s *session) beginCall(c *channel, m *message) *call {
	if len(s.calls) >= c.opts.calls {
		s.log.Info("call refused: too many", zap.Stringer("client", s.client), zap.Int("calls", len(s.calls)))
		return nil
	}
	out := &call{id: m.value("call-id"), peers: []netip.Addr{c.peer.Addr()}}
	s.calls[out.id] = out
	return out
}

// confirm notes a positive answer to an INVITE or UPDATE.
func (s *session) confirm(c *call, m *message) {
	c.confirmed = true
	length := maxCallTime
	value, _, _ := strings.Cut(m.value("session-expires"), ";")
	if n, ok := parseNumber(strings.Trim(value, " \t"), 1<<31-1); ok && n > 0 {
		length = min(length, time.Duration(n)*time.Second+answerTime)
	}
	c.until = time.Now().Add(length)
}

// endCall closes everything that a call has opened.
func (s *session) endCall(c *call) {
	if s.calls[c.id] != c {
		return
	}
	delete(s.calls, c.id)
	for _, st := range c.streams {
		s.release(st)
	}
	c.streams = nil
	s.drop(c, c.offer)
	for _, t := range s.transactions {
		if t.call == c {
			s.drop(c, t.offer)
			t.call, t.offer = nil, nil
		}
	}
	for _, x := range s.contacts {
		delete(x.uses, c.use())
		s.tidy(x)
	}
}

// drop releases the streams of an offer that are not part of the call.
func (s *session) drop(c *call, o *offer) {
	if o == nil {
		return
	}
	for _, l := range o.lines {
		if l.stream != nil && !slices.Contains(c.streams, l.stream) {
			s.release(l.stream)
		}
	}
}

// refusedOffer is a negative answer to a request, or none: what it offered is
// void, and a call that it began.
func (s *session) refusedOffer(t *transaction, code int) {
	c := t.call
	switch {
	case c == nil:
	case t.key.method == "INVITE" && t.initial && !c.confirmed, t.key.method != "PRACK" && (code == 481 || code == 408):
		o := t.offer // the transaction itself may be forgotten already
		s.endCall(c)
		s.drop(c, o)
	default:
		s.drop(c, t.offer)
		t.offer = nil
	}
}

// lost ends the calls that were made over a connection.
func (s *session) lost(c *channel) {
	for _, x := range s.calls {
		if x.channel == c {
			s.log.Debug("call ends with its connection", zap.String("call", x.id))
			s.endCall(x)
		}
	}
}
