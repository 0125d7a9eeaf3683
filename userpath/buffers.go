package userpath

import (
	"sync"

	"github.com/sluicegw/sluice/filterapi"
)

// bufferPool lends buffers of one size to the network ends of data filters.
// A buffer comes back by its Release, whatever its owner did to Data. Safe for
// concurrent use.
type bufferPool struct {
	size int
	pool sync.Pool
}

// pooled is one buffer and the memory that it was made with, which a filter
// may have replaced by its own.
type pooled struct {
	buf  filterapi.Buffer
	mem  []byte
	back func(*filterapi.Buffer) // made once
}

func newBufferPool(size int) *bufferPool { return &bufferPool{size: size} }

// get lends a buffer whose Data has the pool's size.
func (p *bufferPool) get() *filterapi.Buffer {
	x, ok := p.pool.Get().(*pooled)
	if !ok {
		x = &pooled{mem: make([]byte, p.size)}
		x.back = func(*filterapi.Buffer) {
			x.buf.Data = nil // what a filter put there is not the pool's to keep
			p.pool.Put(x)
		}
	}
	x.buf = *filterapi.NewBuffer(x.mem, x.back)
	return &x.buf
}

// loan is a buffer in the hands of one filter, and of those that it is sent on
// to. Its owner notices the release of his own loan, which then releases the
// buffer below.
type loan struct {
	buf   filterapi.Buffer
	below *filterapi.Buffer
	from  *filterSocket
	back  func(*filterapi.Buffer) // made once
}

// lend wraps a buffer that a filter receives from s.
func (p *bufferPools) lend(b *filterapi.Buffer, s *filterSocket) *filterapi.Buffer {
	l, ok := p.loans.Get().(*loan)
	if !ok {
		l = new(loan)
		l.back = func(*filterapi.Buffer) {
			l.from.forget(&l.buf)
			below := l.below
			l.from, l.below, l.buf.Data = nil, nil, nil
			p.loans.Put(l)
			below.Release()
		}
	}
	l.below, l.from = b, s
	l.buf = *filterapi.NewBuffer(b.Data, l.back)
	l.buf.Addr = b.Addr
	return &l.buf
}

// bufferPools has one pool for each size in use, and what buffers are lent in.
type bufferPools struct {
	loans sync.Pool // *loan

	mu    sync.Mutex
	sizes map[int]*bufferPool
}

// of gives the pool for a size in bytes; 0 and less mean the default of a
// stream.
func (p *bufferPools) of(size int) *bufferPool {
	if size <= 0 {
		size = filterapi.DefaultStreamBuffer
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sizes == nil {
		p.sizes = make(map[int]*bufferPool)
	}
	if p.sizes[size] == nil {
		p.sizes[size] = newBufferPool(size)
	}
	return p.sizes[size]
}
