package kernelpath

import (
	"encoding/binary"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// KernelFlow is one entry of the conntrack table, at its end or alive. It is
// a value and may be kept.
type KernelFlow struct {
	// Tuple is that of the first packet, before translation.
	flow.Tuple
	// Translation is what the reply tuple says: for ICMP the port of Src is
	// the identifier that the far end sees.
	Translation flow.Translation
	// Mark is the whole conntrack mark, bits of others included.
	Mark uint32
	// Counts are zero without nf_conntrack_acct.
	Counts flow.Counts
	// Start and Stop are zero without nf_conntrack_timestamp; Stop is zero
	// for a living flow.
	Start, Stop time.Time
	// Status has the IPS_ bits (linux/netfilter/nf_conntrack_common.h).
	Status uint32
	// Zone is the conntrack zone of the original direction.
	Zone uint16
	// ID is unique among living entries, not over time.
	ID uint32
	// TCPState is enum tcp_conntrack (linux/netfilter/nf_conntrack_tcp.h); 0
	// for other protocols.
	TCPState uint8
}

// Offloaded says whether a flowtable carries the flow.
func (f *KernelFlow) Offloaded() bool { return f.Status&statusOffload != 0 }

// Bits of the conntrack status that matter here
// (linux/netfilter/nf_conntrack_common.h).
const (
	statusFixedTimeout = 1 << 10
	statusOffload      = 1 << 14
)

// Messages and attributes of ctnetlink (linux/netfilter/nfnetlink_conntrack.h).
const (
	ctSubsys     = 1
	ctMsgNew     = 0
	ctMsgGet     = 1
	ctMsgDelete  = 2
	groupNew     = 1 // NFNLGRP_CONNTRACK_NEW
	groupUpdate  = 2 // NFNLGRP_CONNTRACK_UPDATE
	groupDestroy = 3 // NFNLGRP_CONNTRACK_DESTROY

	tcpEstablished = 3 // TCP_CONNTRACK_ESTABLISHED

	ctaTupleOrig   = 1
	ctaTupleReply  = 2
	ctaStatus      = 3
	ctaProtoInfo   = 4
	ctaTimeout     = 7
	ctaMark        = 8
	ctaCountOrig   = 9
	ctaCountReply  = 10
	ctaID          = 12
	ctaZone        = 18
	ctaTimestamp   = 20
	ctaMarkMask    = 21
	ctaTupleIP     = 1
	ctaTupleProto  = 2
	ctaIPv4Src     = 1
	ctaIPv4Dst     = 2
	ctaIPv6Src     = 3
	ctaIPv6Dst     = 4
	ctaProtoNum    = 1
	ctaProtoSrc    = 2
	ctaProtoDst    = 3
	ctaICMPID      = 4
	ctaICMPType    = 5
	ctaICMPCode    = 6
	ctaICMPv6ID    = 7
	ctaICMPv6Type  = 8
	ctaICMPv6Code  = 9
	nlHeaderSize   = 16
	nfHeaderSize   = 4
	attrHeaderSize = 4
)

// nextAttr cuts the first attribute off b; ok is false at the end and where
// the rest makes no sense.
func nextAttr(b []byte) (kind uint16, value, rest []byte, ok bool) {
	if len(b) < attrHeaderSize {
		return 0, nil, nil, false
	}
	size := int(binary.NativeEndian.Uint16(b))
	if size < attrHeaderSize || size > len(b) {
		return 0, nil, nil, false
	}
	kind = binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
	return kind, b[attrHeaderSize:size], b[min((size+3)&^3, len(b)):], true
}

// markOf finds the mark among the attributes of an entry and touches nothing
// else. An entry whose mark is 0 may come without the attribute.
func markOf(attrs []byte) uint32 {
	for {
		kind, v, rest, ok := nextAttr(attrs)
		if !ok {
			return 0
		}
		if kind == ctaMark && len(v) == 4 {
			return binary.BigEndian.Uint32(v)
		}
		attrs = rest
	}
}

// wireTuple is a tuple as conntrack tells it.
type wireTuple struct {
	proto    flow.Proto
	src, dst netip.Addr
	// from and to are the ports, or the ICMP identifier and type.
	from, to uint16
}

func (w wireTuple) tuple() flow.Tuple {
	return flow.Tuple{Proto: w.proto, Src: netip.AddrPortFrom(w.src, w.from), Dst: netip.AddrPortFrom(w.dst, w.to)}
}

// translation compares the two directions of an entry.
func (w wireTuple) translation(reply wireTuple) (t flow.Translation) {
	if reply.proto == flow.ICMP || reply.proto == flow.ICMPv6 {
		// Both tuples carry the identifier first; the types are each other's answer.
		reply.from, reply.to = w.to, reply.from
	}
	if reply.dst != w.src || reply.to != w.from {
		t.Src = netip.AddrPortFrom(reply.dst, reply.to)
	}
	if reply.src != w.dst || reply.from != w.to {
		t.Dst = netip.AddrPortFrom(reply.src, reply.from)
	}
	return t
}

// parseEntry reads a conntrack entry from its attributes. It keeps nothing of
// them and allocates nothing.
func parseEntry(attrs []byte) (f KernelFlow, ok bool) {
	var orig, reply wireTuple
	for {
		kind, v, rest, more := nextAttr(attrs)
		if !more {
			break
		}
		attrs = rest
		switch kind {
		case ctaTupleOrig:
			orig = parseTuple(v)
		case ctaTupleReply:
			reply = parseTuple(v)
		case ctaStatus:
			f.Status = wire32(v)
		case ctaMark:
			f.Mark = wire32(v)
		case ctaID:
			f.ID = wire32(v)
		case ctaZone:
			f.Zone = wire16(v)
		case ctaCountOrig:
			f.Counts.OutPackets, f.Counts.OutBytes = parsePair(v)
		case ctaCountReply:
			f.Counts.InPackets, f.Counts.InBytes = parsePair(v)
		case ctaTimestamp:
			start, stop := parsePair(v)
			f.Start, f.Stop = nanos(start), nanos(stop)
		case ctaProtoInfo:
			f.TCPState = parseTCPState(v)
		}
	}
	if !orig.src.IsValid() || !orig.dst.IsValid() || !reply.src.IsValid() || !reply.dst.IsValid() || orig.proto != reply.proto {
		return KernelFlow{}, false
	}
	f.Tuple, f.Translation = orig.tuple(), orig.translation(reply)
	return f, true
}

func parseTuple(b []byte) (w wireTuple) {
	for {
		kind, v, rest, ok := nextAttr(b)
		if !ok {
			return w
		}
		b = rest
		switch kind {
		case ctaTupleIP:
			w.parseIP(v)
		case ctaTupleProto:
			w.parseProto(v)
		}
	}
}

func (w *wireTuple) parseIP(b []byte) {
	for {
		kind, v, rest, ok := nextAttr(b)
		if !ok {
			return
		}
		b = rest
		switch {
		case kind == ctaIPv4Src && len(v) == 4:
			w.src = netip.AddrFrom4([4]byte(v))
		case kind == ctaIPv4Dst && len(v) == 4:
			w.dst = netip.AddrFrom4([4]byte(v))
		case kind == ctaIPv6Src && len(v) == 16:
			w.src = netip.AddrFrom16([16]byte(v))
		case kind == ctaIPv6Dst && len(v) == 16:
			w.dst = netip.AddrFrom16([16]byte(v))
		}
	}
}

func (w *wireTuple) parseProto(b []byte) {
	for {
		kind, v, rest, ok := nextAttr(b)
		if !ok {
			return
		}
		b = rest
		switch {
		case kind == ctaProtoNum && len(v) == 1:
			w.proto = flow.Proto(v[0])
		case kind == ctaProtoSrc || kind == ctaICMPID || kind == ctaICMPv6ID:
			w.from = wire16(v)
		case kind == ctaProtoDst:
			w.to = wire16(v)
		case (kind == ctaICMPType || kind == ctaICMPv6Type) && len(v) == 1:
			w.to = uint16(v[0])
		}
	}
}

// parsePair reads CTA_COUNTERS (packets, bytes) and CTA_TIMESTAMP (start,
// stop): both are nested 64-bit attributes 1 and 2.
func parsePair(b []byte) (first, second uint64) {
	for {
		kind, v, rest, ok := nextAttr(b)
		if !ok {
			return first, second
		}
		b = rest
		switch {
		case len(v) != 8:
		case kind == 1:
			first = binary.BigEndian.Uint64(v)
		case kind == 2:
			second = binary.BigEndian.Uint64(v)
		}
	}
}

// parseTCPState reads CTA_PROTOINFO_TCP (1) > CTA_PROTOINFO_TCP_STATE (1).
func parseTCPState(b []byte) uint8 {
	kind, v, _, ok := nextAttr(b)
	if !ok || kind != 1 {
		return 0
	}
	kind, v, _, ok = nextAttr(v)
	if !ok || kind != 1 || len(v) != 1 {
		return 0
	}
	return v[0]
}

func wire16(b []byte) uint16 {
	if len(b) != 2 {
		return 0
	}
	return binary.BigEndian.Uint16(b)
}

func wire32(b []byte) uint32 {
	if len(b) != 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func nanos(n uint64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(n))
}
