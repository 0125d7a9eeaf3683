package socks

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// maxAddresses bounds how many addresses of a name are tried.
const maxAddresses = 8

// resolve asks for the addresses of a name. The question leaves from a socket
// of the gateway's own, which the packet filter lets through.
func (c *client) resolve(ctx context.Context, name string, is4 bool) ([]netip.Addr, error) {
	r := net.Resolver{PreferGo: true, Dial: c.dialResolver}
	network := "ip6"
	if is4 {
		network = "ip4"
	}
	found, err := r.LookupNetIP(ctx, network, name)
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("resolve %q: %w", name, context.Cause(ctx))
		}
		return nil, fmt.Errorf("resolve %q: %w: %w", name, errNoAddress, err)
	}
	var out []netip.Addr
	for _, a := range found {
		if a = a.Unmap(); a.Is4() == is4 && len(out) < maxAddresses {
			out = append(out, a)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("resolve %q: %w", name, errNoAddress)
	}
	return out, nil
}

// dialResolver connects to a name server: the system's, or one that the
// configuration names.
func (c *client) dialResolver(ctx context.Context, network, address string) (net.Conn, error) {
	p := flow.UDP
	if network == "tcp" || network == "tcp4" || network == "tcp6" {
		p = flow.TCP
	}
	if list := c.set.Resolvers; len(list) > 0 {
		var err error
		for _, a := range list {
			var conn net.Conn
			if conn, err = c.f.fw.Dial(ctx, p, netip.AddrPort{}, netip.AddrPortFrom(a, 53)); err == nil {
				return conn, nil
			}
		}
		return nil, err
	}
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, fmt.Errorf("name server %q: %w", address, filterapi.ErrInvalidArgument)
	}
	return c.f.fw.Dial(ctx, p, netip.AddrPort{}, at)
}
