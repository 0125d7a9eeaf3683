package pcp

import (
	"context"
	"net/netip"
	"sync"
	"time"
)

const (
	// workers is how many hosts are answered at the same time.
	workers = 8
	// backlog is how many requests may wait for a worker, and perHost how many of
	// them may be one host's. A client whose request is lost repeats it (RFC 6887,
	// section 8.1.1).
	backlog = 64
	perHost = 8
	// maxMappings bounds those of all hosts together: whoever takes one IPv6
	// address after the other has no quota to fear.
	maxMappings = 1 << 16
)

// job is what a worker does: answer a request, or look after its hosts.
type job struct {
	from  netip.AddrPort
	text  []byte
	reply func([]byte)
	// readdressed: the external address has changed, and the mappings of IPv4
	// lead nowhere.
	readdressed bool
	// configured: what hosts may have can have changed.
	configured bool
}

// hand gives a request to the worker of its host. It is lost where too many
// wait already, of that host or of all.
func (s *Server) hand(j job) {
	s.counts.requests.Add(1)
	a := j.from.Addr()
	w := s.workerOf(a)
	if !w.admit(a) {
		s.counts.lost.Add(1)
		return
	}
	select {
	case w.jobs <- j:
	default:
		w.begun(a)
		s.counts.lost.Add(1)
	}
}

// workerOf is the worker of a host.
func (s *Server) workerOf(a netip.Addr) *worker {
	sum := 0
	for _, x := range a.As16() {
		sum = sum*31 + int(x)
	}
	return s.workers[uint(sum)%workers]
}

// look has all workers look after their hosts.
func (s *Server) look(ctx context.Context, j job) {
	for _, w := range s.workers {
		select {
		case w.jobs <- j:
		case <-ctx.Done():
		}
	}
}

// worker answers the requests of some of the hosts.
type worker struct {
	s     *Server
	jobs  chan job
	hosts map[netip.Addr]*host

	mu      sync.Mutex
	waiting map[netip.Addr]int // requests of each host
}

// admit counts a request that is to wait; false: its host has enough waiting.
func (w *worker) admit(a netip.Addr) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waiting[a] >= perHost {
		return false
	}
	w.waiting[a]++
	return true
}

// begun takes a request off that count.
func (w *worker) begun(a netip.Addr) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waiting[a]--; w.waiting[a] == 0 {
		delete(w.waiting, a)
	}
}

func (w *worker) run(ctx context.Context) {
	for {
		select {
		case j := <-w.jobs:
			w.do(j)
		case <-ctx.Done():
			return
		}
	}
}

func (w *worker) do(j job) {
	c := w.s.serving()
	if j.reply == nil {
		for a, h := range w.hosts {
			if !c.serves(a) || j.readdressed && a.Is4() {
				h.forget()
			}
			h.tidy(time.Now())
			if j.configured {
				h.config = c
				h.recheck()
			}
			if len(h.mappings) == 0 {
				h.close()
				delete(w.hosts, a)
			}
		}
		return
	}
	a := j.from.Addr()
	w.begun(a)
	h := w.hosts[a]
	if h == nil {
		h = &host{s: w.s, addr: a, mappings: make(map[endpoint]*mapping)}
	}
	h.config = c
	h.tidy(time.Now())
	if answer := h.answer(j.text); answer != nil {
		j.reply(answer)
	}
	if len(h.mappings) > 0 {
		w.hosts[a] = h
		return
	}
	h.close()
	delete(w.hosts, a)
}
