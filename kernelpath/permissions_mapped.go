package kernelpath

import (
	"net/netip"

	"github.com/google/nftables/expr"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// mappedRecord is what is kept of an endpoint-independent mapping. There may be
// very many, of which nobody else holds an element: its slots are not recorded,
// but made again where they are needed. The string is the engine's own.
type mappedRecord struct {
	rule             string
	inside, external [4]byte
	ports            [2]uint16
	proto            flow.Proto
	any, peersOnly   bool
}

func recordOf(p nat.Permission) mappedRecord {
	return mappedRecord{
		rule: p.Leaves, inside: p.Client.Addr().As4(), external: p.External.Addr().As4(), ports: [2]uint16{p.Client.Port(), p.External.Port()},
		proto: p.Proto, any: p.AnySource, peersOnly: p.PeersOnly,
	}
}

func (r mappedRecord) permission(id uint64) nat.Permission {
	return nat.Permission{
		ID: id, Direction: nat.Inbound, Proto: r.proto, Multiple: true, Mapped: true, Leaves: r.rule,
		Client:   netip.AddrPortFrom(netip.AddrFrom4(r.inside), r.ports[0]),
		External: netip.AddrPortFrom(netip.AddrFrom4(r.external), r.ports[1]), AnySource: r.any, PeersOnly: r.peersOnly,
	}
}

// mapNames are the sets that a mapping of a network rule is in.
type mapNames struct{ permit, bind, out, known string }

func (m *mappings) namesOf(rule string) mapNames {
	n, ok := m.names[rule]
	if !ok {
		n = mapNames{setPermitAny(ipv4), mapBind(ipv4), mapOut(rule), setKnown(rule)}
		if m.names == nil {
			m.names = map[string]mapNames{}
		}
		m.names[rule] = n
	}
	return n
}

// isMapping says whether slotsOfMapped gives all that slotsOf does.
func isMapping(p nat.Permission) bool {
	return p.Mapped && p.Multiple && p.ID != 0 && p.Leaves != "" && p.Direction == nat.Inbound && p.Timeout == 0 && len(p.Sources) == 0 &&
		!p.ToUser && !p.OneWay && !p.FromGateway && (p.Proto.HasPorts() || p.Proto == flow.ICMP && !p.AnySource) &&
		p.Client.Addr().Is4() && p.External.Addr().Is4() && p.Client.Port() != 0 && p.External.Port() != 0 && p.Client != p.External
}

// slotsOfMapped are the elements of a mapping, in the maps that there are. They
// are what slotsOf gives, without the words; a first packet waits for them. The
// slice is good until the next call.
func (h *holders) slotsOfMapped(r mappedRecord) []slot {
	m := &h.mapped
	m.scratch = m.scratch[:0]
	b := make([]byte, 0, 2*(12+8)) // an address and a port, each padded; twice with the protocol between them
	socket := func(addr [4]byte, port uint16, proto bool) []byte {
		at := len(b)
		b = append(b, addr[:]...)
		if proto {
			b = append(b, byte(r.proto), 0, 0, 0)
		}
		b = append(b, byte(port>>8), byte(port), 0, 0)
		return b[at:len(b):len(b)]
	}
	inside, external := socket(r.inside, r.ports[0], true), socket(r.external, r.ports[1], true)
	put := func(set string, key, val []byte) *slot {
		m.scratch = append(m.scratch, slot{set: set, elem: element{key: key, val: val}})
		return &m.scratch[len(m.scratch)-1]
	}
	names := m.namesOf(r.rule)
	if r.proto.HasPorts() {
		if r.any {
			use := chainUseMapped
			if r.peersOnly {
				use = chainUsePeer
			}
			put(names.permit, external, nil).elem.verdict = &expr.Verdict{Kind: expr.VerdictGoto, Chain: use}
		}
		put(names.bind, external, socket(r.inside, r.ports[0], false))
	}
	if h.outMaps[names.out] {
		put(names.out, inside, socket(r.external, r.ports[1], false))
		put(names.known, inside, nil)
	}
	return m.scratch
}

// mappings are the records, and those of the running transaction.
type mappings struct {
	held    map[uint64]mappedRecord
	touched map[uint64]mappedChange
	names   map[string]mapNames // of network rules
	scratch []slot              // for slotsOfMapped
}

// mappedChange is one mapping before the transaction. newest is what a removal
// of an unknown one names.
type mappedChange struct {
	before mappedRecord
	had    bool
	newest mappedRecord
}

func (m *mappings) touch(id uint64, newest mappedRecord) {
	if _, already := m.touched[id]; already {
		return
	}
	if m.touched == nil {
		m.touched = map[uint64]mappedChange{}
	}
	before, had := m.held[id]
	m.touched[id] = mappedChange{before, had, newest}
}

// undo takes back what was changed since the beginning of the transaction.
func (m *mappings) undo() {
	for id, c := range m.touched {
		if c.had {
			m.held[id] = c.before
		} else {
			delete(m.held, id)
		}
	}
}

// takeMapped makes a change to a mapping that nobody shares an element with.
// false: it is none, and take does it.
func (h *holders) takeMapped(c *change, slots []slot, err error, open func(nat.Permission)) bool {
	p := c.permission
	_, had := h.mapped.held[p.ID]
	if !p.Mapped || len(h.byID[p.ID]) > 0 {
		return false
	}
	if p.Shared && !c.remove {
		if had { // from now on its slots are recorded
			h.mapped.touch(p.ID, mappedRecord{})
			delete(h.mapped.held, p.ID)
		}
		return false
	}
	if err == nil {
		for _, s := range slots {
			if !c.remove && h.holds(&s) && !h.get(s.at()).slot.same(s) {
				err = nat.ErrConflict
			}
		}
	}
	if c.refused = nil; !c.remove {
		c.refused = err
	}
	if err != nil && !c.remove && !had {
		return true
	}
	record := mappedRecord{}
	if p.Client.Addr().Is4() && p.External.Addr().Is4() {
		record = recordOf(p)
	}
	h.mapped.touch(p.ID, record)
	delete(h.mapped.held, p.ID)
	if err == nil && !c.remove {
		h.mapped.held[p.ID] = record
		open(p)
	}
	return true
}

// changeMapped adds the mappings to the elements of a transaction. What a
// permission holds as well stays as it is.
func (h *holders) changeMapped(gone, fresh map[string][]element) {
	add := func(to map[string][]element, slots []slot) {
		for _, s := range slots {
			if !h.holds(&s) {
				to[s.set] = append(to[s.set], s.elem)
			}
		}
	}
	for id, c := range h.mapped.touched {
		now, holds := h.mapped.held[id]
		switch {
		case c.had:
			add(gone, h.slotsOfMapped(c.before))
		case !holds || !h.known:
			add(gone, h.slotsOfMapped(c.newest))
		}
		if holds {
			add(fresh, h.slotsOfMapped(now))
		}
	}
}

// touchedMapped are the slots of the running transaction that nobody else holds.
func (h *holders) touchedMapped() []slot {
	var slots []slot
	for _, c := range h.mapped.touched {
		slots = append(slots, h.slotsOfMapped(c.newest)...)
		if c.had {
			slots = append(slots, h.slotsOfMapped(c.before)...)
		}
	}
	return h.unheld(slots)
}
