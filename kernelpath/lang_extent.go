package kernelpath

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// makeElement is an element of a verdict map.
func makeElement(parts []extent, to stmt) element {
	e := keyElement(parts)
	e.verdict = verdictOf(to)
	e.text += " : " + to.text
	return e
}

// keyElement is an element by its key alone.
func keyElement(parts []extent) (e element) {
	var lo, hi [][]byte
	for i, p := range parts {
		if i > 0 {
			e.text += " . "
		}
		e.text += p.text
		lo, hi = append(lo, p.lo), append(hi, p.hi)
	}
	e.key, e.end = pack(lo...), pack(hi...)
	return e
}

// extent is an inclusive range of one field.
type extent struct {
	text   string
	lo, hi []byte
}

func prefixExtent(p netip.Prefix) extent {
	p = p.Masked()
	return extent{p.String(), p.Addr().AsSlice(), lastAddr(p).AsSlice()}
}

// firstExtent is the first address of a prefix alone.
func firstExtent(p netip.Prefix) extent {
	a := p.Masked().Addr()
	return extent{a.String(), a.AsSlice(), a.AsSlice()}
}

// lastAddr is the highest address of a prefix.
func lastAddr(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(a)*8; i++ {
		a[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(a)
	return last
}

func protoExtent(p [2]flow.Proto) extent {
	if p[0] == p[1] {
		v := protoValue(p[0])
		return extent{v.text, v.raw, v.raw}
	}
	return byteExtent(byte(p[0]), byte(p[1]))
}

func portExtent(p policy.PortRange) extent {
	text := fmt.Sprint(p.Lo)
	if p.Lo != p.Hi {
		text = fmt.Sprintf("%d-%d", p.Lo, p.Hi)
	}
	return extent{text, binary.BigEndian.AppendUint16(nil, p.Lo), binary.BigEndian.AppendUint16(nil, p.Hi)}
}

func byteExtent(lo, hi byte) extent {
	text := fmt.Sprint(lo)
	if lo != hi {
		text = fmt.Sprintf("%d-%d", lo, hi)
	}
	return extent{text, []byte{lo}, []byte{hi}}
}
