package kernelpath

import (
	"slices"
	"time"

	"github.com/sluicegw/sluice/nat"
)

// packed is a held as it is kept where permissions share slots: what its set and
// its key say is not said again.
type packed struct {
	says  string // the value of an element, or the chain that it leads to
	id    uint64
	until int64 // by the Unix clock, ns; 0: for ever
}

// get gives a copy of what is held; nil: nothing.
func (h *holders) get(k slotKey) *held {
	x, ok := h.slots[k]
	if !ok {
		if made := h.made[k]; made != nil {
			return made
		}
		return h.lone.find(k)
	}
	by := slices.Clone(h.shared[k])
	if by == nil {
		by = []holding{{id: x.id}}
		if x.until != 0 {
			by[0].until = time.Unix(0, x.until)
		}
	}
	return &held{k.slot(x.says), by}
}

// put keeps a held, under the key that is returned; nil: nothing more. Whoever
// had the slot alone shares it from now on.
func (h *holders) put(k slotKey, x *held) slotKey {
	if alone := h.lone.find(k); alone != nil {
		h.associate(alone.by[0].id)
	}
	delete(h.made, k)
	delete(h.shared, k)
	if x == nil || len(x.by) == 0 {
		delete(h.slots, k)
		return k
	}
	if h.names[k.set] == "" {
		h.names[k.set] = k.set
	}
	k.set = h.names[k.set]
	p := packed{says: x.slot.says(), id: x.by[0].id}
	if !x.by[0].until.IsZero() {
		p.until = x.by[0].until.UnixNano()
	}
	h.slots[k] = p
	if len(x.by) > 1 {
		h.shared[k] = x.by
	}
	return k
}

// has says whether anybody holds a slot.
func (h *holders) has(k slotKey) bool {
	_, ok := h.slots[k]
	return ok || h.made[k] != nil || h.lone.find(k) != nil
}

// holds is has for a slot. It makes no key while nobody holds any.
func (h *holders) holds(s *slot) bool {
	return len(h.slots)+len(h.made)+len(h.lone.index) > 0 && h.has(s.at())
}

// says is what its key does not say: the value, or the chain of the verdict.
func (s slot) says() string {
	if s.elem.verdict != nil {
		return s.elem.verdict.Chain
	}
	return string(s.elem.val)
}

// slot is the slot of a key, made of what says gave, without the timeout.
func (k slotKey) slot(says string) slot {
	s := slot{set: k.set, elem: element{key: []byte(k.key)}}
	switch k.set {
	case setWide(ipv4), setWide(ipv6):
		half := len(k.key) / 2
		s.elem.key, s.elem.end = s.elem.key[:half:half], s.elem.key[half:]
	case setVia(ipv4), setVia(ipv6):
		s.lingers = nat.Quarantine
	}
	switch {
	case says == "":
	case leadsToChain(k.set):
		s.elem.verdict = verdictOf(goTo(says))
	default:
		s.elem.val = []byte(says)
	}
	return s
}

// leadsToChain says whether the elements of a set are verdicts.
func leadsToChain(set string) bool {
	for _, f := range []family{ipv4, ipv6} {
		switch set {
		case setPermit(f), setPermitAny(f), setWide(f), mapSource(f), mapInside(f):
			return true
		}
	}
	return false
}
