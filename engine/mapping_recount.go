package engine

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// HoldsMappings says whether there are any.
func (e *Engine) HoldsMappings() bool {
	e.mappings.mu.Lock()
	defer e.mappings.mu.Unlock()
	return len(e.mappings.byExternal) > 0
}

// LivingFlow is a kernel flow as conntrack lists it.
type LivingFlow struct {
	flow.Tuple
	Translation flow.Translation
	Counts      flow.Counts
}

// journalled is what conntrack told of a flow while a dump was compared: how
// much more often that it begins than that it ends.
type journalled struct {
	translation flow.Translation
	begun       int32
	endedFirst  bool
}

// alive says whether the flow is. One that ends and then begins was there before,
// and its addresses are used again; the two come by different sockets, so that it
// may be a short one that is over: then it is counted until the next time, which
// does no harm.
func (j journalled) alive() bool { return j.begun > 0 || j.begun == 0 && j.endedFirst }

// Recount counts the flows of all mappings anew, from a dump of conntrack: its
// reports were lost, or the rules have changed. It waits until those that were
// on their way have come.
func (e *Engine) Recount(ctx context.Context, dump func(context.Context) ([]LivingFlow, error)) error {
	x := &e.mappings
	x.mu.Lock()
	busy := x.journal != nil || len(x.byExternal) == 0
	if !busy {
		x.journal = make(map[flow.Tuple]journalled)
	}
	x.mu.Unlock()
	if busy {
		return nil // there is nothing to count, or it is being done
	}
	living, err := dump(ctx)
	if err == nil {
		wait := time.NewTimer(lateReports)
		defer wait.Stop()
		select {
		case <-wait.C:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	journal := x.journal
	x.journal = nil
	if err != nil {
		return err
	}
	e.recount(living, journal)
	return nil
}

// recount sets the numbers of flows. mappings.mu is held.
func (e *Engine) recount(living []LivingFlow, journal map[flow.Tuple]journalled) {
	x := &e.mappings
	x.survey = nil // what it has found may be older than this
	flows := make(map[*mapping]int32, len(x.byExternal))
	peers := make(map[*mapping]map[netip.Addr]int32)
	add := func(t flow.Tuple, tr flow.Translation) {
		sender, target := x.of(t, tr)
		if target != nil {
			flows[target]++
		}
		if sender == nil {
			return
		}
		if flows[sender]++; sender.filtering == policy.FilterAddress {
			if peers[sender] == nil {
				peers[sender] = make(map[netip.Addr]int32)
			}
			peers[sender][t.Dst.Addr()]++
		}
	}
	for _, f := range living {
		if _, told := journal[f.Tuple]; !told {
			add(f.Tuple, f.Translation)
		}
	}
	for t, j := range journal {
		if j.alive() {
			add(t, j.translation)
		}
	}
	var gone, come []nat.Peer
	for _, m := range x.byExternal {
		n := flows[m]
		if m.extra != nil {
			n += m.extra.inUser
		}
		for a := range peers[m] {
			come = append(come, nat.Peer{Proto: m.proto, Inside: m.inside.addrPort(), Addr: a})
		}
		if len(peers[m]) > 0 || m.extra != nil && len(m.extra.peers) > 0 {
			gone = append(gone, m.setPeers(peers[m])...)
		}
		e.count(m, n-m.flows)
	}
	if len(gone)+len(come) == 0 || x.adopting {
		return
	}
	e.tasks.run(func() { e.knowPeers(come, gone) })
}

// Held is a mapping as the kernel holds it.
type Held struct {
	NetworkRule      string
	Proto            flow.Proto
	Inside, External netip.AddrPort
}

// Adopt takes over, before flows come, what an earlier run has left: mappings
// that have living flows and that the rules still make. The external endpoints
// of other living flows are kept from everybody as long as these live.
// InstallAdopted must follow when the kernel has the rules.
func (e *Engine) Adopt(held []Held, living []LivingFlow) {
	x := &e.mappings
	rules := map[string]policy.NetworkRule{}
	for _, r := range e.Policy().NetworkRules() {
		rules[r.Name] = r
	}
	type end struct {
		proto            flow.Proto
		inside, external netip.AddrPort
	}
	ends := map[end]flow.Tuple{}
	for _, f := range living {
		if f.Is4() && f.Translation.Src.IsValid() {
			ends[end{f.Proto, f.Src, f.Translation.Src}] = f.Tuple
		}
		if f.Is4() && f.Translation.Dst.IsValid() {
			at := end{f.Proto, f.Translation.Dst, f.Dst}
			if _, known := ends[at]; !known {
				ends[at] = f.Reverse()
			}
		}
	}
	adopted := 0
	for _, h := range held {
		at := end{h.Proto, h.Inside, h.External}
		t, lives := ends[at]
		if r, ok := rules[h.NetworkRule]; lives && ok && e.adopt(&r, h, t) {
			adopted++
			delete(ends, at)
		}
	}
	kept := 0
	for at, t := range ends {
		if at.external.Addr() != at.inside.Addr() && e.leased(at.external.Port()) &&
			e.adopt(nil, Held{"", at.proto, at.inside, at.external}, t) {
			kept++
		}
	}
	if adopted+kept > 0 {
		e.log.Info("took over mappings of an earlier run", zap.Int("mappings", adopted), zap.Int("ports_of_other_flows", kept))
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.adopting = true
	e.recount(living, nil)
}

// adopt makes a mapping of what was there. Without a network rule it is
// outlived.
func (e *Engine) adopt(r *policy.NetworkRule, h Held, t flow.Tuple) bool {
	if !h.Inside.Addr().Is4() || !h.External.Addr().Is4() {
		return false
	}
	fits := r != nil && r.Maps(h.Proto) && r.LeavesFrom(h.External.Addr())
	err := e.ports.LeaseExactFor(h.Inside.Addr(), h.Proto, h.External, 1)
	if errors.Is(err, nat.ErrQuota) { // which is lower now: what lives goes on
		err = e.ports.LeaseExact(h.Proto, h.External, 1)
	}
	if err != nil {
		return false
	}
	x := &e.mappings
	m := &mapping{
		id: e.nextID(), inside: packed(h.Inside), external: packed(h.External), first: packed(t.Dst), proto: h.Proto,
		state: mappingOutlived, rule: -1, since: e.now().UnixNano(),
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.byExternal[m.externalKey()] = m
	if fits {
		m.state, m.rule, m.filtering = mappingLeaving, x.numberOf(r.Name), r.Filtering
		if iface, _, _, err := e.routes.Lookup(t.Dst.Addr()); err == nil {
			x.rules[m.rule].iface = iface
		}
		x.byInside[m.insideKey()] = m
	}
	return true
}

// InstallAdopted has the kernel hold what Adopt has taken over.
func (e *Engine) InstallAdopted() {
	x := &e.mappings
	var all []*mapping
	var peers []nat.Peer
	x.mu.Lock()
	x.adopting = false
	for _, m := range x.byInside {
		if m.extra != nil {
			for a := range m.extra.peers {
				peers = append(peers, nat.Peer{Proto: m.proto, Inside: m.inside.addrPort(), Addr: a})
			}
		}
		if m.state == mappingLeaving && m.flows > 0 {
			all = append(all, m)
		}
	}
	x.mu.Unlock()
	if len(peers) > 0 {
		e.knowPeers(peers, nil)
	}
	e.each(all, func(m *mapping) {
		x.mu.Lock()
		if m.state != mappingLeaving || m.extra != nil && m.extra.change != nil {
			x.mu.Unlock() // a packet was faster
			return
		}
		if err := e.installMapping(m); err != nil { // unlocks
			e.log.Error("putting a mapping back failed", zap.Stringer("external", m.external.addrPort()), zap.Error(err))
		}
	})
}

// leased says whether a port is one of those that are leased.
func (e *Engine) leased(port uint16) bool {
	return e.ports.Covers(port)
}
