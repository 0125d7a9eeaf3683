package main

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The servers that keep what they accept, under the rule of a path: one says
// nothing, the other sends all that its clients' way takes.
const (
	idle     kind = 50
	flooding kind = 51
)

// hold makes n connections to a server of its own and keeps them. release closes
// all; it is for the caller also after an error.
func (l *lane) hold(p path, k kind, n int) (release func(), err error) {
	h := &holder{}
	port := p.port(k)
	if err := inside(l.srv, func() error { return h.listen(port) }); err != nil {
		return h.release, err
	}
	if k == flooding {
		h.served.Go(h.flood)
	}
	serial := l.next(n)
	err = inside(l.client, func() error { return h.connect(serial, port, n) })
	return h.release, err
}

type holder struct {
	fds      []int // of clients
	listener int   // 0: none
	served   sync.WaitGroup
	over     atomic.Bool
	mu       sync.Mutex
	accepted []int // under mu
}

func (h *holder) listen(port uint16) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	h.listener = fd
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
		unix.Bind(fd, &unix.SockaddrInet4{Port: int(port)}),
		unix.Listen(fd, backlog),
	); err != nil {
		return fmt.Errorf("tcp port %d: %w", port, err)
	}
	h.served.Go(func() {
		for {
			c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
			switch {
			case err == nil:
				h.mu.Lock()
				h.accepted = append(h.accepted, c)
				h.mu.Unlock()
			case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EBADF):
				return // shut down
			}
		}
	})
	return nil
}

// flood fills every connection again and again, as the way to its client has
// room.
func (h *holder) flood() {
	bytes := make([]byte, 64<<10)
	for ; !h.over.Load(); time.Sleep(20 * time.Millisecond) {
		h.mu.Lock()
		all := h.accepted[:len(h.accepted):len(h.accepted)]
		h.mu.Unlock()
		for _, fd := range all {
			for {
				if n, err := unix.SendmsgN(fd, bytes, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL); err != nil || n == 0 {
					break // full
				}
			}
		}
	}
}

// connect makes the connections, a bounded number at a time.
func (h *holder) connect(serial uint32, port uint16, n int) error {
	for begin := 0; begin < n; {
		var under []unix.PollFd
		for ; begin < n && len(under) < inFlight; begin++ {
			fd, err := h.dial(serial+uint32(begin), port)
			if err != nil {
				return err
			}
			under = append(under, unix.PollFd{Fd: int32(fd), Events: unix.POLLOUT})
		}
		for deadline := time.Now().Add(10 * givenUp); len(under) > 0; {
			if time.Now().After(deadline) {
				return fmt.Errorf("%d of %d connections hang", len(under), begin)
			}
			if _, err := unix.Poll(under, int(givenUp.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("poll: %w", err)
			}
			left := under[:0]
			for _, p := range under {
				if p.Revents == 0 {
					left = append(left, p)
				} else if e, err := unix.GetsockoptInt(int(p.Fd), unix.SOL_SOCKET, unix.SO_ERROR); err != nil || e != 0 {
					return fmt.Errorf("connection %d of %d failed: %w", begin, n, errors.Join(err, unix.Errno(e)))
				}
			}
			under = left
		}
	}
	return nil
}

func (h *holder) dial(k uint32, port uint16) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	h.fds = append(h.fds, fd)
	src, dst := tcpFlow(k, port)
	if err := errors.Join(
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.Bind(fd, src),
	); err != nil {
		return -1, fmt.Errorf("prepare the socket on port %d: %w", src.Port, err)
	}
	if err := unix.Connect(fd, dst); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return -1, fmt.Errorf("connect: %w", err)
	}
	return fd, nil
}

func (h *holder) release() {
	h.over.Store(true)
	if h.listener != 0 {
		_ = unix.Shutdown(h.listener, unix.SHUT_RD) // ends what serves it
		h.served.Wait()
		_ = unix.Close(h.listener)
	}
	for _, fd := range append(h.fds, h.accepted...) {
		_ = unix.Close(fd)
	}
	h.fds, h.accepted, h.listener = nil, nil, 0
}
