package userpath

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/florianl/go-nfqueue/v2"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// copyRange is what the kernel copies of a packet: IPv4 with all its
	// options or IPv6 with 68 bytes of extension headers, then TCP's first 20.
	copyRange = 128
	// messageLen is the room for one message: copyRange and attributes, or an
	// error with the verdict that it is about.
	messageLen = 1024
	// drainMax is how many messages one system call receives.
	drainMax = 32
	// receiveBuffer holds a full queue: about 1 kB of kernel memory for each
	// message. The kernel drops what does not fit.
	receiveBuffer = 16 << 20
	// bindWithin bounds the wait for the kernel's answer to a bind.
	bindWithin = 2 * time.Second
	bindSeq    = 1
)

// queueSocket is one netlink socket that owns one queue. When it is closed the
// kernel drops what waits in the queue. One goroutine receives; any may send.
type queueSocket struct {
	number uint16
	portID uint32
	nf     *nfqueue.Nfqueue
	raw    syscall.RawConn
	// held counts the packets of the queue that somebody else than its reader
	// is to give a verdict on. It goes up in the reader, and down when the verdict
	// was sent: what is never answered keeps it up.
	held atomic.Int64
	// early are packets that came before the bind was acknowledged.
	early [][]byte
	once  sync.Once
}

// openQueueSocket takes a queue in the network namespace netns (a file
// descriptor; 0: the caller's own).
func openQueueSocket(number uint16, length, flags uint32, netns int) (*queueSocket, error) {
	nf, err := nfqueue.Open(&nfqueue.Config{
		NetNS: netns, NfQueue: number, MaxQueueLen: length, MaxPacketLen: copyRange,
		Copymode: nfqueue.NfQnlCopyPacket, AfFamily: unix.AF_UNSPEC,
	})
	if err != nil {
		return nil, fmt.Errorf("open netlink socket for queue %d: %w", number, err)
	}
	s := &queueSocket{number: number, portID: nf.Con.PID(), nf: nf}
	if err := s.bind(length, flags); err != nil {
		s.close()
		return nil, fmt.Errorf("bind queue %d: %w", number, err)
	}
	return s, nil
}

// bind sets the socket up and takes the queue. The library's own request and
// answer would lose a packet that arrives between the two; here it is kept.
func (s *queueSocket) bind(length, flags uint32) (err error) {
	if s.raw, err = s.nf.Con.SyscallConn(); err != nil {
		return err
	}
	if err = s.nf.SetOption(netlink.NoENOBUFS, true); err != nil {
		return fmt.Errorf("set NETLINK_NO_ENOBUFS: %w", err)
	}
	if err = s.nf.Con.SetReadBuffer(receiveBuffer); err != nil {
		return fmt.Errorf("set receive buffer: %w", err)
	}
	request := appendBind(nil, s.number, bindSeq, copyRange, length, flags|nfqFlagGSO)
	var sent error
	if err = s.raw.Control(func(fd uintptr) { sent = sendNetlink(fd, request) }); err != nil {
		return err
	}
	if sent != nil {
		return sent
	}
	if err = s.nf.Con.SetReadDeadline(time.Now().Add(bindWithin)); err != nil {
		return err
	}
	r := newReceiver(s, new(atomic.Bool))
	for acknowledged := false; !acknowledged; {
		if err = r.receive(); err != nil {
			return err
		}
		if acknowledged, err = s.bindAnswer(r); err != nil {
			return err
		}
	}
	return s.nf.Con.SetReadDeadline(time.Time{})
}

// bindAnswer looks for the answer to the bind among what was received and
// keeps the rest.
func (s *queueSocket) bindAnswer(r *receiver) (acknowledged bool, err error) {
	for i := range r.n {
		for b := r.message(i); ; {
			kind, seq, body, rest, ok := netlinkMessage(b)
			if !ok {
				break
			}
			if kind == unix.NLMSG_ERROR && seq == bindSeq {
				answer, ok := parseNetlinkError(body)
				if !ok {
					return false, errors.New("malformed answer")
				}
				if answer.errno != 0 {
					return false, answer.errno
				}
				acknowledged = true
			} else {
				s.early = append(s.early, append([]byte(nil), b[:len(b)-len(rest)]...))
			}
			b = rest
		}
	}
	return acknowledged, nil
}

// close gives the queue up. It may be called again, from any goroutine.
func (s *queueSocket) close() {
	s.once.Do(func() { _ = s.nf.Close() }) // the kernel has nothing to say that would help
}

// readable says whether something waits to be received.
func (s *queueSocket) readable() (yes bool) {
	err := s.raw.Control(func(fd uintptr) {
		yes = rawReadable(int(fd))
	})
	return err == nil && yes // nothing waits in a closed one
}

// sendNetlink sends to the kernel; netlink handles it before the call returns.
func sendNetlink(fd uintptr, b []byte) error {
	for {
		err := rawSend(int(fd), b)
		if err != unix.EINTR {
			return os.NewSyscallError("sendmsg", err)
		}
	}
}

// mmsghdr is struct mmsghdr of recvmmsg(2); its padding is Go's own.
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

// receiver drains a queue socket into buffers that it uses again. Neither the
// library nor x/sys has recvmmsg, which takes a burst in one system call.
type receiver struct {
	sock  *queueSocket
	heads [drainMax]mmsghdr
	iovs  [drainMax]unix.Iovec
	bufs  [drainMax][messageLen]byte
	n     int
	err   error
	began time.Time             // of the last system call
	read  func(fd uintptr) bool // made once, as in verdicts
}

// newReceiver makes a receiver that has reading set from before it takes
// something until nothing more is there.
func newReceiver(s *queueSocket, reading *atomic.Bool) *receiver {
	r := &receiver{sock: s}
	for i := range r.heads {
		r.iovs[i].Base = &r.bufs[i][0]
		r.iovs[i].SetLen(messageLen)
		r.heads[i].hdr.Iov = &r.iovs[i]
		r.heads[i].hdr.SetIovlen(1)
	}
	r.read = func(fd uintptr) bool {
		reading.Store(true)
		for {
			r.began = time.Now()
			n, err := rawReceiveMany(int(fd), r.heads[:])
			if err == unix.EINTR {
				continue
			}
			r.n, r.err = max(n, 0), err
			if err == unix.EAGAIN {
				reading.Store(false)
			}
			return err != unix.EAGAIN
		}
	}
	return r
}

// receive waits for messages and takes up to drainMax. An error of the
// connection itself (closed, past its deadline) ends the loop of its caller.
func (r *receiver) receive() error {
	r.n, r.err = 0, nil
	if err := r.sock.raw.Read(r.read); err != nil {
		return err
	}
	return os.NewSyscallError("recvmmsg", r.err)
}

// message is the i-th datagram of the last receive.
func (r *receiver) message(i int) []byte {
	if r.heads[i].hdr.Flags&unix.MSG_TRUNC != 0 {
		return nil
	}
	return r.bufs[i][:min(r.heads[i].len, messageLen)]
}
