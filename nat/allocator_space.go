package nat

import (
	"math/bits"
	"math/rand/v2"
	"net/netip"

	"github.com/sluicegw/sluice/flow"
)

const maxPort = 65535

// parity of a port.
type parity uint8

const (
	anyParity parity = iota
	even
	odd
)

func parityOf(port int) parity { return even + parity(port%2) }

func (p parity) fits(port int) bool { return p == anyParity || p == parityOf(port) }

// mask has the bits of a word of ports that have the parity.
func (p parity) mask() uint64 {
	return [...]uint64{anyParity: ^uint64(0), even: 0x5555555555555555, odd: 0xaaaaaaaaaaaaaaaa}[p]
}

// spaceKey names the ports of one protocol and external address.
type spaceKey struct {
	proto flow.Proto
	addr  netip.Addr
}

// holding is what is known of a port that is leased or rests. It has no
// pointers, so that the garbage collector passes a million of them over.
type holding struct {
	client uint32
	// rests is the tick until which it rests, or was to rest before it was
	// leased to the same client again; 0: it is leased and was free.
	rests uint32
	// at is its place in the client's list of resting ports, from 1; 0: it is
	// leased.
	at uint32
}

func (h holding) resting() bool { return h.at != 0 }

// space is the ports of one protocol and external address: a bitmap to search
// and a map of what is known of those that are not free.
type space struct {
	spaceKey
	chunks [(maxPort + 1) / chunkPorts]*chunk
	ports  map[uint16]holding
}

const (
	wordPorts  = 64
	chunkWords = 16
	chunkPorts = wordPorts * chunkWords
)

// chunk is a part of the bitmap, which is there while one of its ports is not
// free.
type chunk struct {
	taken [chunkWords]uint64
	n     int
}

func (a *Allocator) space(p flow.Proto, addr netip.Addr) *space {
	k := spaceKey{p, addr}
	s := a.spaces[k]
	if s == nil {
		s = &space{spaceKey: k, ports: make(map[uint16]holding)}
		a.spaces[k] = s
	}
	return s
}

// discard forgets a space without ports.
func (a *Allocator) discard(s *space) {
	if len(s.ports) == 0 && a.spaces[s.spaceKey] == s {
		delete(a.spaces, s.spaceKey)
	}
}

// holding looks a port up. A space that is not there holds nothing.
func (s *space) holding(port uint16) (holding, bool) {
	if s == nil {
		return holding{}, false
	}
	h, held := s.ports[port]
	return h, held
}

func (s *space) mark(port int) {
	c := s.chunks[port/chunkPorts]
	if c == nil {
		c = new(chunk)
		s.chunks[port/chunkPorts] = c
	}
	c.taken[port%chunkPorts/wordPorts] |= 1 << (port % wordPorts)
	c.n++
}

func (s *space) unmark(port int) {
	c := s.chunks[port/chunkPorts]
	c.taken[port%chunkPorts/wordPorts] &^= 1 << (port % wordPorts)
	if c.n--; c.n == 0 {
		s.chunks[port/chunkPorts] = nil
	}
}

// word has the bits of the ports from 64*i on that are not free.
func (s *space) word(i int) uint64 {
	c := s.chunks[i/chunkWords]
	if c == nil {
		return 0
	}
	return c.taken[i%chunkWords]
}

func (s *space) taken(port int) bool { return s.word(port/wordPorts)>>(port%wordPorts)&1 != 0 }

// full says whether nothing is free in the chunk that begins with word i.
func (s *space) full(i int) bool {
	c := s.chunks[i/chunkWords]
	return i%chunkWords == 0 && c != nil && c.n == chunkPorts
}

// within has the bits of a word that are ports from lo to hi.
func within(word, lo, hi int) uint64 {
	m := ^uint64(0)
	if first := word * wordPorts; lo > first {
		m &= ^uint64(0) << (lo - first)
	}
	if last := word*wordPorts + wordPorts - 1; hi < last {
		m &= ^uint64(0) >> (last - hi)
	}
	return m
}

// randomTries is how many ports are tried at random before the bitmap is
// searched: as long as there is room every free port is as likely as another.
const randomTries = 8

// pick finds a free port at random.
func (s *space) pick(spans []Range, p parity, busy busyPorts) (int, bool) {
	total := 0
	for _, r := range spans {
		total += r.size()
	}
	if total == 0 {
		return 0, false
	}
	for range randomTries {
		port := portAt(spans, rand.IntN(total))
		if !p.fits(port) {
			if port ^= 1; !inside(spans, port, 1) {
				continue
			}
		}
		if !s.taken(port) && !busy.has(s.addr, port) {
			return port, true
		}
	}
	for _, r := range rotated(spans, portAt(spans, rand.IntN(total)), 1) {
		if port, ok := s.pickFrom(r, p, busy); ok {
			return port, true
		}
	}
	return 0, false
}

// pickFrom finds a random free port of the first word that has any.
func (s *space) pickFrom(r span, p parity, busy busyPorts) (int, bool) {
	for w := r.lo / wordPorts; w*wordPorts <= r.hi; w++ {
		if s.full(w) {
			w += chunkWords - 1
			continue
		}
		for free := ^s.word(w) & p.mask() & within(w, r.lo, r.hi); free != 0; {
			bit := nthBit(free, rand.IntN(bits.OnesCount64(free)))
			if port := w*wordPorts + bit; !busy.has(s.addr, port) {
				return port, true
			}
			free &^= 1 << bit
		}
	}
	return 0, false
}

// nthBit is the number of the nth bit that is set.
func nthBit(x uint64, n int) int {
	for range n {
		x &= x - 1
	}
	return bits.TrailingZeros64(x)
}

// run finds n free ports in a row, from a random place on.
func (s *space) run(spans []Range, n int, p parity, busy busyPorts) (int, bool) {
	total := 0
	for _, r := range spans {
		total += r.size()
	}
	if total == 0 {
		return 0, false
	}
	for _, r := range rotated(spans, portAt(spans, rand.IntN(total)), n) {
		if port, ok := s.runFrom(r, n, p, busy); ok {
			return port, true
		}
	}
	return 0, false
}

func (s *space) runFrom(r span, n int, p parity, busy busyPorts) (int, bool) {
search:
	for port := r.lo; port+n-1 <= r.hi; {
		if port = s.next(port, r.hi, p, false); port+n-1 > r.hi {
			break
		}
		if end := s.next(port, port+n-1, anyParity, true); end < port+n {
			port = end + 1
			continue
		}
		for i := range n {
			if busy.has(s.addr, port+i) {
				port += i + 1
				continue search
			}
		}
		return port, true
	}
	return 0, false
}

// next is the first port from one on that is taken, or that is not, up to hi;
// hi+1: there is none.
func (s *space) next(from, hi int, p parity, taken bool) int {
	for w := from / wordPorts; w*wordPorts <= hi; w++ {
		if !taken && s.full(w) {
			w += chunkWords - 1
			continue
		}
		x := s.word(w)
		if !taken {
			x = ^x
		}
		if x &= p.mask() & within(w, from, hi); x != 0 {
			return w*wordPorts + bits.TrailingZeros64(x)
		}
	}
	return hi + 1
}

// span is a Range that may be empty.
type span struct{ lo, hi int }

// portAt is the port with a number in several ranges.
func portAt(spans []Range, i int) int {
	for _, r := range spans {
		if i < r.size() {
			return int(r.Lo) + i
		}
		i -= r.size()
	}
	return 0
}

// rotated are the ranges in their order, beginning with a port in one of them;
// what comes before that port comes last, with the ports that a run of n from
// there reaches.
func rotated(spans []Range, first, n int) []span {
	at := 0
	for i, r := range spans {
		if int(r.Lo) <= first && first <= int(r.Hi) {
			at = i
		}
	}
	list := make([]span, 0, 8)
	list = append(list, span{first, int(spans[at].Hi)})
	for i := 1; i < len(spans); i++ {
		r := spans[(at+i)%len(spans)]
		list = append(list, span{int(r.Lo), int(r.Hi)})
	}
	return append(list, span{int(spans[at].Lo), min(first-1+n-1, int(spans[at].Hi))})
}

// inside says whether n ports from one on lie in one of the ranges.
func inside(spans []Range, port, n int) bool {
	for _, r := range spans {
		if int(r.Lo) <= port && port+n-1 <= int(r.Hi) {
			return true
		}
	}
	return false
}
