package userpath

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Numbers of the nfnetlink_queue protocol (linux/netfilter/nfnetlink_queue.h)
// and of the netlink headers around it.
const (
	nlHeaderLen    = unix.SizeofNlMsghdr
	nfGenLen       = 4 // struct nfgenmsg: family, version, queue number (big endian)
	nlAttrLen      = 4 // struct nlattr: length, type (native endian)
	nlAttrTypeMask = 0x3fff

	nfqSubsystem  = unix.NFNL_SUBSYS_QUEUE << 8
	nfqMsgPacket  = nfqSubsystem
	nfqMsgVerdict = nfqSubsystem | 1
	nfqMsgConfig  = nfqSubsystem | 2
	nfqMsgBatch   = nfqSubsystem | 3 // a verdict on every packet up to an id

	nfqaPacketHdr  = 1
	nfqaVerdictHdr = 2
	nfqaMark       = 3
	nfqaInDev      = 5
	nfqaPayload    = 10

	nfqaCfgCmd    = 1
	nfqaCfgParams = 2
	nfqaCfgMaxLen = 3
	nfqaCfgMask   = 4
	nfqaCfgFlags  = 5

	nfqCmdBind    = 1
	nfqCopyPacket = 2

	nfqFlagFailOpen = 1 << 0
	nfqFlagGSO      = 1 << 2
)

// queued is one packet message of a queue. payload points into the receive
// buffer and dies with the next receive.
type queued struct {
	id      uint32
	mark    uint32
	inDev   uint32
	payload []byte
}

// netlinkMessage cuts the first message off a datagram; ok is false when
// nothing whole is left.
func netlinkMessage(b []byte) (kind uint16, seq uint32, body, rest []byte, ok bool) {
	if len(b) < nlHeaderLen {
		return 0, 0, nil, nil, false
	}
	n := binary.NativeEndian.Uint32(b)
	if n < nlHeaderLen || uint64(n) > uint64(len(b)) {
		return 0, 0, nil, nil, false
	}
	next := min((int(n)+3)&^3, len(b))
	return binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:]), b[nlHeaderLen:n], b[next:], true
}

// parseQueued reads the body of a packet message in place. It is false for a
// message without a packet id or without a payload.
func parseQueued(b []byte) (q queued, ok bool) {
	if len(b) < nfGenLen {
		return q, false
	}
	b = b[nfGenLen:]
	haveID := false
	for len(b) >= nlAttrLen {
		n := int(binary.NativeEndian.Uint16(b))
		if n < nlAttrLen || n > len(b) {
			return queued{}, false
		}
		value := b[nlAttrLen:n]
		switch kind := binary.NativeEndian.Uint16(b[2:]) & nlAttrTypeMask; {
		case kind == nfqaPacketHdr && len(value) >= 7:
			q.id, haveID = binary.BigEndian.Uint32(value), true
		case kind == nfqaMark && len(value) == 4:
			q.mark = binary.BigEndian.Uint32(value)
		case kind == nfqaInDev && len(value) == 4:
			q.inDev = binary.BigEndian.Uint32(value)
		case kind == nfqaPayload:
			q.payload = value
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return q, haveID && q.payload != nil
}

// netlinkError is the body of an NLMSG_ERROR. An errno of zero acknowledges.
type netlinkError struct {
	errno unix.Errno
	// id is the packet id that the refused message named, if it was a verdict.
	id      uint32
	verdict bool
}

// parseNetlinkError reads an error message: the errno, negative, and after it
// the message that was refused, whole (netlink(7), struct nlmsgerr).
func parseNetlinkError(b []byte) (e netlinkError, ok bool) {
	if len(b) < 4+nlHeaderLen {
		return e, false
	}
	code := int32(binary.NativeEndian.Uint32(b))
	if code > 0 || code < -4095 {
		return e, false
	}
	e.errno = unix.Errno(-code)
	refused := b[4:]
	if binary.NativeEndian.Uint16(refused[4:]) != nfqMsgVerdict {
		return e, true
	}
	attr := nlHeaderLen + nfGenLen
	if len(refused) >= attr+nlAttrLen+8 && binary.NativeEndian.Uint16(refused[attr+2:]) == nfqaVerdictHdr {
		e.id = binary.BigEndian.Uint32(refused[attr+nlAttrLen+4:])
		e.verdict = true
	}
	return e, true
}

// appendBind appends the one message that takes a queue and sets it up. It is
// one message so that no packet comes between taking and setting up.
func appendBind(b []byte, number uint16, seq, copyRange, length, flags uint32) []byte {
	start := len(b)
	b = appendNfHeader(b, nfqMsgConfig, unix.NLM_F_REQUEST|unix.NLM_F_ACK, seq, number)
	b = appendAttr(b, nfqaCfgCmd, []byte{nfqCmdBind, 0, 0, 0})
	b = appendAttr(b, nfqaCfgParams, append(binary.BigEndian.AppendUint32(nil, copyRange), nfqCopyPacket))
	b = appendAttr(b, nfqaCfgFlags, binary.BigEndian.AppendUint32(nil, flags))
	b = appendAttr(b, nfqaCfgMask, binary.BigEndian.AppendUint32(nil, nfqFlagFailOpen|nfqFlagGSO))
	b = appendAttr(b, nfqaCfgMaxLen, binary.BigEndian.AppendUint32(nil, length))
	binary.NativeEndian.PutUint32(b[start:], uint32(len(b)-start))
	return b
}

// appendNfHeader appends a netlink header, whose length the caller fills in,
// and the nfnetlink header of a queue.
func appendNfHeader(b []byte, kind, flags uint16, seq uint32, number uint16) []byte {
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0) // to the kernel
	b = append(b, unix.AF_UNSPEC, unix.NFNETLINK_V0)
	return binary.BigEndian.AppendUint16(b, number)
}

func appendAttr(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(nlAttrLen+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}
