package userpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// udpICMPReader hears the ICMP errors about datagrams that went to initiators:
// a client that has closed its port. The reply sockets cannot hear them, for
// they never receive. The table delivers the errors here with the rest of a
// taken-over flow, by the conntrack entry that they are related to.
type udpICMPReader struct {
	u    *UDP
	sock *udpSocket
	is6  bool
}

// icmp6FilterOption is ICMPV6_FILTER of linux/icmpv6.h.
const icmp6FilterOption = 1

func newUDPICMPReader(u *UDP, is6 bool) (*udpICMPReader, error) {
	family, proto := unix.AF_INET, unix.IPPROTO_ICMP
	if is6 {
		family, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, fmt.Errorf("open raw socket to hear ICMP errors: %w", err)
	}
	if is6 {
		// A set bit blocks a type.
		filter := unix.ICMPv6Filter{}
		for i := range filter.Data {
			filter.Data[i] = ^uint32(0)
		}
		filter.Data[0] &^= 1<<icmp6Unreachable | 1<<icmp6PacketTooBig
		err = unix.SetsockoptICMPv6Filter(fd, unix.SOL_ICMPV6, icmp6FilterOption, &filter)
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1)
		}
	} else {
		const solRaw, icmpFilter = 255, 1 // linux/socket.h, linux/icmp.h
		block := ^uint32(1 << icmp4Unreachable)
		err = unix.SetsockoptInt(fd, solRaw, icmpFilter, int(block))
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("filter raw socket for ICMP errors: %w", err)
	}
	sock, err := udpWrap(fd, netip.AddrPort{})
	if err != nil {
		return nil, err
	}
	return &udpICMPReader{u: u, sock: sock, is6: is6}, nil
}

// run reads until the socket is closed.
func (r *udpICMPReader) run() error {
	var data [2048]byte
	var oob [256]byte
	var n, oobn int
	var from unix.Sockaddr
	ready := func(fd uintptr) bool {
		var err error
		n, oobn, _, from, err = unix.Recvmsg(int(fd), data[:], oob[:], unix.MSG_DONTWAIT)
		if err != nil {
			n = 0
		}
		return !errors.Is(err, unix.EAGAIN)
	}
	for {
		if err := r.sock.raw.Read(ready); err != nil {
			return fmt.Errorf("hear ICMP errors: %w", err)
		}
		if n > 0 && from != nil {
			r.heard(data[:n], oob[:oobn], udpFromUnix(from).Addr())
		}
	}
}

// heard passes an error of the initiator's side on to the dialled side. An
// error that was sent to another address than the peer's did not travel with
// the flow, and is somebody's invention.
func (r *udpICMPReader) heard(data, oob []byte, from netip.Addr) {
	sentTo, message := udpICMPTarget(data, oob, r.is6)
	q, ok := udpQuoted(message, r.is6)
	if !ok || sentTo != q.key.src.Addr() {
		return
	}
	f := r.u.find(udpKey{src: q.key.dst, dst: q.key.src})
	if f == nil || f.killed() || f.pump == nil {
		return
	}
	q.err.from = f.pump.sock.local.Addr()
	if f.dial.Transparent {
		q.err.from = from
	}
	r.u.tell(udpKey{src: f.dial.Target, dst: f.pump.sock.local}, q.err, q.payload)
}

// udpICMPTarget gives the destination of the packet and its ICMP message.
func udpICMPTarget(data, oob []byte, is6 bool) (netip.Addr, []byte) {
	if !is6 {
		if len(data) < ip4HeaderLen || len(data) < int(data[0]&15)*4 {
			return netip.Addr{}, nil
		}
		return netip.AddrFrom4([4]byte(data[16:20])), data[int(data[0]&15)*4:]
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.Addr{}, nil
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= int(unsafe.Sizeof(unix.Inet6Pktinfo{})) {
			return netip.AddrFrom16([16]byte(m.Data[:16])), data
		}
	}
	return netip.Addr{}, nil
}

// udpQuotation is what an ICMP error tells of the datagram that caused it.
type udpQuotation struct {
	key     udpKey
	err     udpError
	payload []byte
}

// udpQuoted reads an ICMP error about a UDP datagram. Quotations with IPv6
// extension headers are not read.
func udpQuoted(b []byte, is6 bool) (q udpQuotation, ok bool) {
	if len(b) < icmpLen {
		return q, false
	}
	q.err = udpError{typ: b[0], code: b[1]}
	if !is6 && b[0] == icmp4Unreachable && b[1] == icmp4FragNeeded || is6 && b[0] == icmp6PacketTooBig {
		q.err.info = binary.BigEndian.Uint32(b[4:])
	}
	b = b[icmpLen:]
	var src, dst netip.Addr
	var proto byte
	if is6 {
		if len(b) < ip6HeaderLen {
			return q, false
		}
		src, dst, proto = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40])), b[6]
		b = b[ip6HeaderLen:]
	} else {
		if len(b) < ip4HeaderLen || b[0]&15 < 5 || len(b) < int(b[0]&15)*4 {
			return q, false
		}
		src, dst, proto = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), b[9]
		b = b[int(b[0]&15)*4:]
	}
	if len(b) < udpHeaderLen || flow.Proto(proto) != flow.UDP {
		return q, false
	}
	q.key = udpKey{
		src: netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)),
		dst: netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:])),
	}
	q.payload = b[udpHeaderLen:]
	return q, true
}
