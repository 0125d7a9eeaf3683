package kernelpath

import (
	"fmt"
	"os"
	"sort"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// ForeignChain is a base chain of another table on a hook of ours that can
// overrule our accept: netfilter asks every base chain, and the first that
// drops has the last word.
type ForeignChain struct {
	Family, Table, Chain, Hook string
	Priority                   int32
	// PolicyDrop: what no rule of it accepts is dropped.
	PolicyDrop bool
	// Drops: a rule that it reaches drops, rejects or queues.
	Drops bool
}

func (f ForeignChain) String() string {
	if f.Chain == "" {
		return fmt.Sprintf("legacy %s table %s may drop what the gateway accepts", f.Family, f.Table)
	}
	why := "has rules that drop"
	if f.PolicyDrop {
		why = "has policy drop"
	}
	return fmt.Sprintf("chain %s %s %s (hook %s, priority %d) %s: it overrules what the gateway accepts", f.Family, f.Table, f.Chain, f.Hook, f.Priority, why)
}

var foreignHooks = map[nftables.ChainHook]string{
	*nftables.ChainHookPrerouting: "prerouting", *nftables.ChainHookInput: "input", *nftables.ChainHookForward: "forward",
	*nftables.ChainHookOutput: "output", *nftables.ChainHookPostrouting: "postrouting",
}

var foreignFamilies = map[nftables.TableFamily]string{
	nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6",
}

// ForeignChains finds them in the network namespace of the calling thread, in
// a stable order. Chains that only translate, count or mark are not among
// them. The tables of legacy iptables cannot be looked into and are named
// without a chain.
func ForeignChains() ([]ForeignChain, error) {
	c, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	defer c.CloseLasting()
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	var found []ForeignChain
	for _, ch := range chains {
		family, ours := foreignFamilies[ch.Table.Family]
		if !ours || ch.Hooknum == nil || family == "inet" && ch.Table.Name == tableName {
			continue
		}
		hook, known := foreignHooks[*ch.Hooknum]
		if !known {
			continue
		}
		f := ForeignChain{Family: family, Table: ch.Table.Name, Chain: ch.Name, Hook: hook}
		if ch.Priority != nil {
			f.Priority = int32(*ch.Priority)
		}
		f.PolicyDrop = ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop
		if f.Drops, err = chainDrops(c, ch.Table, ch.Name, map[string]bool{}); err != nil {
			return nil, err
		}
		if f.PolicyDrop || f.Drops {
			found = append(found, f)
		}
	}
	found = append(found, legacyTables()...)
	sort.Slice(found, func(i, j int) bool { return found[i].String() < found[j].String() })
	return found, nil
}

// chainDrops looks for a drop, reject or queue in a chain and those that its
// rules jump to. Verdict maps are taken at their worst.
func chainDrops(c *nftables.Conn, t *nftables.Table, name string, seen map[string]bool) (bool, error) {
	if seen[name] {
		return false, nil
	}
	seen[name] = true
	rules, err := c.GetRules(t, &nftables.Chain{Name: name, Table: t})
	if err != nil {
		return false, fmt.Errorf("list rules of chain %s %s: %w", t.Name, name, err)
	}
	for _, r := range rules {
		for _, e := range r.Exprs {
			switch e := e.(type) {
			case *expr.Reject, *expr.Queue:
				return true, nil
			case *expr.Target:
				switch e.Name {
				case "DROP", "REJECT", "NFQUEUE", "TARPIT":
					return true, nil
				}
			case *expr.Lookup:
				if e.IsDestRegSet && e.DestRegister == 0 {
					return true, nil
				}
			case *expr.Verdict:
				switch e.Kind {
				case expr.VerdictDrop, expr.VerdictQueue:
					return true, nil
				case expr.VerdictJump, expr.VerdictGoto:
					if drops, err := chainDrops(c, t, e.Chain, seen); drops || err != nil {
						return drops, err
					}
				}
			}
		}
	}
	return false, nil
}

// legacyTables are the filter-like tables of iptables-legacy, which stand on
// the same hooks without being in nftables.
func legacyTables() (found []ForeignChain) {
	for family, file := range map[string]string{"ip": "/proc/thread-self/net/ip_tables_names", "ip6": "/proc/thread-self/net/ip6_tables_names"} {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // iptables-legacy is not there
		}
		for _, table := range strings.Fields(string(b)) {
			if table != "nat" {
				found = append(found, ForeignChain{Family: family, Table: table})
			}
		}
	}
	return found
}
