package main

import (
	"bytes"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// writes counts them.
type writes struct {
	mu   sync.Mutex
	text bytes.Buffer
	n    int
}

func (w *writes) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n++
	return w.text.Write(b)
}

// Every line is written, in order; those of a moment together.
func TestLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &writes{}
		l := &lines{out: out}
		want := ""
		for i := range 1000 {
			line := fmt.Sprintf("line %d\n", i)
			want += line
			if n, err := l.Write([]byte(line)); n != len(line) || err != nil {
				t.Fatal(n, err)
			}
			if i == 0 && out.n != 1 {
				t.Error("the first line waits")
			}
		}
		time.Sleep(linesMoment)
		synctest.Wait()
		if out.text.String() != want || out.n != 2 {
			t.Errorf("%d writes of %d bytes, want 2 of %d", out.n, out.text.Len(), len(want))
		}
		time.Sleep(linesMoment)
		for range 2 {
			l.Write([]byte("more\n"))
		}
		if l.Sync(); out.text.String() != want+"more\nmore\n" {
			t.Errorf("after Sync: %q", out.text.String()[len(want):])
		}
		time.Sleep(linesMoment)
		l.Write(bytes.Repeat([]byte("x"), linesMost))
		if n := out.n; n != 5 {
			t.Errorf("%d writes", n)
		}
	})
}
