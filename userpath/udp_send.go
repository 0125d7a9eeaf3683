package userpath

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Datagrams of one flow that follow each other and have one length go through
// the kernel as one packet, which it takes apart where it leaves (udp(7),
// UDP_SEGMENT): routing, conntrack and the rules then cost once for all of
// them. Their receiver sees no difference.
const (
	udpTogether    = 4        // fewer are not worth it
	udpSegmentsMax = 64       // UDP_MAX_SEGMENTS of Linux before 6.9
	udpBytesMax    = 60 << 10 // of an IP packet, with room for its headers
)

// udpMany is a message of many datagrams.
type udpMany struct {
	hdr     unix.Msghdr
	control struct {
		head unix.Cmsghdr
		size uint16
		_    [6]byte
	}
}

// alike says how many datagrams from one on can go as one: the last of them may
// be shorter.
func (o *udpOut) alike(at int) (n int) {
	size := o.iov[at].Len
	if size == 0 {
		return 1
	}
	for n = 1; at+n < o.n && n < udpSegmentsMax && uint64(n+1)*size <= udpBytesMax && o.flows[at+n] == o.flows[at]; n++ {
		next := o.iov[at+n].Len
		if next == 0 || next > size {
			break
		}
		if next < size {
			return n + 1
		}
	}
	return n
}

// sendAsOne sends alike datagrams as one packet. False: it could not, and they
// are still to be sent.
func (o *udpOut) sendAsOne(fd uintptr, at, n int) bool {
	m := &o.one
	m.hdr = o.msgs[at].hdr
	m.hdr.Iov = &o.iov[at]
	m.hdr.SetIovlen(n)
	m.control.head.Level, m.control.head.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	m.control.head.SetLen(unix.CmsgLen(2))
	m.control.size = uint16(o.iov[at].Len)
	m.hdr.Control = (*byte)(unsafe.Pointer(&m.control))
	m.hdr.SetControllen(int(unsafe.Sizeof(m.control)))
	_, err := rawResult(unix.RawSyscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&m.hdr)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL))
	switch err {
	case unix.EINVAL, unix.EMSGSIZE, unix.EIO, unix.EOPNOTSUPP, unix.ENOPROTOOPT:
		// Each is longer than a packet of the way may be, or the way cannot.
		o.sock.apart.Store(true)
	}
	m.hdr = unix.Msghdr{} // what it points at is not the socket's to keep
	return err == nil
}

// udpSendRetries is how often a datagram is sent again after an error: an
// ICMP error that waits on the socket is reported once in place of whatever
// is sent next (and its story is in the error queue).
const udpSendRetries = 3

// sendAll sends what is in line, alike datagrams together.
func (o *udpOut) sendAll(fd uintptr) {
	from := 0
	for at := 0; at < o.n; {
		n := o.alike(at)
		if n >= udpTogether && !o.sock.apart.Load() {
			o.sendEach(fd, from, at)
			if !o.sendAsOne(fd, at, n) {
				o.sendEach(fd, at, at+n)
			}
			from = at + n
		}
		at += n
	}
	o.sendEach(fd, from, o.n)
}

// sendEach sends datagrams as they are, with one system call.
func (o *udpOut) sendEach(fd uintptr, at, end int) {
	retries := 0
	for at < end {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&o.msgs[at])),
			uintptr(end-at), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		switch {
		case errno == 0:
			at += int(n)
			retries = 0
		case errno == unix.EINTR:
		case errno == unix.EAGAIN || errno == unix.ENOBUFS || errno == unix.ENOMEM:
			o.lost(at)
			at++
		case retries < udpSendRetries:
			retries++
		default:
			o.lost(at)
			o.u.sendFailed(o.flows[at], o.dir, errno, unsafe.Slice(o.iov[at].Base, o.iov[at].Len))
			retries = 0
			at++
		}
	}
}
