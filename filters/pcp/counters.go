package pcp

import "sync/atomic"

// Counters count what the server was asked and what became of it, since the
// start.
type Counters struct {
	Requests  uint64 // datagrams of hosts that are served
	Lost      uint64 // that nobody had time for; the host asks again
	Granted   uint64 // mappings that were made, renewed or given back
	Denied    uint64 // by the rules, a filter, another nonce
	Quota     uint64 // the host has all that one may have
	Exhausted uint64 // no port was left, or not the one that was insisted on
	Failed    uint64 // the kernel has refused, or nothing told the external address
	Bad       uint64 // what could not be read, or nobody can give
	Mappings  uint64 // that there are now
}

// counts are the Counters as they grow.
type counts struct {
	requests, lost, granted, denied, quota, exhausted, failed, bad atomic.Uint64
	mappings                                                       atomic.Int64
}

// note counts the result of a request to map.
func (c *counts) note(r result) {
	switch r {
	case success:
		c.granted.Add(1)
	case notAuthorized:
		c.denied.Add(1)
	case userExQuota:
		c.quota.Add(1)
	case noResources, cannotProvideExternal:
		c.exhausted.Add(1)
	case networkFailure:
		c.failed.Add(1)
	default:
		c.bad.Add(1)
	}
}

// Counters gives them.
func (s *Server) Counters() Counters {
	c := &s.counts
	return Counters{
		Requests: c.requests.Load(), Lost: c.lost.Load(), Granted: c.granted.Load(), Denied: c.denied.Load(), Quota: c.quota.Load(),
		Exhausted: c.exhausted.Load(), Failed: c.failed.Load(), Bad: c.bad.Load(), Mappings: uint64(max(0, c.mappings.Load())),
	}
}
