package kernelpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// appendAttr adds an attribute with its padding.
func appendAttr(b []byte, kind uint16, value ...byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(attrHeaderSize+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, "\x00\x00\x00"[:-len(value)&3]...)
}

func appendAttr16(b []byte, kind uint16, value uint16) []byte {
	return appendAttr(b, kind, byte(value>>8), byte(value))
}

func appendAttr32(b []byte, kind uint16, value uint32) []byte {
	return appendAttr(b, kind, byte(value>>24), byte(value>>16), byte(value>>8), byte(value))
}

// appendNested adds an attribute whose value fill appends.
func appendNested(b []byte, kind uint16, fill func([]byte) []byte) []byte {
	at := len(b)
	b = append(b, 0, 0, 0, 0)
	b = fill(b)
	binary.NativeEndian.PutUint16(b[at:], uint16(len(b)-at))
	binary.NativeEndian.PutUint16(b[at+2:], kind|unix.NLA_F_NESTED)
	return b
}

// appendTupleAttr adds CTA_TUPLE_ORIG.
func appendTupleAttr(b []byte, t flow.Tuple) []byte {
	return appendNested(b, ctaTupleOrig, func(b []byte) []byte {
		b = appendNested(b, ctaTupleIP, func(b []byte) []byte {
			src, dst := uint16(ctaIPv4Src), uint16(ctaIPv4Dst)
			if !t.Is4() {
				src, dst = ctaIPv6Src, ctaIPv6Dst
			}
			b = appendAttr(b, src, t.Src.Addr().AsSlice()...)
			return appendAttr(b, dst, t.Dst.Addr().AsSlice()...)
		})
		return appendNested(b, ctaTupleProto, func(b []byte) []byte {
			b = appendAttr(b, ctaProtoNum, byte(t.Proto))
			switch t.Proto {
			case flow.ICMP:
				b = appendAttr16(b, ctaICMPID, t.Src.Port())
				b = appendAttr(b, ctaICMPType, byte(t.Dst.Port()))
				return appendAttr(b, ctaICMPCode, 0)
			case flow.ICMPv6:
				b = appendAttr16(b, ctaICMPv6ID, t.Src.Port())
				b = appendAttr(b, ctaICMPv6Type, byte(t.Dst.Port()))
				return appendAttr(b, ctaICMPv6Code, 0)
			}
			b = appendAttr16(b, ctaProtoSrc, t.Src.Port())
			return appendAttr16(b, ctaProtoDst, t.Dst.Port())
		})
	})
}

// ctRequest makes a ctnetlink message; attrs come after its nfgenmsg.
func ctRequest(kind uint16, flags netlink.HeaderFlags, family uint8, attrs []byte) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(ctSubsys<<8 | kind), Flags: netlink.Request | flags},
		Data:   append([]byte{family, 0, 0, 0}, attrs...),
	}
}

func nfFamilyOf(t flow.Tuple) uint8 {
	if t.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// ctAnswerTime bounds how long the kernel may take to acknowledge; it does so
// within the send.
const ctAnswerTime = 5 * time.Second

// ctSocket asks and changes single conntrack entries. Safe for concurrent use.
type ctSocket struct {
	mu   sync.Mutex // one request at a time
	conn *netlink.Conn
	in   *rawReader
}

func dialConntrack() (*ctSocket, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open netfilter netlink socket: %w", err)
	}
	in, err := newRawReader(conn, 16<<10)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &ctSocket{conn: conn, in: in}, nil
}

func (s *ctSocket) close() error { return s.conn.Close() }

// request sends one request and waits until the kernel has acknowledged it.
// take gets the attributes of each answer before that. netlink.Conn.Execute
// will not do: ctnetlink flags a single answer as one of many and ends it with
// an acknowledgement instead of NLMSG_DONE.
func (s *ctSocket) request(kind uint16, family uint8, attrs []byte, take func(attrs []byte)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	sent, err := s.conn.Send(ctRequest(kind, netlink.Acknowledge, family, attrs))
	if err != nil {
		return err
	}
	if err := s.conn.SetReadDeadline(time.Now().Add(ctAnswerTime)); err != nil {
		return err
	}
	for {
		datagram, err := s.in.read()
		if err != nil {
			return err
		}
		for {
			m, rest, ok := nextMessage(datagram)
			if !ok {
				break
			}
			datagram = rest
			switch {
			case m.seq != sent.Header.Sequence:
			case m.kind == unix.NLMSG_ERROR:
				return m.errorOf()
			case len(m.data) >= nfHeaderSize && take != nil:
				take(m.data[nfHeaderSize:])
			}
		}
	}
}

// entry asks conntrack for the entry with this original tuple in zone 0;
// false: there is none.
func (s *ctSocket) entry(t flow.Tuple) (f KernelFlow, ok bool, err error) {
	err = s.request(ctMsgGet, nfFamilyOf(t), appendTupleAttr(nil, t), func(attrs []byte) { f, ok = parseEntry(attrs) })
	switch {
	case errors.Is(err, unix.ENOENT):
		return KernelFlow{}, false, nil
	case err != nil:
		return KernelFlow{}, false, fmt.Errorf("get conntrack entry: %w", err)
	case !ok:
		return KernelFlow{}, false, errors.New("get conntrack entry: the answer makes no sense")
	}
	// The tuple that names an entry may also be that of its answers.
	return f, f.Tuple == t, nil
}

// rawReader reads a netlink socket into one buffer, without the allocations
// of netlink.Conn.Receive.
type rawReader struct {
	raw  syscall.RawConn
	buf  []byte
	n    int
	err  error
	step func(fd uintptr) bool
}

func newRawReader(c *netlink.Conn, size int) (*rawReader, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("reach the netlink socket: %w", err)
	}
	r := &rawReader{raw: raw, buf: make([]byte, size)}
	r.step = func(fd uintptr) bool {
		for {
			if r.n, r.err = unix.Read(int(fd), r.buf); r.err != unix.EINTR {
				return r.err != unix.EAGAIN
			}
		}
	}
	return r, nil
}

// read waits for the next datagram. The slice is good until the next call.
func (r *rawReader) read() ([]byte, error) {
	if err := r.raw.Read(r.step); err != nil {
		return nil, err
	}
	return r.buf[:max(r.n, 0)], r.err
}

// mmsghdr is struct mmsghdr of recvmmsg(2); its padding is Go's own.
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

const (
	// eventsMost is how many datagrams one system call takes.
	eventsMost = 32
	// eventRoom is for one: a conntrack event has some 300 bytes.
	eventRoom = 4 << 10
)

// eventReader reads a netlink socket on which many datagrams come, into buffers
// that it uses again: as many as there are in one system call.
type eventReader struct {
	raw   syscall.RawConn
	heads [eventsMost]mmsghdr
	iovs  [eventsMost]unix.Iovec
	bufs  []byte
	n     int
	errno syscall.Errno
	step  func(fd uintptr) bool
}

func newEventReader(c *netlink.Conn) (*eventReader, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("reach the netlink socket: %w", err)
	}
	r := &eventReader{raw: raw, bufs: make([]byte, eventsMost*eventRoom)}
	for i := range r.heads {
		r.iovs[i].Base = &r.bufs[i*eventRoom]
		r.iovs[i].SetLen(eventRoom)
		r.heads[i].hdr.Iov = &r.iovs[i]
		r.heads[i].hdr.SetIovlen(1)
	}
	r.step = func(fd uintptr) bool {
		for {
			n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&r.heads[0])), eventsMost, unix.MSG_DONTWAIT, 0, 0)
			if errno == unix.EINTR {
				continue
			}
			if r.n, r.errno = 0, errno; errno == 0 {
				r.n = int(n)
			}
			return errno != unix.EAGAIN
		}
	}
	return r, nil
}

// read waits for datagrams and gives their number. An error that waits in the
// socket comes after the datagrams before it.
func (r *eventReader) read() (int, error) {
	r.n, r.errno = 0, 0
	if err := r.raw.Read(r.step); err != nil {
		return 0, err
	}
	if r.errno != 0 {
		return 0, r.errno
	}
	return r.n, nil
}

// datagram is the ith; it is good until the next read. One that had no room is
// empty.
func (r *eventReader) datagram(i int) []byte {
	if r.heads[i].hdr.Flags&unix.MSG_TRUNC != 0 {
		return nil
	}
	at := i * eventRoom
	return r.bufs[at : at+int(min(r.heads[i].len, eventRoom))]
}

// wireMessage is one netlink message in a buffer.
type wireMessage struct {
	kind, flags uint16
	seq         uint32
	data        []byte
}

// nextMessage cuts the first message off a datagram.
func nextMessage(b []byte) (m wireMessage, rest []byte, ok bool) {
	if len(b) < nlHeaderSize {
		return wireMessage{}, nil, false
	}
	size := int(binary.NativeEndian.Uint32(b))
	if size < nlHeaderSize || size > len(b) {
		return wireMessage{}, nil, false
	}
	m = wireMessage{
		kind: binary.NativeEndian.Uint16(b[4:]), flags: binary.NativeEndian.Uint16(b[6:]),
		seq: binary.NativeEndian.Uint32(b[8:]), data: b[nlHeaderSize:size],
	}
	return m, b[min((size+3)&^3, len(b)):], true
}

// errorOf reads NLMSG_ERROR, and the error that NLMSG_DONE may carry.
func (m wireMessage) errorOf() error {
	if len(m.data) < 4 {
		return nil
	}
	if n := int32(binary.NativeEndian.Uint32(m.data)); n < 0 {
		return unix.Errno(-n)
	}
	return nil
}
