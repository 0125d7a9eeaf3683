package kernelpath

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// TestLonersLikeShared has random changes made to two records of holders. One of
// them keeps what nobody shares as it does; in the other everything is as if it
// were shared. Both say the same of every slot, whatever was taken back.
func TestLonersLikeShared(t *testing.T) {
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 7))
		now := time.Now()
		lone, shared := newHolders(), newHolders()
		var slots []slotKey
		for range 400 {
			c := randomChange(r)
			all, err := slotsOf(c.permission)
			if err != nil {
				continue
			}
			for _, s := range all {
				slots = append(slots, s.at())
			}
			now = now.Add(time.Duration(r.IntN(5)) * time.Second)
			back := r.IntN(4) == 0
			for _, h := range []*holders{&lone, &shared} {
				h.sweep(now)
				undo := h.begin()
				h.take(&change{permission: c.permission, remove: c.remove}, now)
				if back {
					undo()
				}
				h.end()
			}
			for id := range uint64(maxRandomID + 1) {
				shared.associate(id)
			}
			for _, k := range slots {
				if a, b := describe(lone.get(k), now), describe(shared.get(k), now); a != b {
					t.Fatalf("seed %d, %+v: %x of %s is held as %s, and shared as %s", seed, c, k.key, k.set, a, b)
				}
			}
			slices.SortFunc(slots, func(a, b slotKey) int { return slices.Compare([]byte(a.set+a.key), []byte(b.set+b.key)) })
			slots = slices.Compact(slots)
		}
		for id := range uint64(maxRandomID + 1) {
			lone.drop(id)
		}
		lone.sweep(now.Add(time.Hour))
		if n := len(lone.lone.index) + len(lone.slots) + len(lone.byID) + len(lone.shared); n != 0 {
			t.Errorf("seed %d: in the end %d entries are left", seed, n)
		}
	}
}

const maxRandomID = 12

// randomChange has few addresses, so that permissions meet.
func randomChange(r *rand.Rand) *change {
	six := r.IntN(4) == 0
	at := func(n int) netip.AddrPort {
		a := netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + r.IntN(n))})
		if six {
			a = netip.AddrFrom16([16]byte{0xfd, 15: byte(1 + r.IntN(n))})
		}
		return netip.AddrPortFrom(a, uint16(1+r.IntN(n)))
	}
	p := nat.Permission{
		ID: uint64(1 + r.IntN(maxRandomID)), Direction: nat.Direction(1 + r.IntN(3)), Proto: flow.TCP,
		Multiple: r.IntN(2) == 0, ToUser: r.IntN(4) == 0, Timeout: time.Duration(r.IntN(3)) * time.Minute,
	}
	if r.IntN(3) == 0 {
		p.Proto = flow.UDP
	}
	if p.Direction == nat.Outbound {
		p.Client, p.Target = netip.AddrPortFrom(at(2).Addr(), 0), at(3)
		if r.IntN(2) == 0 {
			p.Via = at(2)
		}
		if r.IntN(3) == 0 {
			p.Source = at(2)
		}
		return &change{permission: p, remove: r.IntN(3) == 0}
	}
	p.External, p.Client = at(2), at(2)
	p.FromGateway = p.Direction == nat.Inbound && r.IntN(4) == 0
	p.OneWay = p.Direction == nat.Inbound && p.Proto == flow.UDP && !p.ToUser && r.IntN(2) == 0
	if p.AnySource = r.IntN(3) == 0; !p.AnySource {
		for range r.IntN(3) {
			a := at(3).Addr()
			p.Sources = append(p.Sources, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return &change{permission: p, remove: r.IntN(3) == 0}
}

// describe says who holds a slot, and for how long.
func describe(x *held, now time.Time) string {
	if x == nil {
		return "nobody's"
	}
	by := slices.Clone(x.by)
	slices.SortFunc(by, func(a, b holding) int { return int(a.id) - int(b.id) })
	text := fmt.Sprintf("%q lingers %v", x.slot.says(), x.slot.lingers)
	for _, h := range by {
		left := "for ever"
		if !h.until.IsZero() {
			left = h.until.Sub(now).String()
		}
		text += fmt.Sprintf(", by %d %s", h.id, left)
	}
	return text
}
