package engine

import (
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestDeadlines compares the heap with a list in which every deadline is looked
// for: who is due, and when, whatever was started, started anew and stopped
// before.
func TestDeadlines(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) { deadlinesLikeModel(t, rand.New(rand.NewPCG(seed, 1))) })
	}
}

func deadlinesLikeModel(t *testing.T, r *rand.Rand) {
	var mu sync.Mutex
	fired := map[*permission]time.Time{}
	var d deadlines
	d.init(time.Now, func(p *permission) {
		mu.Lock()
		defer mu.Unlock()
		if _, twice := fired[p]; twice {
			t.Error("a deadline came twice")
		}
		fired[p] = time.Now()
	})
	all := make([]*permission, 200)
	for i := range all {
		all[i] = &permission{}
	}
	model, over := map[*permission]time.Time{}, map[*permission]time.Time{}
	for range 2000 {
		p := all[r.IntN(len(all))]
		_, done := over[p]
		switch {
		case done:
		case r.IntN(3) == 0:
			d.stop(p)
			delete(model, p)
		default:
			after := time.Duration(1+r.IntN(1000)) * time.Millisecond
			d.start(p, d.in(after))
			model[p] = time.Now().Add(after)
		}
		if r.IntN(10) == 0 {
			time.Sleep(time.Duration(r.IntN(50)) * time.Millisecond)
			synctest.Wait()
			for p, at := range model {
				if !at.After(time.Now()) {
					over[p] = at
					delete(model, p)
				}
			}
		}
		if _, waits := model[p]; d.has(p) != waits {
			t.Fatalf("has says %t, the model %t", d.has(p), waits)
		}
	}
	time.Sleep(time.Second)
	synctest.Wait()
	for p, at := range model {
		over[p] = at
	}
	mu.Lock()
	defer mu.Unlock()
	if len(fired) != len(over) || len(d.heap) != 0 {
		t.Fatalf("%d came, %d were due, %d are left", len(fired), len(over), len(d.heap))
	}
	for p, at := range over {
		if !fired[p].Equal(at) {
			t.Errorf("due at %v, came at %v", at, fired[p])
		}
	}
}
