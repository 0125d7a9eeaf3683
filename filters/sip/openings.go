package sip

import (
	"net/netip"
	"slices"
	"sync"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// maxFlows bounds the flows of one opening that are remembered, and thereby
// let in: a media stream has one for each port that its far end sends from.
const maxFlows = 16

// opening is what secondary connections belong to: an address that stands for
// a contact, or one of a media stream. conns are guarded by openings.mu.
type opening struct {
	client  netip.AddrPort // where it leads to, inside
	contact bool
	closed  bool
	conns   []filterapi.Connection
}

// openings finds the owner of a secondary connection while its event is
// handled. Its lock is held across no call. Safe for concurrent use.
type openings struct {
	mu       sync.Mutex
	external map[endpoint]*opening // what the far end sends to
	target   map[endpoint]*opening // what the client sends to
}

type endpoint struct {
	proto flow.Proto
	at    netip.AddrPort
}

func (o *openings) add(into *map[endpoint]*opening, e endpoint, w *opening) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if *into == nil {
		*into = map[endpoint]*opening{}
	}
	(*into)[e] = w
}

func (o *openings) addExternal(e endpoint, w *opening) { o.add(&o.external, e, w) }
func (o *openings) addTarget(e endpoint, w *opening)   { o.add(&o.target, e, w) }

// meet notes a secondary connection. owner is the contact that it came in at;
// nil: it is a media stream. allowed is false for one that came too late, or is
// one too many.
func (o *openings) meet(c filterapi.Connection, t flow.Tuple, peer netip.AddrPort) (owner *opening, allowed bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	w := o.external[endpoint{t.Proto, t.Dst}]
	if w == nil || t.Src != peer {
		w = o.target[endpoint{t.Proto, t.Dst}]
	}
	if w == nil || w.closed || len(w.conns) >= maxFlows {
		return nil, false
	}
	w.conns = append(w.conns, c)
	if w.contact {
		return w, true
	}
	return nil, true
}

// forget drops a connection that is over.
func (o *openings) forget(c filterapi.Connection) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, m := range []map[endpoint]*opening{o.external, o.target} {
		for _, w := range m {
			w.conns = slices.DeleteFunc(w.conns, func(x filterapi.Connection) bool { return x == c })
		}
	}
}

// close takes an opening away and gives the connections that it has let in.
func (o *openings) close(w *opening) []filterapi.Connection {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, m := range []map[endpoint]*opening{o.external, o.target} {
		for e, x := range m {
			if x == w {
				delete(m, e)
			}
		}
	}
	conns := w.conns
	w.conns, w.closed = nil, true
	return conns
}

// retarget takes the client's targets of an opening away and gives the
// connections that it has let in so far.
func (o *openings) retarget(w *opening) []filterapi.Connection {
	o.mu.Lock()
	defer o.mu.Unlock()
	for e, x := range o.target {
		if x == w {
			delete(o.target, e)
		}
	}
	conns := w.conns
	w.conns = nil
	return conns
}
