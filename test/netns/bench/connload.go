package main

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// connect makes connections one after the other, a bounded number at a time,
// each reset when it is made or, greeted, when the server's byte is there. The
// last ones, which end behind the measurement, must succeed but do not count.
func connect(l *lane, p path, k kind, length time.Duration) (a amount, err error) {
	err = inside(l.client, func() error {
		poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
		if err != nil {
			return fmt.Errorf("epoll: %w", err)
		}
		defer unix.Close(poll)
		c := &connector{poll: poll, port: p.port(k), serial: l.next(connections), greeted: k == greet, open: map[int]bool{}}
		defer c.abandon()
		a, err = c.run(length)
		return err
	})
	return a, err
}

type connector struct {
	poll    int
	port    uint16
	serial  uint32
	greeted bool
	open    map[int]bool
	failed  int
}

func (c *connector) abandon() {
	for fd := range c.open {
		_ = unix.Close(fd)
	}
}

func (c *connector) run(length time.Duration) (a amount, err error) {
	begun := time.Now()
	events := make([]unix.EpollEvent, inFlight)
	for begin := 0; ; {
		for len(c.open) < inFlight && begin < connections && time.Since(begun) < length {
			if err := c.begin(c.serial + uint32(begin)); err != nil {
				return a, err
			}
			begin++
		}
		if len(c.open) == 0 {
			if c.failed*100 > begin {
				return a, fmt.Errorf("%d of %d connections failed", c.failed, begin)
			}
			return a, nil
		}
		n, err := unix.EpollWait(c.poll, events, int(givenUp.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return a, fmt.Errorf("epoll: %w", err)
		}
		if n == 0 {
			return a, fmt.Errorf("%d of %d connections hang", len(c.open), begin)
		}
		for _, e := range events[:n] {
			made := c.finish(int(e.Fd))
			if t := time.Since(begun); made && t < length {
				a.units++
				a.time = t
			}
		}
	}
}

func (c *connector) begin(k uint32) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	c.open[fd] = true
	src, dst := tcpFlow(k, c.port)
	if err := errors.Join(
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), // the port goes to several servers
		unix.Bind(fd, src),
	); err != nil {
		return fmt.Errorf("prepare the socket on port %d: %w", src.Port, err)
	}
	if err := unix.Connect(fd, dst); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fmt.Errorf("connect: %w", err)
	}
	want := uint32(unix.EPOLLOUT)
	if c.greeted {
		want = unix.EPOLLIN
	}
	if err := unix.EpollCtl(c.poll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: want, Fd: int32(fd)}); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// finish resets a connection and says whether it was made.
func (c *connector) finish(fd int) bool {
	var made bool
	if c.greeted {
		var b [1]byte
		n, _, err := unix.Recvfrom(fd, b[:], 0)
		made = n == 1 && err == nil
	} else {
		state, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		made = state == 0 && err == nil
	}
	delete(c.open, fd)
	_ = unix.Close(fd)
	if !made {
		c.failed++
	}
	return made
}
