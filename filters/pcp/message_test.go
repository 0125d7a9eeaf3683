package pcp

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/flow"
)

// Whatever comes, what is read of it is in bounds, and an answer is one: whole
// words, not longer than a message may be, with the response bit and the opcode
// that was asked.
func FuzzParse(f *testing.F) {
	header := append([]byte{2, opMap, 0, 0, 0, 0, 2, 88}, netip.MustParseAddr("::ffff:10.0.0.2").AsSlice()...)
	body := append(make([]byte, nonceSize), byte(flow.TCP), 0, 0, 0, 15, 160, 0, 0)
	ask := append(append(bytes.Clone(header), body...), make([]byte, 16)...)
	f.Add(ask)
	f.Add(append(bytes.Clone(ask), optPreferFailure, 0, 0, 0))
	f.Add(append(bytes.Clone(ask), append([]byte{optFilter, 0, 0, 20, 0, 128, 0, 0}, netip.MustParseAddr("::ffff:192.0.2.1").AsSlice()...)...))
	f.Add(append(bytes.Clone(ask), 200, 0, 0, 3, 1, 2, 3, 0))
	f.Add(append(bytes.Clone(ask), optFilter, 0, 255, 255))
	f.Add(header)
	f.Add([]byte{2, opPeer})
	from := netip.MustParseAddr("10.0.0.2")
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 2 || b[0] != version || b[1]&responseBit != 0 {
			return
		}
		came := bytes.Clone(b)
		r, res := parse(b, from)
		out := refusal(b, res, 7)
		if res == success && r.opcode != opAnnounce {
			out = grant(b, r, 600, 7, netip.MustParseAddrPort("203.0.113.1:61000"))
			for _, x := range r.filters {
				if !x.clear && (!x.prefix.Addr().Is4() || x.prefix != x.prefix.Masked()) {
					t.Errorf("filter %v", x.prefix)
				}
			}
		}
		if len(out)%4 != 0 || len(out) > maxMessage || len(out) < headerSize || out[1] != b[1]|responseBit || out[0] != version {
			t.Errorf("%x is answered by %x", b, out)
		}
		if !bytes.Equal(came, b) {
			t.Error("the request was changed")
		}
	})
}

// The same for NAT-PMP.
func FuzzParsePMP(f *testing.F) {
	f.Add([]byte{0, pmpAddress})
	f.Add([]byte{0, pmpTCP, 0, 0, 15, 160, 0, 0, 0, 0, 2, 88})
	f.Add([]byte{0, pmpUDP, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{0, 77, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 2 || b[1]&responseBit != 0 {
			return
		}
		r, ok := parsePMP(b)
		switch {
		case !ok && b[1] != pmpAddress:
			if out := pmpUnsupported(b, 7); out[1] != b[1]|responseBit || len(out) < 8 || len(out) > maxMessage {
				t.Errorf("%x is answered by %x", b, out)
			}
		case ok:
			if !r.proto.HasPorts() || r.internal == 0 && r.lifetime != 0 {
				t.Errorf("%x is read as %+v", b, r)
			}
			if out := pmpGrant(b, pmpSuccess, 7, 61000, 600); len(out) != pmpGrantSize || out[1] != b[1]|responseBit {
				t.Errorf("%x is answered by %x", b, out)
			}
		}
	})
}

// TestBounds: a prefix and its range are the same.
func TestBounds(t *testing.T) {
	for text, want := range map[string][2]string{
		"10.0.0.0/24":      {"10.0.0.0", "10.0.0.255"},
		"192.0.2.77/30":    {"192.0.2.76", "192.0.2.79"},
		"192.0.2.7/32":     {"192.0.2.7", "192.0.2.7"},
		"0.0.0.0/0":        {"0.0.0.0", "255.255.255.255"},
		"2001:db8::5/125":  {"2001:db8::", "2001:db8::7"},
		"2001:db8:a::/129": {},
	} {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			if want[0] != "" {
				t.Error(err)
			}
			continue
		}
		if lo, hi := bounds(p); lo.String() != want[0] || hi.String() != want[1] {
			t.Errorf("%s is %v to %v", p, lo, hi)
		}
	}
}
