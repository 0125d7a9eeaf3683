package userpath

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
)

func TestBuffersComeBack(t *testing.T) {
	p := newBufferPool(100)
	b := p.get()
	mem := &b.Data[0]
	b.Data = []byte("the filter's own")
	b.Release()
	// sync.Pool may drop what it is given, but not every time.
	for range 1000 {
		again := p.get()
		if len(again.Data) != 100 {
			t.Fatalf("a buffer of %d bytes, want 100", len(again.Data))
		}
		if &again.Data[0] == mem {
			return
		}
		mem = &again.Data[0]
		again.Release()
	}
	t.Error("no buffer came back")
}

// Every buffer of a flow is released, also those in the links of one that was
// cut.
func TestChainReleasesItsBuffers(t *testing.T) {
	for _, kill := range []bool{false, true} {
		var lent, back atomic.Int64
		count := pumpFunc(func(_ context.Context, in, out filterapi.Socket) error {
			return passBoth(in, out, func(_ bool, b *filterapi.Buffer) {
				own := *b
				lent.Add(1)
				*b = *filterapi.NewBuffer(own.Data, func(*filterapi.Buffer) { back.Add(1); own.Release() })
			})
		})
		c := carry(t, runTCP(t, nil), false, count, passer{}, passer{})
		if kill {
			fill(t, c.client)
			close(c.kill)
			c.wait()
		} else {
			transfer(t, c, 4<<20)
		}
		if lent.Load() == 0 || lent.Load() != back.Load() {
			t.Errorf("kill %v: %d buffers went in, %d were released", kill, lent.Load(), back.Load())
		}
	}
}

func TestBufferSizeBoundsAPiece(t *testing.T) {
	var largest atomic.Int64
	tcp := runTCP(t, nil)
	c := &carried{recorder: newRecorder(t)}
	if got := tcp.buffers.of(1000).size; got != 1000 {
		t.Errorf("a pool of %d, want 1000", got)
	}
	c = carry(t, tcp, false, pumpFunc(func(_ context.Context, in, out filterapi.Socket) error {
		return passBoth(in, out, func(_ bool, b *filterapi.Buffer) {
			largest.Store(max(largest.Load(), int64(len(b.Data))))
		})
	}))
	transfer(t, c, 1<<20)
	if largest.Load() > filterapi.DefaultStreamBuffer {
		t.Errorf("a piece of %d bytes, want at most %d", largest.Load(), filterapi.DefaultStreamBuffer)
	}
}

// openPipes counts the descriptors of pipes in this process.
func openPipes(t *testing.T) (n int) {
	t.Helper()
	all, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range all {
		if to, err := os.Readlink(name); err == nil && strings.HasPrefix(to, "pipe:") {
			n++
		}
	}
	return n
}

func TestIdleFlowsAreCheap(t *testing.T) {
	const flows = 1000
	tcp := runTCP(t, nil)
	var before, after runtime.MemStats
	pipes, goroutines := openPipes(t), runtime.NumGoroutine()
	runtime.GC()
	runtime.ReadMemStats(&before)
	piece := bytes.Repeat([]byte("x"), 200<<10)
	for range flows {
		c := carry(t, tcp, false)
		go c.client.Write(piece)
		if _, err := io.ReadFull(c.server, make([]byte, len(piece))); err != nil {
			t.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if n := openPipes(t) - pipes; n > 2*len(tcp.loops) {
		t.Errorf("%d descriptors of pipes for %d idle flows", n, flows)
	}
	if n := runtime.NumGoroutine() - goroutines; n > flows+10 {
		t.Errorf("%d goroutines for %d idle flows", n, flows)
	}
	// Four sockets' worth of test is in it.
	heap, stack := int64(after.HeapAlloc)-int64(before.HeapAlloc), int64(after.StackInuse)-int64(before.StackInuse)
	t.Logf("%d bytes of heap and %d of stack a flow", heap/flows, stack/flows)
	if heap > flows*8<<10 {
		t.Errorf("%d bytes of heap for %d idle flows", heap, flows)
	}
}
