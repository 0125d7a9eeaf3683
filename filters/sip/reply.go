package sip

import (
	"bytes"
	"fmt"
	"hash/fnv"
	"strconv"

	"go.uber.org/zap"
)

// respond is the gateway's own answer to a request. It is the same for a
// request that is sent again.
func (c *channel) respond(m *message, outward bool, no *refusal) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "SIP/2.0 %d %s\r\n", no.code, no.reason)
	first := true
	for _, h := range m.headers {
		value := h.value
		switch h.name {
		case "via":
			if first {
				value = c.received(m, outward)
			}
			first = false
			fmt.Fprintf(&b, "Via: %s\r\n", value)
		case "from":
			fmt.Fprintf(&b, "From: %s\r\n", value)
		case "to":
			if m.tag("to") == "" {
				value += ";tag=" + tagFor(m)
			}
			fmt.Fprintf(&b, "To: %s\r\n", value)
		case "call-id":
			fmt.Fprintf(&b, "Call-ID: %s\r\n", value)
		case "cseq":
			fmt.Fprintf(&b, "CSeq: %s\r\n", value)
		}
	}
	// 399: a warning for a person to read (RFC 3261, 20.43).
	fmt.Fprintf(&b, "Warning: 399 gateway %q\r\n", no.text)
	if no.code == 415 {
		b.WriteString("Accept: application/sdp\r\nAccept-Encoding: identity\r\n")
	}
	if no.code == 503 {
		b.WriteString("Retry-After: 30\r\n")
	}
	b.WriteString("Content-Length: 0\r\n\r\n")
	return b.Bytes()
}

// received is the topmost Via with what a server adds to it (RFC 3581, 4).
func (c *channel) received(m *message, outward bool) string {
	v, _ := m.topVia() // check has read it
	if _, ok := v.param("rport"); ok {
		from := c.peer
		if outward {
			from = c.inside
		}
		v.setParam("rport", strconv.Itoa(int(from.Port())))
		v.setParam("received", from.Addr().String())
	}
	return v.String()
}

// tagFor is a tag that depends on the request alone.
func tagFor(m *message) string {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s\x00%s\x00%s", m.value("call-id"), m.value("from"), m.cseq())
	return strconv.FormatUint(h.Sum64(), 36)
}

// refuse answers a request in the other side's place.
func (s *session) refuse(c *channel, t *transaction, outward bool, m *message, no *refusal) outcome {
	s.log.Info("request refused", zap.Stringer("flow", c.conn.Tuple()), zap.String("method", m.method), zap.Int("code", no.code), zap.String("why", no.text))
	if t != nil {
		t.own = no
		t.answered(no.code)
		s.letGo(t)
		s.refusedOffer(t, no.code)
	}
	if m.method == "ACK" {
		return outcome{} // nobody answers it
	}
	return outcome{answer: c.respond(m, outward, no)}
}
