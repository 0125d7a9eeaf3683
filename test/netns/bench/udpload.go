package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// datagrams sends UDP datagrams through a raw socket, many in one call, and
// counts them where they arrive. It never has more under way than the window:
// what a gateway's queue cannot hold would be dropped, and dropping is cheap.
func datagrams(l *lane, p path, n, size int, length time.Duration, of flows) (a amount, err error) {
	sinkFD := l.servers.sinks[p.port(sink)]
	err = inside(l.client, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return fmt.Errorf("raw socket: %w", err)
		}
		defer unix.Close(fd)
		first, err := arrived(sinkFD)
		if err != nil {
			return err
		}
		b := newBatch(p.port(sink), size)
		serial := l.next(n + sendmmsgMany)
		if of.warm {
			if first, err = b.introduce(fd, serial, of, sinkFD); err != nil {
				return err
			}
		}
		window := burstWindow
		if of.window > 0 {
			window = of.window
		}
		begun := time.Now()
		sent, came, moved := 0, 0, begun
		for {
			now, err := arrived(sinkFD)
			if err != nil {
				return err
			}
			if got := int(now - first); got > came {
				came, moved = got, time.Now()
			}
			over := sent >= n || time.Since(begun) >= length
			switch {
			case came >= sent && over:
				a = amount{float64(came), moved.Sub(begun)}
				return nil
			case time.Since(moved) > givenUp/4:
				if lost := sent - came; lost*100 > sent || came == 0 {
					return fmt.Errorf("%d of %d datagrams did not arrive", lost, sent)
				}
				a = amount{float64(came), moved.Sub(begun)}
				return nil
			case over || sent-came > window-sendmmsgMany:
				rest(50 * time.Microsecond)
				continue
			}
			m, err := b.send(fd, serial, serial+uint32(sent), of, sendmmsgMany)
			if err != nil {
				return err
			}
			sent += m
		}
	})
	return a, err
}

// Sizes of packets from the IPv4 header on: 64 and 1400 bytes on the wire.
const (
	smallPacket = 64 - 14 - 4
	largePacket = 1400 - 14 - 4
)

// mmsghdr is recvmmsg(2)'s.
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32 // bytes that were sent or received
	_   [4]byte
}

// batch is what one sendmmsg takes.
type batch struct {
	packets [sendmmsgMany][]byte
	vectors [sendmmsgMany]unix.Iovec
	to      [sendmmsgMany]unix.RawSockaddrInet4
	headers [sendmmsgMany]mmsghdr
}

func newBatch(port uint16, size int) *batch {
	b := &batch{}
	for i := range b.packets {
		p := make([]byte, size)
		b.packets[i] = p
		p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP // the kernel fills in length and checksum, raw(7)
		binary.BigEndian.PutUint16(p[22:], port)
		binary.BigEndian.PutUint16(p[24:], uint16(size-20))
		b.vectors[i] = unix.Iovec{Base: &p[0], Len: uint64(size)}
		b.to[i].Family = unix.AF_INET
		h := &b.headers[i].hdr
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&b.to[i])), unix.SizeofSockaddrInet4
		h.Iov, h.Iovlen = &b.vectors[i], 1
	}
	return b
}

// fill addresses the packets to the flows from k on, of a load that begins with
// first.
func (b *batch) fill(first, k uint32, of flows) {
	for i := range b.packets {
		client, server, sport := of.ends(first, k+uint32(i))
		p := b.packets[i]
		copy(p[12:], client[:])
		copy(p[16:], server[:])
		binary.BigEndian.PutUint16(p[20:], sport)
		b.to[i].Addr = server
	}
}

// send gives the number of datagrams that went out, n at most.
func (b *batch) send(fd int, first, k uint32, of flows, n int) (int, error) {
	b.fill(first, k, of)
	m, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.headers)), uintptr(n), 0, 0, 0)
	switch errno {
	case 0:
		return int(m), nil
	case unix.EINTR, unix.ENOBUFS:
		return 0, nil
	}
	return 0, fmt.Errorf("send datagrams: %w", errno)
}

// introduce sends one datagram, waits until it has arrived, and gives the number
// that has arrived by then.
func (b *batch) introduce(fd int, first uint32, of flows, sinkFD int) (uint32, error) {
	before, err := arrived(sinkFD)
	if err != nil {
		return 0, err
	}
	if _, err := b.send(fd, first, first, of, 1); err != nil {
		return 0, err
	}
	for begun := time.Now(); time.Since(begun) < givenUp; rest(50 * time.Microsecond) {
		if now, err := arrived(sinkFD); err != nil || now != before {
			return now, err
		}
	}
	return 0, errors.New("the first datagram did not arrive")
}
