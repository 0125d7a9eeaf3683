package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/florianl/go-nflog/v2"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

const (
	// reportBuffer is asked for the receive buffer of Reports, in bytes.
	reportBuffer = 4 << 20
	// reportCopy is how much of a packet a report has: all headers that
	// flow.ParsePacket reads.
	reportCopy = 128
)

// Prefixes of the table's log statements.
const (
	reportUsed   = "use"
	reportDenied = "deny"
	reportError  = "unreachable"
)

// Heard are the receivers of Reports. They run on one goroutine and must not
// block.
type Heard struct {
	// Used: a permission let this first packet in, without user space.
	Used func(flow.Packet)
	// Denied: this first packet was refused.
	Denied func(flow.Packet)
	// Unreachable: the gateway itself sent this ICMP error about a packet
	// with the quoted tuple.
	Unreachable func(quoted flow.Tuple, told flow.Path)
}

// Reports are what the table says of single packets, over NFLOG: that a
// permission let a first packet in (all of them), that a first packet was
// refused (a sample), and that a next hop could not be reached.
type Reports struct {
	group *nflog.Nflog
	heard Heard
	name  func(index int) string
	lost  atomic.Uint64

	start  sync.Once
	begun  chan struct{} // closed by Run and Close: reports may be handed on
	reader reader
	failed chan error
	cancel context.CancelFunc

	mu     sync.Mutex // held while a report is handed on
	closed bool
}

// NewReports binds the group in the network namespace of the calling thread;
// reports wait in the socket until Run. It is an error if the group has another
// reader. name names the interface of an index.
func NewReports(group uint16, name func(index int) string, heard Heard) (*Reports, error) {
	// A threshold of 1: the kernel sends each report at once instead of
	// gathering them for up to a second.
	reader := newReader()
	g, err := nflog.Open(&nflog.Config{Group: group, Copymode: nflog.CopyPacket, Bufsize: reportCopy, QThresh: 1, Logger: reader})
	if err != nil {
		return nil, fmt.Errorf("open NFLOG socket: %w", err)
	}
	if err := forceReadBuffer(g.Con, reportBuffer); err != nil {
		g.Close()
		return nil, fmt.Errorf("enlarge the buffer of NFLOG reports: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &Reports{group: g, heard: heard, name: name, reader: reader,
		begun: make(chan struct{}), failed: make(chan error, 1), cancel: cancel}
	hear := func(a nflog.Attribute) int { return reader.goOn(r.hear(a)) }
	missed := func(err error) int { return reader.goOn(r.missed(ctx, err)) }
	if err := g.RegisterWithErrorFunc(ctx, hear, missed); err != nil {
		cancel()
		g.Close()
		return nil, fmt.Errorf("bind NFLOG group %d: %w", group, err)
	}
	return r, nil
}

// Lost counts the times that the kernel dropped reports.
func (r *Reports) Lost() uint64 { return r.lost.Load() }

// Run hands reports on until ctx is over, which is no error, and closes them.
func (r *Reports) Run(ctx context.Context) error {
	r.start.Do(func() { close(r.begun) })
	defer r.Close()
	select {
	case <-ctx.Done():
		return nil
	case err := <-r.failed:
		return fmt.Errorf("read NFLOG group: %w", err)
	}
}

// Close gives the group back. No report is handed on after it. It may be
// called more than once.
func (r *Reports) Close() error {
	r.mu.Lock()
	closed := r.closed
	r.closed = true
	r.mu.Unlock()
	if closed {
		return nil
	}
	r.start.Do(func() { close(r.begun) })
	select {
	case r.failed <- errors.New("closed"):
	default:
	}
	r.cancel()
	<-r.reader.ended
	return r.group.Close()
}

// reader knows when the library's reading goroutine has ended. The library's
// own Close waits for that goroutine, but may do so before it has begun to
// count itself. The reader is its Logger because that is the only one to hear
// of an end that a cancelled context caused.
type reader struct {
	once  *sync.Once
	ended chan struct{}
}

func newReader() reader { return reader{new(sync.Once), make(chan struct{})} }

// goOn passes the answer of a callback on: not 0 ends the reading.
func (r reader) goOn(answer int) int {
	if answer != 0 {
		r.once.Do(func() { close(r.ended) })
	}
	return answer
}

func (r reader) Errorf(string, ...any) { r.goOn(1) }
func (r reader) Debugf(string, ...any) {}

// missed judges an error of the socket; not 0 ends the reading.
func (r *Reports) missed(ctx context.Context, err error) int {
	if errors.Is(err, unix.ENOBUFS) {
		r.lost.Add(1)
		return 0
	}
	if ctx.Err() == nil {
		select {
		case r.failed <- err:
		default:
		}
	}
	return 1
}

func (r *Reports) hear(a nflog.Attribute) int {
	<-r.begun
	if a.Payload == nil || a.Prefix == nil {
		return 0
	}
	if *a.Prefix == reportError {
		return r.hearError(*a.Payload)
	}
	tuple, _, ok := flow.ParsePacket(*a.Payload)
	if !ok {
		return 0
	}
	p := flow.Packet{Tuple: tuple}
	if a.InDev != nil {
		p.InIface = r.name(int(*a.InDev))
	}
	if a.Mark != nil {
		p.Mark = *a.Mark
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.closed:
		return 1
	case *a.Prefix == reportUsed:
		r.heard.Used(p)
	case *a.Prefix == reportDenied:
		r.heard.Denied(p)
	}
	return 0
}

func (r *Reports) hearError(packet []byte) int {
	quoted, told, ok := flow.ParseUnreachable(packet)
	if !ok {
		return 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return 1
	}
	r.heard.Unreachable(quoted, told)
	return 0
}
