package userpath

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// Netfilter's verdicts (linux/netfilter.h).
const (
	nfDrop   = 0
	nfQueue  = 3 // with the queue's number in the upper half
	nfRepeat = 4 // the chain that queued the packet sees it again, with its mark
)

// Sizes of a verdict message without and with a mark.
const (
	verdictLen     = nlHeaderLen + nfGenLen + nlAttrLen + 8
	verdictMarkLen = verdictLen + nlAttrLen + 4
)

// maxVerdicts is how many verdicts go out in one send. The kernel carries
// each accepted packet on its way inside that send, about 8 us apiece, so more
// would make the last one wait.
const maxVerdicts = 32

// pathVerdict is what the kernel is told about a packet of a path. Refusals
// go back too: the chain that queued the packet reads the path in its mark, now
// that it has one, and answers. Only what carries or answers may pass;
// everything else drops.
func pathVerdict(p flow.Path) uint32 {
	switch p {
	case flow.Kernel, flow.User, flow.Reject, flow.HostUnreachable, flow.NetUnreachable, flow.PortUnreachable, flow.Exhausted, flow.Plain:
		return nfRepeat
	}
	return nfDrop
}

// verdicts collects verdicts for one queue socket at a time and sends them
// together. One goroutine at a time uses it.
type verdicts struct {
	marks flow.Marks
	count *counters
	sock  *queueSocket
	buf   []byte
	n     int
	write func(fd uintptr) // made once: a closure for each send would be garbage
	err   error
	held  []heldPacket // room for release
}

func newVerdicts(marks flow.Marks, count *counters) *verdicts {
	v := &verdicts{marks: marks, count: count, buf: make([]byte, 0, maxVerdicts*verdictMarkLen)}
	v.write = func(fd uintptr) { v.err = sendNetlink(fd, v.buf) }
	return v
}

// path adds the verdict of a path: the packet mark keeps others' bits.
func (v *verdicts) path(h heldPacket, p flow.Path) {
	if pathVerdict(p) == nfDrop {
		v.drop(h)
		return
	}
	if p == flow.Exhausted {
		v.count.exhausted.Add(1)
	}
	v.room(h.sock)
	v.buf = appendVerdict(v.buf, h.sock.number, h.id, nfRepeat)
	v.buf = appendAttr32(v.buf, nfqaMark, v.marks.Put(h.mark, p))
	v.closeMessage(verdictMarkLen)
}

// drop adds a verdict that drops the packet.
func (v *verdicts) drop(h heldPacket) {
	v.count.dropped.Add(1)
	v.plain(h, nfDrop)
}

// requeue adds a verdict that moves the packet to another queue of the same
// hook, with the mark that it has.
func (v *verdicts) requeue(h heldPacket, number uint16) {
	v.plain(h, nfQueue|uint32(number)<<16)
}

func (v *verdicts) plain(h heldPacket, verdict uint32) {
	v.room(h.sock)
	v.buf = appendVerdict(v.buf, h.sock.number, h.id, verdict)
	v.closeMessage(verdictLen)
}

// room sends what is there when it belongs to another socket or is enough.
func (v *verdicts) room(s *queueSocket) {
	if v.n > 0 && (v.sock != s || v.n >= maxVerdicts) {
		v.flush()
	}
	v.sock = s
}

func (v *verdicts) closeMessage(size int) {
	binary.NativeEndian.PutUint32(v.buf[len(v.buf)-size:], uint32(size))
	v.n++
}

// flush sends what was collected. A send that fails is counted: its packets
// are gone with the queue, or run into their deadline.
func (v *verdicts) flush() {
	if v.n == 0 {
		return
	}
	v.err = nil
	if err := v.sock.raw.Control(v.write); err != nil || v.err != nil {
		v.count.unsent.Add(uint64(v.n))
	}
	v.buf, v.n, v.sock = v.buf[:0], 0, nil
}

// appendVerdict appends a verdict message without a mark; the caller fills in
// its length.
func appendVerdict(b []byte, number uint16, id, verdict uint32) []byte {
	b = appendNfHeader(b, nfqMsgVerdict, unix.NLM_F_REQUEST, 0, number)
	b = binary.NativeEndian.AppendUint16(b, nlAttrLen+8)
	b = binary.NativeEndian.AppendUint16(b, nfqaVerdictHdr)
	b = binary.BigEndian.AppendUint32(b, verdict)
	return binary.BigEndian.AppendUint32(b, id)
}

func appendAttr32(b []byte, kind uint16, value uint32) []byte {
	b = binary.NativeEndian.AppendUint16(b, nlAttrLen+4)
	b = binary.NativeEndian.AppendUint16(b, kind)
	return binary.BigEndian.AppendUint32(b, value)
}
