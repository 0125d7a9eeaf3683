package userpath

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// setOwnMark gives a socket the mark of the gateway's upstream legs, so that
// the ruleset knows its packets (SO_MARK; wants CAP_NET_ADMIN).
func setOwnMark(fd int, marks flow.Marks) error {
	if err := rawSetInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(marks.Value(flow.Own))); err != nil {
		return fmt.Errorf("set the socket's mark: %w", err)
	}
	return nil
}

// setTransparent lets a socket have an address that is not the gateway's
// (IP_TRANSPARENT; wants CAP_NET_ADMIN).
func setTransparent(fd int, is4 bool) error {
	var err error
	if is4 {
		err = rawSetInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
	} else {
		err = rawSetInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
	if err != nil {
		return fmt.Errorf("make the socket transparent: %w", err)
	}
	return nil
}

// setReuseAddr lets several sockets have one local address, also one that
// lingers in TIME_WAIT, as long as none of them listens.
func setReuseAddr(fd int) error {
	if err := rawSetInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return fmt.Errorf("share the local address: %w", err)
	}
	return nil
}

// setLatePort leaves the choice of the port to connect, which knows the peer
// and so can give one port to many flows (IP_BIND_ADDRESS_NO_PORT; the option
// is of the IP level for IPv6 as well).
func setLatePort(fd int) error {
	if err := rawSetInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
		return fmt.Errorf("leave the port to connect: %w", err)
	}
	return nil
}

// domainOf is the address family of a socket for a.
func domainOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// sockaddrOf is a in the form that system calls take. a is never IPv4-mapped.
func sockaddrOf(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// localAddr is the address that a socket has.
func localAddr(fd int) (netip.AddrPort, error) {
	name, err := rawName(fd)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("ask for the socket's address: %w", err)
	}
	return name, nil
}
