package kernelpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"syscall"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// socket is one netlink socket for transactions and lists. It is not for
// concurrent use.
type socket struct {
	conn *netlink.Conn
	raw  syscall.RawConn
	seq  uint32
	buf  []byte
}

// Buffers of the socket in bytes: a transaction is sent in one piece.
const (
	sendBuffer    = 32 << 20
	receiveBuffer = 4 << 20
)

func dialTable(netns int) (*socket, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, fmt.Errorf("open a netfilter socket: %w", err)
	}
	s := &socket{conn: conn, seq: 1, buf: make([]byte, 128<<10)}
	err = errors.Join(conn.SetWriteBuffer(sendBuffer), conn.SetReadBuffer(receiveBuffer),
		conn.SetOption(netlink.ExtendedAcknowledge, true))
	if err == nil {
		s.raw, err = conn.SyscallConn()
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("prepare a netfilter socket: %w", err)
	}
	return s, nil
}

func (s *socket) close() error { return s.conn.Close() }

// A transactionError is a refused transaction: what was asked for and why not.
type transactionError struct {
	what  string
	errno syscall.Errno
	hint  string // the kernel's own words, may be empty
	more  int    // other messages that failed
}

func (e *transactionError) Error() string {
	text := e.what + ": " + e.errno.Error()
	if e.hint != "" {
		text += " (" + e.hint + ")"
	}
	if e.more > 0 {
		text += fmt.Sprintf(", and %d more", e.more)
	}
	return text
}

func (e *transactionError) Unwrap() error { return e.errno }

// commit sends a transaction and waits for its end. On error the kernel has
// applied nothing of it.
func (s *socket) commit(t *transaction) error {
	if t.err != nil {
		return t.err
	}
	if len(t.msgs) == 0 {
		return nil
	}
	begin := s.seq
	size := 2 * (unix.NLMSG_HDRLEN + 4)
	for i := range t.msgs {
		size += unix.NLMSG_HDRLEN + 4 + len(t.msgs[i].data)
	}
	out := appendMessage(make([]byte, 0, size), unix.NFNL_MSG_BATCH_BEGIN, unix.NLM_F_REQUEST, begin, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil)
	for i, m := range t.msgs {
		flags := unix.NLM_F_REQUEST | int(m.flags)
		if i == len(t.msgs)-1 {
			flags |= unix.NLM_F_ACK
		}
		s.seq++
		out = appendMessage(out, unix.NFNL_SUBSYS_NFTABLES<<8|m.typ, flags, s.seq, unix.NFPROTO_INET, 0, m.data)
	}
	last := s.seq
	s.seq++
	out = appendMessage(out, unix.NFNL_MSG_BATCH_END, unix.NLM_F_REQUEST, s.seq, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil)
	s.seq++
	if err := s.send(out); err != nil {
		return fmt.Errorf("send a transaction of %d bytes: %w", len(out), err)
	}
	return s.outcome(t, begin, last)
}

// outcome reads what the kernel says: errors of single messages, and an answer
// to the last one in any case; or one error to the first message that stands
// for all.
func (s *socket) outcome(t *transaction, begin, last uint32) error {
	var failed *transactionError
	for {
		answers, err := s.receive()
		if err != nil {
			return fmt.Errorf("read the answer to a transaction: %w", err)
		}
		for _, a := range answers {
			if a.seq < begin || a.seq > last {
				continue // of an earlier transaction
			}
			if a.errno != 0 && failed == nil {
				failed = &transactionError{what: "transaction", errno: a.errno, hint: a.hint}
				if a.seq > begin {
					failed.what = t.msgs[a.seq-begin-1].what
				}
			} else if a.errno != 0 {
				failed.more++
			}
			if a.seq == last || a.seq == begin {
				if failed == nil {
					return nil
				}
				return failed
			}
		}
	}
}

func appendMessage(b []byte, typ uint16, flags int, seq uint32, family, resource byte, data []byte) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(unix.NLMSG_HDRLEN+4+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, uint16(flags))
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = append(b, 0, 0, 0, 0, family, unix.NFNETLINK_V0, 0, resource)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func (s *socket) send(b []byte) error {
	var err error
	werr := s.raw.Write(func(fd uintptr) bool {
		err = unix.Sendto(int(fd), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		return !errors.Is(err, unix.EAGAIN)
	})
	return errors.Join(werr, err)
}

// answer is one error message of netlink; errno 0 is an acknowledgement.
type answer struct {
	seq   uint32
	errno syscall.Errno
	hint  string
}

func (s *socket) receive() ([]answer, error) {
	var n int
	var err error
	rerr := s.raw.Read(func(fd uintptr) bool {
		n, _, err = unix.Recvfrom(int(fd), s.buf, 0)
		return !errors.Is(err, unix.EAGAIN)
	})
	if err = errors.Join(rerr, err); err != nil {
		return nil, err
	}
	var answers []answer
	for b := s.buf[:n]; len(b) >= unix.NLMSG_HDRLEN; {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.NLMSG_HDRLEN || size > len(b) {
			break
		}
		if binary.NativeEndian.Uint16(b[4:]) == unix.NLMSG_ERROR && size >= unix.NLMSG_HDRLEN+4 {
			answers = append(answers, answer{
				seq:   binary.NativeEndian.Uint32(b[8:]),
				errno: syscall.Errno(-int32(binary.NativeEndian.Uint32(b[unix.NLMSG_HDRLEN:]))),
				hint:  hint(b[:size]),
			})
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return answers, nil
}

// hint is the extended acknowledgement's text, which follows the message that
// failed (linux/netlink.h, NLMSGERR_ATTR_MSG).
func hint(b []byte) string {
	const before = unix.NLMSG_HDRLEN + 4
	if binary.NativeEndian.Uint16(b[6:])&unix.NLM_F_ACK_TLVS == 0 || len(b) < before+unix.NLMSG_HDRLEN {
		return ""
	}
	size := int(binary.NativeEndian.Uint32(b[before:]))
	if size < 0 || (size+3)&^3 > len(b)-before {
		return ""
	}
	ad, err := netlink.NewAttributeDecoder(b[before+(size+3)&^3:])
	if err != nil {
		return ""
	}
	for ad.Next() {
		if ad.Type() == unix.NLMSGERR_ATTR_MSG {
			return ad.String()
		}
	}
	return ""
}

// listTries bounds how often a list is read again that changed while it was
// read: what changes all the time is listed as it comes.
const listTries = 4

// list dumps objects of the table. attrs go with the request.
func (s *socket) list(typ uint16, attrs ...netlink.Attribute) ([]netlink.Message, error) {
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return nil, err
	}
	for tries := 1; ; tries++ {
		msgs, err := s.conn.Execute(netlink.Message{
			Header: netlink.Header{
				Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | typ),
				Flags: netlink.Request | netlink.Dump,
			},
			Data: append([]byte{byte(nftables.TableFamilyINet), unix.NFNETLINK_V0, 0, 0}, data...),
		})
		torn := slices.ContainsFunc(msgs, func(m netlink.Message) bool { return m.Header.Flags&netlink.DumpInterrupted != 0 })
		if torn && tries < listTries {
			continue
		}
		return msgs, err
	}
}
