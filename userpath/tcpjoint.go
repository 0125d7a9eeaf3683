package userpath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// A client that asked the gateway has a connection to it, and no packets that
// TPROXY could hand over. Its flow gets one end first and the client's at last:
//
//	client's socket == chain or splice == dialled socket --> server       Connect
//	peer --> accepted socket == chain or splice == client's socket        Receive

// tcpJoint is a flow that waits for its client's end. It implements
// engine.Joint.
type tcpJoint struct {
	f    *tcpFlow
	side int // of the client
	has  atomic.Bool
}

// Connect implements engine.User.
func (u *User) Connect(ctx context.Context, t *engine.Takeover) (engine.Joint, error) {
	return u.tcp.connect(ctx, jobOf(t))
}

// Receive implements engine.User.
func (u *User) Receive(t *engine.Takeover, conn net.Conn) (engine.Joint, error) {
	return u.tcp.receive(jobOf(t), conn)
}

func (t *TCP) connect(ctx context.Context, job tcpJob) (engine.Joint, error) {
	job.joined = true
	f, err := t.dial(ctx, job)
	if err != nil {
		if errors.Is(err, errLost) {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("dial %s: %w", job.dial.Target, err)
	}
	if !job.emulated { // else there is no external side to name
		job.Connected(f.name(), job.dial.Target)
	}
	return t.joint(f, sideInit), nil
}

func (t *TCP) receive(job tcpJob, conn net.Conn) (engine.Joint, error) {
	job.joined = true
	fd, err := takeFD(conn)
	if err != nil {
		job.Ended(flow.Counts{}, flow.Failed, err.Error())
		return nil, err
	}
	job.Connected(job.tuple.Dst, job.tuple.Src)
	t.stats.flows.Add(1)
	f, err := t.begin(job, fd, -1)
	if err != nil {
		t.stats.flows.Add(-1)
		resetFD(fd)
		job.undialled(err)
		return nil, fmt.Errorf("receive from %s: %w", job.tuple.Src, err)
	}
	job.CarriedBy(f)
	return t.joint(f, sideFar), nil
}

// joint has a flow wait for its client.
func (t *TCP) joint(f *tcpFlow, side int) *tcpJoint {
	f.mu.Lock()
	f.since = t.now()
	f.mu.Unlock()
	return &tcpJoint{f: f, side: side}
}

// Carry implements engine.Joint.
func (j *tcpJoint) Carry(conn net.Conn) error {
	fd, err := takeFD(conn)
	if err != nil {
		return err
	}
	if j.has.Swap(true) {
		resetFD(fd)
		return fmt.Errorf("a second connection: %w", filterapi.ErrInvalidArgument)
	}
	if !j.f.joined(j.side, fd) {
		resetFD(fd)
		return filterapi.ErrTerminating
	}
	return nil
}

// Close implements engine.Joint.
func (j *tcpJoint) Close() {
	if !j.has.Swap(true) {
		j.f.abort(flow.Failed, "the client's connection was not joined to it")
	}
}

// joined gives the flow its client's socket and starts it. False: the flow is
// over, and the socket still the caller's.
func (f *tcpFlow) joined(side, fd int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		return false
	}
	f.ends[side].fd = fd
	f.begin()
	// The dialled end is watched already.
	err := f.loop.watch(f, side)
	if err == nil && side == sideFar {
		err = f.loop.watch(f, sideInit)
	}
	if err != nil {
		f.abort(flow.Failed, err.Error())
	}
	return true
}

// takeFD takes the socket out of a connection, which is over for everybody
// else. It stays non-blocking: that belongs to the socket.
func takeFD(conn net.Conn) (fd int, err error) {
	defer func() { _ = conn.Close() }() // the duplicate lives on
	c, ok := conn.(syscall.Conn)
	if !ok {
		return -1, fmt.Errorf("a connection without a socket: %w", filterapi.ErrInvalidArgument)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, fmt.Errorf("take the socket of a connection: %w", err)
	}
	use := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(use, err); err != nil {
		return -1, fmt.Errorf("take the socket of a connection: %w", err)
	}
	if _, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("not a TCP connection: %w", filterapi.ErrInvalidArgument)
	}
	return fd, nil
}
