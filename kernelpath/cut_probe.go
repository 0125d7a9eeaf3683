package kernelpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// prober sends the packets that make an idle end of a TCP flow answer: an
// acknowledgement far outside its window (RFC 9293, 3.10.7.4: "If an incoming
// segment is not acceptable, an acknowledgment should be sent in reply").
type prober struct {
	fd4, fd6 int // fd6 is -1 where the kernel has no IPv6
}

func newProber(mark uint32) (*prober, error) {
	fd4, err := rawSocket(unix.AF_INET, mark)
	if err != nil {
		return nil, err
	}
	fd6, err := rawSocket(unix.AF_INET6, mark)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		fd6, err = -1, nil
	}
	if err != nil {
		unix.Close(fd4)
		return nil, err
	}
	return &prober{fd4, fd6}, nil
}

// rawSocket opens a socket that sends packets with their IP header; IPPROTO_RAW
// receives nothing.
func rawSocket(family int, mark uint32) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return -1, fmt.Errorf("open raw socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("mark raw socket: %w", err)
	}
	return fd, nil
}

func (p *prober) close() error {
	err := unix.Close(p.fd4)
	if p.fd6 >= 0 {
		err = errors.Join(err, unix.Close(p.fd6))
	}
	return err
}

// probe makes both ends of a TCP flow answer, each under the addresses that it
// knows. An end that cannot be reached has nothing to be told.
func (p *prober) probe(f *KernelFlow) error {
	if f.Proto != flow.TCP {
		return nil
	}
	near, far := f.Src, f.Dst
	nearKnows, farKnows := far, near
	if f.Translation.Src.IsValid() {
		farKnows = f.Translation.Src
	}
	if f.Translation.Dst.IsValid() {
		far = f.Translation.Dst
	}
	return errors.Join(p.send(nearKnows, near), p.send(farKnows, far))
}

// send sends two acknowledgements half the sequence space apart: wherever the
// window is, one of them is outside.
func (p *prober) send(from, to netip.AddrPort) error {
	fd := p.fd4
	var addr unix.Sockaddr = &unix.SockaddrInet4{Addr: as4(to.Addr())}
	if !to.Addr().Is4() {
		fd, addr = p.fd6, &unix.SockaddrInet6{Addr: to.Addr().As16()}
	}
	for _, seq := range [...]uint32{1 << 30, 3 << 30} {
		err := unix.Sendto(fd, probePacket(from, to, seq), 0, addr)
		switch {
		case err == nil, errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOBUFS): // sent again by Run
		case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.ENETDOWN):
		default:
			return fmt.Errorf("probe %s: %w", to, err)
		}
	}
	return nil
}

func as4(a netip.Addr) (b [4]byte) {
	if a.Is4() {
		b = a.As4()
	}
	return b
}

// probePacket is a bare ACK with its IP header. In the IPv4 header the kernel
// fills in the checksum.
func probePacket(from, to netip.AddrPort, seq uint32) []byte {
	const tcpLen = 20
	var b []byte
	src, dst := from.Addr().AsSlice(), to.Addr().AsSlice()
	if to.Addr().Is4() {
		b = append(b, 0x45, 0, 0, 20+tcpLen, 0, 0, 0x40, 0, 64, byte(flow.TCP), 0, 0)
	} else {
		b = append(b, 0x60, 0, 0, 0, 0, tcpLen, byte(flow.TCP), 64)
	}
	b = append(append(b, src...), dst...)
	at := len(b)
	b = binary.BigEndian.AppendUint16(b, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint32(b, seq)
	b = binary.BigEndian.AppendUint32(b, seq)
	b = append(b, 5<<4, flow.FlagACK, 4, 0, 0, 0, 0, 0)
	sum := onesSum(onesSum(onesSum(uint32(flow.TCP)+tcpLen, src), dst), b[at:])
	binary.BigEndian.PutUint16(b[at+16:], ^uint16(sum))
	return b
}

// onesSum goes on with an Internet checksum (RFC 1071) over an even number of
// bytes and folds it.
func onesSum(sum uint32, b []byte) uint32 {
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return sum
}
