package engine

import (
	"github.com/sluicegw/sluice/flow"
)

// sender is an inside endpoint.
type sender struct {
	proto flow.Proto
	at    socket4
}

// denyMappings ends the mappings whose client may send nowhere any more where
// it has sent to: else strangers would come in at them for as long as conntrack
// remembers a flow, which may be one that was cut. What a mapping stands on is
// the flow that it was made for, or any other one of the client's that the rules
// in force, or a permission, let pass. kernel are the kernel's flows.
func (e *Engine) denyMappings(kernel []KernelFlow) {
	x := &e.mappings
	firsts := map[*mapping]flow.Tuple{}
	x.mu.Lock()
	for _, m := range x.byInside {
		if m.first == (socket4{}) {
			continue // it was made for a bind, which is judged by itself, and ends with it
		}
		if m.extra == nil || m.extra.change == nil { // whoever makes it looks at the rules after
			firsts[m] = flow.Tuple{Proto: m.proto, Src: m.inside.addrPort(), Dst: m.first.addrPort()}
		}
	}
	x.mu.Unlock()
	denied := map[sender][]*mapping{}
	for m, t := range firsts {
		if !e.allowed(basis{tuple: t}) {
			at := sender{m.proto, packed(t.Src)}
			denied[at] = append(denied[at], m)
		}
	}
	if len(denied) == 0 {
		return
	}
	others := e.standFor(denied, kernel)
	var end []*mapping
	x.mu.Lock()
	for at, list := range denied {
		t, allowed := others[at]
		for _, m := range list {
			switch {
			case x.byInside[m.insideKey()] != m || m.extra != nil && m.extra.change != nil:
			case allowed && t.Is4():
				m.first = packed(t.Dst)
			case !allowed:
				end = append(end, m)
			}
		}
	}
	e.retire(end)
	x.mu.Unlock()
	for _, m := range end {
		e.closeBind(m)
	}
	e.each(end, e.takeOut)
}

// standFor finds, for senders whose mappings' first flows are denied, another flow
// of theirs that is allowed; the zero one: one that a permission lets pass.
func (e *Engine) standFor(denied map[sender][]*mapping, kernel []KernelFlow) map[sender]flow.Tuple {
	others := map[sender]flow.Tuple{}
	for _, f := range kernel {
		t := f.Tuple
		if !t.Is4() || denied[sender{t.Proto, packed(t.Src)}] == nil || e.flows.find(t) != nil {
			continue
		}
		if e.allowed(f.basis()) {
			others[sender{t.Proto, packed(t.Src)}] = t
		}
	}
	for _, c := range e.flows.all() {
		if !c.tuple.Is4() {
			continue
		}
		at := sender{c.tuple.Proto, packed(c.tuple.Src)}
		if denied[at] == nil || !e.stillAllowed(c) {
			continue
		}
		if _, known := others[at]; c.perm == nil {
			others[at] = c.tuple
		} else if !known {
			others[at] = flow.Tuple{} // nothing that the rules could be asked about
		}
	}
	return others
}
