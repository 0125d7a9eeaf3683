package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// existingFlowtable is a flowtable in the kernel. A device that vanishes
// leaves it by itself.
type existingFlowtable struct {
	devices []string // sorted
	flags   uint32
}

// flowtableFlags: without the counter what a flowtable carries would be
// missing in the counts of the flows' ends.
const flowtableFlags = flowCounter

// flowtableLabel names the flowtable in an error.
const flowtableLabel = "flowtable " + flowtableName

// Unoffload takes all flows out of the flowtable and returns when the kernel
// has acknowledged: from then on every packet passes the table's chains, and
// those that may go back do so with their next packet, by the carry chain.
// What was offloaded keeps the bit in its conntrack status some milliseconds
// longer. Without a flowtable it does nothing. (CutConfig.Unoffload)
func (t *Table) Unoffload(ctx context.Context) error {
	return t.do(ctx, func() error {
		s, err := dialTable(t.netns)
		if err != nil {
			return fmt.Errorf("empty the flowtable: %w", err)
		}
		defer func() { _ = s.close() }()
		old := newExisting()
		if err := s.eachObject(msgGetFlowtable, attrFlowTable, old.takeFlowtable); err != nil {
			return fmt.Errorf("list flowtables: %w", err)
		}
		f, there := old.flowtables[flowtableName]
		if !there {
			return nil
		}
		err = t.ours(func() error {
			return t.offloading(s, f.devices, func(devices []string) error {
				tx := &transaction{}
				tx.renewFlowtable(devices)
				return s.commit(tx)
			})
		})
		if err != nil {
			return fmt.Errorf("empty the flowtable: %w", err)
		}
		return nil
	})
}

// renewFlowtable replaces the flowtable by an empty one. Linux cannot empty
// one, nor take out a single flow: conntrack refuses to delete what is
// offloaded. A flowtable cannot go while a rule refers to it, so that the
// rules of the carry chain go before and come back after. No packet sees
// anything of that but the end: it is one transaction.
func (tx *transaction) renewFlowtable(devices []string) {
	tx.flushChain(chainCarry)
	tx.deleteFlowtable(flowtableName)
	if len(devices) > 0 {
		tx.addFlowtable(tableName, devices)
	}
	for _, r := range carryChain(len(devices) > 0) {
		tx.addRule(chainCarry, r)
	}
}

// offloading runs change with the devices that a flowtable is to have. If the
// kernel refuses the flowtable, because a device has gone meanwhile or is not
// of the kind that can have one, the others get theirs; offloading is a gain,
// and never a reason to fail.
func (t *Table) offloading(s *socket, devices []string, change func(devices []string) error) error {
	err := change(devices)
	if !refusedFlowtable(err) || len(devices) == 0 {
		return err
	}
	usable, reasons := s.offloadable(devices)
	if len(usable) > 0 {
		if err = change(usable); !refusedFlowtable(err) {
			if len(reasons) > 0 {
				t.log.Warn("flows of some interfaces are not offloaded: " + strings.Join(reasons, "; "))
			}
			return err
		}
	}
	t.log.Warn("no flow is offloaded", zap.Error(err))
	return change(nil)
}

func refusedFlowtable(err error) bool {
	var refused *transactionError
	return errors.As(err, &refused) && refused.what == flowtableLabel
}

// trialTable is where devices are tried, one by one.
const trialTable = tableName + "_trial"

// offloadable gives the devices that can have a flowtable, and why the others
// cannot.
func (s *socket) offloadable(devices []string) (usable, reasons []string) {
	for _, d := range devices {
		tx := &transaction{}
		tx.addTableNamed(trialTable)
		tx.addFlowtable(trialTable, []string{d})
		if err := s.commit(tx); err != nil {
			reasons = append(reasons, d+": "+err.Error())
			continue
		}
		usable = append(usable, d)
		tx = &transaction{}
		tx.deleteTableNamed(trialTable)
		if err := s.commit(tx); err != nil {
			reasons = append(reasons, err.Error())
		}
	}
	return usable, reasons
}

// offloadingOn gives the ruleset with other devices in its flowtable.
func (r Ruleset) offloadingOn(devices []string) Ruleset {
	r.flowtable = devices
	r.chains = slices.Clone(r.chains)
	for i, c := range r.chains {
		if c.name == chainCarry {
			r.chains[i] = &chain{name: c.name, hook: c.hook, rules: carryChain(len(devices) > 0)}
		}
	}
	return r
}

// replaceFlowtable makes the flowtable what it is to be. One that only gets
// more devices keeps its flows. The rules that refer to it are gone.
func (tx *transaction) replaceFlowtable(old map[string]existingFlowtable, devices []string) {
	have, there := old[flowtableName]
	missing := slices.DeleteFunc(slices.Clone(devices), func(d string) bool { return slices.Contains(have.devices, d) })
	keep := there && len(devices) > 0 && have.flags == flowtableFlags && len(missing)+len(have.devices) == len(devices)
	if !keep {
		missing = devices
	}
	for _, name := range sortedKeys(old) {
		if name != flowtableName || !keep {
			tx.deleteFlowtable(name)
		}
	}
	if len(missing) > 0 {
		tx.addFlowtable(tableName, missing)
	}
}

// addFlowtable makes the flowtable of a table, or adds devices to it.
func (t *transaction) addFlowtable(table string, devices []string) {
	names := make([]netlink.Attribute, len(devices))
	for i, d := range devices {
		names[i] = attr(attrDeviceName, text(d))
	}
	t.put(flowtableLabel, msgNewFlowtable, create,
		attr(attrFlowTable, text(table)), attr(attrFlowName, text(flowtableName)), attr(attrFlowFlags, be32(flowtableFlags)),
		t.inner(attrFlowHook, attr(attrFlowHookNum, be32(hookIngress)), attr(attrFlowPriority, be32(0)), t.inner(attrFlowDevices, names...)))
}

func (t *transaction) deleteFlowtable(name string) {
	t.put("deletion of flowtable "+name, msgDelFlowtable, 0, attr(attrFlowTable, text(tableName)), attr(attrFlowName, text(name)))
}

// flushChain deletes the rules of one chain.
func (t *transaction) flushChain(name string) {
	t.put("rules of chain "+name, unix.NFT_MSG_DELRULE, 0, attr(unix.NFTA_RULE_TABLE, text(tableName)), attr(unix.NFTA_RULE_CHAIN, text(name)))
}

func (old *existing) takeFlowtable(a map[uint16][]byte) {
	f := existingFlowtable{devices: []string{}, flags: number(a[attrFlowFlags])}
	ad, err := netlink.NewAttributeDecoder(attributes(a[attrFlowHook])[attrFlowDevices])
	if err == nil {
		for ad.Next() {
			f.devices = append(f.devices, ad.String())
		}
	}
	slices.Sort(f.devices)
	old.flowtables[cString(a[attrFlowName])] = f
}
