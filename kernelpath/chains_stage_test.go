package kernelpath

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// packet is what the look-ups of a stage read.
type packet struct {
	src, dst netip.Addr
	proto    flow.Proto
	last     uint16 // port or ICMP type
}

func (p packet) in(x policy.Box) bool {
	return x.Src.Contains(p.src) && x.Dst.Contains(p.dst) && x.Protos[0] <= p.proto && p.proto <= x.Protos[1] && x.Ports.Lo <= p.last && p.last <= x.Ports.Hi
}

// read is what a field of a key has, as the kernel loads it.
func (p packet) read(t *testing.T, k stageKind, f field) []byte {
	t.Helper()
	var raw []byte
	switch f.typ.Name {
	case k.family.addr.Name:
		raw = p.dst.AsSlice()
		if bytes.HasPrefix([]byte(f.text), []byte(k.family.saddr.text)) {
			raw = p.src.AsSlice()
		}
	case fieldL4Proto.typ.Name:
		raw = []byte{byte(p.proto)}
	case fieldDport.typ.Name:
		raw = portValue(p.last).raw
	case k.family.icmpType.typ.Name:
		raw = []byte{byte(p.last)}
	default:
		t.Fatalf("a key with %s", f.text)
	}
	for i, m := range f.mask {
		raw[i] &= m
	}
	return raw
}

// elementsOf are the elements of each look-up.
func elementsOf(k stageKind, lookups []lookup) [][]element {
	all := make([][]element, len(lookups))
	for i, l := range lookups {
		for _, x := range l.boxes {
			all[i] = append(all[i], l.elements(k, x)...)
		}
	}
	return all
}

// verdict looks a packet up in one map after the other.
func (p packet) verdict(t *testing.T, k stageKind, lookups []lookup, elements [][]element) string {
	t.Helper()
	for i, l := range lookups {
		var parts [][]byte
		for _, f := range l.key(k) {
			parts = append(parts, p.read(t, k, f))
		}
		if len(parts) == 0 {
			return verdictOf(l.boxes[0].to).Chain
		}
		key := pack(parts...)
		for _, e := range elements[i] {
			if l.last != lastRanges && bytes.Equal(key, e.key) || l.last == lastRanges && inRanges(parts, key, e) {
				return e.verdict.Chain
			}
		}
	}
	return ""
}

// inRanges compares field by field.
func inRanges(parts [][]byte, key []byte, e element) bool {
	at := 0
	for _, p := range parts {
		end := at + len(p)
		if bytes.Compare(key[at:end], e.key[at:end]) < 0 || bytes.Compare(key[at:end], e.end[at:end]) > 0 {
			return false
		}
		at = (end + 3) / 4 * 4
	}
	return true
}

// randomBox is one of few, so that many of them meet.
func randomBox(r *rand.Rand, k stageKind) policy.Box {
	prefix := func() netip.Prefix {
		a := k.family.unspecified.raw
		a = append([]byte{10, byte(r.IntN(3)), byte(r.IntN(3))}, a[3:]...)
		addr, _ := netip.AddrFromSlice(a)
		return netip.PrefixFrom(addr, []int{0, 8, 16, 24, addr.BitLen()}[r.IntN(5)]).Masked()
	}
	x := policy.Box{Src: prefix(), Dst: prefix(), Ports: policy.PortRange{Lo: 0, Hi: 65535}}
	value := func(below int) (uint16, uint16) {
		lo := r.IntN(below)
		return uint16(lo), uint16(lo + r.IntN(2)*r.IntN(below-lo))
	}
	switch k.kind {
	case policy.KindPorts:
		x.Protos = [][2]flow.Proto{{flow.TCP, flow.UDP}, {flow.TCP, flow.TCP}, {flow.UDP, flow.UDP}}[r.IntN(3)]
		if r.IntN(3) > 0 {
			x.Ports.Lo, x.Ports.Hi = value([]int{8, 65536}[r.IntN(2)])
		}
	case policy.KindICMP:
		x.Protos = [2]flow.Proto{k.family.icmp, k.family.icmp}
		x.Ports.Hi = 255
		if r.IntN(3) > 0 {
			x.Ports.Lo, x.Ports.Hi = value(4)
		}
	default:
		lo, hi := value(256)
		x.Protos = [2]flow.Proto{flow.Proto(lo), flow.Proto(hi)}
		if r.IntN(3) == 0 {
			x.Protos = [2]flow.Proto{0, 255}
		}
	}
	return x
}

func overlapping(a, b policy.Box) bool {
	return a.Src.Overlaps(b.Src) && a.Dst.Overlaps(b.Dst) && a.Protos[0] <= b.Protos[1] && b.Protos[0] <= a.Protos[1] &&
		a.Ports.Lo <= b.Ports.Hi && b.Ports.Lo <= a.Ports.Hi
}

// randomPacket is near the edge of a box, if there is one.
func randomPacket(r *rand.Rand, k stageKind, boxes []judgedBox) packet {
	x := randomBox(r, k)
	if len(boxes) > 0 && r.IntN(4) > 0 {
		x = boxes[r.IntN(len(boxes))].Box
	}
	address := func(p netip.Prefix) netip.Addr {
		switch r.IntN(3) {
		case 0:
			return lastAddr(p)
		case 1:
			if next := lastAddr(p).Next(); next.IsValid() {
				return next
			}
		}
		return p.Addr()
	}
	p := packet{src: address(x.Src), dst: address(x.Dst), proto: x.Protos[r.IntN(2)], last: []uint16{x.Ports.Lo, x.Ports.Hi, x.Ports.Hi + 1}[r.IntN(3)]}
	if k.kind == policy.KindICMP {
		p.last &= 255
	}
	return p
}

// However the boxes of a stage are looked up, each packet gets what its box says.
func TestStageSaysWhatItsBoxesSay(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	hashes, ranges := 0, 0
	for round := range 200 {
		k := stageKinds()[r.IntN(len(stageKinds()))]
		var boxes []judgedBox
		for range []int{4, 30, 2000}[round%3] {
			x := randomBox(r, k)
			free := true
			for _, other := range boxes {
				free = free && !overlapping(x, other.Box)
			}
			if free {
				boxes = append(boxes, judgedBox{x, goTo(fmt.Sprint("chain", len(boxes)))})
			}
		}
		lookups := lookupsOf(k, boxes)
		n := 0
		for _, l := range lookups {
			n += len(l.boxes)
			if l.last == lastRanges {
				ranges++
			} else {
				hashes++
			}
		}
		if n != len(boxes) {
			t.Fatalf("seed %d: %d boxes became %d", seed, len(boxes), n)
		}
		elements := elementsOf(k, lookups)
		for range 50 {
			p := randomPacket(r, k, boxes)
			want := ""
			for _, x := range boxes {
				if p.in(x.Box) {
					want = verdictOf(x.to).Chain
				}
			}
			if got := p.verdict(t, k, lookups, elements); got != want {
				t.Fatalf("seed %d: %s: %v meets %q, its box says %q", seed, k.name, p, got, want)
			}
		}
	}
	if hashes == 0 || ranges == 0 {
		t.Errorf("seed %d: %d hashes, %d look-ups of ranges", seed, hashes, ranges)
	}
}

// A thousand rules about prefixes of one length are one look-up in a hash, and
// what is about everybody is looked up before them.
func TestStageOfManyPrefixesIsAHash(t *testing.T) {
	k := stageKinds()[0]
	var boxes []judgedBox
	for i := range 1000 {
		boxes = append(boxes, judgedBox{box(fmt.Sprintf("10.%d.%d.0/24", i/256, i%256), "0.0.0.0/0", flow.TCP, flow.UDP, 80, 80, policy.ClassKernel), accept()})
	}
	boxes = append(boxes, judgedBox{box("0.0.0.0/0", "0.0.0.0/0", flow.TCP, flow.UDP, 443, 443, policy.ClassKernel), accept()})
	var keys []string
	for _, l := range lookupsOf(k, boxes) {
		keys = append(keys, fieldText(l.key(k)))
	}
	want := []string{"meta l4proto . th dport", "ip saddr and 255.255.255.0 . meta l4proto . th dport"}
	if fmt.Sprint(keys) != fmt.Sprint(want) {
		t.Errorf("the look-ups are %q", keys)
	}
}
