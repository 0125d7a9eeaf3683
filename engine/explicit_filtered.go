package engine

import (
	"bytes"
	"net/netip"
	"sync"
	"time"
)

// The bounds of what waits for the client.
const (
	maxFiltered      = 1024
	maxFilteredBytes = 1 << 20
)

// passedOn are datagrams for the client of a UDP socket that do not come from
// it, but from data filters.
type passedOn struct {
	mu    sync.Mutex
	queue []datagram
	bytes int
}

type datagram struct {
	from netip.AddrPort
	data []byte
}

// toClient takes what data filters let pass to the client, and has the one who
// waits at the socket look at it.
func (x *udpPeers) toClient(b []byte, from netip.AddrPort) { x.filtered.put(b, from, x.l.packets) }

// put keeps a copy and wakes who reads the socket, by a deadline that has
// passed.
func (f *passedOn) put(b []byte, from netip.AddrPort, s datagrams) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.queue) >= maxFiltered || f.bytes+len(b) > maxFilteredBytes {
		return // lost: nobody fetches it
	}
	f.queue = append(f.queue, datagram{from, bytes.Clone(b)})
	f.bytes += len(b)
	_ = s.SetReadDeadline(time.Unix(1, 0)) // closed: nobody waits
}

// heard takes the deadline away; what came before it take finds.
func (f *passedOn) heard(s datagrams) {
	f.mu.Lock()
	defer f.mu.Unlock()
	_ = s.SetReadDeadline(time.Time{}) // closed: reading says so
}

// take copies the oldest into b.
func (f *passedOn) take(b []byte) (n int, from netip.AddrPort, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.queue) == 0 {
		return 0, from, false
	}
	d := f.queue[0]
	f.queue[0] = datagram{}
	f.queue, f.bytes = f.queue[1:], f.bytes-len(d.data)
	return copy(b, d.data), d.from, true
}
