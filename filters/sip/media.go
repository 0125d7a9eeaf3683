package sip

import (
	"errors"
	"fmt"
	"net/netip"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// stream is one media stream of a call, from the client's description of it to
// its end:
//
//	reserved --the far end's description--> connected --another--> connected
//	    \-----------------------------------------\--> released
type stream struct {
	client  endpoints              // the client's own
	names   endpoints              // what the far end is told
	remote  endpoints              // the far end's; zero: not connected
	binds   []filterapi.Connection // for RTP, and RTCP
	actions []filterapi.Action     // that let the client out
	opening *opening
	gone    bool
}

func (e endpoints) list() []netip.AddrPort {
	if e.rtcp.IsValid() {
		return []netip.AddrPort{e.rtp, e.rtcp}
	}
	return []netip.AddrPort{e.rtp}
}

// reserve chooses external addresses for the client's media. They let nobody in
// yet.
func (s *session) reserve(c *channel, client endpoints) (*stream, error) {
	flags := bindFlags(flow.UDP)
	if client.rtcp.IsValid() {
		flags |= filterapi.EvenPort
	}
	binds, err := s.api.BindForClient(filterapi.Bind{
		Negotiated: filterapi.Negotiated{Primary: c.conn, Proto: flow.UDP, Flags: flags},
		Clients:    client.list(), IPFilter: filterapi.OnlyFrom(),
	})
	if err != nil {
		return nil, fmt.Errorf("reserve ports for media: %w", err)
	}
	st := &stream{client: client, binds: binds, opening: &opening{client: client.rtp}}
	for i, b := range binds {
		name, err := b.ExternalName()
		if err == nil && i == 0 {
			st.names.rtp = name
		} else if err == nil {
			st.names.rtcp = name
		}
		if err != nil || name.Addr().Is4() != s.client.Is4() {
			s.release(st)
			return nil, fmt.Errorf("address for media: %w", errors.Join(err, filterapi.ErrTerminating))
		}
		s.open.addExternal(endpoint{flow.UDP, name}, st.opening)
	}
	return st, nil
}

// connect lets the far end's media in and the client's out, and returns when
// the kernel has acknowledged. It may be called again, with the same address
// or another.
func (s *session) connect(c *channel, st *stream, remote endpoints) error {
	if st.gone {
		return filterapi.ErrTerminating
	}
	if st.remote == remote {
		return nil
	}
	s.disconnect(st)
	sources := filterapi.OnlyFrom(remote.rtp.Addr())
	if remote.rtcp.IsValid() {
		sources = filterapi.OnlyFrom(remote.rtp.Addr(), remote.rtcp.Addr())
	}
	for _, b := range st.binds {
		if err := b.SetIPFilter(sources); err != nil {
			return fmt.Errorf("let media in from %s: %w", remote.rtp, err)
		}
	}
	names := st.names.list()
	for i, to := range remote.list() {
		if i == len(names) {
			break
		}
		s.open.addTarget(endpoint{flow.UDP, to}, st.opening)
		if err := s.letOut(c, st, to, names[i], st.client.list()[i]); err != nil {
			return err
		}
	}
	st.remote = remote
	s.log.Debug("media may flow", zap.Stringer("client", st.client.rtp), zap.Stringer("external", st.names.rtp), zap.Stringer("remote", remote.rtp))
	return nil
}

// letOut allows the client's media to leave from the address that the far end
// was told.
func (s *session) letOut(c *channel, st *stream, to, name, client netip.AddrPort) error {
	f := filterapi.FutureConnect{
		Negotiated: filterapi.Negotiated{Primary: c.conn, Proto: flow.UDP}, Target: to,
	}
	if to.Addr() != c.peer.Addr() {
		f.Flags |= filterapi.ToAll // mayCarry has judged it
	}
	if name != client {
		f.External = name
	}
	a, err := s.api.AllowFutureConnect(f)
	if err != nil {
		return fmt.Errorf("let media out to %s: %w", to, err)
	}
	st.actions = append(st.actions, a)
	return nil
}

// disconnect takes back what connect opened, but for the reserved addresses.
func (s *session) disconnect(st *stream) {
	for _, a := range st.actions {
		// ErrTerminating says that it was used or is void already.
		_ = a.Cancel()
	}
	st.actions = nil
	if !st.remote.rtp.IsValid() {
		return
	}
	st.remote = endpoints{}
	for _, conn := range s.open.retarget(st.opening) {
		conn.Kill()
	}
}

// release ends a stream for good: nobody gets in any more, and what flows is
// cut. nil and a released one are no error.
func (s *session) release(st *stream) {
	if st == nil || st.gone {
		return
	}
	st.gone = true
	for _, b := range st.binds {
		b.Kill()
	}
	for _, a := range st.actions {
		_ = a.Cancel()
	}
	st.actions = nil
	for _, conn := range s.open.close(st.opening) {
		conn.Kill()
	}
}

// theirs judges a media line of the far end's. why: it must not be opened.
func (s *session) theirs(c *channel, d *description, m *mediaLine) (e endpoints, why string) {
	e, why = d.endpoints(m)
	if why != "" || e.rtp.Addr().IsUnspecified() {
		return e, why
	}
	for _, at := range e.list() {
		switch {
		case at.Addr().Is4() != s.client.Is4():
			return e, "it is of another address family"
		case !c.opts.mayCarry(at.Addr(), c.peer.Addr()):
			return e, "its host is neither the far end of the signalling nor allowed by the rule"
		case at.Port() < lowestPort:
			return e, "its port is below 1024"
		}
	}
	return e, ""
}

// mine judges a media line of the client's.
func (s *session) mine(d *description, m *mediaLine) (e endpoints, why string) {
	e, why = d.endpoints(m)
	if why != "" || e.rtp.Addr().IsUnspecified() {
		return e, why
	}
	for _, at := range e.list() {
		switch {
		case at.Addr() != s.client:
			return e, "its address is not the client's own"
		case at.Port() < lowestPort:
			return e, "its port is below 1024"
		}
	}
	return e, ""
}
