package userpath

import (
	"context"
	"io"
	"sync"
	"sync/atomic"

	"github.com/sluicegw/sluice/filterapi"
)

// udpBurstBytes is the least payload that a link between data filters holds,
// so that a burst survives a filter that pauses; udpLinkDatagrams bounds what
// tiny datagrams cost beside their payload, but for a flow that was promised a
// burst of any.
const (
	udpBurstBytes    = 64 << 10
	udpLinkDatagrams = 4096
)

// udpHop takes datagrams on their way: the link to the next data filter, or
// the network. It owns the buffer from then on.
type udpHop interface {
	push(*filterapi.Buffer)
	// shut says that no more will come from this side.
	shut()
}

// udpLink is one direction between two neighbours in a chain: what waits for
// one data filter. It is bounded and drops what does not fit.
type udpLink struct {
	u     *UDP
	max   int // bytes of one datagram
	limit int // bytes in all
	depth int // datagrams
	// end is where the filter that receives here sends to, if that is the
	// network.
	end *udpNetwork
	// more: when the filter received last, more was waiting, and it will come
	// back for that.
	more atomic.Bool

	mu    sync.Mutex
	items []*filterapi.Buffer // a ring
	first int                 // index of the oldest
	n     int                 // how many wait
	bytes int
	shutd bool
	// next takes everything once the filter has dropped out.
	next udpHop
	wake chan struct{}
}

func newUDPLink(u *UDP, buffer int, burst bool) *udpLink {
	l := &udpLink{u: u, max: buffer, limit: max(udpBurstBytes, 2*buffer), depth: udpLinkDatagrams, wake: make(chan struct{}, 1)}
	if burst {
		l.depth = udpBurstBytes
	}
	return l
}

func (l *udpLink) push(b *filterapi.Buffer) {
	l.mu.Lock()
	next := l.next
	switch {
	case next != nil:
		l.mu.Unlock()
		next.push(b)
		return
	case l.shutd:
	case len(b.Data) > l.max:
		l.u.stats.oversize.Add(1)
	case l.n >= l.depth || l.bytes+len(b.Data) > l.limit:
		l.u.stats.linkFull.Add(1)
	default:
		l.put(b)
		l.mu.Unlock()
		l.signal()
		return
	}
	l.mu.Unlock()
	b.Release()
}

func (l *udpLink) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

func (l *udpLink) shut() {
	l.mu.Lock()
	l.shutd = true
	next := l.next
	l.mu.Unlock()
	l.signal()
	if next != nil {
		next.shut()
	}
}

// discard drops what waits and what is still to come.
func (l *udpLink) discard() {
	l.shut()
	l.mu.Lock()
	var items []*filterapi.Buffer
	for b := l.take(); b != nil; b = l.take() {
		items = append(items, b)
	}
	l.mu.Unlock()
	l.flush()
	for _, b := range items {
		b.Release()
	}
}

// udpRingMin is the first size of a ring, which grows to what it must hold.
const udpRingMin = 16

// put adds a datagram; the caller holds l.mu.
func (l *udpLink) put(b *filterapi.Buffer) {
	if l.n == len(l.items) {
		grown := make([]*filterapi.Buffer, max(udpRingMin, 2*l.n))
		copy(grown[copy(grown, l.items[l.first:]):], l.items[:l.first])
		l.items, l.first = grown, 0
	}
	l.items[(l.first+l.n)%len(l.items)] = b
	l.n++
	l.bytes += len(b.Data)
}

// take gives the next datagram, or nil; the caller holds l.mu.
func (l *udpLink) take() *filterapi.Buffer {
	if l.n == 0 {
		return nil
	}
	b := l.items[l.first]
	l.items[l.first] = nil
	l.first = (l.first + 1) % len(l.items)
	l.n--
	l.bytes -= len(b.Data)
	return b
}

// flush has the network end send what waits there: the filter does not come
// back for more, or not soon.
func (l *udpLink) flush() {
	if l.end != nil {
		l.more.Store(false)
		l.end.flush()
	}
}

// recv waits for a datagram until ctx is over. io.EOF: the other side has shut
// down and all was read. errHandover: stop is closed, and nothing was taken.
func (l *udpLink) recv(ctx context.Context, stop <-chan struct{}) (*filterapi.Buffer, error) {
	for {
		select {
		case <-stop:
			return nil, errHandover
		default:
		}
		if ctx.Err() != nil {
			return nil, filterapi.ErrTerminating
		}
		l.mu.Lock()
		b, shut := l.take(), l.shutd
		l.more.Store(l.n > 0)
		l.mu.Unlock()
		switch {
		case b != nil:
			return b, nil
		case shut:
			l.flush()
			return nil, io.EOF
		}
		l.flush()
		select {
		case <-l.wake:
		case <-stop:
		case <-ctx.Done():
		}
	}
}

// passTo sends what waits, and then everything that comes, straight on. The
// order is kept: next is in force only when nothing waits any more.
func (l *udpLink) passTo(next udpHop) {
	for {
		l.mu.Lock()
		b := l.take()
		if b == nil {
			l.next = next
			shut := l.shutd
			l.mu.Unlock()
			l.flush()
			if shut {
				next.shut()
			}
			return
		}
		l.mu.Unlock()
		next.push(b)
	}
}
