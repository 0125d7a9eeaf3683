package kernelpath

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// The short way to the elements of a mapping leads where the long one does.
func TestSlotsOfMapped(t *testing.T) {
	h := newHolders()
	h.outMaps = map[string]bool{mapOut("out"): true, setKnown("out"): true}
	for _, proto := range []flow.Proto{flow.UDP, flow.TCP, flow.ICMP} {
		for _, let := range [][2]bool{{}, {true, false}, {true, true}} {
			p := nthMapping(70_000)
			p.Proto, p.AnySource, p.PeersOnly = proto, let[0], let[1]
			if proto == flow.ICMP && p.AnySource {
				continue
			}
			want, err := slotsOf(p)
			if err != nil {
				t.Fatal(err)
			}
			if !isMapping(p) {
				t.Fatalf("%v, %v: not taken for a mapping", proto, let)
			}
			got := h.slotsOfMapped(recordOf(p))
			if len(got) != len(want) {
				t.Fatalf("%v, %v: %d elements, want %d", proto, let, len(got), len(want))
			}
			for i, w := range want {
				if g := got[i]; g.set != w.set || !bytes.Equal(g.elem.key, w.elem.key) || len(w.elem.end) > 0 || !g.same(w) || g.elem.timeout != w.elem.timeout {
					t.Errorf("%v, %v: %+v, want %+v", proto, let, g, w)
				}
			}
		}
	}
}

// A mapping finds what a permission holds alone, and leaves it.
func TestMappingMeetsPermission(t *testing.T) {
	h := newHolders()
	h.known, h.outMaps = true, map[string]bool{mapOut("out"): true, setKnown("out"): true}
	take := func(p nat.Permission, remove bool) error {
		h.begin()
		defer h.end()
		c := &change{permission: p, remove: remove}
		h.take(c, time.Now())
		for _, m := range h.transaction(time.Now()).msgs {
			if remove && p.Mapped && strings.Contains(m.what, mapBind(ipv4)) {
				t.Errorf("it takes away what the permission holds: %s", m.what)
			}
		}
		return c.refused
	}
	m := nthMapping(1)
	bind := nat.Permission{ID: 77, Direction: nat.Inbound, Proto: m.Proto, Multiple: true, AnySource: true, Client: m.Client, External: m.External}
	elsewhere := bind
	elsewhere.Client = netip.MustParseAddrPort("10.9.9.9:9")
	if err := take(elsewhere, false); err != nil {
		t.Fatal(err)
	}
	if err := take(m, false); !errors.Is(err, nat.ErrConflict) {
		t.Errorf("another's external endpoint: %v", err)
	}
	if err := errors.Join(take(elsewhere, true), take(bind, false), take(m, false), take(m, true)); err != nil {
		t.Error(err)
	}
}
