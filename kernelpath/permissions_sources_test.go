package kernelpath

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// TestOutermostSources against the definition: what another one covers is left
// out, and of what is there twice one is kept.
func TestOutermostSources(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		var sources, want []netip.Prefix
		for range 1 + r.IntN(8) {
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(16))}), 26+r.IntN(7))
			if r.IntN(2) == 0 {
				p = p.Masked()
			}
			sources = append(sources, p)
		}
		for i, p := range sources {
			if !slices.ContainsFunc(sources, func(q netip.Prefix) bool { return q.Bits() < p.Bits() && q.Overlaps(p) }) &&
				!slices.ContainsFunc(sources[:i], func(q netip.Prefix) bool { return q.Masked() == p.Masked() }) {
				want = append(want, p.Masked())
			}
		}
		var got []netip.Prefix
		for _, p := range outermost(sources) {
			got = append(got, p.Masked())
		}
		slices.SortFunc(want, netip.Prefix.Compare)
		slices.SortFunc(got, netip.Prefix.Compare)
		if !slices.Equal(got, want) {
			t.Fatalf("of %v: %v, want %v", sources, got, want)
		}
	}
}

// TestVeryManySourcesHoldNobodyUp: the goroutine that all permissions wait for
// works them out in no time.
func TestVeryManySourcesHoldNobodyUp(t *testing.T) {
	p := nat.Permission{
		ID: 1, Direction: nat.Inbound, Proto: flow.UDP, Multiple: true,
		Client: netip.MustParseAddrPort("10.0.0.2:5000"), External: netip.MustParseAddrPort("203.0.113.1:61000"),
	}
	for i := range 1 << 15 {
		p.Sources = append(p.Sources, netip.MustParsePrefix(fmt.Sprintf("11.%d.%d.0/25", i>>8, i&255)))
	}
	start := time.Now()
	h := newHolders()
	h.begin()
	c := &change{ctx: context.Background(), permission: p}
	h.take(c, start)
	h.end()
	if took := time.Since(start); c.refused != nil || len(h.slots) != 1<<15+2 || took > 3*time.Second {
		t.Errorf("%d slots in %v: %v", len(h.slots), took, c.refused)
	}
}
