package userpath

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// udpSocket is an open socket that may be closed while others use it: every
// use goes through raw, which holds the descriptor meanwhile.
type udpSocket struct {
	file  *os.File
	raw   syscall.RawConn
	local netip.AddrPort
	// apart: datagrams must go one by one.
	apart atomic.Bool
}

func (s *udpSocket) close() { _ = s.file.Close() }

// udpSpec says what socket is wanted.
type udpSpec struct {
	local netip.AddrPort // port 0: the kernel's choice
	// transparent: local need not be an address of this host.
	transparent bool
	// reuse: others may be bound to the same address. Never with port 0, or
	// the kernel may choose a port that is taken.
	reuse bool
	// lend: sockets with reuse may be bound to the address that the kernel has
	// chosen, once it has. A bind at the end of a living flow has that address
	// too, and a reply socket that speaks in its name.
	lend bool
	mark uint32
	// original: ask for the original destination of each datagram.
	original bool
	// errors: ICMP errors go to the error queue.
	errors bool
	// remote: connect to it. A connected socket receives from there only.
	remote netip.AddrPort
	// receive and send are buffer sizes in bytes; 0: the system's default.
	// The kernel doubles them to cover what it charges for each datagram
	// beside its payload. (socket(7), SO_RCVBUF)
	receive, send int
	// polled: the runtime's poller waits for this socket.
	polled bool
}

// udpOpen makes a socket.
func udpOpen(s udpSpec) (*udpSocket, error) {
	family := unix.AF_INET
	if s.local.Addr().Is6() {
		family = unix.AF_INET6
	}
	kind := unix.SOCK_DGRAM | unix.SOCK_CLOEXEC
	if s.polled {
		kind |= unix.SOCK_NONBLOCK
	}
	fd, err := unix.Socket(family, kind, unix.IPPROTO_UDP)
	if err != nil {
		return nil, fmt.Errorf("open UDP socket: %w", err)
	}
	local, err := udpSetUp(fd, s)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return udpWrap(fd, local)
}

// udpWrap makes the descriptor safe to close; it belongs to the result.
func udpWrap(fd int, local netip.AddrPort) (*udpSocket, error) {
	file := os.NewFile(uintptr(fd), "udp")
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("wrap UDP socket: %w", err)
	}
	return &udpSocket{file: file, raw: raw, local: local}, nil
}

func udpSetUp(fd int, s udpSpec) (netip.AddrPort, error) {
	var none netip.AddrPort
	for _, o := range udpOptions(s) {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return none, fmt.Errorf("set %s on UDP socket: %w", o.what, err)
		}
	}
	if err := unix.Bind(fd, udpUnixAddr(s.local)); err != nil {
		return none, fmt.Errorf("bind UDP socket to %s: %w", s.local, err)
	}
	if s.lend {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return none, fmt.Errorf("set SO_REUSEADDR on bound UDP socket: %w", err)
		}
	}
	if s.remote.IsValid() {
		if err := unix.Connect(fd, udpUnixAddr(s.remote)); err != nil {
			return none, fmt.Errorf("connect UDP socket %s to %s: %w", s.local, s.remote, err)
		}
	}
	return udpLocal(fd)
}

type udpOption struct {
	what               string
	level, name, value int
}

func udpOptions(s udpSpec) []udpOption {
	is6 := s.local.Addr().Is6()
	var o []udpOption
	pick := func(what string, name4, name6 int) {
		if is6 {
			o = append(o, udpOption{"IPV6_" + what, unix.SOL_IPV6, name6, 1})
			return
		}
		o = append(o, udpOption{"IP_" + what, unix.SOL_IP, name4, 1})
	}
	if is6 {
		o = append(o, udpOption{"IPV6_V6ONLY", unix.SOL_IPV6, unix.IPV6_V6ONLY, 1})
	}
	if s.transparent {
		pick("TRANSPARENT", unix.IP_TRANSPARENT, unix.IPV6_TRANSPARENT)
	}
	if s.original {
		pick("RECVORIGDSTADDR", unix.IP_RECVORIGDSTADDR, unix.IPV6_RECVORIGDSTADDR)
	}
	if s.errors {
		pick("RECVERR", unix.IP_RECVERR, unix.IPV6_RECVERR)
	}
	if s.reuse {
		o = append(o, udpOption{"SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1})
	}
	if s.mark != 0 {
		o = append(o, udpOption{"SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, int(s.mark)})
	}
	if s.receive > 0 {
		o = append(o, udpOption{"SO_RCVBUFFORCE", unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, s.receive})
	}
	if s.send > 0 {
		o = append(o, udpOption{"SO_SNDBUFFORCE", unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, s.send})
	}
	return o
}

func udpUnixAddr(ap netip.AddrPort) unix.Sockaddr {
	if ap.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}

func udpFromUnix(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}

func udpLocal(fd int) (netip.AddrPort, error) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("read the name of a UDP socket: %w", err)
	}
	return udpFromUnix(sa), nil
}

// udpBurstBuffer is room for 64 KiB of payload even in datagrams of one byte.
// The kernel charges 768 bytes for the smallest one, and doubles this.
const udpBurstBuffer = udpBurstBytes * 768 / 2

// deepen makes room for a burst. It only ever bounds what the kernel takes.
func (s *udpSocket) deepen() {
	_ = s.raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, udpBurstBuffer)
	})
}

// udpPreferred asks the kernel which source address its route to a target
// prefers: connecting a UDP socket sends nothing.
func udpPreferred(target netip.AddrPort, mark uint32) (netip.Addr, error) {
	any4, any6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	local := netip.AddrPortFrom(any4, 0)
	if target.Addr().Is6() {
		local = netip.AddrPortFrom(any6, 0)
	}
	s, err := udpOpen(udpSpec{local: local, mark: mark, remote: target})
	if err != nil {
		return netip.Addr{}, err
	}
	defer s.close()
	return s.local.Addr(), nil
}

// udpReply is the socket that speaks to initiators in a peer's name: bound to
// the peer's own address and port. All flows to that peer share it.
//
// It is connected to the discard port of the loopback address, which no packet
// of the network can come from, and every datagram names its destination. So
// it never receives: unconnected it would tie with an upstream socket bound to
// the same address (the peer of one flow can be the initiator of another) and
// take away its datagrams, and TPROXY would find it when it were connected to
// the initiator.
//
// It has no mark: its datagrams belong to the conntrack entry that the
// initiator's own made, in the other direction, whose mark must stay.
type udpReply struct {
	refs int // guarded by UDP.mu
	once sync.Once
	sock *udpSocket
	err  error
}

func (r *udpReply) open(peer netip.AddrPort) error {
	r.once.Do(func() {
		discard := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 9)
		if peer.Addr().Is6() {
			discard = netip.AddrPortFrom(netip.IPv6Loopback(), 9)
		}
		r.sock, r.err = udpOpen(udpSpec{
			local: peer, transparent: true, reuse: true, remote: discard, send: udpSocketBuffer,
		})
	})
	return r.err
}

func (r *udpReply) close() {
	// A reply that was never opened stays closed.
	r.once.Do(func() { r.err = os.ErrClosed })
	if r.sock != nil {
		r.sock.close()
	}
}

// udpNoFamily says that this host does not speak the family at all.
func udpNoFamily(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)
}
