package userpath

import (
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// loop waits for the sockets of many flows and carries the bytes of those
// that no filter holds. One goroutine owns it: whatever a comment calls
// "loop-owned" is touched by that goroutine alone, and only there a socket of
// a flow is closed. It must never block.
//
// The epoll descriptor is itself watched by the runtime's poller, so that an
// idle loop is a parked goroutine and not a thread in a system call. All
// sockets are edge-triggered.
type loop struct {
	epoll *os.File
	epfd  int
	bell  int // eventfd; never read: with edge triggering each write rings

	mu    sync.Mutex
	slots []slot
	free  []int32
	tasks []func() // run on the loop's goroutine, in order
	rung  bool     // tasks were announced
	stop  bool
	lame  chan struct{} // rings for tasks when the epoll instance has failed

	reports reports // to the engine

	// Loop-owned.
	quit     bool // the last task has run
	events   []unix.EpollEvent
	marks    []marked
	answered Held       // whose packet, and perhaps others', is to be released
	again    []*tcpFlow // had more to carry when their turn was over
	scrap    []byte     // for bytes in passage, never across two events
	pipes    []*pipe
}

// slot is the place of a flow; gen makes an event of the former tenant void.
type slot struct {
	flow *tcpFlow
	gen  int32
}

// marked is a flow with what happened to one of its ends.
type marked struct {
	flow   *tcpFlow
	side   int
	events uint32
}

const (
	loopEvents   = 256
	endEvents    = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET&0xffffffff
	bellFd       = -1
	scrapSize    = 16 << 10
	sideInit     = 0 // the initiator's end: the accepted socket
	sideFar      = 1 // the far end: the dialled socket
	oppositeMask = 1
)

func newLoop() (*loop, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make an epoll instance: %w", err)
	}
	bell, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(epfd)
		return nil, fmt.Errorf("make an eventfd: %w", err)
	}
	err = unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, bell, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET&0xffffffff, Fd: bellFd})
	if err == nil {
		err = unix.SetNonblock(epfd, true) // os.NewFile asks the poller to watch what does not block
	}
	if err != nil {
		unix.Close(bell)
		unix.Close(epfd)
		return nil, fmt.Errorf("prepare an epoll instance: %w", err)
	}
	return &loop{
		epoll: os.NewFile(uintptr(epfd), "epoll"), epfd: epfd, bell: bell,
		events:  make([]unix.EpollEvent, loopEvents),
		scrap:   make([]byte, scrapSize),
		reports: reports{bell: make(chan struct{}, 1)},
	}, nil
}

// enter gives a flow its slot.
func (l *loop) enter(f *tcpFlow) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.free); n > 0 {
		f.slot, l.free = l.free[n-1], l.free[:n-1]
	} else {
		f.slot = int32(len(l.slots))
		l.slots = append(l.slots, slot{})
	}
	s := &l.slots[f.slot]
	s.flow, f.gen = f, s.gen
}

// leave takes the slot back.
func (l *loop) leave(f *tcpFlow) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := &l.slots[f.slot]
	s.flow = nil
	s.gen++
	l.free = append(l.free, f.slot)
}

// watch begins to wait for an end of a flow. What is ready already is
// reported at once.
func (l *loop) watch(f *tcpFlow, side int) error {
	ev := unix.EpollEvent{Events: endEvents, Fd: f.slot<<1 | int32(side), Pad: f.gen}
	if err := rawWatch(l.epfd, f.ends[side].fd, &ev); err != nil {
		return fmt.Errorf("watch a socket: %w", err)
	}
	return nil
}

// post has fn run on the loop's goroutine, soon. Safe for concurrent use.
// After the loop's end fn is not run.
func (l *loop) post(fn func()) {
	l.mu.Lock()
	l.tasks = append(l.tasks, fn)
	ring := !l.rung && !l.stop
	l.rung = true
	if ring {
		l.ring() // under the lock: the descriptor lives as long as stop is false
	}
	if l.lame != nil {
		wake(l.lame)
	}
	l.mu.Unlock()
}

func (l *loop) ring() {
	one := [8]byte{1}
	unix.Write(l.bell, one[:]) // fails only if the counter were full: then it has rung
}

// run carries until a task sets quit. When it cannot wait for its sockets any
// more it calls broken, and goes on with its tasks alone: one of them ends its
// flows.
func (l *loop) run(broken func(error)) {
	defer l.close()
	raw, err := l.epoll.SyscallConn()
	if err == nil {
		var failed error
		err = raw.Read(func(uintptr) bool {
			done := false
			done, failed = l.turn()
			return done
		})
		if err == nil {
			err = failed
		}
	}
	if l.quit {
		return
	}
	if err == nil { // the poller has closed
		err = os.ErrClosed
	}
	broken(fmt.Errorf("wait for sockets: %w", err))
	l.limp()
}

// limp runs the tasks of a loop whose epoll instance has failed, until one
// sets quit.
func (l *loop) limp() {
	l.mu.Lock()
	l.lame = make(chan struct{}, 1)
	l.mu.Unlock()
	for {
		l.runTasks()
		if l.quit {
			return
		}
		<-l.lame
	}
}

// turn handles everything that is ready. It is called again by the runtime's
// poller when something is: leaving with anything unread would lose its edge.
func (l *loop) turn() (done bool, err error) {
	for {
		n, err := rawEvents(l.epfd, l.events)
		if err != nil && err != unix.EINTR {
			return true, err
		}
		if l.translate(l.events[:max(n, 0)]) {
			l.runTasks()
			if l.quit {
				return true, nil
			}
		}
		l.dispatch()
		unfinished := l.again
		l.again = nil
		for _, f := range unfinished {
			f.queued = false
			f.step()
		}
		if len(l.again) > 0 {
			runtime.Gosched()
		} else if n < len(l.events) && err == nil {
			return false, nil
		}
	}
}

// dispatch has the flows of this turn act on their events. What ends a dial
// comes first: a SYN that is held waits for it.
func (l *loop) dispatch() {
	for _, dials := range []bool{true, false} {
		for i := range l.marks {
			if m := &l.marks[i]; m.flow != nil && (!dials || !m.flow.shaken) {
				m.flow.happened(m.side, m.events)
				m.flow = nil
			}
		}
		l.release()
	}
}

// translate finds the flows of events, and says whether the bell rang.
func (l *loop) translate(events []unix.EpollEvent) (rang bool) {
	l.marks = l.marks[:0]
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range events {
		ev := &events[i]
		if ev.Fd == bellFd {
			rang = true
			continue
		}
		s := l.slots[ev.Fd>>1]
		if s.flow != nil && s.gen == ev.Pad {
			l.marks = append(l.marks, marked{s.flow, int(ev.Fd & 1), ev.Events})
		}
	}
	return rang
}

func (l *loop) runTasks() {
	l.mu.Lock()
	tasks := l.tasks
	l.tasks, l.rung = nil, false
	l.mu.Unlock()
	for _, fn := range tasks {
		fn()
	}
	l.release()
}

// flows is everyone with a slot.
func (l *loop) flows() []*tcpFlow {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []*tcpFlow
	for _, s := range l.slots {
		if s.flow != nil {
			all = append(all, s.flow)
		}
	}
	return all
}

func (l *loop) close() {
	l.mu.Lock()
	l.stop = true
	unix.Close(l.bell)
	l.mu.Unlock()
	for _, p := range l.pipes {
		p.close()
	}
	l.epoll.Close()
}
