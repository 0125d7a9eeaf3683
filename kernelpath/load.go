package kernelpath

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// existing is what the kernel holds of the table.
type existing struct {
	chains     map[string]*hook // nil hook: a regular chain
	sets       map[string]existingSet
	counters   map[string]bool
	timers     map[uint32]bool // by their seconds
	flowtables map[string]existingFlowtable
}

type existingSet struct{ flags, keyType, keyLen, dataType, dataLen, size uint32 }

// Load replaces the rules by those of r in one transaction, and makes what is
// not there yet. Base chains, counters and the permission sets with their
// elements stay as they are; packets that wait in a queue stay there. The
// verdict maps of the policy are replaced, and what r does not have
// disappears. A table of an earlier run is adopted; if its base chains or
// permission sets have another form, it is replaced as a whole, in the same
// transaction. Permissions that this Table has installed survive that, too,
// and a table that somebody else has deleted. Offloaded flows stay so unless a
// device leaves the flowtable; a device that cannot have one is left out with a
// warning.
//
// On error the kernel holds what it held before, and the error names the
// object or rule that it refused, and its errno. Load may be repeated, and
// called while permissions are installed.
func (t *Table) Load(r Ruleset) error {
	return t.do(context.Background(), func() error {
		s, err := dialTable(t.netns)
		if err != nil {
			return fmt.Errorf("load the ruleset: %w", err)
		}
		defer func() { _ = s.close() }()
		if r.xtQueue {
			if err := s.wakeXTQueue(); err != nil {
				return fmt.Errorf("load the ruleset: %w", err)
			}
		}
		err = t.offloading(s, r.flowtable, func(devices []string) error {
			return t.load(s, r.offloadingOn(devices))
		})
		if err != nil {
			return fmt.Errorf("load the ruleset: %w", err)
		}
		t.seen()
		return nil
	})
}

func (t *Table) load(s *socket, r Ruleset) error {
	old, err := s.existing()
	if err != nil {
		return fmt.Errorf("list the table: %w", err)
	}
	tx := &transaction{}
	tx.addTable()
	if why := old.incompatible(r); why != "" {
		t.log.Warn("the table in the kernel has another form and is replaced as a whole; packets that wait for a verdict are lost: " + why)
		tx.deleteTable()
		tx.addTable()
		old = newExisting()
	}
	tx.replace(old, r.demanded(func(name string) bool { _, there := old.chains[name]; return there || t.demanded }))
	restored := t.restore(tx, old, r)
	if err := s.commit(tx); err != nil {
		return err
	}
	t.holders.loaded(r.outMapNames())
	t.demand = slices.DeleteFunc(slices.Clone(r.chains), func(c *chain) bool { return !c.onDemand })
	// A table that is all new holds nothing but what was restored.
	t.holders.known = t.holders.known || len(old.sets) == 0
	if restored > 0 {
		t.log.Sugar().Infof("put %d elements of permissions back into the new table", restored)
	}
	return nil
}

// TakeOver puts the chains into the table that only flows of user space need,
// and that cost every other packet something: from then on they stay. It may be
// repeated, before Load as well. They are there when it returns without an
// error.
func (t *Table) TakeOver() error {
	return t.do(context.Background(), func() error {
		if t.demanded {
			return nil
		}
		old, err := t.sock.existing()
		if err != nil {
			return fmt.Errorf("list the table: %w", err)
		}
		tx := &transaction{}
		for _, c := range t.demand {
			if _, there := old.chains[c.name]; there {
				continue
			}
			tx.addChain(c)
			for _, rule := range c.rules {
				tx.addRule(c.name, rule)
			}
		}
		if err := t.ours(func() error { return t.commit(tx) }); err != nil {
			return fmt.Errorf("add the chains for flows of user space: %w", err)
		}
		t.demanded = true
		return nil
	})
}

// demanded leaves out the chains on demand that are not there.
func (r Ruleset) demanded(there func(name string) bool) Ruleset {
	r.chains = slices.DeleteFunc(slices.Clone(r.chains), func(c *chain) bool { return c.onDemand && !there(c.name) })
	return r
}

// replace is the whole change. The order is the kernel's: what is pointed at
// must be there before what points at it, and go after it.
func (tx *transaction) replace(old *existing, r Ruleset) {
	wanted, sets := r.names()
	if len(old.chains) > 0 {
		tx.flushRules()
	}
	for _, name := range sortedKeys(old.sets) {
		if s := sets[name]; s == nil || !s.lasting {
			tx.deleteSet(name)
		}
	}
	for _, name := range sortedKeys(old.chains) {
		if !wanted[name] {
			tx.deleteChain(name)
		}
	}
	tx.replaceFlowtable(old.flowtables, r.flowtable)
	for _, name := range r.counters {
		if !old.counters[name] {
			tx.addCounter(name)
		}
	}
	for _, s := range r.timers {
		if !old.timers[s] {
			tx.addTimer(tableName, s)
		}
	}
	for _, c := range r.chains {
		if _, there := old.chains[c.name]; c.hook != nil || !there {
			tx.addChain(c)
		}
	}
	for _, s := range r.sets {
		if _, there := old.sets[s.name]; !there || !s.lasting {
			tx.addSet(s, 0)
		}
	}
	for _, c := range r.chains {
		for _, rule := range c.rules {
			tx.addRule(c.name, rule)
		}
	}
}

func (r Ruleset) names() (chains map[string]bool, sets map[string]*set) {
	chains, sets = map[string]bool{}, map[string]*set{}
	for _, c := range r.chains {
		chains[c.name] = true
	}
	for _, s := range r.sets {
		sets[s.name] = s
	}
	return chains, sets
}

// incompatible says what of the table cannot be kept; empty: nothing.
func (old *existing) incompatible(r Ruleset) string {
	for _, c := range r.chains {
		h, there := old.chains[c.name]
		if !there {
			continue
		}
		if (h == nil) != (c.hook == nil) {
			return "chain " + c.name + " is a base chain or is none"
		}
		if h != nil && (h.typ != c.hook.typ || h.num != c.hook.num || h.priority != c.hook.priority) {
			return "base chain " + c.name + " stands elsewhere"
		}
	}
	for _, s := range r.sets {
		e, there := old.sets[s.name]
		if !there || !s.lasting {
			continue
		}
		dataType, dataLen, _ := s.dataType()
		if s.isVerdictMap() {
			dataLen = e.dataLen // the size of the kernel's own structure
		}
		if e != (existingSet{s.flags(), typeSum(s.key), keyLength(s.key), dataType, dataLen, s.size}) {
			return s.label() + " holds something else, or has another size"
		}
	}
	return ""
}

// Delete removes the table with all that is in it. A table that is not there
// is no error.
func (t *Table) Delete() error {
	return t.do(context.Background(), func() error {
		tx := &transaction{}
		tx.addTable()
		tx.deleteTable()
		if err := t.commit(tx); err != nil {
			return fmt.Errorf("delete table %s: %w", tableName, err)
		}
		t.forget()
		t.shape = 0
		return nil
	})
}

func newExisting() *existing {
	return &existing{map[string]*hook{}, map[string]existingSet{}, map[string]bool{}, map[uint32]bool{}, map[string]existingFlowtable{}}
}

// existing lists the table. A table that is not there gives an empty list.
func (s *socket) existing() (*existing, error) {
	old := newExisting()
	steps := []struct {
		typ   uint16
		table uint16 // the attribute that has the table's name
		take  func(map[uint16][]byte)
	}{
		{unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, old.takeChain},
		{unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, old.takeSet},
		{unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE, old.takeObject},
		{msgGetFlowtable, attrFlowTable, old.takeFlowtable},
	}
	for _, step := range steps {
		if err := s.eachObject(step.typ, step.table, step.take); err != nil {
			return nil, err
		}
	}
	return old, nil
}

// eachObject lists what the table has of one kind. table is the attribute that
// has the table's name.
func (s *socket) eachObject(typ, table uint16, take func(map[uint16][]byte)) error {
	msgs, err := s.list(typ, attr(table, text(tableName)))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("message %d: %w", typ, err)
	}
	for _, m := range msgs {
		if len(m.Data) < 4 || nftables.TableFamily(m.Data[0]) != nftables.TableFamilyINet {
			continue
		}
		if a := attributes(m.Data[4:]); cString(a[table]) == tableName {
			take(a)
		}
	}
	return nil
}

func (old *existing) takeChain(a map[uint16][]byte) {
	var h *hook
	if raw := a[unix.NFTA_CHAIN_HOOK]; len(raw) > 0 {
		at := attributes(raw)
		h = &hook{
			typ:      nftables.ChainType(cString(a[unix.NFTA_CHAIN_TYPE])),
			num:      nftables.ChainHook(number(at[unix.NFTA_HOOK_HOOKNUM])),
			priority: int32(number(at[unix.NFTA_HOOK_PRIORITY])),
		}
	}
	old.chains[cString(a[unix.NFTA_CHAIN_NAME])] = h
}

// takeSet leaves out the anonymous ones, which go with their rules.
func (old *existing) takeSet(a map[uint16][]byte) {
	e := existingSet{
		number(a[unix.NFTA_SET_FLAGS]), number(a[unix.NFTA_SET_KEY_TYPE]), number(a[unix.NFTA_SET_KEY_LEN]),
		number(a[unix.NFTA_SET_DATA_TYPE]), number(a[unix.NFTA_SET_DATA_LEN]),
		number(attributes(a[unix.NFTA_SET_DESC])[unix.NFTA_SET_DESC_SIZE]),
	}
	if e.flags&unix.NFT_SET_ANONYMOUS == 0 {
		old.sets[cString(a[unix.NFTA_SET_NAME])] = e
	}
}

// attributes splits a message. Of a repeated attribute the last one counts.
func attributes(b []byte) map[uint16][]byte {
	m := map[uint16][]byte{}
	ad, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return m
	}
	for ad.Next() {
		m[ad.Type()] = ad.Bytes()
	}
	return m
}

func number(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func cString(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
