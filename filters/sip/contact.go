package sip

import (
	"fmt"
	"net/netip"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// contactKey names a contact: an address of the client's, for one far end.
type contactKey struct {
	proto  flow.Proto
	client netip.AddrPort
	peer   netip.Addr
}

// contact is an external address that stands for an address of the client's,
// for as long as somebody has a use of it:
//
//	reserved --positive answer--> armed for the peer --no use left--> gone
type contact struct {
	key      contactKey
	bind     filterapi.Connection
	external netip.AddrPort
	opening  *opening
	armed    bool
	// uses say until when: registrations, subscriptions, calls, and requests
	// without an answer. The zero time is for calls, which end by themselves.
	uses map[string]time.Time
}

// maxContacts bounds the addresses of one client that are held; a far end
// that names many is no reason for more.
const maxContacts = 64

// contactFor finds or reserves the external address of a client's address.
func (s *session) contactFor(c *channel, key contactKey, use string, until time.Time) (*contact, error) {
	if known := s.contacts[key]; known != nil {
		known.uses[use] = until
		return known, nil
	}
	if len(s.contacts) >= maxContacts {
		return nil, fmt.Errorf("%d contacts: %w", len(s.contacts), filterapi.ErrQuota)
	}
	binds, err := s.api.BindForClient(filterapi.Bind{
		Negotiated: filterapi.Negotiated{
			Primary: c.conn, Proto: key.proto, Flags: bindFlags(key.proto) | filterapi.NoKernelMode,
		},
		Clients: []netip.AddrPort{key.client}, IPFilter: filterapi.OnlyFrom(),
	})
	if err != nil {
		return nil, fmt.Errorf("reserve an address for contact %s: %w", key.client, err)
	}
	out := &contact{key: key, bind: binds[0], uses: map[string]time.Time{use: until}, opening: &opening{client: key.client, contact: true}}
	if out.external, err = binds[0].ExternalName(); err != nil {
		binds[0].Kill()
		return nil, fmt.Errorf("address of contact %s: %w", key.client, err)
	}
	s.open.addExternal(endpoint{key.proto, out.external}, out.opening)
	s.contacts[key] = out
	return out, nil
}

// bindFlags are those of a bind that any number of flows may use, both ways.
func bindFlags(p flow.Proto) filterapi.Flags {
	if p == flow.UDP {
		return filterapi.AllowMultiple | filterapi.Bidirectional
	}
	return filterapi.AllowMultiple
}

// arm lets the far end in, and returns when it may come.
func (s *session) arm(c *contact) {
	if c.armed {
		return
	}
	if err := c.bind.SetIPFilter(filterapi.OnlyFrom(c.key.peer)); err != nil {
		s.log.Warn("contact is not reachable", zap.Stringer("client", c.key.client), zap.Stringer("peer", c.key.peer), zap.Error(err))
		clear(c.uses)
		s.tidy(c)
		return
	}
	c.armed = true
	s.log.Debug("contact is reachable", zap.Stringer("client", c.key.client), zap.Stringer("external", c.external), zap.Stringer("peer", c.key.peer))
}

// expire ends the uses that have had their time.
func (c *contact) expire(now time.Time) {
	for use, until := range c.uses {
		if !until.IsZero() && !now.Before(until) {
			delete(c.uses, use)
		}
	}
}

// tidy gives the external address back when nobody has a use of it. The flows
// that came in by it live on for as long as an answer may be repeated.
func (s *session) tidy(c *contact) {
	if len(c.uses) > 0 || s.contacts[c.key] != c {
		return
	}
	delete(s.contacts, c.key)
	c.bind.Kill()
	if conns := s.open.close(c.opening); len(conns) > 0 {
		s.lingering = append(s.lingering, lingering{time.Now().Add(answerTime), conns})
	}
}

// byExternal finds the contact that an external address stands for.
func (s *session) byExternal(p flow.Proto, at netip.AddrPort, peer netip.Addr) *contact {
	for _, c := range s.contacts {
		if c.external == at && c.key.proto == p && c.key.peer == peer {
			return c
		}
	}
	return nil
}

// protoOf is the transport that a SIP URI asks for; ok is false for one that is
// not supported. Without a parameter it is UDP (RFC 3263, 4.1).
func protoOf(u uri) (p flow.Proto, ok bool) {
	switch t := u.transport(); {
	case u.scheme != "sip":
		return 0, false
	case t == "" || t == "udp":
		return flow.UDP, true
	case t == "tcp":
		return flow.TCP, true
	}
	return 0, false
}

// lowestPort is the first that a permission of the filter's leads to: no
// service of the system's listens there.
const lowestPort = 1024
