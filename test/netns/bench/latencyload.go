package main

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// pause stands between two connections of latency: a moderate load, which waits
// for nothing but its own connection.
const pause = 300 * time.Microsecond

// latency makes connections one after the other, resets each, and gives a
// percentile of the times until they stood.
func latency(l *lane, p path, percent int, length time.Duration) (a amount, err error) {
	err = inside(l.client, func() error {
		var times []time.Duration
		serial := l.next(connections)
		for begun := time.Now(); time.Since(begun) < length && len(times) < connections; {
			t, err := connectOnce(serial+uint32(len(times)), p.port(silent))
			if err != nil {
				return err
			}
			times = append(times, t)
			rest(pause)
		}
		slices.Sort(times)
		a = amount{1, times[len(times)*percent/100]}
		return nil
	})
	return a, err
}

func connectOnce(k uint32, port uint16) (time.Duration, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	defer unix.Close(fd)
	src, dst := tcpFlow(k, port)
	if err := errors.Join(
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.Bind(fd, src),
	); err != nil {
		return 0, fmt.Errorf("prepare the socket on port %d: %w", src.Port, err)
	}
	begun := time.Now()
	if err := unix.Connect(fd, dst); err != nil {
		return 0, fmt.Errorf("connect: %w", err)
	}
	return time.Since(begun), nil
}
