package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// watchBuffer is asked for the receive buffer of conntrack events. The kernel
// charges about 1 KiB for each: this bridges some 30,000 ends at once.
const watchBuffer = 32 << 20

// Watch hears the end of every flow that the kernel carried: conntrack's
// DESTROY events of entries with the Kernel path in their mark; and, while
// somebody wants that, when such a flow is established. The sysctls of Sysctls
// must be set, or the kernel sends none.
type Watch struct {
	marks flow.Marks
	conn  *netlink.Conn
	in    *eventReader
	ended func(KernelFlow)
	lost  func()
	begun *beginnings
	first *firsts

	events, losses, malformed atomic.Uint64
}

// WatchStats are running totals.
type WatchStats struct {
	Events    uint64 // ends reported
	Losses    uint64 // times that the kernel dropped events (ENOBUFS)
	Malformed uint64 // events that could not be read
	// Established are flows reported as established, EstablishedLosses the
	// times that the kernel dropped events of such.
	Established, EstablishedLosses uint64
}

// NewWatch subscribes in the network namespace of the calling thread; events
// wait in the socket until Run. ended is called for each flow, lost each time
// that the kernel says that it dropped events, so that the caller can compare
// what it knows with Dump. Both run on Run's goroutine and must not block.
func NewWatch(marks flow.Marks, ended func(KernelFlow), lost func()) (*Watch, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open netfilter netlink socket: %w", err)
	}
	w := &Watch{marks: marks, conn: conn, ended: ended, lost: lost}
	if err := w.prepare(); err != nil {
		conn.Close()
		return nil, err
	}
	if w.begun, err = newBeginnings(marks); err != nil {
		conn.Close()
		return nil, err
	}
	if w.first, err = newFirsts(marks); err != nil {
		conn.Close()
		w.begun.conn.Close()
		return nil, err
	}
	return w, nil
}

func (w *Watch) prepare() (err error) {
	if w.in, err = openEvents(w.conn, kernelFlowsOnly(w.marks)); err != nil {
		return err
	}
	if err := w.conn.JoinGroup(groupDestroy); err != nil {
		return fmt.Errorf("join the conntrack destroy group: %w", err)
	}
	return nil
}

// openEvents makes a socket ready for the conntrack events that a filter keeps.
func openEvents(conn *netlink.Conn, keep []bpf.Instruction) (*eventReader, error) {
	in, err := newEventReader(conn)
	if err != nil {
		return nil, err
	}
	if err := forceReadBuffer(conn, watchBuffer); err != nil {
		return nil, fmt.Errorf("enlarge the buffer of conntrack events: %w", err)
	}
	program, err := bpf.Assemble(keep)
	if err != nil {
		return nil, fmt.Errorf("assemble the filter of conntrack events: %w", err)
	}
	if err := conn.SetBPF(program); err != nil {
		return nil, fmt.Errorf("set the filter of conntrack events: %w", err)
	}
	return in, nil
}

// kernelFlowsOnly is a socket filter that keeps events whose CTA_MARK has the
// Kernel path, cut or not, or passes one way: everybody else's flows end
// without waking the gateway.
func kernelFlowsOnly(m flow.Marks) []bpf.Instruction {
	return []bpf.Instruction{
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaMark},
		bpf.LoadConstant{Dst: bpf.RegA, Val: nlHeaderSize + nfHeaderSize},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr}, // A = offset of attribute X, or 0
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 6},
		bpf.TAX{},
		bpf.LoadIndirect{Off: attrHeaderSize, Size: 4},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: m.Mask()},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: m.Value(flow.Kernel), SkipTrue: 3},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: m.CutValue(flow.Kernel), SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: m.OneWay(), SkipTrue: 1},
		bpf.RetConstant{Val: 0},
		bpf.RetConstant{Val: 1<<32 - 1},
	}
}

// forceReadBuffer needs CAP_NET_ADMIN and is not bound by net.core.rmem_max.
func forceReadBuffer(c *netlink.Conn, size int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var set error
	if err := raw.Control(func(fd uintptr) {
		set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, size)
	}); err != nil {
		return err
	}
	return set
}

// Close ends a Watch that is not running.
func (w *Watch) Close() error {
	return errors.Join(w.conn.Close(), w.begun.conn.Close(), w.first.conn.Close())
}

// Stats reads the counters.
func (w *Watch) Stats() WatchStats {
	return WatchStats{
		Events: w.events.Load(), Losses: w.losses.Load(), Malformed: w.malformed.Load() + w.begun.malformed.Load() + w.first.malformed.Load(),
		Established: w.begun.events.Load(), EstablishedLosses: w.begun.losses.Load(),
	}
}

// Run reports ends until ctx is over, which is no error, and closes the
// Watch. Lost events are counted and told, and never end it.
func (w *Watch) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		return readEvents(ctx, w.conn, w.in, w.take, func() {
			w.losses.Add(1)
			w.lost()
		})
	})
	group.Go(func() error {
		return readEvents(ctx, w.begun.conn, w.begun.in, w.begun.take, func() { w.begun.losses.Add(1) })
	})
	group.Go(func() error {
		return readEvents(ctx, w.first.conn, w.first.in, w.first.take, func() {
			w.losses.Add(1)
			w.lost()
		})
	})
	return group.Wait()
}

// readEvents reads a socket until ctx is over, and closes it.
func readEvents(ctx context.Context, conn *netlink.Conn, in *eventReader, take func(datagram []byte), lost func()) error {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		n, err := in.read()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			lost()
		case err != nil:
			return fmt.Errorf("read conntrack events: %w", err)
		}
		for i := range n {
			take(in.datagram(i))
		}
	}
}

func (w *Watch) take(datagram []byte) {
	for {
		m, rest, ok := nextMessage(datagram)
		if !ok {
			return
		}
		datagram = rest
		if m.kind != ctSubsys<<8|ctMsgDelete || len(m.data) < nfHeaderSize {
			continue
		}
		attrs := m.data[nfHeaderSize:]
		if w.marks.Path(markOf(attrs)) != flow.Kernel {
			continue
		}
		f, ok := parseEntry(attrs)
		if !ok {
			w.malformed.Add(1)
			continue
		}
		if f.Stop.IsZero() {
			f.Stop = time.Now()
		}
		w.events.Add(1)
		w.ended(f)
	}
}
