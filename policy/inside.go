package policy

import (
	"fmt"
	"slices"
)

// Inside says whether a network may be served by the gateway's own services for
// clients: it is defined, some network rule begins in it, and no network rule
// hides others from it. The error says why not.
func (p *Policy) Inside(network string) error {
	switch {
	case network == Any || network == Gateway:
		return fmt.Errorf("%q is no network of clients", network)
	case !slices.ContainsFunc(p.networks, func(n Network) bool { return n.Name == network }):
		return fmt.Errorf("unknown network %q", network)
	case slices.ContainsFunc(p.netRules, func(r NetworkRule) bool { return r.Relation == NAT && r.To == network && r.From != network }):
		return fmt.Errorf("network %q is outside: a network rule hides others from it", network)
	case !slices.ContainsFunc(p.netRules, func(r NetworkRule) bool { return r.From == network || r.From == Any }):
		return fmt.Errorf("network %q is not inside: no network rule begins in it", network)
	}
	return nil
}
