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

// verdictLen is the size of a verdict message with a mark.
const verdictLen = nlHeaderLen + nfGenLen + nlAttrLen + 8 + nlAttrLen + 4

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
	// reader: these are the verdicts of the goroutine that reads the queue, on
	// packets that nobody else has heard of. Else they are on held ones.
	reader bool
	sock   *queueSocket
	buf    []byte
	n      int              // packets
	last   verdict          // what the last message in buf says,
	lastAt int              // and where it begins
	write  func(fd uintptr) // made once: a closure for each send would be garbage
	err    error
	held   []heldPacket // room for release
}

// verdict is what the kernel is to do with a packet.
type verdict struct {
	what   uint32
	mark   uint32
	marked bool // the packet gets the mark
}

func newVerdicts(marks flow.Marks, count *counters) *verdicts {
	v := &verdicts{marks: marks, count: count, buf: make([]byte, 0, maxVerdicts*verdictLen)}
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
	v.add(h, verdict{nfRepeat, v.marks.Put(h.mark, p), true})
}

// drop adds a verdict that drops the packet.
func (v *verdicts) drop(h heldPacket) {
	v.count.dropped.Add(1)
	v.add(h, verdict{what: nfDrop})
}

// requeue adds a verdict that moves the packet to another queue of the same
// hook, with the mark that it has.
func (v *verdicts) requeue(h heldPacket, number uint16) {
	v.add(h, verdict{what: nfQueue | uint32(number)<<16})
}

// add adds a verdict. Packets that follow each other in the queue and fare alike
// share a message, which the kernel applies to every packet up to an id, in
// their order: that spares it the parsing, the look-up and the lock for each.
// A message may do so only while nobody else has a packet of the queue whose
// verdict is still to come, or that one would go along with the others.
func (v *verdicts) add(h heldPacket, d verdict) {
	v.room(h.sock)
	v.n++
	if v.reader && v.n > 1 && v.last == d && h.sock.held.Load() == 0 {
		extendVerdict(v.buf[v.lastAt:], h.id)
		return
	}
	v.last, v.lastAt = d, len(v.buf)
	v.buf = appendVerdict(v.buf, h.sock.number, h.id, d)
}

// room sends what is there when it belongs to another socket or is enough.
func (v *verdicts) room(s *queueSocket) {
	if v.n > 0 && (v.sock != s || v.n >= maxVerdicts) {
		v.flush()
	}
	v.sock = s
}

// flush sends what was collected. A send that fails is counted: its packets
// are gone with the queue, or run into their deadline.
func (v *verdicts) flush() {
	if v.n == 0 {
		return
	}
	v.err = nil
	err := v.sock.raw.Control(v.write)
	switch failed := err != nil || v.err != nil; {
	case failed && v.reader:
		v.sock.held.Add(int64(v.n)) // no other verdict may cover these
		fallthrough
	case failed:
		v.count.unsent.Add(uint64(v.n))
	case !v.reader:
		v.sock.held.Add(-int64(v.n))
	}
	v.buf, v.n, v.sock = v.buf[:0], 0, nil
}

// appendVerdict appends a verdict message on one packet.
func appendVerdict(b []byte, number uint16, id uint32, d verdict) []byte {
	start := len(b)
	b = appendNfHeader(b, nfqMsgVerdict, unix.NLM_F_REQUEST, 0, number)
	b = binary.NativeEndian.AppendUint16(b, nlAttrLen+8)
	b = binary.NativeEndian.AppendUint16(b, nfqaVerdictHdr)
	b = binary.BigEndian.AppendUint32(b, d.what)
	b = binary.BigEndian.AppendUint32(b, id)
	if d.marked {
		b = appendAttr32(b, nfqaMark, d.mark)
	}
	binary.NativeEndian.PutUint32(b[start:], uint32(len(b)-start))
	return b
}

// extendVerdict has a verdict message stand for all packets up to an id.
func extendVerdict(message []byte, id uint32) {
	binary.NativeEndian.PutUint16(message[4:], nfqMsgBatch)
	binary.BigEndian.PutUint32(message[nlHeaderLen+nfGenLen+nlAttrLen+4:], id)
}

func appendAttr32(b []byte, kind uint16, value uint32) []byte {
	b = binary.NativeEndian.AppendUint16(b, nlAttrLen+4)
	b = binary.NativeEndian.AppendUint16(b, kind)
	return binary.BigEndian.AppendUint32(b, value)
}
