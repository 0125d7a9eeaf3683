package main

import (
	"encoding/binary"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// datagrams sends UDP datagrams through a raw socket, many in one call, and
// counts them where they arrive. With same they are all of one flow, else each
// begins a flow of its own. It never has more under way than the window: what
// a gateway's queue cannot hold would be dropped, and dropping is cheap.
func datagrams(l *lane, p path, n int, length time.Duration, same bool) (a amount, err error) {
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
		b := newBatch(p.port(sink))
		serial := l.next(n + sendmmsgMany)
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
			case over || sent-came > burstWindow-sendmmsgMany:
				rest(50 * time.Microsecond)
				continue
			}
			k := serial
			if !same {
				k += uint32(sent)
			}
			m, err := b.send(fd, k, same)
			if err != nil {
				return err
			}
			sent += m
		}
	})
	return a, err
}

const packetSize = 20 + 8 + 18 // IPv4, UDP, the smallest frame's payload

// mmsghdr is recvmmsg(2)'s.
type mmsghdr struct {
	hdr unix.Msghdr
	_   [8]byte // what was sent, and padding
}

// batch is what one sendmmsg takes.
type batch struct {
	packets [sendmmsgMany][packetSize]byte
	vectors [sendmmsgMany]unix.Iovec
	to      [sendmmsgMany]unix.RawSockaddrInet4
	headers [sendmmsgMany]mmsghdr
}

func newBatch(port uint16) *batch {
	b := &batch{}
	for i := range b.packets {
		p := &b.packets[i]
		p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP // the kernel fills in length and checksum, raw(7)
		binary.BigEndian.PutUint16(p[22:], port)
		binary.BigEndian.PutUint16(p[24:], packetSize-20)
		b.vectors[i] = unix.Iovec{Base: &p[0], Len: packetSize}
		b.to[i].Family = unix.AF_INET
		h := &b.headers[i].hdr
		h.Name, h.Namelen = (*byte)(unsafe.Pointer(&b.to[i])), unix.SizeofSockaddrInet4
		h.Iov, h.Iovlen = &b.vectors[i], 1
	}
	return b
}

// fill addresses the packets to the flows from serial on.
func (b *batch) fill(serial uint32, same bool) {
	for i := range b.packets {
		k := serial
		if !same {
			k += uint32(i)
		}
		client, server, sport := ends(k)
		p := &b.packets[i]
		copy(p[12:], client[:])
		copy(p[16:], server[:])
		binary.BigEndian.PutUint16(p[20:], sport)
		b.to[i].Addr = server
	}
}

// send gives the number of datagrams that went out.
func (b *batch) send(fd int, serial uint32, same bool) (int, error) {
	b.fill(serial, same)
	n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.headers)), sendmmsgMany, 0, 0, 0)
	switch errno {
	case 0:
		return int(n), nil
	case unix.EINTR, unix.ENOBUFS:
		return 0, nil
	}
	return 0, fmt.Errorf("send datagrams: %w", errno)
}
