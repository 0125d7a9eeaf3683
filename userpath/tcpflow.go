package userpath

import (
	"errors"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// takeover is what a TCP flow calls of an engine.Takeover.
type takeover interface {
	Conn() filterapi.Connection
	Connected(name, peer netip.AddrPort)
	Established()
	CarriedBy(engine.Carrier)
	Ended(flow.Counts, flow.Result, string)
}

// tcpJob is a takeover with what it says about the flow.
type tcpJob struct {
	takeover
	tuple             flow.Tuple
	dial              engine.Dial
	chain             []engine.Link
	initiatorExternal bool
	emulated          bool // the last filter stands in for the external end
	joined            bool // both ends are handed in: no initiator comes to the listener
	buffer            int

	// One of them hears how the dial went: the held first packet, or a
	// goroutine that waits.
	held    Held
	dialled chan error    // has room for one
	within  time.Duration // of the dial of a held one, at least
}

func jobOf(t *engine.Takeover) tcpJob {
	return tcpJob{
		takeover: t, tuple: t.Tuple, dial: t.Dial, chain: t.Chain,
		initiatorExternal: t.InitiatorExternal, emulated: t.Emulated, buffer: t.Buffer,
	}
}

// tcpFlow is one flow that was taken over.
//
//	dialling --handshake--> waiting --accepted--> carrying --> over
//	    |                      |  30 s, Kill          |
//	    +---- error, Kill -----+----------------------+------> over
//
// Each direction has a carrier of its own: filters hold it, or the loop does.
type tcpFlow struct {
	tcp  *TCP
	loop *loop
	job  tcpJob
	slot int32
	gen  int32

	ends [2]tcpEnd
	dirs [2]direction

	done chan struct{} // closed at the end; nil without data filters
	sent atomic.Uint64 // payload from the initiator
	rcvd atomic.Uint64 // payload to the initiator

	mu       sync.Mutex // orders the arrival of the initiator and the end
	over     bool       // written by the loop under mu
	carrying atomic.Bool
	since    time.Time // of waiting, then of carrying; under mu

	// Loop-owned.
	queued   bool // in loop.again
	kept     bool // keepalive is set on the far end
	shaken   bool // the handshake is over
	told     bool // how the dial went is told, or nobody is dialled
	lingerBy time.Time
	dialBy   time.Time
	dialErr  error       // why it never stood; after the end: the reporter's
	result   flow.Result // likewise
	reason   string

	chain *chain // nil without data filters
}

// tcpEnd is one of the two sockets of a flow.
type tcpEnd struct {
	fd int // -1: not there
	// mu keeps the loop from closing fd under a filter's system call. The
	// loop itself needs it only for closing.
	mu   sync.RWMutex
	gone bool

	// Loop-owned: what the socket can do, as far as its events told. false
	// is certain until the next event, true is to be tried.
	readable, writable, hungUp, failed bool
	dead                               bool // reset by its peer, which wants no other reset

	eof  atomic.Bool // nothing more comes from it
	shut atomic.Bool // nothing more goes to it
	// cause is why the end is unusable, if it broke; told, that a filter or
	// a relay heard of it.
	cause atomic.Pointer[error]
	told  atomic.Bool

	// Only one goroutine sends at a time, and it owns these.
	hasSent, nodelay bool

	rd, wr chan struct{} // ring the waiting filter; nil without data filters
}

// direction is the way from ends[i] to ends[1-i].
type direction struct {
	carrier atomic.Int32

	// Loop-owned.
	bulk  bool // spliced rather than copied
	small int  // small pieces in a row, in bulk
	pipe  *pipe
	rest  []byte // copied, not yet taken by the socket
}

// Who reads the source of a direction.
const (
	byLoop    = iota // the loop, and sends to the other end
	byFilters        // the chain
	byNobody         // the loop, and forgets it: the filter has closed
)

func (f *tcpFlow) prepare(t *TCP, l *loop, job tcpJob) {
	f.tcp, f.loop, f.job = t, l, job
	f.ends[sideInit].nodelay = true // inherited from the listener
	if len(job.chain) == 0 {
		return
	}
	f.done = make(chan struct{})
	for i := range f.ends {
		f.ends[i].rd, f.ends[i].wr = make(chan struct{}, 1), make(chan struct{}, 1)
		f.dirs[i].carrier.Store(byFilters)
	}
	f.chain = newChain(f)
	if job.emulated {
		f.leaveOut()
	}
}

// happened notes an event of one end and acts on it. Loop only.
func (f *tcpFlow) happened(side int, events uint32) {
	if f.over {
		return
	}
	e := &f.ends[side]
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		e.readable = true
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		e.writable = true
	}
	e.hungUp = e.hungUp || events&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0
	e.failed = e.failed || events&unix.EPOLLERR != 0
	if !f.shaken {
		f.handshake(e, events)
		return
	}
	if f.carrying.Load() {
		f.step()
	}
}

// handshake learns how the dial went. Loop only.
func (f *tcpFlow) handshake(e *tcpEnd, events uint32) {
	var err error
	switch {
	case events&(unix.EPOLLERR|unix.EPOLLHUP) != 0:
		if err = socketError(e.fd); err == nil {
			err = errors.New("the connection ended with its handshake")
		}
	case events&unix.EPOLLOUT == 0:
		return
	}
	f.shaken = true
	f.dialEnds(err)
}

// step carries what can be carried. Loop only.
func (f *tcpFlow) step() {
	if f.over {
		return
	}
	for i := range f.dirs {
		src, dst := &f.ends[i], &f.ends[i^oppositeMask]
		carrier := f.dirs[i].carrier.Load()
		switch {
		case carrier == byLoop:
			f.carry(i)
		case carrier == byNobody:
			f.discard(i)
		case src.readable:
			src.readable = false
			wake(src.rd)
		}
		// Where the first filter of a direction has closed, the last one may
		// still send what is on its way.
		if carrier != byLoop && dst.writable {
			dst.writable = false
			wake(dst.wr)
		}
		if f.over {
			return
		}
	}
	for i := range f.ends {
		f.checkError(i)
	}
	f.settle()
}

func wake(bell chan struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}

// arrived gives the flow its initiator's socket and starts it. False: the
// flow is over, and the socket still the caller's.
func (f *tcpFlow) arrived(fd int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		return false
	}
	f.ends[sideInit].fd = fd
	f.begin()
	// The first event is that the socket can be written to; it makes the loop
	// look at both ends.
	if err := f.loop.watch(f, sideInit); err != nil {
		f.abort(flow.Failed, err.Error())
	}
	return true
}

// begin starts what carries the flow. The caller holds mu, and the flow is not
// over.
func (f *tcpFlow) begin() {
	f.since = f.tcp.now()
	f.carrying.Store(true)
	if f.chain != nil {
		f.chain.start()
	}
	f.loop.reports.add(report{f, true})
}

// counts is the payload as the initiator sees it.
func (f *tcpFlow) counts() flow.Counts {
	return flow.Counts{OutBytes: f.sent.Load(), InBytes: f.rcvd.Load()}
}

// countRead and countWritten keep counts: the initiator's end is the measure,
// where there is one.
func (f *tcpFlow) countRead(side, n int) {
	switch {
	case side == sideInit:
		f.sent.Add(uint64(n))
	case f.job.originated():
		f.rcvd.Add(uint64(n))
	}
}

func (f *tcpFlow) countWritten(side, n int) {
	switch {
	case side == sideInit:
		f.rcvd.Add(uint64(n))
	case f.job.originated():
		f.sent.Add(uint64(n))
	}
}

func (f *tcpFlow) sideName(side int) string {
	if side == sideInit {
		return "initiator"
	}
	return "far end"
}

// hurry turns Nagle's algorithm off before the second send: it never delays
// the first one, and many flows have no second.
func (e *tcpEnd) hurry() {
	if e.nodelay {
		return
	}
	if e.hasSent {
		rawSetInt(e.fd, unix.SOL_TCP, unix.TCP_NODELAY, 1)
		e.nodelay = true
	}
	e.hasSent = true
}

var _ takeover = (*engine.Takeover)(nil)

// name is the address of the far end's socket on this side.
func (f *tcpFlow) name() netip.AddrPort {
	e := &f.ends[sideFar]
	e.mu.RLock()
	defer e.mu.RUnlock()
	if e.gone {
		return netip.AddrPort{}
	}
	return localName(e.fd, f.job.dial)
}
