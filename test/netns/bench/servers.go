package main

import (
	"errors"
	"fmt"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kind is what a server does; each has a port under every rule of the gateway.
type kind uint16

const (
	silent kind = iota // accepts TCP, says nothing
	greet              // says one byte to every connection
	bulk               // sends until the client has gone
	sink               // counts UDP datagrams
	kinds
)

// path is the first port of a rule: how the gateway carries the flow.
type path uint16

const (
	decided path = 5000 // by a rule that the kernel decides
	judged  path = 5100 // by a rule whose first packets are queued, and nobody hears of
	carried path = 5200 // by a rule that keeps flows in user space
	heard   path = 5300 // by a rule whose first packets a filter hears of
	// filtered flows pass a data filter that hands everything on.
	filtered path = 5400
)

func (p path) port(k kind) uint16 { return uint16(p) + uint16(k) }

// backlog holds what is accepted a little later, on a busy machine too.
const backlog = 65535

// servers are the sockets in a lane's srv namespace.
type servers struct {
	listeners []int
	sinks     map[uint16]int
	done      sync.WaitGroup
}

func startServers(l *lane) (*servers, error) {
	s := &servers{sinks: map[uint16]int{}}
	err := inside(l.srv, func() error {
		for _, p := range []path{decided, judged, carried, heard, filtered} {
			for k := range kinds {
				if err := s.open(p.port(k), k); err != nil {
					return err
				}
			}
		}
		return nil
	})
	return s, err
}

func (s *servers) open(port uint16, k kind) error {
	if k == sink {
		fd, err := openSink(port)
		if err != nil {
			return fmt.Errorf("udp port %d: %w", port, err)
		}
		s.sinks[port] = fd
		return nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("tcp socket: %w", err)
	}
	s.listeners = append(s.listeners, fd)
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}), // inherited by what is accepted
		unix.Bind(fd, &unix.SockaddrInet4{Port: int(port)}),
		unix.Listen(fd, backlog),
	); err != nil {
		return fmt.Errorf("tcp port %d: %w", port, err)
	}
	s.done.Go(func() { serve(fd, k) })
	return nil
}

func (s *servers) close() {
	for _, fd := range s.listeners {
		_ = unix.Shutdown(fd, unix.SHUT_RD) // ends serve; a listener that never listened has none
	}
	s.done.Wait()
	for _, fd := range s.listeners {
		_ = unix.Close(fd)
	}
	for _, fd := range s.sinks {
		_ = unix.Close(fd)
	}
}

// serve accepts in bunches: it is woken once for many connections, so that the
// load takes little from the gateway. It closes a connection when many later
// ones have come; by then the client has reset it.
func serve(listener int, k kind) {
	const remembered = 1024
	var ring [remembered]int
	at := 0
	defer func() {
		for _, fd := range ring {
			if fd > 0 {
				_ = unix.Close(fd)
			}
		}
	}()
	hello := []byte{'!'}
	for {
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		switch {
		case errors.Is(err, unix.EAGAIN):
			rest(200 * time.Microsecond)
			if !readable(listener) {
				return
			}
			continue
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EBADF):
			return // shut down
		case err != nil:
			continue // ECONNABORTED and its like: of one connection
		}
		switch k {
		case bulk:
			go pour(fd)
			continue
		case greet:
			_, _ = unix.Write(fd, hello) // the client may have gone
		}
		if ring[at] > 0 {
			_ = unix.Close(ring[at])
		}
		ring[at] = fd
		at = (at + 1) % remembered
	}
}

// readable waits for something to accept; false: the listener is shut down.
func readable(fd int) bool {
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		_, err := unix.Poll(p, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && p[0].Revents&unix.POLLHUP == 0
	}
}

// pour sends to one client until it has gone, or takes nothing for two seconds.
func pour(fd int) {
	defer unix.Close(fd)
	t := unix.NsecToTimeval(int64(2 * time.Second))
	if unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &t) != nil {
		return
	}
	b := make([]byte, 256<<10)
	for {
		if _, err := unix.Write(fd, b); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// openSink makes a UDP socket whose filter discards what arrives: the kernel
// counts each datagram and nobody need read it.
func openSink(port uint16) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	discard := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K}}
	err = errors.Join(
		unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &discard[0]}),
		unix.Bind(fd, &unix.SockaddrInet4{Port: int(port)}),
	)
	if err != nil {
		_ = unix.Close(fd)
	}
	return fd, err
}

// arrived is the number of datagrams that have reached a sink: the last field
// of SO_MEMINFO, SK_MEMINFO_DROPS in linux/sock_diag.h.
func arrived(fd int) (uint32, error) {
	var info [9]uint32
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, fmt.Errorf("count datagrams: %w", errno)
	}
	return info[8], nil
}

// rest gives the processor away for a moment: the generators wait like this
// for the gateway, which shares the processors with them.
func rest(d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&t, nil)
}

// listens says whether something in a namespace listens on an address.
func listens(ns, addr string) bool {
	return commandOutputHas(addr, "ip", "netns", "exec", ns, "ss", "-Hltn")
}
