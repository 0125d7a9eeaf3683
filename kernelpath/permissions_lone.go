package kernelpath

import (
	"encoding/binary"
	"hash/maphash"
	"net/netip"
	"slices"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// loners are the permissions whose elements nobody else holds, which nearly all
// do: of very many there is kept what they are, in 37 bytes, and none of their
// elements, which are made again where they are needed. Whoever shares one, or
// is of a kind that fits into no record, is in the other maps of holders.
//
// An index finds both a permission by its ID and the one that holds a slot. It
// keeps 32 bits of a hash and the place of a record, which then says whether it
// is the one. Of two that have one hash the second is not kept here.
type loners struct {
	seed  maphash.Seed
	index map[uint32]int32
	// of IPv4 and of IPv6. The place of a record is twice that in its slab, and
	// one more for IPv6.
	slabs [2]slab
}

func newLoners() loners {
	return loners{seed: maphash.MakeSeed(), index: map[uint32]int32{}, slabs: [2]slab{{stride: recordSize(4)}, {stride: recordSize(16)}}}
}

func (l *loners) hashID(id uint64) uint32 { return uint32(maphash.Comparable(l.seed, id)) }

// hash is of the key alone: where a permission has the same one in several sets,
// one entry does for all.
func (l *loners) hash(k slotKey) uint32 { return uint32(maphash.String(l.seed, k.key)) }

func (l *loners) at(place int32) (nat.Permission, time.Time) {
	return unrecord(l.slabs[place&1].at(place >> 1))
}

// find gives what holds a slot; nil: none of these.
func (l *loners) find(k slotKey) *held {
	place, ok := l.index[l.hash(k)]
	if !ok {
		return nil
	}
	for _, x := range heldOf(l.at(place)) {
		if x.slot.at() == k {
			return x
		}
	}
	return nil
}

// heldOf are the slots of a permission as it holds them alone.
func heldOf(p nat.Permission, until time.Time) []*held {
	const mark = 1 // makes slotsOf say what shares the timeout, and what has more
	if !until.IsZero() {
		p.Timeout = mark
	}
	slots, err := slotsOf(p)
	if err != nil {
		return nil // it was checked
	}
	all := make([]*held, 0, len(slots))
	for _, s := range slots {
		by := holding{id: p.ID}
		if s.elem.timeout > 0 {
			by.until = until.Add(s.elem.timeout - mark)
		}
		s.elem.timeout = 0
		all = append(all, &held{s, []holding{by}})
	}
	return all
}

// add keeps a permission that is in nobody's way; false: it cannot be kept here.
func (l *loners) add(p nat.Permission, keys []slotKey, until time.Time) bool {
	hashes := append(make([]uint32, 0, 8), l.hashID(p.ID))
	for _, k := range keys {
		hashes = append(hashes, l.hash(k))
	}
	for _, h := range hashes {
		if _, taken := l.index[h]; taken {
			return false
		}
	}
	raw, six, ok := record(p, until)
	if !ok {
		return false
	}
	place := l.slabs[six].put(raw)<<1 | int32(six)
	for _, h := range hashes {
		l.index[h] = place
	}
	return true
}

// remove forgets a permission, if it is there, and gives what it was.
func (l *loners) remove(id uint64) (slots []*held, was bool) {
	h := l.hashID(id)
	place, ok := l.index[h]
	if !ok {
		return nil, false
	}
	p, until := l.at(place)
	if p.ID != id {
		return nil, false
	}
	slots = heldOf(p, until)
	for _, x := range slots {
		delete(l.index, l.hash(x.slot.at()))
	}
	delete(l.index, h)
	l.slabs[place&1].free(place >> 1)
	return slots, true
}

// each calls f with every permission.
func (l *loners) each(f func(p nat.Permission, until time.Time)) {
	for six := range l.slabs {
		l.slabs[six].each(func(raw []byte) { f(unrecord(raw)) })
	}
}

// A record is the ID, the time in nanoseconds by the Unix clock or 0, the
// protocol, the direction and marks, and three addresses with ports: the
// client, where first packets go or the external address, and what the marks
// say.
const (
	recordMany uint16 = 1 << iota
	recordToUser
	recordAnySource
	recordOneWay
	recordFromGateway
	recordVia       // the third address is Via
	recordOwnSource // it is Source
	recordSource    // it is that of Sources
	recordClient    // there is a client
)

const recordHead = 8 + 8 + 1 + 1 + 2

func recordSize(address int) int { return recordHead + 3*(address+2) }

func marksOf(p nat.Permission) (marks uint16) {
	set := func(mark uint16, is bool) {
		if is {
			marks |= mark
		}
	}
	set(recordMany, p.Multiple)
	set(recordToUser, p.ToUser)
	set(recordAnySource, p.AnySource)
	set(recordOneWay, p.OneWay)
	set(recordFromGateway, p.FromGateway)
	set(recordVia, p.Via.IsValid())
	set(recordOwnSource, p.Source.IsValid())
	set(recordSource, len(p.Sources) > 0)
	set(recordClient, p.Client.IsValid())
	return marks
}

// record makes the record of a permission; false: it would not say all of it.
func record(p nat.Permission, until time.Time) (raw []byte, six int, ok bool) {
	to, third := p.Target, netip.AddrPort{}
	if p.Direction != nat.Outbound {
		to = p.External
	}
	size := 4
	if to.Addr().Is6() {
		size, six = 16, 1
	}
	switch {
	case p.Via.IsValid():
		third = p.Via
	case p.Source.IsValid():
		third = p.Source
	case len(p.Sources) > 0:
		third = netip.AddrPortFrom(p.Sources[0].Addr(), 0)
	}
	raw = binary.LittleEndian.AppendUint64(make([]byte, 0, recordSize(size)), p.ID)
	if until.IsZero() {
		raw = binary.LittleEndian.AppendUint64(raw, 0)
	} else {
		raw = binary.LittleEndian.AppendUint64(raw, uint64(until.UnixNano()))
	}
	raw = binary.LittleEndian.AppendUint16(append(raw, byte(p.Proto), byte(p.Direction)), marksOf(p))
	for _, a := range []netip.AddrPort{p.Client, to, third} {
		if a.IsValid() && a.Addr().BitLen() != 8*size {
			return nil, 0, false
		}
		raw = append(raw, a.Addr().AsSlice()...)
		if !a.IsValid() {
			raw = append(raw, make([]byte, size)...)
		}
		raw = binary.LittleEndian.AppendUint16(raw, a.Port())
	}
	back, _ := unrecord(raw)
	return raw, six, alike(back, p)
}

// unrecord reads a record. The permission is without its timeout.
func unrecord(raw []byte) (p nat.Permission, until time.Time) {
	if ns := int64(binary.LittleEndian.Uint64(raw[8:])); ns != 0 {
		until = time.Unix(0, ns)
	}
	marks := binary.LittleEndian.Uint16(raw[18:])
	has := func(mark uint16) bool { return marks&mark != 0 }
	p = nat.Permission{
		ID: binary.LittleEndian.Uint64(raw), Proto: flow.Proto(raw[16]), Direction: nat.Direction(raw[17]),
		Multiple: has(recordMany), ToUser: has(recordToUser), AnySource: has(recordAnySource), OneWay: has(recordOneWay),
		FromGateway: has(recordFromGateway),
	}
	size := (len(raw) - recordHead) / 3
	var all [3]netip.AddrPort
	for i := range all {
		a := raw[recordHead+i*size:][:size]
		addr, _ := netip.AddrFromSlice(a[:size-2])
		all[i] = netip.AddrPortFrom(addr, binary.LittleEndian.Uint16(a[size-2:]))
	}
	if has(recordClient) {
		p.Client = all[0]
	}
	if p.Direction == nat.Outbound {
		p.Target = all[1]
	} else {
		p.External = all[1]
	}
	switch {
	case has(recordVia):
		p.Via = all[2]
	case has(recordOwnSource):
		p.Source = all[2]
	case has(recordSource):
		p.Sources = []netip.Prefix{netip.PrefixFrom(all[2].Addr(), all[2].Addr().BitLen())}
	}
	return p, until
}

// alike compares permissions, but for their timeouts.
func alike(a, b nat.Permission) bool {
	return slices.Equal(a.Sources, b.Sources) && plainOf(a) == plainOf(b)
}

// plainPermission is all of a permission that can be compared.
type plainPermission struct {
	id                                   uint64
	direction                            nat.Direction
	proto                                flow.Proto
	client, target, via, source, outside netip.AddrPort
	leaves                               string
	is                                   [8]bool
}

func plainOf(p nat.Permission) plainPermission {
	return plainPermission{
		p.ID, p.Direction, p.Proto, p.Client, p.Target, p.Via, p.Source, p.External, p.Leaves,
		[8]bool{p.AnySource, p.OneWay, p.FromGateway, p.Mapped, p.PeersOnly, p.Shared, p.Multiple, p.ToUser},
	}
}

// slab has records of one size, which the garbage collector passes over.
type slab struct {
	stride int
	chunks [][]byte
	used   int32
	idle   []int32 // places that are free among those
}

// chunkRecords bounds what is had for nothing, and what growing costs at a time.
const chunkRecords = 512

func (s *slab) at(place int32) []byte {
	return s.chunks[place/chunkRecords][int(place%chunkRecords)*s.stride:][:s.stride]
}

func (s *slab) put(raw []byte) (place int32) {
	if n := len(s.idle); n > 0 {
		place, s.idle = s.idle[n-1], s.idle[:n-1]
	} else {
		place = s.used
		s.used++
		if int(place/chunkRecords) == len(s.chunks) {
			s.chunks = append(s.chunks, make([]byte, chunkRecords*s.stride))
		}
	}
	copy(s.at(place), raw)
	return place
}

func (s *slab) free(place int32) {
	clear(s.at(place)) // no permission has the ID 0
	s.idle = append(s.idle, place)
}

func (s *slab) each(f func(raw []byte)) {
	for place := range s.used {
		if raw := s.at(place); binary.LittleEndian.Uint64(raw) != 0 {
			f(raw)
		}
	}
}
