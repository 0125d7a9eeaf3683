package filterapi

import (
	"net/netip"
	"sync/atomic"
)

// Buffer is a piece of a stream or one datagram. It has one owner at a time;
// whoever receives it owns it, and sending or releasing ends that.
// (IFWXIOBuffer)
type Buffer struct {
	// Data is what was received. The owner may change it, shorten it, append
	// to it or replace it.
	Data []byte
	// Addr is the far address of a datagram.
	Addr netip.AddrPort

	release func(*Buffer)
}

// NewBuffer wraps bytes, which then belong to the buffer. release, if not
// nil, gets the buffer back when its last owner is done with it.
func NewBuffer(data []byte, release func(*Buffer)) *Buffer {
	return &Buffer{Data: data, release: release}
}

// Release gives the buffer back; it must not be touched afterwards. A nil
// Buffer may be released.
func (b *Buffer) Release() {
	if b != nil && b.release != nil {
		b.release(b)
	}
}

// Split cuts off the first n bytes and gives them as a buffer of their own,
// with the same Addr; b keeps the rest. Nothing is copied: the memory goes back
// when both have been released, by whomever and in whichever order, also at the
// same time. Appending to the head never overwrites the rest.
//
// It panics, as slicing does, unless 0 <= n <= len(b.Data). What came from a
// Recv counts as in the filter's hands (see DataFilter) until b itself was
// sent, or both were released; so send the head first.
func (b *Buffer) Split(n int) *Buffer {
	whole := b.Data
	head := &Buffer{Data: whole[:n:n], Addr: b.Addr}
	b.Data = whole[n:]
	if b.release == nil {
		return head
	}
	back := b.release
	var left atomic.Int32
	left.Store(2)
	shared := func(*Buffer) {
		if left.Add(-1) == 0 {
			// Both owners are gone; the buffer is as it was before.
			b.Data, b.release = whole, back
			back(b)
		}
	}
	head.release, b.release = shared, shared
	return head
}
