package kernelpath

import (
	"fmt"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/policy"
)

// chainSessions refuses a first packet, or returns.
const chainSessions = "sessions"

// setSessions has the hosts that have flows, and these. An element keeps the
// limit that it was made with, so that each limit has a set of its own; what it
// counts survives a reload. An element without flows goes by itself.
func setSessions(limit uint32) string { return fmt.Sprintf("sessions4_%d", limit) }

// limitSessions refuses the flows of hidden hosts that have too many. Conntrack
// is asked which of those that were counted live (nf_conncount.c).
//
//	chain first {
//		meta nfproto ipv4 iifname @net0_if ip saddr @net0_addr4 jump sessions
//	}
//	chain sessions {
//		meta nfproto ipv4 add @sessions4_100 { ip saddr ct count over 100 } goto exhausted
//	}
func (b *builder) limitSessions(c *chain) {
	if b.Sessions == 0 {
		return
	}
	seen := map[string]bool{}
	for _, r := range b.in.NetworkRules {
		if r.Relation != policy.NAT || seen[r.From] {
			continue
		}
		seen[r.From] = true
		if from, ok := b.between(r.From, policy.Any); ok {
			c.add(append(from, jump(chainSessions))...)
		}
	}
	if len(seen) == 0 {
		return
	}
	name := setSessions(b.Sessions)
	b.set(&set{name: name, key: fieldTypes([]field{fieldSaddr4}), dynamic: true, lasting: true, size: anySize})
	b.chain(chainSessions).add(is(fieldNFProto, ipv4.nfproto), moreFlows(name, b.Sessions, fieldSaddr4), goTo("exhausted"))
}

// moreFlows counts a flow under a key and matches if there are more than a
// limit:  add @sessions4_100 { ip saddr ct count over 100 }
func moreFlows(name string, limit uint32, key ...field) stmt {
	text := fmt.Sprintf("add @%s { %s ct count over %d }", name, fieldText(key), limit)
	return stmt{text, func(c *code) {
		c.load(key)
		c.add(&expr.Dynset{
			SrcRegKey: 1, SetName: name, Operation: unix.NFT_DYNSET_OP_ADD,
			Exprs: []expr.Any{&expr.Connlimit{Count: limit, Flags: expr.NFT_CONNLIMIT_F_INV}},
		})
	}}
}
