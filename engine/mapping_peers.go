package engine

import (
	"context"
	"net/netip"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// Where filtering depends on the address, the kernel has a set of whom each
// inside endpoint has sent to. It adds those of a known endpoint's packets by
// itself; which of them have a flow is counted here, and those that have none are
// taken out.

// meet has the kernel know a peer whose address may come in from now on. Those
// of flows that the kernel begins by itself it knows.
func (e *Engine) meet(m *mapping, q policy.Question) error {
	if m.filtering != policy.FilterAddress || !m.proto.HasPorts() {
		return nil
	}
	a := q.Dst.Addr()
	e.mappings.mu.Lock()
	more := m.more()
	if more.peers == nil {
		more.peers = make(map[netip.Addr]int32)
	}
	if _, known := more.peers[a]; !known {
		more.peers[a] = 0
		e.later(unconfirmed, func() { e.forgetPeer(m, a) }) // unless its flow begins
	}
	e.mappings.mu.Unlock()
	return e.kernel.Peers(context.Background(), []nat.Peer{{Proto: m.proto, Inside: q.Src, Addr: a}}, nil)
}

// peer changes the number of flows to one peer. Without one the peer may not
// come any more, when the word of another flow had time to come. mappings.mu is
// held.
func (e *Engine) peer(m *mapping, a netip.Addr, by int32) {
	more := m.more()
	if more.peers == nil {
		more.peers = make(map[netip.Addr]int32)
	}
	if more.peers[a] += by; more.peers[a] <= 0 {
		e.later(lateReports, func() { e.forgetPeer(m, a) })
	}
}

// forgetPeer has the kernel let a peer in no more that has no flow. One may have
// begun meanwhile of which nobody has told yet: then it is let in again.
func (e *Engine) forgetPeer(m *mapping, a netip.Addr) {
	x := &e.mappings
	flows := func() (n int32, known bool) {
		if m.extra != nil {
			n, known = m.extra.peers[a]
		}
		return n, known
	}
	x.mu.Lock()
	n, known := flows()
	if n > 0 || !known || x.byExternal[m.externalKey()] != m {
		x.mu.Unlock()
		return
	}
	delete(m.extra.peers, a)
	m.lean()
	p := []nat.Peer{{Proto: m.proto, Inside: m.inside.addrPort(), Addr: a}}
	x.mu.Unlock()
	e.forgetPeers(p)
	e.later(lateReports, func() {
		x.mu.Lock()
		n, _ := flows()
		x.mu.Unlock()
		if n > 0 {
			e.knowPeers(p, nil)
		}
	})
}

// ForgetStrays takes those peers out of the kernel's set that no mapping knows: a
// packet that did not get through, or whose flow nobody has told of, has left
// them. set is what was in it before Recount began, in whose wait the word of their
// flows had to come.
func (e *Engine) ForgetStrays(ctx context.Context, set []nat.Peer) error {
	strays, _ := e.tellApart(set, func(int32) bool { return true })
	if len(strays) == 0 {
		return nil
	}
	err := e.kernel.Peers(ctx, nil, strays)
	e.later(lateReports, func() {
		if _, begun := e.tellApart(strays, func(flows int32) bool { return flows > 0 }); len(begun) > 0 {
			e.knowPeers(begun, nil)
		}
	})
	return err
}

// tellApart says which peers of a list some mapping has, with such a number of
// flows.
func (e *Engine) tellApart(list []nat.Peer, such func(flows int32) bool) (without, with []nat.Peer) {
	x := &e.mappings
	known := map[nat.Peer]bool{}
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, m := range x.byInside {
		if m.extra == nil {
			continue
		}
		for a, flows := range m.extra.peers {
			p := nat.Peer{Proto: m.proto, Inside: m.inside.addrPort(), Addr: a}
			known[p] = known[p] || such(flows)
		}
	}
	for _, p := range list {
		if known[p] {
			with = append(with, p)
		} else {
			without = append(without, p)
		}
	}
	return without, with
}

// forgetPeers takes peers out of the kernel's set.
func (e *Engine) forgetPeers(gone []nat.Peer) { e.knowPeers(nil, gone) }

// knowPeers has the kernel know the peers of mappings.
func (e *Engine) knowPeers(come, gone []nat.Peer) {
	if err := e.kernel.Peers(context.Background(), come, gone); err != nil {
		e.log.Error("the kernel does not know the peers of mappings", zap.Error(err))
	}
}

// setPeers sets the numbers of flows to peers, and gives those that had some
// and have none any more. A peer whose first packet has just passed stays, and so
// do all where user space carries some flow. mappings.mu is held.
func (m *mapping) setPeers(counted map[netip.Addr]int32) (gone []nat.Peer) {
	more := m.more()
	if more.inUser > 0 {
		return nil
	}
	for a, flows := range more.peers {
		switch {
		case counted[a] > 0:
		case flows > 0:
			gone = append(gone, nat.Peer{Proto: m.proto, Inside: m.inside.addrPort(), Addr: a})
		default:
			if counted == nil {
				counted = make(map[netip.Addr]int32)
			}
			counted[a] = 0
		}
	}
	more.peers = counted
	m.lean()
	return gone
}
