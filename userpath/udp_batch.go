package userpath

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// udpBatchLen is how many datagrams one system call moves.
const udpBatchLen = 32

// udpBufferStride separates the receive buffers of a batch. A UDP datagram has
// at most 65535 bytes, so nothing is ever cut off; the odd lines keep the
// first lines of all buffers out of the same cache set.
const udpBufferStride = 65536 + 5*64

// udpControlLen holds one IP(V6)_ORIGDSTADDR message.
const udpControlLen = 64

// udpMmsg is struct mmsghdr of recvmmsg(2).
type udpMmsg struct {
	hdr unix.Msghdr
	n   uint32
}

// udpSockaddr is an address as the kernel reads it, made once per flow. The
// zero value is none.
type udpSockaddr struct {
	raw unix.RawSockaddrInet6 // large enough for both families
	len uint32
}

func udpEncode(ap netip.AddrPort) (s udpSockaddr) {
	if ap.Addr().Is4() {
		in4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&s.raw))
		in4.Family = unix.AF_INET
		in4.Addr = ap.Addr().As4()
		s.len = unix.SizeofSockaddrInet4
	} else {
		s.raw.Family = unix.AF_INET6
		s.raw.Addr = ap.Addr().As16()
		s.len = unix.SizeofSockaddrInet6
	}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&s.raw.Port))[:], ap.Port())
	return s
}

func udpDecode(raw *unix.RawSockaddrInet6) netip.AddrPort {
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&raw.Port))[:])
	switch raw.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(raw)).Addr), port)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16(raw.Addr).Unmap(), port)
	}
	return netip.AddrPort{}
}

// udpBatch receives datagrams into buffers of its own, which are valid until
// the next recv. One goroutine uses it.
type udpBatch struct {
	msgs    [udpBatchLen]udpMmsg
	iov     [udpBatchLen]unix.Iovec
	names   [udpBatchLen]unix.RawSockaddrInet6
	control [udpBatchLen][udpControlLen]byte
	data    []byte
}

func newUDPBatch() *udpBatch {
	b := &udpBatch{data: make([]byte, udpBatchLen*udpBufferStride)}
	for i := range b.msgs {
		b.iov[i].Base = &b.data[i*udpBufferStride]
		b.iov[i].SetLen(65535)
		h := &b.msgs[i].hdr
		h.Iov = &b.iov[i]
		h.SetIovlen(1)
		h.Name = (*byte)(unsafe.Pointer(&b.names[i]))
		h.Control = &b.control[i][0]
	}
	return b
}

// recv takes what waits on the socket and never blocks.
func (b *udpBatch) recv(fd int) (int, error) {
	for i := range b.msgs {
		h := &b.msgs[i].hdr
		h.Namelen = unix.SizeofSockaddrInet6
		h.SetControllen(udpControlLen)
	}
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.msgs[0])),
			udpBatchLen, unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// datagram is the payload of the i-th message.
func (b *udpBatch) datagram(i int) []byte {
	at := i * udpBufferStride
	return b.data[at : at+int(b.msgs[i].n) : at+65535]
}

// source is where the i-th message came from.
func (b *udpBatch) source(i int) netip.AddrPort { return udpDecode(&b.names[i]) }

// original is where the sender of the i-th message meant it to go; invalid
// without that control message. (ip(7), IP_RECVORIGDSTADDR)
func (b *udpBatch) original(i int) netip.AddrPort {
	if uint64(b.msgs[i].hdr.Controllen) < unix.SizeofCmsghdr+unix.SizeofSockaddrInet4 {
		return netip.AddrPort{}
	}
	c := (*unix.Cmsghdr)(unsafe.Pointer(&b.control[i][0]))
	is4 := c.Level == unix.SOL_IP && c.Type == unix.IP_ORIGDSTADDR
	is6 := c.Level == unix.SOL_IPV6 && c.Type == unix.IPV6_ORIGDSTADDR
	if !is4 && !is6 {
		return netip.AddrPort{}
	}
	var raw unix.RawSockaddrInet6
	copy((*[unix.SizeofSockaddrInet6]byte)(unsafe.Pointer(&raw))[:], b.control[i][unix.CmsgLen(0):])
	return udpDecode(&raw)
}

// udpDirection is the way of a datagram through a flow.
type udpDirection uint8

const (
	udpOutward udpDirection = iota // from the initiator to the dialled side
	udpInward                      // back
)

// udpOut collects datagrams for one socket and sends them with one system
// call. The payload is not copied: it must stay until flush. One goroutine
// uses it.
type udpOut struct {
	u     *UDP
	sock  *udpSocket
	dir   udpDirection
	n     int
	msgs  [udpBatchLen]udpMmsg
	iov   [udpBatchLen]unix.Iovec
	flows [udpBatchLen]*udpFlow
	send  func(fd uintptr) // made once, or every flush would allocate it
	one   udpMany
}

func newUDPOut(u *UDP) *udpOut {
	o := &udpOut{u: u}
	for i := range o.msgs {
		o.msgs[i].hdr.Iov = &o.iov[i]
		o.msgs[i].hdr.SetIovlen(1)
	}
	o.send = o.sendAll
	return o
}

// add puts a datagram of a flow in line and flushes what does not go the same
// way.
func (o *udpOut) add(f *udpFlow, dir udpDirection, data []byte) {
	sock, to := f.hop(dir)
	if o.n == udpBatchLen || o.n > 0 && (o.sock != sock || o.dir != dir) {
		o.flush()
	}
	o.sock, o.dir = sock, dir
	m := &o.msgs[o.n].hdr
	m.Namelen = to.len
	if to.len > 0 {
		m.Name = (*byte)(unsafe.Pointer(&to.raw))
	}
	// An empty datagram is a datagram too, and has no first byte to point at.
	o.iov[o.n].Base = unsafe.SliceData(data)
	o.iov[o.n].SetLen(len(data))
	o.flows[o.n] = f
	o.n++
}

func (o *udpOut) flush() {
	if o.n == 0 {
		return
	}
	// Counted before it is sent, so that what a peer has received is never
	// missing from the count; what is lost is taken back.
	for i := range o.n {
		o.flows[i].count(o.dir, 1, uint64(o.iov[i].Len))
	}
	if err := o.sock.raw.Control(o.send); err != nil { // closed meanwhile
		for i := range o.n {
			o.lost(i)
		}
	}
	for i := range o.n {
		if f := o.flows[i]; !f.passed.Load() && f.outPackets.Load()+f.inPackets.Load() > 0 {
			f.established()
		}
		o.flows[i], o.iov[i].Base, o.msgs[i].hdr.Name = nil, nil, nil
	}
	o.n, o.sock = 0, nil
}

// lost takes the count of a datagram back that was not sent.
func (o *udpOut) lost(i int) {
	o.u.stats.sendLost.Add(1)
	o.flows[i].count(o.dir, ^uint64(0), -uint64(o.iov[i].Len))
}

// count books datagrams that are passed on.
func (f *udpFlow) count(dir udpDirection, packets, bytes uint64) {
	if dir == udpOutward {
		f.outPackets.Add(packets)
		f.outBytes.Add(bytes)
		return
	}
	f.inPackets.Add(packets)
	f.inBytes.Add(bytes)
}

// udpStats are the counters behind UDPStats.
type udpStats struct {
	unknownPeer, noFlow, oneWay, oversize, linkFull, sendLost, refused, icmpSent, icmpLimited atomic.Uint64
}
