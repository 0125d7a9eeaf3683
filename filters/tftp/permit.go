package tftp

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// maxWaiting is how many requests of one client port may wait for answers. A
// client makes one, and another when it has given that up.
const maxWaiting = 8

// waiting is a request as the server got it and the permission for its answer,
// which may be used up by now, or have expired:
//
//	asked for --(the kernel has acknowledged)--> waits --(first datagram from
//	another port of the server)--> used up: the kernel carries the transfer
//	      \--(60 s, error from the server, end of the flow)--> void
type waiting struct {
	message string
	bind    filterapi.Connection
	since   time.Time // when its time began
}

// over says that nothing can come of the permission any more.
func (w waiting) over() bool { return time.Since(w.since) > filterapi.DefaultTimeout }

// permit lets the answer to a request in, once, and returns when it may come.
// Asked again, it starts the time of a permission that still waits anew.
func (r *requests) permit(req request, message string) error {
	if again, err := r.again(message); again || err != nil {
		return err
	}
	bind := filterapi.Bind{
		Negotiated: filterapi.Negotiated{
			Primary: r.conn, Proto: flow.UDP, Flags: filterapi.Timeout | filterapi.Bidirectional,
		},
		Clients:  []netip.AddrPort{r.conn.Tuple().Src},
		IPFilter: filterapi.OnlyFrom(r.server.Addr()),
	}
	// Where nothing is translated, the bind is at the client's own address.
	if r.name != bind.Clients[0] {
		bind.External = r.name
	}
	binds, err := r.session.BindForClient(bind)
	if err != nil {
		return fmt.Errorf("let the answer in: %w", err)
	}
	r.add(waiting{message, binds[0], time.Now()})
	r.log.Info("transfer permitted", append([]zap.Field{zap.Stringer("flow", r.conn.Tuple())}, fieldsOf(req)...)...)
	return nil
}

// again finds the permission of a request that the client repeats. false: none
// waits any more.
func (r *requests) again(message string) (bool, error) {
	r.mu.Lock()
	i := slices.IndexFunc(r.waiting, func(w waiting) bool { return w.message == message })
	var bind filterapi.Connection
	if i >= 0 {
		bind = r.waiting[i].bind
	}
	r.mu.Unlock()
	if bind == nil {
		return false, nil
	}
	err := bind.SetIPFilter(filterapi.OnlyFrom(r.server.Addr()))
	r.mu.Lock()
	if i = slices.IndexFunc(r.waiting, func(w waiting) bool { return w.bind == bind }); i >= 0 {
		if err == nil {
			r.waiting[i].since = time.Now()
		} else {
			r.waiting = slices.Delete(r.waiting, i, i+1)
		}
	}
	r.mu.Unlock()
	if err == nil {
		return true, nil
	}
	if errors.Is(err, filterapi.ErrTerminating) {
		return false, nil
	}
	bind.Kill()
	return false, fmt.Errorf("let the answer in again: %w", err)
}

// add notes a request, forgets those whose time is over, and gives up the oldest
// one where there are too many.
func (r *requests) add(w waiting) {
	var oldest filterapi.Connection
	r.mu.Lock()
	r.waiting = append(slices.DeleteFunc(r.waiting, waiting.over), w)
	if len(r.waiting) > maxWaiting {
		oldest = r.waiting[0].bind
		r.waiting = slices.Delete(r.waiting, 0, 1)
	}
	r.mu.Unlock()
	if oldest != nil {
		oldest.Kill()
	}
}

// void takes every permission back that was not used. The transfers of those
// that were go on.
func (r *requests) void() {
	r.mu.Lock()
	all := r.waiting
	r.waiting = nil
	r.mu.Unlock()
	for _, w := range all {
		w.bind.Kill()
	}
}
