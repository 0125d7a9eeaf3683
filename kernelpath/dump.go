package kernelpath

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// Dump lists the living flows that have one of these paths in their mark; no
// path: all that have any of the gateway's bits. It works in the network
// namespace of the calling thread, daemon or not. The list is no snapshot: a
// flow that begins or ends meanwhile may be in it or not.
func Dump(ctx context.Context, marks flow.Marks, paths ...flow.Path) ([]KernelFlow, error) {
	var flows []KernelFlow
	if err := Each(ctx, marks, func(f *KernelFlow) { flows = append(flows, *f) }, paths...); err != nil {
		return nil, err
	}
	return flows, nil
}

// Each is Dump for who keeps none of them: take runs on the caller's goroutine,
// and f is good until it returns.
func Each(ctx context.Context, marks flow.Marks, take func(f *KernelFlow), paths ...flow.Path) error {
	wanted := func(mark uint32) bool {
		if len(paths) == 0 {
			return mark&marks.Mask() != 0
		}
		return slices.Contains(paths, marks.Path(mark))
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("open netfilter netlink socket: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for _, attrs := range dumpFilters(marks, paths) {
		request, err := conn.Send(ctRequest(ctMsgGet, netlink.Dump, unix.AF_UNSPEC, attrs))
		if err != nil {
			return fmt.Errorf("ask for the conntrack table: %w", err)
		}
		err = readDump(conn, request.Header.Sequence, wanted, take)
		if ctx.Err() != nil {
			return fmt.Errorf("dump the conntrack table: %w", context.Cause(ctx))
		}
		if err != nil {
			return fmt.Errorf("dump the conntrack table: %w", err)
		}
	}
	return nil
}

// dumpFilters are the requests that list what has one of the paths. One path is
// a comparison that the kernel does; kernel flows have a second mark.
func dumpFilters(marks flow.Marks, paths []flow.Path) [][]byte {
	if len(paths) != 1 {
		return [][]byte{nil}
	}
	filter := func(mark, mask uint32) []byte {
		return appendAttr32(appendAttr32(nil, ctaMark, mark), ctaMarkMask, mask)
	}
	all := [][]byte{filter(marks.Value(paths[0]), marks.PathMask())}
	if paths[0] == flow.Kernel {
		all = append(all, filter(marks.OneWay(), marks.Mask()))
	}
	return all
}

func readDump(conn *netlink.Conn, seq uint32, wanted func(mark uint32) bool, take func(*KernelFlow)) error {
	in, err := newRawReader(conn, 64<<10)
	if err != nil {
		return err
	}
	var f KernelFlow
	for {
		datagram, err := in.read()
		if err != nil {
			return err
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
				return m.errorOf()
			case m.kind == unix.NLMSG_ERROR:
				return m.errorOf()
			case len(m.data) >= nfHeaderSize && wanted(markOf(m.data[nfHeaderSize:])):
				if f, ok = parseEntry(m.data[nfHeaderSize:]); ok {
					take(&f)
				}
			}
		}
	}
}
