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
	buf *filterapi.Buffer
	mem []byte
}

func newBufferPool(size int) *bufferPool { return &bufferPool{size: size} }

// get lends a buffer whose Data has the pool's size.
func (p *bufferPool) get() *filterapi.Buffer {
	if x, ok := p.pool.Get().(*pooled); ok {
		x.buf.Data = x.mem
		return x.buf
	}
	x := &pooled{mem: make([]byte, p.size)}
	x.buf = filterapi.NewBuffer(x.mem, func(*filterapi.Buffer) {
		x.buf.Data = nil // what a filter put there is not the pool's to keep
		p.pool.Put(x)
	})
	return x.buf
}

// bufferPools has one pool for each size in use.
type bufferPools struct {
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
