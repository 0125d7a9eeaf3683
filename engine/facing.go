package engine

import (
	"net/netip"
	"slices"

	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// portRange is a range of ports; the zero value has none.
type portRange nat.Range

// SetKernelPorts replaces Config.KernelPorts.
func (e *Engine) SetKernelPorts(r nat.Range) {
	ports := portRange(r)
	e.kernelPorts.Store(&ports)
}

// meets says whether n ports from a given one on meet the range.
func (r portRange) meets(first uint16, n int) bool {
	return r.Hi != 0 && first != 0 && first <= r.Hi && int(first)+n-1 >= int(r.Lo)
}

// farAway are in blocks that are nobody's (RFC 5737, RFC 6666): the default route
// leads there.
var farAway = map[bool]netip.Addr{
	false: netip.AddrFrom4([4]byte{192, 0, 2, 1}),
	true:  netip.AddrFrom16([16]byte{0: 1, 15: 1}),
}

// facing is the gateway's address of a family by which the hosts of a network know it:
// the one that a route to them prefers, or that of their interface. It is for
// binds that nobody in particular will use.
func (e *Engine) facing(network string, is6 bool) (netip.Addr, bool) {
	var ifaces []string
	for _, n := range e.Policy().Networks() {
		if n.Name != network {
			continue
		}
		ifaces = n.Interfaces
		for _, p := range n.Prefixes {
			if p.Addr().Is6() != is6 {
				continue
			}
			host := p.Addr()
			if !p.IsSingleIP() {
				host = host.Next()
			}
			if a, ok := e.preferred(host, ifaces); ok {
				return a, true
			}
		}
	}
	if a, ok := e.preferred(farAway[is6], ifaces); ok && (network == policy.Any || len(ifaces) > 0) {
		return a, true
	}
	for _, i := range ifaces {
		if a, err := e.routes.AddressOf(i, is6); err == nil {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// preferred is the source of the route to an address, through one of some
// interfaces; none: through any.
func (e *Engine) preferred(to netip.Addr, ifaces []string) (netip.Addr, bool) {
	iface, source, local, err := e.routes.Lookup(to)
	ok := err == nil && !local && source.IsValid() && (len(ifaces) == 0 || slices.Contains(ifaces, iface))
	return source, ok
}
