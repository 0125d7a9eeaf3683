package sip

import (
	"net/netip"
	"strings"
	"time"

	"go.uber.org/zap"
)

const (
	// defaultExpires is how long a registration lasts of which neither side
	// says anything (RFC 3261, 10.2).
	defaultExpires = time.Hour
	// maxExpires bounds what a registrar grants.
	maxExpires = 24 * time.Hour
)

// binding is one contact that a REGISTER asks for.
type binding struct {
	contact *contact
	expires time.Duration
}

// nameContacts writes external addresses into the Contact fields of a message
// of the client's, and reserves them where the message makes the client
// reachable. call may be nil.
func (s *session) nameContacts(c *channel, t *transaction, call *call, m *message) *refusal {
	register := m.method == "REGISTER"
	if register {
		t.wants, t.aor, t.all = nil, m.aor(), false
	}
	for i := range m.headers {
		h := &m.headers[i]
		if h.name != "contact" {
			continue
		}
		list := splitList(h.value)
		changed := false
		for n, element := range list {
			if element == "*" {
				t.all = register && m.expires(defaultExpires) == 0
				continue
			}
			a, err := parseAddress(element)
			if err != nil {
				return malformed(err)
			}
			u, err := parseURI(a.uri)
			if err != nil {
				return malformed(err)
			}
			to, no := s.nameContact(c, t, call, m, a, u)
			if no != nil {
				return no
			}
			if to.IsValid() {
				a.uri = u.at(to)
				list[n], changed = a.String(), true
			}
		}
		if changed {
			h.set(strings.Join(list, ", "))
		}
	}
	return nil
}

// nameContact gives the external address that stands for one contact; the zero
// value: it stays as it is.
func (s *session) nameContact(c *channel, t *transaction, call *call, m *message, a address, u uri) (to netip.AddrPort, no *refusal) {
	addr := u.addr()
	proto, ok := protoOf(u)
	if !addr.IsValid() || !ok {
		return to, nil // nothing opens for it
	}
	at := netip.AddrPortFrom(addr, u.portOr(defaultPort))
	register := m.method == "REGISTER"
	switch {
	case s.byExternal(proto, at, c.peer.Addr()) != nil && addr != s.client:
		return to, nil // the client has learned it
	case addr != s.client && register:
		return to, &refusal{403, "Forbidden", "a contact's address is not the client's own"}
	case addr != s.client:
		return to, nil
	case at.Port() < lowestPort && register:
		return to, &refusal{403, "Forbidden", "a contact's port is below 1024"}
	}
	x, no := s.contactOf(c, t, call, m, a, contactKey{proto, at, c.peer.Addr()})
	switch {
	case no != nil:
		return to, no
	case x != nil && x.external == at:
		return to, nil
	case x != nil:
		return x.external, nil
	case c.name.Addr() != s.client:
		return c.name, nil
	}
	return to, nil
}

// contactOf finds the contact that a message names, and reserves one if the
// message makes the client reachable; nil: it does not.
func (s *session) contactOf(c *channel, t *transaction, call *call, m *message, a address, key contactKey) (*contact, *refusal) {
	known := s.contacts[key]
	method := m.cseqMethod()
	asks, answers := m.isRequest(), m.code > 100 && m.code < 300
	switch {
	case key.client.Port() < lowestPort:
		return known, nil
	case method == "REGISTER" && asks:
		return s.wantRegistration(c, t, a, m, key)
	case method == "INVITE" && call != nil && (asks || answers):
		x, err := s.contactFor(c, key, call.use(), time.Time{})
		if err != nil {
			return nil, unavailable(err)
		}
		if answers {
			s.arm(x) // the far end began the call
		}
		return x, nil
	case (method == "SUBSCRIBE" || method == "REFER") && (asks || m.code >= 200 && answers):
		x, err := s.contactFor(c, key, t.key.use(), t.until)
		if err != nil {
			return nil, unavailable(err)
		}
		if asks {
			t.contacts = append(t.contacts, x)
		} else {
			s.keep(x, "subscription "+m.value("call-id"), min(m.expires(subscriptionTime), maxExpires))
			delete(x.uses, t.key.use())
			s.tidy(x)
		}
		return x, nil
	}
	return known, nil
}

// subscriptionTime is how long a subscription lasts of which neither side says
// anything.
const subscriptionTime = time.Hour

// subscribed is the positive answer to a SUBSCRIBE or REFER.
func (s *session) subscribed(t *transaction, m *message) {
	for _, x := range t.contacts {
		s.keep(x, "subscription "+m.value("call-id"), min(m.expires(subscriptionTime), maxExpires))
	}
}

// wantRegistration reserves the address of a contact that is to be registered.
// One that is taken away needs none.
func (s *session) wantRegistration(c *channel, t *transaction, a address, m *message, key contactKey) (*contact, *refusal) {
	expires := m.expires(defaultExpires)
	if v, ok := findParam(a.after, "expires"); ok {
		expires = seconds(v, defaultExpires)
	}
	if known := s.contacts[key]; expires == 0 {
		if known != nil {
			t.wants = append(t.wants, binding{known, 0})
		}
		return known, nil
	} else if known == nil || !known.has(t.use()) && !known.has(t.key.use()) {
		if s.registrations() >= c.opts.registrations {
			s.log.Info("registration refused: too many", zap.Stringer("client", s.client))
			return nil, &refusal{503, "Service Unavailable", "the client has too many registrations at the gateway"}
		}
	}
	x, err := s.contactFor(c, key, t.key.use(), t.until)
	if err != nil {
		return nil, unavailable(err)
	}
	t.contacts = append(t.contacts, x)
	t.wants = append(t.wants, binding{x, expires})
	return x, nil
}

// use is what the contacts of a registration are kept by.
func (t *transaction) use() string { return "register " + t.aor }

func (c *contact) has(use string) bool {
	_, ok := c.uses[use]
	return ok
}

// registrations counts what the client has registered, or is about to.
func (s *session) registrations() int {
	n := 0
	for _, c := range s.contacts {
		for use := range c.uses {
			if strings.HasPrefix(use, "register ") || strings.HasPrefix(use, "request true REGISTER ") {
				n++
			}
		}
	}
	return n
}

// registered is a positive answer to a REGISTER. It lists the contacts that are
// registered now; granted has the time of each one. An answer without a list
// grants what was asked for.
func (s *session) registered(c *channel, t *transaction, m *message, granted map[*contact]time.Duration) {
	listed := m.find("contact") != nil
	for _, w := range t.wants {
		d, ok := granted[w.contact]
		switch {
		case w.expires == 0, !ok && listed:
			d = 0
		case !ok:
			d = m.expires(w.expires)
		}
		s.keep(w.contact, t.use(), min(d, maxExpires))
	}
	for _, x := range s.contacts {
		if _, ok := granted[x]; x.key.peer == c.peer.Addr() && x.has(t.use()) && (t.all || listed && !ok) {
			s.keep(x, t.use(), 0)
		}
	}
}

// keep arms a contact for some time; 0: it ends a use of it.
func (s *session) keep(x *contact, use string, d time.Duration) {
	if d <= 0 {
		delete(x.uses, use)
		s.tidy(x)
		return
	}
	x.uses[use] = time.Now().Add(d)
	s.arm(x)
}

// granted reads the times out of the answer to a REGISTER.
func (s *session) granted(c *channel, m *message) map[*contact]time.Duration {
	out := map[*contact]time.Duration{}
	for _, value := range m.values("contact") {
		for _, element := range splitList(value) {
			a, err := parseAddress(element)
			if err != nil {
				continue
			}
			u, err := parseURI(a.uri)
			proto, ok := protoOf(u)
			if err != nil || !ok {
				continue
			}
			x := s.byExternal(proto, netip.AddrPortFrom(u.addr(), u.portOr(defaultPort)), c.peer.Addr())
			if x == nil {
				continue
			}
			d := m.expires(defaultExpires)
			if v, ok := findParam(a.after, "expires"); ok {
				d = seconds(v, defaultExpires)
			}
			out[x] = max(out[x], d)
		}
	}
	return out
}

// nameBack shows the client its own contacts in the answer to a REGISTER.
func (s *session) nameBack(c *channel, m *message) {
	for i := range m.headers {
		h := &m.headers[i]
		if h.name != "contact" {
			continue
		}
		list := splitList(h.value)
		for n, element := range list {
			a, err := parseAddress(element)
			if err != nil {
				continue
			}
			u, err := parseURI(a.uri)
			if err != nil {
				continue
			}
			if x := s.contactAt(c, u, netip.AddrPortFrom(u.addr(), u.portOr(defaultPort))); x != nil {
				a.uri = u.at(x.key.client)
				list[n] = a.String()
			}
		}
		h.set(strings.Join(list, ", "))
	}
}

// aor is the address of record that a REGISTER is for.
func (m *message) aor() string {
	a, err := parseAddress(m.value("to"))
	if err != nil {
		return m.value("to")
	}
	return a.uri
}

// expires is the Expires field.
func (m *message) expires(otherwise time.Duration) time.Duration {
	if v := m.value("expires"); v != "" {
		return seconds(v, otherwise)
	}
	return otherwise
}

// seconds reads a number of seconds; what is none stands for otherwise (RFC
// 3261, 20.10).
func seconds(s string, otherwise time.Duration) time.Duration {
	n, ok := parseNumber(s, 1<<32-1)
	if !ok {
		return otherwise
	}
	return time.Duration(n) * time.Second
}
