package engine

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/flow"
)

const (
	// maxRemembered bounds the peers that one session, or one bind, remembers
	// data filters for.
	maxRemembered = 256
	// makeRoom is how many are forgotten at once where none can be spared, so
	// that the next ones need not look again.
	makeRoom = maxRemembered / 8
)

// peerKey names a peer of a client's UDP socket.
type peerKey struct{ socket, peer netip.AddrPort }

// remembered is a data filter for one peer, which is there again when the peer
// comes back. by is the number of the connection in whose event it was
// attached: in another one's the filter replaces it. The numbers rise.
type remembered struct {
	link Link
	by   uint64
}

// remember keeps a data filter for a peer of a client's socket. If there is no
// room, those of sockets without a living flow are forgotten, else the oldest.
func (s *session) remember(k peerKey, m remembered) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.peers == nil {
		s.peers = make(map[peerKey][]remembered)
	}
	if len(s.peers) >= maxRemembered && s.peers[k] == nil {
		s.forgetPeers(k.socket)
	}
	s.peers[k] = replace(s.peers[k], m)
}

// forgetPeers makes room for a peer of one socket. s.mu is held.
func (s *session) forgetPeers(of netip.AddrPort) {
	sockets := s.e.flows.sockets(s)
	sockets[of] = true
	keys := make([]peerKey, 0, len(s.peers))
	for k := range s.peers {
		if sockets[k.socket] {
			keys = append(keys, k)
		} else {
			delete(s.peers, k)
		}
	}
	if len(keys) < maxRemembered {
		return
	}
	age := func(k peerKey) uint64 { all := s.peers[k]; return all[len(all)-1].by }
	slices.SortFunc(keys, func(a, b peerKey) int { return cmp.Compare(age(a), age(b)) })
	for _, k := range keys[:makeRoom] {
		delete(s.peers, k)
	}
}

// sockets are those of a client's UDP flows that live.
func (l *living) sockets(of *session) map[netip.AddrPort]bool {
	out := make(map[netip.AddrPort]bool)
	l.mu.RLock()
	defer l.mu.RUnlock()
	for t, c := range l.byTuple {
		if c.session == of && t.Proto == flow.UDP && !c.inbound() {
			out[t.Src] = true
		}
	}
	for t, u := range l.unheard {
		if u.session == of && t.Proto == flow.UDP {
			out[t.Src] = true
		}
	}
	return out
}

// remember keeps a data filter for a peer of a bind. If there is no room, those
// of peers without a living flow are forgotten, else the oldest.
func (c *connection) remember(m remembered) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.peers = replace(c.peers, m)
	if len(c.peers) <= maxRemembered {
		return
	}
	kept := slices.DeleteFunc(slices.Clone(c.peers), func(x remembered) bool {
		return x.by != m.by && c.e.flows.find(flow.Tuple{Proto: flow.UDP, Src: x.link.peer, Dst: c.name}) == nil
	})
	if len(kept) > maxRemembered {
		kept = kept[makeRoom:]
	}
	c.peers = kept
}

func replace(in []remembered, m remembered) []remembered {
	out := slices.DeleteFunc(slices.Clone(in), func(x remembered) bool {
		return x.link.owner == m.link.owner && x.link.peer == m.link.peer && x.by != m.by
	})
	return append(out, m)
}
