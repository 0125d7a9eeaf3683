package kernelpath

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strings"

	"github.com/google/nftables"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// outPrefix begins the names of the maps of outMaps.
const outPrefix = "out4_"

// mapOut is the map of a NAT network rule that says for an inside endpoint
// (address, protocol, port) from which external address and port it leaves.
// The name depends on nothing but the rule's, so that the map goes with the
// rule and outlives every other change.
func mapOut(networkRule string) string {
	h := fnv.New64a()
	h.Write([]byte(networkRule))
	return fmt.Sprintf("%s%016x", outPrefix, h.Sum64())
}

// insideEndpoint is who sent the first packet of a flow, before any
// translation.
func insideEndpoint() []field { return []field{fieldAskedSaddr4, fieldL4Proto, fieldAskedSport} }

// hasEndpoint matches the protocols that have endpoints: ports, or identifiers
// of queries.
func hasEndpoint() stmt {
	return oneOf(fieldL4Proto, protoValue(flow.ICMP), protoValue(flow.TCP), protoValue(flow.UDP))
}

// outMaps are the maps of the NAT network rules. Only the first packet of a
// flow that is hidden pays for the look-up.
//
//	map out4_91b7584a2265b1f5 {
//		type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
//		flags timeout
//	}
//	chain hide {
//		... meta l4proto { icmp, tcp, udp } snat ip to ct original ip saddr . meta l4proto . ct original proto-src map @out4_91b7584a2265b1f5
//	}
func (b *builder) outMaps() error {
	of := map[string]string{}
	for _, r := range b.in.NetworkRules {
		if r.Relation != policy.NAT {
			continue
		}
		name := mapOut(r.Name)
		if other, taken := of[name]; taken {
			return fmt.Errorf("network rules %q and %q: one of them needs another name", other, r.Name)
		}
		of[name] = r.Name
		b.set(&set{name: name, comment: plainComment(r.Name), key: fieldTypes(insideEndpoint()),
			data: []nftables.SetDatatype{ipv4.addr, nftables.TypeInetService}, timeout: true, lasting: true})
	}
	return nil
}

// outMapNames are those of a ruleset.
func (r Ruleset) outMapNames() map[string]bool {
	names := map[string]bool{}
	for _, s := range r.sets {
		if strings.HasPrefix(s.name, outPrefix) {
			names[s.name] = true
		}
	}
	return names
}

// lastingNames are the sets of permissions that a table has.
func (old *existing) lastingNames() []string {
	names := permissionSetNames()
	for _, name := range sortedKeys(old.sets) {
		if strings.HasPrefix(name, outPrefix) {
			names = append(names, name)
		}
	}
	return slices.DeleteFunc(names, func(name string) bool {
		_, there := old.sets[name]
		return !there
	})
}
