package kernelpath

import (
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// firsts hears of kernel flows that begin and are translated, as long as
// somebody counts those of mappings. Each has a socket of its own, see
// beginnings; while it is in no group the kernel makes no such event for it.
type firsts struct {
	conn *netlink.Conn
	in   *eventReader
	tell atomic.Pointer[func(KernelFlow)]

	mu     sync.Mutex // held across joining and leaving
	joined bool

	malformed atomic.Uint64
}

func newFirsts(marks flow.Marks) (*firsts, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open netfilter netlink socket: %w", err)
	}
	f := &firsts{conn: conn}
	if f.in, err = openEvents(conn, firstsOnly(marks)); err != nil {
		conn.Close()
		return nil, err
	}
	return f, nil
}

// firstsOnly is a socket filter like kernelFlowsOnly that also drops the flows
// of which nothing is translated.
func firstsOnly(m flow.Marks) []bpf.Instruction {
	const translated = 1<<4 | 1<<5 // IPS_SRC_NAT, IPS_DST_NAT
	return append([]bpf.Instruction{
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaStatus},
		bpf.LoadConstant{Dst: bpf.RegA, Val: nlHeaderSize + nfHeaderSize},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 3},
		bpf.TAX{},
		bpf.LoadIndirect{Off: attrHeaderSize, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: translated, SkipTrue: 1},
		bpf.RetConstant{Val: 0},
	}, kernelFlowsOnly(m)...)
}

// OnFirst sets who is told of flows that begin. It runs on a goroutine of Run
// and must not block.
func (w *Watch) OnFirst(tell func(KernelFlow)) { w.first.tell.Store(&tell) }

// Firsts has the beginning of every kernel flow told that is translated, from
// the return on, or no more. Losses are told like those of ends. Safe for
// concurrent use, before Run too.
func (w *Watch) Firsts(on bool) error {
	f := w.first
	f.mu.Lock()
	defer f.mu.Unlock()
	if on == f.joined {
		return nil
	}
	change, what := f.conn.LeaveGroup, "leave"
	if on {
		change, what = f.conn.JoinGroup, "join"
	}
	if err := change(groupNew); err != nil {
		return fmt.Errorf("%s the conntrack group of new flows: %w", what, err)
	}
	f.joined = on
	return nil
}

func (f *firsts) take(datagram []byte) {
	tell := f.tell.Load()
	for {
		m, rest, ok := nextMessage(datagram)
		if !ok {
			return
		}
		datagram = rest
		if m.kind != ctSubsys<<8|ctMsgNew || len(m.data) < nfHeaderSize || tell == nil {
			continue
		}
		flow, ok := parseEntry(m.data[nfHeaderSize:])
		if !ok {
			f.malformed.Add(1)
			continue
		}
		(*tell)(flow)
	}
}
