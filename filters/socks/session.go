package socks

import (
	"net/netip"
	"sync"
	"time"

	"github.com/sluicegw/sluice/filterapi"
)

// sessions are the private ones: one for each client's address and user, so
// that what a filter permits for one connection of a client, another one of the
// same client can use.
type sessions struct {
	fw filterapi.Firewall

	mu   sync.Mutex
	open map[who]*shared
}

type who struct {
	addr netip.Addr
	user string
}

// shared is a session with its users.
type shared struct {
	filterapi.Session
	who  who
	refs int         // under sessions.mu
	idle *time.Timer // closes it; under sessions.mu

	mu   sync.Mutex
	legs []peerLeg // living connections, the newest last
}

// peerLeg is a connection to a peer, which a BIND may belong to.
type peerLeg struct {
	peer netip.AddrPort
	leg  filterapi.Leg
}

// sessionIdle is how long a session without a connection is kept: filters
// attach to it once, not for each connection of a browser.
const sessionIdle = 30 * time.Second

func (s *sessions) init(fw filterapi.Firewall) { s.fw, s.open = fw, make(map[who]*shared) }

// get gives a session; the caller puts it back.
func (s *sessions) get(w who) (*shared, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x := s.open[w]; x != nil {
		if x.Flags()&filterapi.SessionTerminated == 0 {
			x.refs++
			if x.idle != nil {
				x.idle.Stop()
				x.idle = nil
			}
			return x, nil
		}
		delete(s.open, w) // somebody has disconnected it
	}
	made, err := s.fw.PrivateSession(w.addr, w.user)
	if err != nil {
		return nil, err
	}
	x := &shared{Session: made, who: w, refs: 1}
	s.open[w] = x
	return x, nil
}

// put gives a session back.
func (s *sessions) put(x *shared) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if x.refs--; x.refs > 0 {
		return
	}
	if s.open[x.who] != x {
		x.Close() // it was disconnected
		return
	}
	var mine *time.Timer
	mine = time.AfterFunc(sessionIdle, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if x.idle == mine && x.refs == 0 {
			s.drop(x)
		}
	})
	x.idle = mine
}

// drop closes a session that nobody uses. mu is held.
func (s *sessions) drop(x *shared) {
	if s.open[x.who] == x {
		delete(s.open, x.who)
	}
	x.Close()
}

// close closes those that wait.
func (s *sessions) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.open {
		if x.idle != nil {
			x.idle.Stop()
			x.idle = nil
		}
		s.drop(x)
	}
}

// add remembers a connection until it is removed.
func (x *shared) add(peer netip.AddrPort, leg filterapi.Leg) (remove func()) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.legs = append(x.legs, peerLeg{peer, leg})
	return func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		for i, l := range x.legs {
			if l.leg == leg {
				x.legs = append(x.legs[:i:i], x.legs[i+1:]...)
				return
			}
		}
	}
}

// primary is the newest living connection to a host, at a port if that is not
// 0; nil: there is none.
func (x *shared) primary(addr netip.Addr, port uint16) filterapi.Connection {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i := len(x.legs) - 1; i >= 0; i-- {
		if p := x.legs[i].peer; p.Addr() == addr && (port == 0 || p.Port() == port) {
			return x.legs[i].leg.Connection()
		}
	}
	if port != 0 && len(x.legs) > 0 {
		for i := len(x.legs) - 1; i >= 0; i-- {
			if x.legs[i].peer.Addr() == addr {
				return x.legs[i].leg.Connection()
			}
		}
	}
	return nil
}
