package sip

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// refusal is why the gateway answers a request itself.
type refusal struct {
	code   int
	reason string
	text   string
}

func notAcceptable(text string) *refusal { return &refusal{488, "Not Acceptable Here", text} }

func malformed(err error) *refusal { return &refusal{400, "Bad Request", err.Error()} }

// unavailable is the refusal of a gateway that cannot open what is asked for.
func unavailable(err error) *refusal {
	text := "the gateway cannot open it"
	switch {
	case errors.Is(err, filterapi.ErrQuota):
		text = "too many are open at the gateway"
	case errors.Is(err, filterapi.ErrNoPorts):
		text = "no port is free at the gateway"
	case errors.Is(err, filterapi.ErrPolicyDenied), errors.Is(err, filterapi.ErrNetworkDenied):
		return &refusal{403, "Forbidden", "the gateway's rules do not allow it"}
	case errors.Is(err, filterapi.ErrTerminating):
		text = "the gateway is closing the connection"
	}
	return &refusal{503, "Service Unavailable", text}
}

// describes says whether a message carries a session description, and whether
// it carries one that the gateway cannot read.
func describes(m *message) (sdp, unreadable bool) {
	if len(m.body) == 0 {
		return false, false
	}
	kind, _, _ := strings.Cut(m.value("content-type"), ";")
	kind = strings.ToLower(strings.Trim(kind, " \t"))
	switch {
	case strings.HasPrefix(kind, "multipart/"), m.value("content-encoding") != "" && m.value("content-encoding") != "identity":
		return false, true
	case kind == "application/sdp":
		return true, false
	}
	return false, false
}

// offerOf reads an offer. One in a request is refused as a whole where it
// cannot be opened; in one that comes with an answer those lines are disabled.
func (s *session) offerOf(c *channel, call *call, outward bool, m *message) (*offer, *refusal) {
	d, err := parseSDP(m.body)
	if err != nil {
		return nil, malformed(err)
	}
	call.offers++
	o := &offer{number: call.offers, outward: outward}
	for i, line := range d.media {
		var l offered
		var no *refusal
		switch {
		case line.port == 0:
		case outward:
			l.stream, no = s.offerMine(c, call, i, d, line)
		default:
			l, no = s.offerTheirs(c, d, line)
		}
		if no != nil {
			s.log.Info("media refused", zap.Stringer("flow", c.conn.Tuple()), zap.String("call", call.id), zap.String("media", line.fields[0]), zap.String("why", no.text))
			if m.isRequest() && no.text != noSuchTransport {
				s.drop(call, o)
				return nil, no
			}
			d.disable(line)
		}
		o.lines = append(o.lines, l)
	}
	if outward {
		s.hideIn(c, d)
	}
	m.setBody(d.bytes())
	return o, nil
}

// offerMine opens nothing yet.
func (s *session) offerMine(c *channel, call *call, i int, d *description, line *mediaLine) (*stream, *refusal) {
	e, why := s.mine(d, line)
	if why != "" {
		return nil, notAcceptable(why)
	}
	st, err := s.streamFor(c, call, i, e)
	if err != nil {
		return nil, unavailable(err)
	}
	d.name(line, e, st, c.name.Addr())
	return st, nil
}

func (s *session) offerTheirs(c *channel, d *description, line *mediaLine) (offered, *refusal) {
	e, why := s.theirs(c, d, line)
	if why != "" {
		return offered{}, notAcceptable(why)
	}
	return offered{far: e, held: e.rtp.Addr().IsUnspecified()}, nil
}

// streamFor is the stream of a media line: the one that there is, if it has the
// same addresses, or a new one. nil: the client asks for no media, and had
// none.
func (s *session) streamFor(c *channel, call *call, i int, e endpoints) (*stream, error) {
	var known *stream
	if i < len(call.streams) {
		known = call.streams[i]
	}
	if e.rtp.Addr().IsUnspecified() || known != nil && !known.gone && known.client == e {
		return known, nil
	}
	for _, t := range s.transactions {
		// The same line of a request that is under way.
		if t.call == call && t.offer != nil && t.offer.outward && i < len(t.offer.lines) {
			if st := t.offer.lines[i].stream; st != nil && !st.gone && st.client == e {
				return st, nil
			}
		}
	}
	return s.reserve(c, e)
}

// name writes the external addresses of a stream into a line of the client's. A
// line that asks for no media keeps its unspecified address. gateway is what the
// session as a whole will name.
func (d *description) name(line *mediaLine, own endpoints, st *stream, gateway netip.Addr) {
	if st == nil || st.names == st.client {
		return
	}
	d.setPorts(line, st.names)
	if !own.rtp.Addr().IsUnspecified() && (line.conn >= 0 || d.conn < 0 || st.names.rtp.Addr() != gateway) {
		d.setAddress(line, st.names.rtp.Addr())
	}
}

// hideIn writes the gateway's address where the client's stands for the whole
// session.
func (s *session) hideIn(c *channel, d *description) {
	if c.name.Addr() != s.client {
		d.hide(s.client, c.name.Addr())
	}
}

// answerOf reads an answer, and opens what both sides agree on. What cannot be
// opened is disabled. It may come again.
func (s *session) answerOf(c *channel, call *call, o *offer, m *message) {
	d, err := parseSDP(m.body)
	if err != nil {
		s.log.Info("answer without a description that can be read", zap.Stringer("flow", c.conn.Tuple()), zap.Error(err))
		m.setBody(nil)
		return
	}
	if o.number < call.agreed {
		// It comes late: the two have agreed on something else since.
		if !o.outward {
			s.repeat(c, call, d)
		}
		m.setBody(d.bytes())
		return
	}
	call.agreed = o.number
	for i, line := range d.media {
		var st *stream
		why := ""
		switch {
		case line.port == 0:
		case i >= len(o.lines):
			why = "nobody offered it"
		case o.outward:
			st, why = s.answerTheirs(c, call, i, o.lines[i], d, line)
		default:
			st, why = s.answerMine(c, call, i, o.lines[i], d, line)
		}
		if why != "" {
			s.log.Info("media refused", zap.Stringer("flow", c.conn.Tuple()), zap.String("call", call.id), zap.String("media", line.fields[0]), zap.String("why", why))
			d.disable(line)
		}
		s.place(call, i, st)
	}
	for i := len(d.media); i < len(call.streams); i++ {
		s.place(call, i, nil)
	}
	s.drop(call, o)
	if !o.outward {
		s.hideIn(c, d)
	}
	m.setBody(d.bytes())
}

// repeat writes the present external addresses into an answer of the client's,
// and opens nothing.
func (s *session) repeat(c *channel, call *call, d *description) {
	for i, line := range d.media {
		e, why := s.mine(d, line)
		if why == "" && line.port != 0 && i < len(call.streams) && call.streams[i] != nil && call.streams[i].client == e {
			d.name(line, e, call.streams[i], c.name.Addr())
		} else {
			d.disable(line)
		}
	}
	s.hideIn(c, d)
}

// replace releases the stream of a media line if it is another one.
func (s *session) replace(call *call, i int, st *stream) {
	if i < len(call.streams) && call.streams[i] != st {
		s.release(call.streams[i])
		call.streams[i] = nil
	}
}

// place makes a stream that of a media line, in the place of another.
func (s *session) place(call *call, i int, st *stream) {
	for len(call.streams) <= i {
		call.streams = append(call.streams, nil)
	}
	if old := call.streams[i]; old != st {
		call.streams[i] = st
		s.release(old)
	}
}

// answerTheirs connects the client's stream with what the far end answers. The
// one whose place it takes is over: two cannot lead to the same far end.
func (s *session) answerTheirs(c *channel, call *call, i int, l offered, d *description, line *mediaLine) (st *stream, why string) {
	if l.stream == nil || l.stream.gone {
		if _, why := s.theirs(c, d, line); why != "" {
			return nil, why
		}
		return nil, ""
	}
	e, why := s.theirs(c, d, line)
	switch {
	case why != "":
		return nil, why
	case e.rtp.Addr().IsUnspecified():
		return l.stream, ""
	}
	s.replace(call, i, l.stream)
	if err := s.connect(c, l.stream, e); err != nil {
		return nil, fmt.Sprintf("it cannot be opened: %v", err)
	}
	return l.stream, ""
}

// answerMine connects the stream that the client answers with.
func (s *session) answerMine(c *channel, call *call, i int, l offered, d *description, line *mediaLine) (st *stream, why string) {
	if !l.far.rtp.IsValid() {
		return nil, "it was refused in the offer"
	}
	e, why := s.mine(d, line)
	if why != "" {
		return nil, why
	}
	st, err := s.streamFor(c, call, i, e)
	if err != nil {
		return nil, fmt.Sprintf("it cannot be opened: %v", err)
	}
	if st != nil && !l.held {
		s.replace(call, i, st)
		if err := s.connect(c, st, l.far); err != nil {
			s.release(st)
			return nil, fmt.Sprintf("it cannot be opened: %v", err)
		}
	}
	d.name(line, e, st, c.name.Addr())
	return st, ""
}
