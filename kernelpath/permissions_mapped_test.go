package kernelpath

import (
	"bytes"
	"testing"

	"github.com/sluicegw/sluice/flow"
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
