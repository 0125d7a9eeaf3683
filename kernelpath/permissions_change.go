package kernelpath

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/sluicegw/sluice/nat"
)

// element is the slot with the time that is left of its longest holder; not
// ok: all of them have expired.
func (h *held) element(now time.Time) (element, bool) {
	e := h.slot.elem
	e.timeout = 0
	for _, x := range h.by {
		if x.until.IsZero() {
			e.timeout = 0
			return e, true
		}
		e.timeout = max(e.timeout, x.until.Sub(now))
	}
	return e, e.timeout > 0
}

// transaction brings the kernel from what was held before to what is held now.
//
// Deleting an absent element fails, and with it the whole transaction; and an
// element may be absent at any time, because a packet used it up or its time
// was over. So what may be there is added first, then deleted, then added as
// it shall be. (Before kernel 6.12 that is also the only way to start the time
// of an element anew.)
func (h *holders) transaction(now time.Time) *transaction {
	tx := &transaction{}
	gone, fresh := map[string][]element{}, map[string][]element{}
	for _, k := range sortedSlots(h.touched) {
		before, after := h.touched[k], h.get(k)
		switch {
		case before != nil:
			e := before.slot.elem
			e.text, e.timeout = h.newest[k].elem.text, 0
			gone[k.set] = append(gone[k.set], e)
		case h.newest[k].isRange():
			// It cannot be there beside what is held, see overlaps.
		case !h.known || after == nil:
			e := h.newest[k].elem
			e.timeout = 0
			gone[k.set] = append(gone[k.set], e)
		}
		if after == nil {
			continue
		}
		if e, ok := after.element(now); ok {
			e.text = h.newest[k].elem.text
			fresh[k.set] = append(fresh[k.set], e)
		}
	}
	h.changeMapped(gone, fresh)
	h.gates.change(gone, fresh, now)
	for _, name := range sortedKeys(gone) {
		s := &set{name: name}
		tx.addElements(s, 0, gone[name])
		tx.deleteElements(s, gone[name])
	}
	for _, name := range sortedKeys(fresh) {
		tx.addElements(&set{name: name}, 0, fresh[name])
	}
	return tx
}

// restore adds what is held to the sets that the table did not have, and says
// how many elements that are.
func (t *Table) restore(tx *transaction, old *existing, r Ruleset) int {
	now, n := time.Now(), 0
	fresh, outMaps := map[string][]element{}, r.outMapNames()
	again := func(x *held) {
		set := x.slot.set
		if _, there := old.sets[set]; there || ofNetworkRule(set) && !outMaps[set] {
			return
		}
		if e, ok := x.element(now); ok {
			fresh[set] = append(fresh[set], e)
			n++
		}
	}
	for k := range t.holders.slots {
		again(t.holders.get(k))
	}
	t.holders.lone.each(func(p nat.Permission, until time.Time) {
		for _, x := range heldOf(p, until) {
			again(x)
		}
	})
	for id, record := range t.holders.mapped.held {
		slots, err := slotsOf(record.permission(id))
		for _, s := range slots {
			if _, there := old.sets[s.set]; err == nil && !there && (!ofNetworkRule(s.set) || outMaps[s.set]) && t.holders.get(s.at()) == nil {
				fresh[s.set] = append(fresh[s.set], s.elem)
				n++
			}
		}
	}
	t.holders.gates.restore(func(set string) bool { _, there := old.sets[set]; return there }, fresh, now)
	for _, name := range sortedKeys(fresh) {
		tx.addElements(&set{name: name}, 0, fresh[name])
	}
	return n
}

// forget is for a table that is empty or gone: nothing is held.
func (t *Table) forget() {
	outMaps := t.holders.outMaps
	t.holders = newHolders()
	t.holders.known, t.holders.outMaps = true, outMaps
}

func sortedSlots(m map[slotKey]*held) []slotKey {
	return slices.SortedFunc(maps.Keys(m), func(a, b slotKey) int {
		if c := strings.Compare(a.set, b.set); c != 0 {
			return c
		}
		return strings.Compare(a.key, b.key)
	})
}

func (h *holders) touchedSlots() []slot {
	slots := make([]slot, 0, len(h.newest))
	for _, s := range h.newest {
		slots = append(slots, s)
	}
	return append(slots, h.touchedMapped()...)
}

// unheld are those of the slots that nobody holds.
func (h *holders) unheld(slots []slot) []slot {
	return slices.DeleteFunc(slots, func(s slot) bool { return h.has(s.at()) })
}
