package sip

import (
	"net/netip"
	"strconv"
	"time"

	"go.uber.org/zap"
)

// maxTransactions bounds the requests of one client's session that are
// remembered.
const maxTransactions = 512

// inviteTime is how long an INVITE may be without an answer or a provisional
// one.
const inviteTime = 4 * time.Minute

// transactionKey names a request and its answers. outward: the client sent the
// request.
type transactionKey struct {
	outward bool
	peer    netip.Addr
	branch  string
	method  string
}

// transaction is one request, from its first sight until its answer is not
// repeated any more:
//
//	asked --1xx--> asked --final--> answered --32 s--> forgotten
type transaction struct {
	key   transactionKey
	until time.Time
	// host, port and rport are what the client wrote into its Via.
	host  string
	port  uint16
	rport bool
	// named is what the gateway writes there instead.
	named netip.AddrPort
	// final is the code of the final answer, or 0.
	final int
	// own is the gateway's answer: the other side never saw the request.
	own *refusal
	// call, offer and contacts are what the request negotiates.
	call     *call
	initial  bool // it began the call
	offer    *offer
	contacts []*contact
	// wants are the registrations that a REGISTER asks for.
	wants []binding
	aor   string
	all   bool // it takes all away
}

// invite is the key of the INVITE that a CANCEL is for.
func (k transactionKey) invite() transactionKey {
	k.method = "INVITE"
	return k
}

// use is what a transaction's contacts are kept by until its answer.
func (k transactionKey) use() string {
	return "request " + strconv.FormatBool(k.outward) + " " + k.method + " " + k.branch
}

// outcome is what becomes of one message: forward goes on to the other end,
// answer goes back to its sender. None: it is lost.
type outcome struct{ forward, answer []byte }

// keyOf names the transaction that a message belongs to. An ACK belongs to its
// INVITE unless that was accepted.
func keyOf(c *channel, outward bool, m *message) transactionKey {
	v, _ := m.topVia() // check has read it
	k := transactionKey{outward: outward, peer: c.peer.Addr(), branch: v.branch(), method: m.cseqMethod()}
	if k.branch == "" {
		// RFC 2543 has none: the request is known by its number.
		k.branch = m.value("call-id") + " " + m.cseq() + " " + m.tag("from")
	}
	if k.method == "ACK" {
		k.method = "INVITE"
	}
	return k
}

// remember makes the transaction of a new request; nil: there are too many.
func (s *session) remember(c *channel, key transactionKey, m *message) *transaction {
	if len(s.transactions) >= maxTransactions {
		return nil
	}
	v, _ := m.topVia()
	t := &transaction{key: key, until: time.Now().Add(answerTime), host: v.host, port: v.port, named: c.name}
	_, t.rport = v.param("rport")
	if invite := s.transactions[key.invite()]; key.method == "CANCEL" && invite != nil {
		t.named = invite.named // by its Via the far end knows what it cancels
	}
	if key.method == "INVITE" {
		t.until = time.Now().Add(inviteTime)
	}
	s.transactions[key] = t
	return t
}

// answered notes an answer.
func (t *transaction) answered(code int) {
	switch {
	case code >= 200 && t.final == 0:
		t.final = code
		t.until = time.Now().Add(answerTime)
	case code < 200 && t.final == 0 && t.key.method == "INVITE":
		t.until = time.Now().Add(inviteTime)
	}
}

// endTransaction forgets a transaction, and what it negotiated if nobody has
// answered.
func (s *session) endTransaction(key transactionKey, t *transaction) {
	delete(s.transactions, key)
	s.letGo(t)
	switch {
	case t.call == nil:
	case t.final != 0:
		s.drop(t.call, t.offer) // what no answer has spoken of
	case t.own == nil:
		s.log.Debug("request without an answer", zap.String("method", key.method), zap.String("call", t.call.id))
		s.refusedOffer(t, 408)
	}
}

// letGo takes a transaction's hold on its contacts away.
func (s *session) letGo(t *transaction) {
	for _, c := range t.contacts {
		delete(c.uses, t.key.use())
		s.tidy(c)
	}
	t.contacts = nil
}
