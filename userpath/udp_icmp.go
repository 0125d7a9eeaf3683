package userpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// ICMP errors that end a datagram's way are passed back to the one who sent
// it, as a router does. (RFC 792, RFC 4443)
//
// The error is a packet of our own from a raw socket, and quotes a datagram of
// the initiator: conntrack would find the initiator's entry by the quotation
// and call the error related to it, and a rule that writes the mark of our own
// packets into conntrack would overwrite the path of that entry. So the raw
// socket has the mark of flow.Reject, by which the table leaves its packets
// untracked. They need no translation: nothing of the initiator's leg is
// translated.

// udpErrno sums up an ICMP error for the end of a flow.
type udpErrno uint32

const (
	udpErrNone udpErrno = iota
	udpErrPort
	udpErrOther
)

// ICMP types and codes; all numbers are IANA's.
const (
	icmp4Unreachable  = 3
	icmp4Network      = 0
	icmp4Host         = 1
	icmp4Port         = 3
	icmp4FragNeeded   = 4
	icmp4Admin        = 13
	icmp6Unreachable  = 1
	icmp6NoRoute      = 0
	icmp6Admin        = 1
	icmp6Address      = 3
	icmp6Port         = 4
	icmp6PacketTooBig = 2
)

// The longest errors: RFC 1812 section 4.3.2.3, RFC 4443 section 2.4 (c).
const (
	icmp4MaxLen = 576
	icmp6MaxLen = 1280
)

const (
	udpHeaderLen = 8
	ip4HeaderLen = 20
	ip6HeaderLen = 40
	icmpLen      = 8
)

// udpError is what an ICMP error says.
type udpError struct {
	typ, code uint8
	info      uint32 // the path MTU, or 0
	from      netip.Addr
}

// The rate of ICMP errors to all initiators, in a second and at once.
const (
	udpICMPRate  = 1000
	udpICMPBurst = 200
)

// udpICMP sends ICMP errors, and hears those of the initiators' side.
type udpICMP struct {
	four, six *udpSocket // six may be nil
	readers   []*udpICMPReader

	mu     sync.Mutex
	tokens float64
	filled time.Time
}

func newUDPICMP(u *UDP) (*udpICMP, error) {
	i := &udpICMP{tokens: udpICMPBurst, filled: time.Now()}
	mark := u.marks.Value(flow.Reject)
	var err error
	if i.four, err = udpRaw(unix.AF_INET, mark); err != nil {
		return nil, err
	}
	if u.listens(false) {
		if i.six, err = udpRaw(unix.AF_INET6, mark); err != nil {
			i.close()
			return nil, err
		}
	}
	for _, l := range u.listeners {
		r, err := newUDPICMPReader(u, l.sock.local.Addr().Is6())
		if err != nil {
			i.close()
			return nil, err
		}
		i.readers = append(i.readers, r)
	}
	return i, nil
}

// udpRaw opens a socket that sends whole IP packets and receives nothing.
// (raw(7), IPPROTO_RAW)
func udpRaw(family int, mark uint32) (*udpSocket, error) {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, fmt.Errorf("open raw socket for ICMP errors: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("mark raw socket for ICMP errors: %w", err)
	}
	return udpWrap(fd, netip.AddrPort{})
}

func (i *udpICMP) close() {
	for _, s := range []*udpSocket{i.four, i.six} {
		if s != nil {
			s.close()
		}
	}
	for _, r := range i.readers {
		r.sock.close()
	}
}

// allow is a token bucket.
func (i *udpICMP) allow() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	now := time.Now()
	i.tokens = min(udpICMPBurst, i.tokens+now.Sub(i.filled).Seconds()*udpICMPRate)
	i.filled = now
	if i.tokens < 1 {
		return false
	}
	i.tokens--
	return true
}

// tell sends an error about a datagram of key to its sender.
func (u *UDP) tell(key udpKey, e udpError, payload []byte) {
	if !u.icmp.allow() {
		u.stats.icmpLimited.Add(1)
		return
	}
	sock := u.icmp.four
	if key.src.Addr().Is6() {
		if sock = u.icmp.six; sock == nil {
			return
		}
	}
	if !e.from.IsValid() || e.from.IsUnspecified() || e.from.IsLoopback() || e.from.Is4() != key.src.Addr().Is4() {
		from, err := udpPreferred(key.src, 0)
		if err != nil {
			return
		}
		e.from = from
	}
	packet := udpErrorPacket(key, e, payload)
	to := udpUnixAddr(netip.AddrPortFrom(key.src.Addr(), 0))
	err := sock.raw.Control(func(fd uintptr) {
		if unix.Sendto(int(fd), packet, unix.MSG_DONTWAIT, to) == nil {
			u.stats.icmpSent.Add(1)
		}
	})
	if err != nil { // closed
		return
	}
}

// udpErrorPacket is an ICMP error with its IP header. payload is as much of
// the datagram as is known.
func udpErrorPacket(key udpKey, e udpError, payload []byte) []byte {
	src, dst := key.src.Addr(), key.dst.Addr()
	ipLen, maxLen := ip4HeaderLen, icmp4MaxLen
	if src.Is6() {
		ipLen, maxLen = ip6HeaderLen, icmp6MaxLen
	}
	quoted := udpHeaderLen + len(payload)
	payload = payload[:min(len(payload), maxLen-2*ipLen-icmpLen-udpHeaderLen)]
	body := make([]byte, 0, maxLen)
	body = append(body, e.typ, e.code, 0, 0)
	body = binary.BigEndian.AppendUint32(body, e.info)
	body = udpIPHeader(body, src, dst, unix.IPPROTO_UDP, quoted)
	body = binary.BigEndian.AppendUint16(body, key.src.Port())
	body = binary.BigEndian.AppendUint16(body, key.dst.Port())
	body = binary.BigEndian.AppendUint16(body, uint16(min(quoted, 65535)))
	body = append(body, 0, 0) // its checksum is not known
	body = append(body, payload...)

	proto, pseudo := unix.IPPROTO_ICMP, []byte(nil)
	if src.Is6() {
		proto = unix.IPPROTO_ICMPV6
		pseudo = append(e.from.AsSlice(), src.AsSlice()...)
		pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(body)))
		pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(proto))
	}
	binary.BigEndian.PutUint16(body[2:], udpChecksum(pseudo, body))
	return append(udpIPHeader(make([]byte, 0, ipLen+len(body)), e.from, src, proto, len(body)), body...)
}

// udpIPHeader appends an IP header for a payload of n bytes.
func udpIPHeader(b []byte, src, dst netip.Addr, proto, n int) []byte {
	const ttl = 64
	at := len(b)
	if src.Is4() {
		b = append(b, 0x45, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(min(ip4HeaderLen+n, 65535)))
		b = append(b, 0, 0, 0, 0, ttl, byte(proto), 0, 0)
		b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
		binary.BigEndian.PutUint16(b[at+10:], udpChecksum(nil, b[at:]))
		return b
	}
	b = append(b, 0x60, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(min(n, 65535)))
	b = append(b, byte(proto), ttl)
	return append(append(b, src.AsSlice()...), dst.AsSlice()...)
}

// udpChecksum is the Internet checksum of two pieces, the first of even
// length. (RFC 1071)
func udpChecksum(a, b []byte) uint16 {
	var sum uint32
	for _, p := range [][]byte{a, b} {
		for ; len(p) > 1; p = p[2:] {
			sum += uint32(p[0])<<8 | uint32(p[1])
		}
		if len(p) == 1 {
			sum += uint32(p[0]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// udpErrorsAtOnce bounds how long one socket's errors hold up its poller.
const udpErrorsAtOnce = 64

// errors empties the error queue of the upstream socket. (ip(7), IP_RECVERR)
func (p *udpPump) errors(fd int) {
	var data [icmp6MaxLen]byte
	var oob [256]byte
	for range udpErrorsAtOnce {
		n, oobn, _, name, err := unix.Recvmsg(fd, data[:], oob[:], unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return
		}
		e, errno, ok := udpReadError(oob[:oobn])
		f := p.peer(udpFromUnix(name)) // name is where the datagram was sent
		if !ok || f == nil {
			continue
		}
		p.u.upstreamError(f, e, errno, data[:n])
	}
}

// udpReadError finds struct sock_extended_err and the address after it.
func udpReadError(oob []byte) (e udpError, errno unix.Errno, ok bool) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return e, 0, false
	}
	const size = int(unsafe.Sizeof(unix.SockExtendedErr{}))
	for _, m := range messages {
		is4 := m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_RECVERR
		is6 := m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_RECVERR
		if !is4 && !is6 || len(m.Data) < size {
			continue
		}
		var ee unix.SockExtendedErr
		copy((*[size]byte)(unsafe.Pointer(&ee))[:], m.Data)
		var raw unix.RawSockaddrInet6
		copy((*[unix.SizeofSockaddrInet6]byte)(unsafe.Pointer(&raw))[:], m.Data[size:])
		e = udpError{typ: ee.Type, code: ee.Code, from: udpDecode(&raw).Addr()}
		if ee.Errno == uint32(unix.EMSGSIZE) {
			e.info = ee.Info
		}
		icmp := ee.Origin == unix.SO_EE_ORIGIN_ICMP || ee.Origin == unix.SO_EE_ORIGIN_ICMP6
		return e, unix.Errno(ee.Errno), icmp
	}
	return e, 0, false
}

// upstreamError passes an error on to the initiator. An initiator that knows
// its peer by another address must not learn the true one.
func (u *UDP) upstreamError(f *udpFlow, e udpError, errno unix.Errno, payload []byte) {
	if f.ended.Load() || f.killed() {
		return
	}
	if f.dial.Target != f.key.dst {
		e.from = f.key.dst.Addr()
	}
	if errno != unix.EMSGSIZE {
		f.lastError.Store(uint32(udpErrOther))
		if errno == unix.ECONNREFUSED {
			f.lastError.Store(uint32(udpErrPort))
		}
	}
	if !f.originated() { // else its initiator is a filter
		u.tell(f.key, e, payload)
	}
}

// sendFailed is called for a datagram that the kernel refused to send.
func (u *UDP) sendFailed(f *udpFlow, dir udpDirection, errno unix.Errno, payload []byte) {
	if dir != udpOutward || f.originated() {
		return
	}
	path := flow.Drop
	switch errno {
	case unix.ENETUNREACH:
		path = flow.NetUnreachable
	case unix.EHOSTUNREACH:
		path = flow.HostUnreachable
	case unix.EACCES, unix.EPERM:
		path = flow.Reject
	}
	if path != flow.Drop {
		f.lastError.Store(uint32(udpErrOther))
		u.refuse(path, f.key, payload)
	}
}

// refuse tells an initiator that a datagram goes no further; paths without an
// error of their own stay silent.
func (u *UDP) refuse(path flow.Path, key udpKey, payload []byte) {
	is6 := key.src.Addr().Is6()
	pick := func(code4, code6 uint8) {
		e := udpError{typ: icmp4Unreachable, code: code4}
		if is6 {
			e = udpError{typ: icmp6Unreachable, code: code6}
		}
		u.tell(key, e, payload)
	}
	switch path {
	case flow.Reject, flow.Exhausted:
		pick(icmp4Admin, icmp6Admin)
	case flow.HostUnreachable:
		pick(icmp4Host, icmp6Address)
	case flow.NetUnreachable:
		pick(icmp4Network, icmp6NoRoute)
	case flow.PortUnreachable:
		pick(icmp4Port, icmp6Port)
	}
}
