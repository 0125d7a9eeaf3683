package filterapi_test

import (
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
)

// given counts how often memory was given back, and wants it whole.
func given(t *testing.T, data string) (*filterapi.Buffer, *atomic.Int32) {
	var n atomic.Int32
	b := filterapi.NewBuffer([]byte(data), func(b *filterapi.Buffer) {
		n.Add(1)
		if len(b.Data) != len(data) {
			t.Errorf("given back with %q of %q", b.Data, data)
		}
	})
	return b, &n
}

func TestSplit(t *testing.T) {
	b, back := given(t, "headrest")
	b.Addr = netip.MustParseAddrPort("192.0.2.1:9")
	head := b.Split(4)
	if string(head.Data) != "head" || string(b.Data) != "rest" || head.Addr != b.Addr {
		t.Fatalf("%q %v and %q", head.Data, head.Addr, b.Data)
	}
	head.Data = append(head.Data, "long"...)
	if string(b.Data) != "rest" {
		t.Errorf("appending to the head made the rest %q", b.Data)
	}
	b.Release()
	if back.Load() != 0 {
		t.Error("the memory went back while the head was in use")
	}
	head.Release()
	if back.Load() != 1 {
		t.Errorf("given back %d times", back.Load())
	}
	for _, n := range []int{0, 3} {
		b, back := given(t, "abc")
		head := b.Split(n)
		if len(head.Data) != n || len(b.Data) != 3-n {
			t.Errorf("split at %d: %q and %q", n, head.Data, b.Data)
		}
		head.Release()
		b.Release()
		if back.Load() != 1 {
			t.Errorf("split at %d: given back %d times", n, back.Load())
		}
	}
	plain := filterapi.NewBuffer([]byte("ab"), nil) // nobody wants it back
	plain.Split(1).Release()
	plain.Release()
}

func TestSplitBeyondTheEnd(t *testing.T) {
	for _, n := range []int{-1, 4} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("split at %d of 3 bytes does not panic", n)
				}
			}()
			filterapi.NewBuffer(make([]byte, 3), nil).Split(n)
		}()
	}
}

// However a buffer is split, its pieces are the whole, and the memory goes back
// once, when the last of them was released by whichever goroutine.
func TestSplitConcurrently(t *testing.T) {
	for range 200 {
		const text = "the quick brown fox jumps over the lazy dog"
		b, back := given(t, text)
		var pieces []*filterapi.Buffer
		for len(b.Data) > 0 && rand.IntN(8) > 0 {
			head := b.Split(rand.IntN(len(b.Data) + 1))
			if len(head.Data) > 1 && rand.IntN(2) == 0 { // a piece of a piece
				pieces = append(pieces, head.Split(len(head.Data)/2))
			}
			pieces = append(pieces, head)
		}
		pieces = append(pieces, b)
		all := ""
		for _, p := range pieces {
			all += string(p.Data)
		}
		if all != text || back.Load() != 0 {
			t.Fatalf("pieces make %q, given back %d times", all, back.Load())
		}
		rand.Shuffle(len(pieces), func(i, j int) { pieces[i], pieces[j] = pieces[j], pieces[i] })
		var wg sync.WaitGroup
		for _, p := range pieces {
			wg.Go(p.Release)
		}
		wg.Wait()
		if back.Load() != 1 {
			t.Fatalf("given back %d times", back.Load())
		}
	}
}
