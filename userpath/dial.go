package userpath

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// errNoPort: all ports of the gateway's own are in use towards one server.
var errNoPort = fmt.Errorf("no port of the gateway's own is left: %w", unix.EADDRNOTAVAIL)

// errDialTimeout is the end of a dial that nobody answered.
var errDialTimeout = fmt.Errorf("no answer: %w", unix.ETIMEDOUT)

// startDial makes a TCP socket as d says and starts its handshake. The socket
// is non-blocking and the caller's.
//
// The number of system calls counts here, each connection pays them: what
// most connections do not live long enough to need, TCP_NODELAY and
// keepalive, is set later (see tcpEnd.hurry and TCP.sweep).
func startDial(d engine.Dial, marks flow.Marks) (fd int, err error) {
	fd, err = rawSocket(domainOf(d.Target.Addr()))
	if err != nil {
		return -1, fmt.Errorf("make a socket: %w", err)
	}
	if err = prepareDial(fd, d, marks); err == nil {
		err = rawConnect(fd, d.Target)
		if err == unix.EADDRNOTAVAIL && d.Source.Port() == 0 {
			err = errNoPort
		}
	}
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// prepareDial sets the options and the local address.
func prepareDial(fd int, d engine.Dial, marks flow.Marks) error {
	if err := setOwnMark(fd, marks); err != nil {
		return err
	}
	if !d.Source.IsValid() {
		return nil
	}
	if d.Transparent {
		if err := setTransparent(fd, d.Source.Addr().Is4()); err != nil {
			return err
		}
	}
	var err error
	if d.Source.Port() == 0 {
		err = setLatePort(fd)
	} else {
		err = setReuseAddr(fd)
	}
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddrOf(d.Source)); err != nil {
		return fmt.Errorf("bind to %s: %w", d.Source, err)
	}
	return nil
}

// localName is the address that a connected socket has. A dial with a full
// source knows it without asking.
func localName(fd int, d engine.Dial) netip.AddrPort {
	if d.Source.IsValid() && d.Source.Port() != 0 {
		return d.Source
	}
	name, err := localAddr(fd)
	if err != nil {
		return netip.AddrPort{}
	}
	return name
}

// dialErrors is what the initiator is told when the far end could not be
// reached, by the error that connect gives (the kernel makes these from ICMP:
// icmp_err_convert in net/ipv4/icmp.c, tab_unreach in net/ipv6/icmp.c).
var dialErrors = []struct {
	err    unix.Errno
	path   flow.Path
	result flow.Result
}{
	{unix.ECONNREFUSED, flow.Reject, flow.Refused},
	{unix.EACCES, flow.Reject, flow.Refused}, // ICMPv6 "administratively prohibited"
	{unix.EHOSTUNREACH, flow.HostUnreachable, flow.Unreachable},
	{unix.EHOSTDOWN, flow.HostUnreachable, flow.Unreachable},
	{unix.ENOPROTOOPT, flow.HostUnreachable, flow.Unreachable}, // ICMP "protocol unreachable"
	{unix.ENETUNREACH, flow.NetUnreachable, flow.Unreachable},
	{unix.ENONET, flow.NetUnreachable, flow.Unreachable},
	{unix.ETIMEDOUT, flow.Drop, flow.TimedOut},
}

// classifyDial turns the error of a dial into the answer to the held SYN and
// the result for the log. What is not the network's word is the gateway's own
// trouble: the SYN is dropped, and its retransmission tries again.
func classifyDial(err error) (flow.Path, flow.Result) {
	if errors.Is(err, errNoPort) {
		return flow.Exhausted, flow.Failed
	}
	for _, e := range dialErrors {
		if errors.Is(err, e.err) {
			return e.path, e.result
		}
	}
	return flow.Drop, flow.Failed
}
