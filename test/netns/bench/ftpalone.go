package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ftpAlone is a session that has the lane for itself, and waits for each reply.
type ftpAlone struct {
	k       uint32
	control int
	said    lineReader
	lines   []string // said, and not asked for yet
}

// alone has f run in a session that has logged in.
func (l *lane) alone(f func(*ftpAlone) error) error {
	serial := l.next(2 * 256)
	return inside(l.client, func() error {
		src, dst := tcpFlow(serial, ftpPort)
		fd, err := dialFTP(src, dst, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := impatient(fd); err != nil {
			return err
		}
		x := &ftpAlone{k: serial, control: fd}
		for _, w := range ftpWords {
			if _, err := x.ask(w.say, w.reply); err != nil {
				return err
			}
		}
		return f(x)
	})
}

// impatient bounds how long a socket's calls wait.
func impatient(fd int) error {
	t := unix.NsecToTimeval(int64(givenUp))
	if err := errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &t),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &t),
	); err != nil {
		return fmt.Errorf("prepare the socket: %w", err)
	}
	return nil
}

// ask says something, if it is not empty, and gives the reply, which must have a
// code.
func (x *ftpAlone) ask(line, code string) (string, error) {
	if line != "" {
		if _, err := unix.Write(x.control, []byte(line+"\r\n")); err != nil {
			return "", fmt.Errorf("say %q: %w", line, err)
		}
	}
	for begun := time.Now(); len(x.lines) == 0; {
		lines, err := x.said.read(x.control)
		if err != nil {
			return "", fmt.Errorf("reply to %q: %w", line, err)
		}
		if time.Since(begun) > givenUp {
			return "", fmt.Errorf("no reply to %q", line)
		}
		x.lines = lines
	}
	reply := x.lines[0]
	x.lines = x.lines[1:]
	if !strings.HasPrefix(reply, code+" ") {
		return "", fmt.Errorf("reply to %q: %q instead of %s", line, reply, code)
	}
	return reply, nil
}

// passive asks for a data connection and makes it.
func (x *ftpAlone) passive() (int, error) {
	reply, err := x.ask("PASV", "227")
	if err != nil {
		return 0, err
	}
	to, err := passiveAddress(reply)
	if err != nil {
		return 0, err
	}
	src, _ := tcpFlow(x.k+256, 0)
	return dialFTP(src, to, 0)
}

// ftpThroughput reads a file that does not end.
func ftpThroughput(l *lane, length time.Duration) (a amount, err error) {
	err = l.alone(func(x *ftpAlone) error {
		fd, err := x.passive()
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := impatient(fd); err != nil {
			return err
		}
		if _, err := x.ask("RETR "+longFile, "150"); err != nil {
			return err
		}
		a, _, err = receive(fd, length)
		return err
	})
	return a, err
}

// ftpLatency has one transfer after the other, and gives the median of the
// times from PASV until the data connection stood.
func ftpLatency(l *lane, length time.Duration) (a amount, err error) {
	var times []time.Duration
	err = l.alone(func(x *ftpAlone) error {
		for begun := time.Now(); time.Since(begun) < length; rest(pause) {
			asked := time.Now()
			fd, err := x.passive()
			if err != nil {
				return err
			}
			times = append(times, time.Since(asked))
			err = x.fetch(fd)
			_ = unix.Close(fd)
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return a, err
	}
	slices.Sort(times)
	return amount{1, times[len(times)/2]}, nil
}

// fetch has the short file sent.
func (x *ftpAlone) fetch(fd int) error {
	if _, err := x.ask("RETR "+shortFile, "150"); err != nil {
		return err
	}
	got, b := 0, make([]byte, 4096)
	for {
		n, _, err := unix.Recvfrom(fd, b, 0)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("receive a file: %w", err)
		}
		if got += max(n, 0); n == 0 {
			break
		}
	}
	if got != len(shortText) {
		return fmt.Errorf("%d of %d bytes of a file", got, len(shortText))
	}
	_, err := x.ask("", "226")
	return err
}
