package sip

import (
	"net/netip"
	"strconv"
	"time"

	"go.uber.org/zap"
)

// decide says what becomes of one message. It returns when everything that the
// message announces is in force. outward: the client sent it.
func (s *session) decide(c *channel, outward bool, m *message) outcome {
	key := keyOf(c, outward, m)
	if m.isRequest() {
		return s.request(c, key, m)
	}
	// The request went the other way.
	key.outward = !outward
	t := s.transactions[key]
	if t == nil || t.own != nil {
		s.log.Debug("answer that nobody asked for", zap.Stringer("flow", c.conn.Tuple()), zap.Int("code", m.code), zap.String("method", m.cseqMethod()))
		return outcome{}
	}
	t.answered(m.code)
	if outward {
		s.answerOut(c, t, m)
	} else {
		s.answerIn(c, t, m)
	}
	if m.code >= 200 {
		s.letGo(t)
	}
	return outcome{forward: m.bytes()}
}

// request decides on a request of either side.
func (s *session) request(c *channel, key transactionKey, m *message) outcome {
	t := s.transactions[key]
	if m.method == "ACK" {
		return s.acknowledge(c, t, key.outward, m)
	}
	again := t != nil
	switch {
	case !again:
		t = s.remember(c, key, m)
	case t.own != nil:
		return outcome{answer: c.respond(m, key.outward, t.own)}
	case m.method == "INVITE" && t.final != 0:
		return outcome{} // its answer is on the way, and will be repeated
	}
	if t == nil {
		return s.refuse(c, nil, key.outward, m, &refusal{503, "Service Unavailable", "too many requests wait for their answers"})
	}
	if no := s.negotiate(c, t, m); no != nil {
		return s.refuse(c, t, key.outward, m, no)
	}
	if key.outward {
		c.addVia(m, t.named)
	} else if no := s.toContact(c, m); no != nil {
		return s.refuse(c, t, key.outward, m, no)
	}
	return outcome{forward: m.bytes()}
}

// negotiate does what a request asks for, in calls and contacts.
func (s *session) negotiate(c *channel, t *transaction, m *message) *refusal {
	outward := t.key.outward
	sdp, unreadable := describes(m)
	dialog := m.method == "INVITE" || m.method == "UPDATE" || m.method == "PRACK"
	if dialog && unreadable {
		return &refusal{415, "Unsupported Media Type", "the gateway reads session descriptions that stand alone and are not encoded"}
	}
	call, ok := s.callOf(c, outward, m)
	switch {
	case !ok:
		if dialog || m.method == "BYE" || m.method == "CANCEL" {
			return &refusal{481, "Call/Transaction Does Not Exist", "the call is another host's"}
		}
	case call == nil && m.method == "INVITE":
		if call = s.beginCall(c, m); call == nil {
			return &refusal{503, "Service Unavailable", "the client has too many calls at the gateway"}
		}
		t.initial = true
	case m.method == "BYE" && call != nil:
		s.endCall(call)
		call = nil
	case m.method == "CANCEL":
		s.cancelled(t.key)
	}
	if dialog && call != nil {
		t.call = call
		if m.method == "INVITE" {
			call.channel = c
		}
	}
	if outward {
		if no := s.nameContacts(c, t, call, m); no != nil {
			return no
		}
	}
	if !sdp || t.call == nil {
		return nil
	}
	return s.describe(c, t, m)
}

// describe handles the session description of a request.
func (s *session) describe(c *channel, t *transaction, m *message) *refusal {
	call, outward := t.call, t.key.outward
	if o := call.offer; m.method == "PRACK" && o != nil && o.outward != outward {
		s.answerOf(c, call, o, m)
		return nil
	}
	o, no := s.offerOf(c, call, outward, m)
	if no == nil {
		t.offer = o
	}
	return no
}

// acknowledge handles an ACK. It answers an offer that came with the 200.
func (s *session) acknowledge(c *channel, t *transaction, outward bool, m *message) outcome {
	if t != nil && t.own != nil {
		return outcome{} // the gateway refused its INVITE
	}
	call, ok := s.callOf(c, outward, m)
	sdp, _ := describes(m)
	switch {
	case !ok:
		return outcome{}
	case sdp && call != nil && call.offer != nil && call.offer.outward != outward:
		s.answerOf(c, call, call.offer, m)
	case len(m.body) > 0:
		m.setBody(nil) // it answers nothing
	}
	if !outward {
		if no := s.toContact(c, m); no != nil {
			return outcome{}
		}
		return outcome{forward: m.bytes()}
	}
	if no := s.nameContacts(c, &transaction{}, nil, m); no != nil {
		return outcome{}
	}
	named := c.name
	if t != nil {
		named = t.named
	}
	c.addVia(m, named)
	return outcome{forward: m.bytes()}
}

// cancelled gives the INVITE that a CANCEL is for no more time than its answer
// needs.
func (s *session) cancelled(key transactionKey) {
	if t := s.transactions[key.invite()]; t != nil && t.final == 0 {
		t.until = time.Now().Add(answerTime)
	}
}

// answerIn handles the far end's answer to a request of the client's.
func (s *session) answerIn(c *channel, t *transaction, m *message) {
	c.restoreVia(t, m)
	positive := m.code < 300
	switch t.key.method {
	case "REGISTER":
		granted := s.granted(c, m)
		s.nameBack(c, m)
		if m.code >= 200 && positive {
			s.registered(c, t, m, granted)
		}
		return
	case "SUBSCRIBE", "REFER":
		if m.code >= 200 && positive {
			s.subscribed(t, m)
		}
	}
	if t.call == nil {
		return
	}
	if t.key.method == "INVITE" && m.code > 100 && positive {
		for _, x := range s.contacts {
			if _, ok := x.uses[t.call.use()]; ok {
				s.arm(x)
			}
		}
	}
	s.agree(c, t, m)
}

// answerOut handles the client's answer to a request of the far end's.
func (s *session) answerOut(c *channel, t *transaction, m *message) {
	// What cannot be named by a bind of its own is named by the connection.
	_ = s.nameContacts(c, t, t.call, m)
	if t.call != nil {
		s.agree(c, t, m)
	}
}

// agree handles the session description of an answer, and what the answer says
// of the call.
func (s *session) agree(c *channel, t *transaction, m *message) {
	call := t.call
	sdp, unreadable := describes(m)
	switch {
	case m.code >= 300:
		s.refusedOffer(t, m.code)
		return
	case unreadable:
		m.setBody(nil)
	case sdp && t.offer != nil:
		s.answerOf(c, call, t.offer, m)
	case sdp && t.key.method == "INVITE":
		// It answers with an offer. It cannot be refused any more.
		o, no := s.offerOf(c, call, !t.key.outward, m)
		if no != nil {
			m.setBody(nil)
			break
		}
		former := call.offer
		call.offer = o
		s.dropReplaced(call, former)
	}
	if m.code >= 200 && t.key.method != "PRACK" {
		s.confirm(call, m)
	}
}

// dropReplaced releases what a former offer reserved and the present one does
// not.
func (s *session) dropReplaced(call *call, former *offer) {
	if former == nil {
		return
	}
	kept := map[*stream]bool{}
	for _, l := range call.offer.lines {
		kept[l.stream] = true
	}
	rest := &offer{}
	for _, l := range former.lines {
		if !kept[l.stream] {
			rest.lines = append(rest.lines, l)
		}
	}
	s.drop(call, rest)
}

// addVia has the answers sent to the gateway: the client's own address means
// nothing outside. Whether or not the far end knows of rport, they come back to
// where the request came from. One that belongs to another request has the name
// of that, whichever connection it leaves by.
func (c *channel) addVia(m *message, named netip.AddrPort) {
	if c.name == c.inside {
		return
	}
	v, _ := m.topVia()
	v.host, v.port = named.Addr().String(), named.Port()
	m.setVia(v)
}

// restoreVia gives the client its own Via back. To the client it looks as if
// nobody had translated its address.
func (c *channel) restoreVia(t *transaction, m *message) {
	if c.name == c.inside {
		return
	}
	v, _ := m.topVia()
	v.host, v.port = t.host, t.port
	if t.rport {
		v.setParam("rport", strconv.Itoa(int(c.inside.Port())))
		v.setParam("received", c.inside.Addr().String())
	} else {
		v.setParam("rport", "")
		v.setParam("received", "")
	}
	m.setVia(v)
}

// toContact writes the client's own address into the URI of a request that was
// sent to an address which stands for it.
func (s *session) toContact(c *channel, m *message) *refusal {
	u, err := parseURI(m.uri)
	if err != nil {
		return malformed(err)
	}
	if u.scheme != "sip" {
		return nil
	}
	at := netip.AddrPortFrom(u.addr(), u.portOr(defaultPort))
	if x := s.contactAt(c, u, at); x != nil {
		m.uri = u.at(x.key.client)
	} else if at == c.name && c.name != c.inside {
		m.uri = u.at(c.inside)
	}
	return nil
}

// contactAt finds the contact that a URI of the far end's names.
func (s *session) contactAt(c *channel, u uri, at netip.AddrPort) *contact {
	p, ok := protoOf(u)
	if !ok {
		return nil
	}
	x := s.byExternal(p, at, c.peer.Addr())
	if x == nil || x.external == x.key.client {
		return nil
	}
	return x
}
