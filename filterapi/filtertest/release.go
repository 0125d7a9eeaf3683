package filtertest

import (
	"slices"
	"sync"
	"time"

	"github.com/sluicegw/sluice/filterapi"
)

// hands is what a filter has in its hands of a flow, so that nothing overtakes
// it when the filter gives the flow back.
type hands struct {
	mu     sync.Mutex
	moved  sync.Cond
	gone   bool // Pump has returned ErrReleased
	inward way  // from the server to the client
	out    way  // from the client to the server
}

// way is one direction.
type way struct {
	held    []held // received, neither sent on nor released
	sending int    // calls of Send
	barred  bool   // the flow goes on without the filter
	expired bool   // what is held was kept too long
}

type held struct {
	buffer *filterapi.Buffer
	text   string // as it was received
}

func newHands() *hands {
	h := &hands{}
	h.moved.L = &h.mu
	return h
}

func (h *hands) released() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.gone
}

// hold notes a received buffer.
func (h *hands) hold(w *way, b *filterapi.Buffer) {
	h.mu.Lock()
	w.held = append(w.held, held{b, string(b.Data)})
	h.mu.Unlock()
}

// forget notes that a buffer was released.
func (h *hands) forget(b *filterapi.Buffer) {
	h.mu.Lock()
	h.drop(b)
	h.mu.Unlock()
}

func (h *hands) drop(b *filterapi.Buffer) {
	for _, w := range []*way{&h.inward, &h.out} {
		w.held = slices.DeleteFunc(w.held, func(x held) bool { return x.buffer == b })
	}
	h.moved.Broadcast()
}

// begin notes that a Send of b begins; false: it comes too late.
func (h *hands) begin(w *way, b *filterapi.Buffer) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if w.barred {
		return false
	}
	w.sending++
	h.drop(b)
	return true
}

// sent notes the end of a Send.
func (h *hands) sent(w *way) {
	h.mu.Lock()
	w.sending--
	h.moved.Broadcast()
	h.mu.Unlock()
}

// empty returns when nothing of one direction is in the filter's hands any
// more, and bars it from sending there. It gives what was kept too long.
func (h *hands) empty(w *way) (lost []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for w.sending > 0 || len(w.held) > 0 && !w.expired {
		if w.sending > 0 { // the far side may take its time
			h.moved.Wait()
			continue
		}
		late := time.AfterFunc(filterapi.ReleaseGrace, func() {
			h.mu.Lock()
			w.expired = w.sending == 0
			h.moved.Broadcast()
			h.mu.Unlock()
		})
		for w.sending == 0 && len(w.held) > 0 && !w.expired {
			h.moved.Wait()
		}
		late.Stop()
	}
	w.barred = true
	for _, x := range w.held {
		lost = append(lost, x.text)
	}
	return lost
}

// release calls a filter's receives off and lets each direction go on without
// it when it has sent on what it has in its hands.
func (f *Flow) release(h *hands, internal, external *leg) {
	h.mu.Lock()
	h.gone = true
	h.mu.Unlock()
	internal.fromEnd.callOff()
	external.fromEnd.callOff()
	for _, x := range []struct {
		way      *way
		from, to *leg
	}{{&h.out, internal, external}, {&h.inward, external, internal}} {
		f.work.Go(func() {
			for _, text := range h.empty(x.way) {
				f.gateway.journal.add(Entry{What: Lost, Text: text})
			}
			join(x.from.fromEnd, x.to.toEnd)
		})
	}
}
