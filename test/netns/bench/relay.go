package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The relay is the baseline of datagrams in user space: the least that carries
// them there. It takes up to relayMany from one transparent socket in a system
// call, and sends them on to where they went in another; it knows no flows, and
// no way back.

// relayRules hand a client's datagrams to it.
const relayRules = `
table ip relay {
	chain prerouting {
		type filter hook prerouting priority mangle
		iifname "lan0" meta l4proto udp tproxy to 127.0.0.1:3130 meta mark set 1 accept
	}
}
`

const (
	relayPort   = 3130
	relayMany   = 64
	relayBuffer = 8 << 20 // bytes
)

func (s *stand) startRelay(ctx context.Context, l *lane) error {
	if err := commandInput(relayRules, "ip", "netns", "exec", l.gw, "nft", "-f", "-"); err != nil {
		return err
	}
	if err := divert(l); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find the bench's own program: %w", err)
	}
	if l.daemon, err = start(l.gw, s.dir, nil, self, "-relay"); err != nil {
		return err
	}
	return l.daemon.await(ctx, func([]byte) bool {
		return commandOutputHas(fmt.Sprintf("127.0.0.1:%d", relayPort), "ip", "netns", "exec", l.gw, "ss", "-Hlun")
	})
}

// relay runs until it is killed.
func relay() error {
	in, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	out, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if err := errors.Join(
		unix.SetsockoptInt(in, unix.SOL_IP, unix.IP_TRANSPARENT, 1),
		unix.SetsockoptInt(in, unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1),
		unix.SetsockoptInt(in, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, relayBuffer),
		unix.Bind(in, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: relayPort}),
	); err != nil {
		return fmt.Errorf("prepare the sockets: %w", err)
	}
	b := newRelayBatch()
	for {
		n, err := b.receive(in)
		if err == nil {
			err = b.send(out, n)
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// relayBatch is what one call takes, and the next gives.
type relayBatch struct {
	packets [relayMany][2048]byte
	control [relayMany][64]byte
	vectors [relayMany]unix.Iovec
	in, out [relayMany]mmsghdr
}

func newRelayBatch() *relayBatch {
	b := &relayBatch{}
	for i := range b.in {
		b.vectors[i].Base = &b.packets[i][0]
		for _, h := range []*unix.Msghdr{&b.in[i].hdr, &b.out[i].hdr} {
			h.Iov, h.Iovlen = &b.vectors[i], 1
		}
		b.in[i].hdr.Control = &b.control[i][0]
	}
	return b
}

// receive waits for the first datagram.
func (b *relayBatch) receive(fd int) (int, error) {
	for i := range b.in {
		b.vectors[i].Len = uint64(len(b.packets[i]))
		b.in[i].hdr.Controllen = uint64(len(b.control[i]))
	}
	n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.in)), relayMany, unix.MSG_WAITFORONE, 0, 0)
	if errno != 0 {
		return 0, fmt.Errorf("receive: %w", errno)
	}
	for i := range b.in[:n] {
		// The only control message is the original destination.
		b.out[i].hdr.Name, b.out[i].hdr.Namelen = &b.control[i][unix.CmsgLen(0)], unix.SizeofSockaddrInet4
		b.vectors[i].Len = uint64(b.in[i].n)
	}
	return int(n), nil
}

func (b *relayBatch) send(fd, n int) error {
	for at := 0; at < n; {
		m, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.out[at])), uintptr(n-at), 0, 0, 0)
		switch errno {
		case 0:
			at += int(m)
		case unix.EINTR, unix.ENOBUFS:
		default:
			return fmt.Errorf("send: %w", errno)
		}
	}
	return nil
}
