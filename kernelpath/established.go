package kernelpath

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// beginnings hears of kernel flows that are established, while somebody wants
// to know. It has a socket of its own: several events come for each flow, and
// when they are too many no end of a flow is lost with them. While it is in no
// group the kernel makes no such event.
type beginnings struct {
	marks flow.Marks
	conn  *netlink.Conn
	in    *eventReader
	tell  atomic.Pointer[func(flow.Tuple)]

	mu     sync.Mutex // held across joining and leaving
	wanted atomic.Int64

	events, losses, malformed atomic.Uint64
}

func newBeginnings(marks flow.Marks) (*beginnings, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open netfilter netlink socket: %w", err)
	}
	b := &beginnings{marks: marks, conn: conn}
	if b.in, err = openEvents(conn, beginningsOnly(marks)); err != nil {
		conn.Close()
		return nil, err
	}
	return b, nil
}

// beginningsOnly is a socket filter like kernelFlowsOnly that also drops what
// happens to a flow later on and has nothing to do with the state of TCP: an
// event that is not the entry's first and has no CTA_PROTOINFO.
func beginningsOnly(m flow.Marks) []bpf.Instruction {
	const flags = 6 // of the netlink header, in the host's order, which the load does not have
	first := uint32(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, unix.NLM_F_CREATE)))
	return append([]bpf.Instruction{
		bpf.LoadAbsolute{Off: flags, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: first, SkipTrue: 5},
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaProtoInfo},
		bpf.LoadConstant{Dst: bpf.RegA, Val: nlHeaderSize + nfHeaderSize},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
	}, kernelFlowsOnly(m)...)
}

// OnEstablished sets who is told of established flows, with the tuple of the
// first packet before translation: TCP when both ends have agreed, UDP with its
// first packet. A flow may be told more than once. It runs on a goroutine of
// Run and must not block.
func (w *Watch) OnEstablished(tell func(flow.Tuple)) { w.begun.tell.Store(&tell) }

// Established has every kernel flow told that is established, from the return
// on, until it was called with false as often as with true. Safe for concurrent
// use, before Run too.
func (w *Watch) Established(on bool) error {
	b := w.begun
	b.mu.Lock()
	defer b.mu.Unlock()
	groups := []uint32{groupNew, groupUpdate}
	switch {
	case !on && b.wanted.Load() == 0:
		return nil
	case !on && b.wanted.Add(-1) == 0:
		for _, g := range groups {
			if err := b.conn.LeaveGroup(g); err != nil {
				b.wanted.Add(1)
				return fmt.Errorf("leave conntrack group %d: %w", g, err)
			}
		}
	case on && b.wanted.Load() == 0:
		for _, g := range groups {
			if err := b.conn.JoinGroup(g); err != nil {
				_ = b.conn.LeaveGroup(groupNew) // else nobody would
				return fmt.Errorf("join conntrack group %d: %w", g, err)
			}
		}
		fallthrough
	case on:
		b.wanted.Add(1)
	}
	return nil
}

func (b *beginnings) take(datagram []byte) {
	tell := b.tell.Load()
	for {
		m, rest, ok := nextMessage(datagram)
		if !ok {
			return
		}
		datagram = rest
		if m.kind != ctSubsys<<8|ctMsgNew || len(m.data) < nfHeaderSize || tell == nil || b.wanted.Load() == 0 {
			continue
		}
		f, ok := parseEntry(m.data[nfHeaderSize:])
		switch {
		case !ok:
			b.malformed.Add(1)
		case b.marks.Path(f.Mark) != flow.Kernel || b.marks.IsCut(f.Mark):
		case f.Proto == flow.TCP && f.TCPState == tcpEstablished, f.Proto == flow.UDP && m.flags&unix.NLM_F_CREATE != 0:
			b.events.Add(1)
			(*tell)(f.Tuple)
		}
	}
}
