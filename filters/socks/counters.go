package socks

import "sync/atomic"

// Counters are what happened since the start.
type Counters struct {
	Clients  uint64 // connections of clients now
	Requests uint64 // that could be read
	Denied   uint64 // of these, by the rules or a filter, or no target at all
	Failed   uint64 // of these, by the gateway's own trouble: no ports, a quota
	Over     uint64 // connections refused: there were too many
	Password uint64 // wrong ones
	Bad      uint64 // connections without a request: not SOCKS, too slow, no password offered
}

// counters are those that only grow.
type counters struct{ requests, denied, failed, over, password, bad atomic.Uint64 }

// Counters tells what happened. Safe for concurrent use.
func (f *Filter) Counters() Counters {
	f.mu.Lock()
	clients := len(f.clients)
	f.mu.Unlock()
	n := &f.count
	return Counters{
		Clients: uint64(clients), Requests: n.requests.Load(), Denied: n.denied.Load(), Failed: n.failed.Load(),
		Over: n.over.Load(), Password: n.password.Load(), Bad: n.bad.Load(),
	}
}
