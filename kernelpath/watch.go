package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// watchBuffer is asked for the receive buffer of conntrack events. The kernel
// charges about 1 KiB for each: this bridges some 30,000 ends at once.
const watchBuffer = 32 << 20

// Watch hears the end of every flow that the kernel carried: conntrack's
// DESTROY events of entries with the Kernel path in their mark. The sysctls of
// Sysctls must be set, or the kernel sends none.
type Watch struct {
	marks flow.Marks
	conn  *netlink.Conn
	in    *rawReader
	ended func(KernelFlow)
	lost  func()

	events, losses, malformed atomic.Uint64
}

// WatchStats are running totals.
type WatchStats struct {
	Events    uint64 // ends reported
	Losses    uint64 // times that the kernel dropped events (ENOBUFS)
	Malformed uint64 // events that could not be read
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
	return w, nil
}

func (w *Watch) prepare() (err error) {
	if w.in, err = newRawReader(w.conn, 64<<10); err != nil {
		return err
	}
	if err := forceReadBuffer(w.conn, watchBuffer); err != nil {
		return fmt.Errorf("enlarge the buffer of conntrack events: %w", err)
	}
	program, err := bpf.Assemble(kernelFlowsOnly(w.marks))
	if err != nil {
		return fmt.Errorf("assemble the filter of conntrack events: %w", err)
	}
	if err := w.conn.SetBPF(program); err != nil {
		return fmt.Errorf("set the filter of conntrack events: %w", err)
	}
	if err := w.conn.JoinGroup(groupDestroy); err != nil {
		return fmt.Errorf("join the conntrack destroy group: %w", err)
	}
	return nil
}

// kernelFlowsOnly is a socket filter that keeps events whose CTA_MARK has the
// Kernel path: everybody else's flows end without waking the gateway.
func kernelFlowsOnly(m flow.Marks) []bpf.Instruction {
	return []bpf.Instruction{
		bpf.LoadConstant{Dst: bpf.RegX, Val: ctaMark},
		bpf.LoadConstant{Dst: bpf.RegA, Val: nlHeaderSize + nfHeaderSize},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr}, // A = offset of attribute X, or 0
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 4},
		bpf.TAX{},
		bpf.LoadIndirect{Off: attrHeaderSize, Size: 4},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: m.PathMask()},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: m.Value(flow.Kernel), SkipTrue: 1},
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

// Established is not built yet.
func (w *Watch) Established(on bool) error { return nil }

// Close ends a Watch that is not running.
func (w *Watch) Close() error { return w.conn.Close() }

// Stats reads the counters.
func (w *Watch) Stats() WatchStats {
	return WatchStats{Events: w.events.Load(), Losses: w.losses.Load(), Malformed: w.malformed.Load()}
}

// Run reports ends until ctx is over, which is no error, and closes the
// Watch. Lost events are counted and told, and never end it.
func (w *Watch) Run(ctx context.Context) error {
	defer w.conn.Close()
	stop := context.AfterFunc(ctx, func() { w.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		datagram, err := w.in.read()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			w.losses.Add(1)
			w.lost()
		case err != nil:
			return fmt.Errorf("read conntrack events: %w", err)
		default:
			w.take(datagram)
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

// Dump lists the living flows that have one of these paths in their mark; no
// path: all that have any of the gateway's bits. It works in the network
// namespace of the calling thread, daemon or not. The list is no snapshot: a
// flow that begins or ends meanwhile may be in it or not.
func Dump(ctx context.Context, marks flow.Marks, paths ...flow.Path) ([]KernelFlow, error) {
	var attrs []byte
	if len(paths) == 1 {
		// One path is a comparison that the kernel does.
		attrs = appendAttr32(attrs, ctaMark, marks.Value(paths[0]))
		attrs = appendAttr32(attrs, ctaMarkMask, marks.PathMask())
	}
	wanted := func(mark uint32) bool {
		if len(paths) == 0 {
			return mark&marks.Mask() != 0
		}
		for _, p := range paths {
			if marks.Path(mark) == p {
				return true
			}
		}
		return false
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open netfilter netlink socket: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	request, err := conn.Send(ctRequest(ctMsgGet, netlink.Dump, unix.AF_UNSPEC, attrs))
	if err != nil {
		return nil, fmt.Errorf("ask for the conntrack table: %w", err)
	}
	flows, err := readDump(conn, request.Header.Sequence, wanted)
	if ctx.Err() != nil {
		return nil, fmt.Errorf("dump the conntrack table: %w", context.Cause(ctx))
	}
	if err != nil {
		return nil, fmt.Errorf("dump the conntrack table: %w", err)
	}
	return flows, nil
}

func readDump(conn *netlink.Conn, seq uint32, wanted func(mark uint32) bool) ([]KernelFlow, error) {
	in, err := newRawReader(conn, 64<<10)
	if err != nil {
		return nil, err
	}
	var flows []KernelFlow
	for {
		datagram, err := in.read()
		if err != nil {
			return nil, err
		}
		for {
			m, rest, ok := nextMessage(datagram)
			if !ok {
				break
			}
			datagram = rest
			switch {
			case m.seq != seq:
			case m.kind == unix.NLMSG_DONE:
				return flows, m.errorOf()
			case m.kind == unix.NLMSG_ERROR:
				return flows, m.errorOf()
			case len(m.data) >= nfHeaderSize && wanted(markOf(m.data[nfHeaderSize:])):
				if f, ok := parseEntry(m.data[nfHeaderSize:]); ok {
					flows = append(flows, f)
				}
			}
		}
	}
}
