package engine

import (
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
	"weak"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// connHandle is a connection as one filter holds it. A filter gets the same
// one each time, and no filter that of another, so that what is done with it
// can be laid at its door. It implements filterapi.Connection.
type connHandle struct {
	c *connection
	r *registered // nil: the gateway itself

	over atomic.Bool // r knows that the connection is over
}

// held is a handle as its connection keeps it, so that it stays the same: as
// long as the connection lives, and afterwards as long as the filter has it.
type held struct {
	r      *registered
	strong *connHandle // nil: the connection is over
	weak   weak.Pointer[connHandle]
}

// handle is the connection as a filter gets it.
func (c *connection) handle(r *registered) *connHandle {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := slices.IndexFunc(c.handles, func(h held) bool { return h.r == r })
	if at < 0 {
		at = len(c.handles)
		c.handles = append(c.handles, held{r: r})
	}
	x := &c.handles[at]
	if x.strong != nil {
		return x.strong
	}
	h := x.weak.Value()
	if h == nil {
		h = &connHandle{c: c, r: r}
		x.strong = h
		if c.gone {
			*x = held{r: r, weak: weak.Make(h)}
		}
	}
	return h
}

// unwrap is the connection behind a handle; false: it is nobody's.
func unwrap(c filterapi.Connection) (*connection, bool) {
	h, ok := c.(*connHandle)
	if !ok || h == nil {
		return nil, false
	}
	return h.c, true
}

// belongs checks that a connection which a filter hands in is its own handle.
func belongs(c filterapi.Connection, r *registered) error {
	if h, ok := c.(*connHandle); !ok || h == nil || h.r != r {
		return fmt.Errorf("a connection that the gateway did not give to this filter: %w", filterapi.ErrInvalidArgument)
	}
	return nil
}

// Session implements filterapi.Connection.
func (h *connHandle) Session() filterapi.Session { return h.c.session.handle(h.r) }

// Tuple implements filterapi.Connection.
func (h *connHandle) Tuple() flow.Tuple { return h.c.shown() }

// Flags implements filterapi.Connection.
func (h *connHandle) Flags() filterapi.ConnectionFlags { return h.c.Flags() }

// AttachDataFilter implements filterapi.Connection.
func (h *connHandle) AttachDataFilter(df filterapi.DataFilter, p filterapi.Priority) error {
	h.used("AttachDataFilter")
	return h.c.attachDataFilter(h.r, df, p)
}

// AttachDataFilterWithDestination implements filterapi.Connection.
func (h *connHandle) AttachDataFilterWithDestination(df filterapi.DataFilter, p filterapi.Priority, peer netip.AddrPort) error {
	h.used("AttachDataFilterWithDestination")
	return h.c.attachWithDestination(h.r, df, p, peer)
}

// Deny implements filterapi.Connection.
func (h *connHandle) Deny() error {
	h.used("Deny")
	return h.c.deny(h.r, deniable|inFactory)
}

// ExternalName implements filterapi.Connection.
func (h *connHandle) ExternalName() (netip.AddrPort, error) { return h.c.ExternalName() }

// ExternalPeer implements filterapi.Connection.
func (h *connHandle) ExternalPeer() (netip.AddrPort, error) { return h.c.ExternalPeer() }

// SetIPFilter implements filterapi.Connection.
func (h *connHandle) SetIPFilter(f *filterapi.IPFilter) error {
	h.used("SetIPFilter")
	return h.c.SetIPFilter(f)
}

// IPFilter implements filterapi.Connection.
func (h *connHandle) IPFilter() *filterapi.IPFilter { return h.c.IPFilter() }

// SetClientAddress implements filterapi.Connection.
func (h *connHandle) SetClientAddress(a netip.AddrPort) error {
	h.used("SetClientAddress")
	return h.c.SetClientAddress(a)
}

// SetExpiry implements filterapi.Connection.
func (h *connHandle) SetExpiry(d time.Duration) error {
	h.used("SetExpiry")
	return h.c.SetExpiry(d)
}

// Expiry implements filterapi.Connection.
func (h *connHandle) Expiry() (time.Time, bool) { return h.c.Expiry() }

// EmulateForConnect implements filterapi.Connection.
func (h *connHandle) EmulateForConnect(df filterapi.DataFilter) error {
	h.used("EmulateForConnect")
	return h.c.emulateForConnect(h.r, df)
}

// EmulateForBind implements filterapi.Connection.
func (h *connHandle) EmulateForBind() error {
	h.used("EmulateForBind")
	return h.c.emulateForBind(h.r)
}

// EmulateConnection implements filterapi.Connection.
func (h *connHandle) EmulateConnection(df filterapi.DataFilter, remote, local netip.AddrPort) (filterapi.Connection, error) {
	h.used("EmulateConnection")
	c, err := h.c.emulateConnection(h.r, df, remote, local)
	if err != nil {
		return nil, err
	}
	return c.handle(h.r), nil
}

// IncrementBytesSent implements filterapi.Connection.
func (h *connHandle) IncrementBytesSent(n uint64) error {
	h.used("IncrementBytesSent")
	return h.c.IncrementBytesSent(n)
}

// SetSocketName implements filterapi.Connection.
func (h *connHandle) SetSocketName(a netip.AddrPort) error {
	h.used("SetSocketName")
	return h.c.SetSocketName(a)
}

// SetBufferSize implements filterapi.Connection.
func (h *connHandle) SetBufferSize(bytes int) error {
	h.used("SetBufferSize")
	return h.c.setBufferSize(h.r, bytes)
}

// Kill implements filterapi.Connection.
func (h *connHandle) Kill() { h.c.Kill() }
