package userpath

import (
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/filterapi"
)

// hops is a chain's sockets without its goroutines: what goes in at the first
// comes out at the last.
type hops []struct{ in, out *filterSocket }

func (h hops) pass(t *testing.T, first []byte) {
	for i := range h {
		b, err := h[i].in.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if &b.Data[0] != &first[0] {
			t.Fatalf("hop %d has a copy", i)
		}
		if err := h[i].out.Send(b); err != nil {
			t.Fatal(err)
		}
	}
}

// Buffers change hands: a filter costs neither a copy nor an allocation. (What
// is allowed here is less than one for each filter, because the race detector
// makes pools forget.)
func TestBuffersChangeHands(t *testing.T) {
	const filters = 7
	var pools bufferPools
	check := func(name string, chain hops, enter func() []byte, leave func()) {
		t.Helper()
		once := func() {
			first := enter()
			chain.pass(t, first)
			leave()
		}
		once()
		if n := testing.AllocsPerRun(1000, once); n >= filters {
			t.Errorf("%s: %.1f allocations for one buffer through %d filters", name, n, filters)
		}
	}
	enter := func(p *bufferPool, push func(*filterapi.Buffer)) func() []byte {
		return func() []byte {
			b := p.get()
			data := b.Data
			push(b)
			return data
		}
	}

	over := make(chan struct{})
	var streams hops
	first := newLink(over, time.Second)
	last := first
	for range filters {
		next := newLink(over, time.Second)
		in, out := newFilterSockets(last.external(), next.internal(), &pools)
		streams = append(streams, struct{ in, out *filterSocket }{in, out})
		last = next
	}
	check("a stream", streams, enter(pools.of(filterapi.DefaultStreamBuffer), func(b *filterapi.Buffer) { _ = first.internal().Send(b) }), func() {
		b, err := last.external().recv(nil)
		if err != nil {
			t.Fatal(err)
		}
		b.Release()
	})

	u := &UDP{}
	far := netip.MustParseAddrPort("203.0.113.10:7")
	link := func() *udpLink { return newUDPLink(u, filterapi.DefaultDatagramBuffer, false) }
	var datagrams hops
	entry := link()
	exit := entry
	for range filters {
		next := link()
		in, out := newFilterSockets(&udpEnd{ctx: t.Context(), far: far, in: exit, out: link()},
			&udpEnd{ctx: t.Context(), far: far, in: link(), out: next}, &pools)
		datagrams = append(datagrams, struct{ in, out *filterSocket }{in, out})
		exit = next
	}
	check("datagrams", datagrams, enter(pools.of(filterapi.DefaultDatagramBuffer), entry.push), func() {
		b, err := exit.recv(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		b.Release()
	})
}
