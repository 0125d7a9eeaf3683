package pcp

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

// Whatever a host sends, twice: nothing is opened but at most one port of its
// own per datagram, the second time changes nothing, and the answers are the same
// in all that a client looks at.
func FuzzAnswer(f *testing.F) {
	from := netip.MustParseAddr("10.0.0.2")
	ask := append([]byte{2, opMap, 0, 0, 0, 0, 2, 88}, netip.MustParseAddr("::ffff:10.0.0.2").AsSlice()...)
	ask = append(append(ask, make([]byte, nonceSize)...), byte(flow.TCP), 0, 0, 0, 15, 160, 195, 80)
	ask = append(ask, make([]byte, 16)...)
	f.Add(ask)
	f.Add(append(bytes.Clone(ask), optPreferFailure, 0, 0, 0))
	f.Add(append(bytes.Clone(ask), append([]byte{optFilter, 0, 0, 20, 0, 128, 0, 0}, netip.MustParseAddr("::ffff:192.0.2.1").AsSlice()...)...))
	peer := bytes.Clone(ask)
	peer[1] = opPeer
	f.Add(append(append(peer, 19, 196, 0, 0), netip.MustParseAddr("::ffff:192.0.2.1").AsSlice()...))
	f.Add([]byte{0, pmpAddress})
	f.Add([]byte{0, pmpTCP, 0, 0, 15, 160, 0, 0, 0, 0, 2, 88})
	f.Fuzz(func(t *testing.T, b []byte) {
		s := New()
		g := filtertest.New(t, s, "")
		c := usual()
		h := &host{s: s, addr: from, config: &c, mappings: make(map[endpoint]*mapping)}
		first := h.answer(b)
		open := g.Open()
		second := h.answer(b)
		if again := g.Open(); len(open) > 1 || strings.Join(again, "\n") != strings.Join(open, "\n") {
			t.Errorf("%x opened %v, the second time %v", b, open, again)
		}
		for _, p := range open {
			if !strings.Contains(p, " > "+from.String()+":") {
				t.Errorf("%x opened %s", b, p)
			}
		}
		if !bytes.Equal(first, second) { // no time has passed
			t.Errorf("%x is answered by %x, the second time by %x", b, first, second)
		}
		h.close()
	})
}
