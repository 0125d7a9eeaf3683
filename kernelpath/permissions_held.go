package kernelpath

import (
	"bytes"
	"slices"
	"time"

	"github.com/sluicegw/sluice/nat"
)

// holders is the owner goroutine's record of what it has installed: a slot is
// in the kernel as long as at least one permission holds it. It is what makes
// two permissions with the same key, and two versions of one, work.
type holders struct {
	// lone are the permissions that share nothing; the others have their slots
	// here.
	lone  loners
	slots map[slotKey]packed
	// shared has who holds a slot where that is more than one, or somebody
	// beside the one in slots.
	shared map[slotKey][]holding
	byID   map[uint64][]slotKey
	// names has one string for each set, for all keys to share.
	names map[string]string
	// touched are the slots that the running transaction changes, with what
	// was held before.
	touched map[slotKey]*held
	// touchedIDs is the same for byID.
	touchedIDs map[uint64][]slotKey
	// known says that the kernel holds nothing else.
	known bool
	// outMaps are the maps of network rules that the table has; nil: no table
	// has been loaded.
	outMaps map[string]bool
	// newest is the version of a touched slot that nobody holds any more.
	newest map[slotKey]slot
	// made are the slots that the running transaction has added to lone: they need
	// not be made again at once.
	made map[slotKey]*held
	// lingering are the slots that stay for a while after their permission, in
	// the order of their ends but for those that linger for less.
	lingering []lingerer
	gates     gates
	mapped    mappings
}

// lingerer is a slot that nobody holds, and until when it stays.
type lingerer struct {
	at    slotKey
	until time.Time
}

// nobody is the ID, which no permission has, under which a slot lingers.
const nobody = 0

// held is a slot and who holds it.
type held struct {
	slot slot
	by   []holding
}

// holding is one permission and until when it holds a slot; zero: for ever.
type holding struct {
	id    uint64
	until time.Time
}

// holdingOf is that of a slot that is taken now.
func holdingOf(id uint64, s slot, now time.Time) holding {
	if s.elem.timeout == 0 {
		return holding{id: id}
	}
	return holding{id, now.Add(s.elem.timeout)}
}

// set adds a holding or replaces it.
func (h *held) set(id uint64, until time.Time) {
	for i := range h.by {
		if h.by[i].id == id {
			h.by[i].until = until
			return
		}
	}
	h.by = append(h.by, holding{id, until})
}

// unset takes a holding away.
func (h *held) unset(id uint64) {
	h.by = slices.DeleteFunc(h.by, func(x holding) bool { return x.id == id })
}

// lingersUntil is when the slot may go though nobody holds it.
func (h *held) lingersUntil() (until time.Time) {
	for _, x := range h.by {
		if x.id == nobody {
			until = x.until
		}
	}
	return until
}

func newHolders() holders {
	return holders{
		lone: newLoners(), slots: map[slotKey]packed{}, shared: map[slotKey][]holding{}, byID: map[uint64][]slotKey{},
		names: map[string]string{}, gates: newGates(), mapped: mappings{held: map[uint64]mappedRecord{}},
	}
}

// begin starts a transaction; undo takes everything back that was taken since.
func (h *holders) begin() (undo func()) {
	h.touched, h.newest, h.made = map[slotKey]*held{}, map[slotKey]slot{}, map[slotKey]*held{}
	h.touchedIDs = map[uint64][]slotKey{}
	return func() {
		for id := range h.touchedIDs {
			h.lone.remove(id)
		}
		for k, before := range h.touched {
			h.put(k, before)
		}
		for id, keys := range h.touchedIDs {
			if len(keys) == 0 {
				delete(h.byID, id)
			} else {
				h.byID[id] = keys
			}
		}
		h.mapped.undo()
		h.end()
	}
}

func (h *holders) end() {
	h.touched, h.touchedIDs, h.newest, h.made, h.gates.opening, h.mapped.touched = nil, nil, nil, nil, nil, nil
}

// touch keeps what a slot was before the transaction.
func (h *holders) touch(k slotKey) {
	if _, already := h.touched[k]; already {
		return
	}
	h.touched[k] = h.get(k)
}

// take makes one change to the record. A permission that is impossible or in
// conflict is refused, and what there was of it is released.
func (h *holders) take(c *change, now time.Time) {
	id := c.permission.ID
	slots, err := h.slotsFor(c.permission)
	if h.takeMapped(c, slots, err, func(p nat.Permission) { h.gates.open(p, now) }) {
		return
	}
	remove := c.remove || err != nil
	gate, keys := h.gate(slots), keysOf(slots)
	for i, s := range slots {
		held := h.get(keys[i])
		if !remove && (held != nil && !held.slot.same(s) && !held.only(id) || h.overlaps(s, gate, id)) {
			err, remove = nat.ErrConflict, true
		}
	}
	if c.refused = nil; !c.remove {
		c.refused = err
	}
	h.releaseAll(id, now)
	if !remove {
		h.gates.open(c.permission, now)
	}
	for i, k := range keys {
		h.touch(k)
		h.newest[k] = slots[i]
	}
	if !remove && !h.takeAlone(c.permission, slots, keys, now) {
		h.takeSlots(id, slots, keys, now)
	}
}

func keysOf(slots []slot) []slotKey {
	keys := make([]slotKey, len(slots))
	for i, s := range slots {
		keys[i] = s.at()
	}
	return keys
}

// takeAlone keeps a permission none of whose slots anybody holds; false: it is
// not such a one.
func (h *holders) takeAlone(p nat.Permission, slots []slot, keys []slotKey, now time.Time) bool {
	if slices.ContainsFunc(keys, h.has) {
		return false
	}
	var until time.Time
	if p.Timeout > 0 {
		until = now.Add(p.Timeout)
	}
	if !h.lone.add(p, keys, until) {
		return false
	}
	for i, s := range slots {
		h.made[keys[i]] = &held{s, []holding{holdingOf(p.ID, s, now)}}
	}
	return true
}

// takeSlots keeps the slots of a permission, which others may hold as well.
func (h *holders) takeSlots(id uint64, slots []slot, keys []slotKey, now time.Time) {
	for i, s := range slots {
		x := h.get(keys[i])
		if x == nil {
			x = &held{}
		}
		x.slot = s
		x.set(id, holdingOf(id, s, now).until)
		keys[i] = h.put(keys[i], x)
	}
	if len(keys) > 0 {
		h.byID[id] = keys
	}
}

// associate has a permission that shared nothing keep its slots among those of
// others: somebody wants to share one of them, or it is about to change. Nothing
// changes for the kernel.
func (h *holders) associate(id uint64) {
	slots, was := h.lone.remove(id)
	if !was {
		return
	}
	keys := make([]slotKey, 0, len(slots))
	for _, x := range slots {
		keys = append(keys, h.put(x.slot.at(), x))
	}
	h.byID[id] = keys
}

// releaseAll takes a permission out of its slots. What lingers does so from
// now on.
func (h *holders) releaseAll(id uint64, now time.Time) {
	h.associate(id)
	if _, already := h.touchedIDs[id]; !already {
		h.touchedIDs[id] = h.byID[id]
	}
	for _, k := range h.byID[id] {
		h.release(id, k, now)
	}
	delete(h.byID, id)
}

func (h *holders) release(id uint64, k slotKey, now time.Time) {
	x := h.get(k)
	if x == nil {
		return
	}
	h.touch(k)
	h.newest[k] = x.slot
	x.unset(id)
	if d := x.slot.lingers; d > 0 && !now.IsZero() {
		x.set(nobody, now.Add(d))
		h.lingering = append(h.lingering, lingerer{k, now.Add(d)})
	}
	h.put(k, x)
}

// slotsFor are the slots of a permission in the sets and maps that there are.
func (h *holders) slotsFor(p nat.Permission) ([]slot, error) {
	if isMapping(p) && h.outMaps[h.mapped.namesOf(p.Leaves).out] {
		return h.slotsOfMapped(recordOf(p)), nil
	}
	slots, err := slotsOf(p)
	if have := h.withMaps(slots); len(have) < len(slots) {
		return have, nat.ErrNoRule
	}
	return slots, err
}

// withMaps leaves out what would be in the map of a network rule that is not
// there. It owns the list.
func (h *holders) withMaps(slots []slot) []slot {
	return slices.DeleteFunc(slots, func(s slot) bool { return ofNetworkRule(s.set) && !h.outMaps[s.set] })
}

// loaded is told of the table's maps of network rules. What was in one that has
// gone went with it.
func (h *holders) loaded(outMaps map[string]bool) {
	gone := false
	for name := range h.outMaps {
		gone = gone || !outMaps[name]
	}
	h.outMaps = outMaps
	if !gone {
		return
	}
	for id, keys := range h.byID {
		h.byID[id] = slices.DeleteFunc(keys, func(k slotKey) bool { return ofNetworkRule(k.set) && !outMaps[k.set] })
	}
	for k := range h.slots {
		if ofNetworkRule(k.set) && !outMaps[k.set] {
			h.put(k, nil)
		}
	}
}

// drop forgets a permission; nothing of it lingers.
func (h *holders) drop(id uint64) {
	h.begin()
	h.releaseAll(id, time.Time{})
	delete(h.mapped.held, id)
	h.end()
}

// sweep forgets what has lingered long enough. The kernel's own clock has taken
// it away by then; the second is for the difference between the two.
func (h *holders) sweep(now time.Time) {
	n := 0
	for ; n < len(h.lingering) && now.After(h.lingering[n].until.Add(time.Second)); n++ {
		at := h.lingering[n].at
		held := h.get(at)
		if held == nil || held.lingersUntil().After(h.lingering[n].until) {
			continue
		}
		held.unset(nobody)
		h.put(at, held)
	}
	h.lingering = slices.Delete(h.lingering, 0, n)
}

// overlaps says whether another permission holds a range for the same address
// that overlaps this one and is not the same. The kernel finds a range that is
// to be deleted by its first key alone, and would take the other one away.
func (h *holders) overlaps(s slot, gate *held, id uint64) bool {
	if !s.isRange() || gate == nil {
		return false
	}
	for _, x := range gate.by {
		if x.id == id {
			continue
		}
		for _, k := range h.byID[x.id] {
			if other := k.slot(""); other.isRange() && k != s.at() &&
				bytes.Compare(s.elem.key, other.elem.end) <= 0 && bytes.Compare(other.elem.key, s.elem.end) <= 0 {
				return true
			}
		}
	}
	return false
}

// gate is what leads to the ranges for the address of these slots: all that
// have some hold it. nil: nobody does.
func (h *holders) gate(slots []slot) *held {
	at := slices.IndexFunc(slots, func(s slot) bool { return s.elem.verdict != nil && s.elem.verdict.Chain == chainWide })
	if at < 0 {
		return nil
	}
	return h.get(slots[at].at())
}

func (h *held) only(id uint64) bool {
	return len(h.by) == 1 && h.by[0].id == id
}
