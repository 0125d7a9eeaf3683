package engine

import (
	"context"
	"net/netip"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// Kernel is what the engine asks of the kernel. kernelpath implements it.
// Every method returns when the kernel has acknowledged. Safe for concurrent
// use; changes that wait together go out together.
type Kernel interface {
	// Install lets the flows of a permission in; one with the same ID is
	// replaced. On error nothing of it is in force.
	Install(context.Context, nat.Permission) error
	// Remove voids a permission; one that is used up or gone is no error.
	Remove(context.Context, nat.Permission) error
	// Cut ends living kernel flows, named by the tuple of their first packet
	// before translation: both ends are reset at once, idle or not. A flow
	// that is gone is no error.
	Cut(context.Context, ...flow.Tuple) error
}

// Routes answers where an address is reached. kernelpath implements it.
type Routes interface {
	// Lookup gives the interface that leads to dst and the source address
	// that the route prefers; local says that dst is the gateway's own.
	Lookup(dst netip.Addr) (iface string, source netip.Addr, local bool, err error)
}
