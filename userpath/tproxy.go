package userpath

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Keepalive of both legs. The idle time is below conntrack's shortest timer of
// a half-closed flow (nf_conntrack_tcp_timeout_close_wait, 60 s), so that an
// entry lives as long as its flow; a dead peer ends after about eleven minutes.
const (
	keepIdle     = 45 // s
	keepInterval = 30 // s
	keepCount    = 20
)

// listenBacklog is cut down to net.core.somaxconn by the kernel.
const listenBacklog = 4096

// setKeepalive turns keepalive on.
func setKeepalive(fd int) error {
	for _, o := range [...]struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.SOL_TCP, unix.TCP_KEEPIDLE, keepIdle},
		{unix.SOL_TCP, unix.TCP_KEEPINTVL, keepInterval},
		{unix.SOL_TCP, unix.TCP_KEEPCNT, keepCount},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return fmt.Errorf("set keepalive: %w", err)
		}
	}
	return nil
}

// listenTransparent opens the two listeners that the ruleset steers taken-over
// flows to: one port on both loopback addresses, where nobody outside reaches
// them. Port 0: any. Without IPv6 on this machine there is only the first.
func listenTransparent(port uint16) (files []*os.File, chosen uint16, err error) {
	// A port that the kernel chose for IPv4 may be taken for IPv6.
	for try := 0; ; try++ {
		var v4, v6 *os.File
		v4, chosen, err = listenOn(netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port))
		if err != nil {
			return nil, 0, err
		}
		v6, _, err = listenOn(netip.AddrPortFrom(netip.IPv6Loopback(), chosen))
		switch {
		case err == nil:
			return []*os.File{v4, v6}, chosen, nil
		case errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL):
			return []*os.File{v4}, chosen, nil
		}
		v4.Close()
		if port != 0 || try == 15 || !errors.Is(err, unix.EADDRINUSE) {
			return nil, 0, err
		}
	}
}

// listenOn opens one listener. What it is given here, its accepted sockets
// inherit: transparency, TCP_NODELAY and keepalive cost no call per flow.
func listenOn(addr netip.AddrPort) (file *os.File, port uint16, err error) {
	fail := func(fd int, err error) (*os.File, uint16, error) {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, 0, fmt.Errorf("listen on %s: %w", addr, err)
	}
	fd, err := rawSocket(domainOf(addr.Addr()))
	if err != nil {
		return fail(-1, err)
	}
	for _, set := range []func() error{
		func() error { return setTransparent(fd, addr.Addr().Is4()) },
		func() error { return setReuseAddr(fd) },
		func() error { return setKeepalive(fd) },
		func() error { return unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_NODELAY, 1) },
		func() error { return unix.Bind(fd, sockaddrOf(addr)) },
		func() error { return unix.Listen(fd, listenBacklog) },
	} {
		if err := set(); err != nil {
			return fail(fd, err)
		}
	}
	local, err := localAddr(fd)
	if err != nil {
		return fail(fd, err)
	}
	return os.NewFile(uintptr(fd), addr.String()), local.Port(), nil
}

// accept takes connections from a listener until it is closed. take owns the
// descriptor; from is the initiator, to the address that it asked for.
func (t *TCP) accept(listener *os.File, take func(fd int, from, to netip.AddrPort)) error {
	raw, err := listener.SyscallConn()
	if err != nil {
		return fmt.Errorf("accept on %s: %w", listener.Name(), err)
	}
	// The callback never says "done": the runtime waits for the next
	// connection and calls it again, until the listener is closed.
	err = raw.Read(func(lfd uintptr) bool {
		for {
			fd, from, err := rawAccept(int(lfd))
			switch {
			case err == nil:
				local, err := localAddr(fd)
				if err != nil {
					resetFD(fd)
					t.stats.acceptErrors.Add(1)
					continue
				}
				take(fd, from, local)
			case errors.Is(err, unix.EAGAIN):
				return false
			case outOfResources(err):
				// Nothing tells when descriptors are free again.
				t.stats.acceptErrors.Add(1)
				time.Sleep(10 * time.Millisecond)
			default: // EINTR, ECONNABORTED: the next one may do
				t.stats.acceptErrors.Add(1)
			}
		}
	})
	if t.stopping.Load() {
		return nil
	}
	return fmt.Errorf("accept on %s: %w", listener.Name(), err)
}

func outOfResources(err error) bool {
	return errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM)
}

// resetFD closes a TCP socket with a reset (RFC 9293, 3.10.4 ABORT).
func resetFD(fd int) {
	rawAbort(fd)
	rawClose(fd)
}
