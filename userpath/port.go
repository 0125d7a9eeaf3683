package userpath

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// PortBusy says whether a socket of this host uses an address and port, by
// binding it for a moment. What cannot be tried counts as busy. Nobody listens
// at the identifier of an ICMP query.
func PortBusy(p flow.Proto, addr netip.AddrPort) bool {
	if !p.HasPorts() {
		return false
	}
	kind, family := unix.SOCK_STREAM, unix.AF_INET6
	if p == flow.UDP {
		kind = unix.SOCK_DGRAM
	}
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
	if addr.Addr().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return true
	}
	defer func() { _ = unix.Close(fd) }()
	return unix.Bind(fd, sa) != nil
}
