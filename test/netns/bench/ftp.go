package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// FTP is what a kernel's helper can do as well: the baseline has the kernel's
// own, nf_conntrack_ftp and nf_nat_ftp, which reads the control connection as
// it passes and expects its data connections. In the gateway's lane the filter
// reads it between two sockets, and the data connections are the kernel's.

// ftpPort is that of the control connection, in both lanes.
const ftpPort = 21

// helperRules have the kernel's helper look at control connections.
const helperRules = `
table ip helped {
	ct helper ftp {
		type "ftp" protocol tcp
	}
	chain prerouting {
		type filter hook prerouting priority filter
		tcp dport 21 ct helper set "ftp"
	}
}
`

// ftpConfig lets data connections in on many ports, which do not rest: a few
// clients of the bench make as many as thousands.
const ftpConfig = `
networks:
  lan: {interfaces: [lan0]}
  wan: {interfaces: [wan0]}
network_rules:
  - {name: internet, from: lan, to: wan, relation: nat}
protocols:
  files: {tcp: 21, filter: ftp}
rules:
  - {name: files, action: allow, from: lan, to: wan, protocols: files, filters: {ftp: {}}}
ports: {kernel: 1024-2047, leases: 2048-32767, quota: 65535, quarantine: 0}
log: {format: json}
control: {socket: %s}
`

// declareFTP declares the lanes of FTP.
func (s *stand) declareFTP(ctx context.Context, gateway string) {
	s.helper = s.lane("kernel's FTP helper", func(l *lane) error {
		if err := commandInput(bareRules+helperRules, "ip", "netns", "exec", l.gw, "nft", "-f", "-"); err != nil {
			return err
		}
		return l.serveFTP()
	})
	s.files = s.lane("sluice, FTP", func(l *lane) error {
		if err := s.startSluice(ctx, l, gateway, ftpConfig); err != nil {
			return err
		}
		return l.serveFTP()
	})
}

// ftpCases are the rows of FTP.
func (s *stand) ftpCases(length time.Duration) []benchCase {
	sessions := func(k ftpKind) func(*lane) (amount, error) {
		return func(l *lane) (amount, error) { return ftpSessions(l, k, length) }
	}
	long := func(l *lane) (amount, error) { return ftpThroughput(l, length) }
	waiting := func(l *lane) (amount, error) { return ftpLatency(l, length) }
	const helper = "the kernel's helper"
	return []benchCase{
		{"(f) FTP: sessions with one passive transfer", "1000/s", each, 0, 0, helper, s.files, s.helper, sessions(ftpKind{})},
		{"(f) FTP: sessions with one active transfer", "1000/s", each, 0, 0, helper, s.files, s.helper, sessions(ftpKind{active: true})},
		{"(f) FTP: passive transfers of sessions that stand", "1000/s", each, 0, 0, helper, s.files, s.helper, sessions(ftpKind{standing: true})},
		{"(f) FTP: bytes of a long transfer", "Gbit/s", bits, 0, 0, helper, s.files, s.helper, long},
		{"(f) FTP: from PASV until the data connection stands: p50", "µs", each, 0, -1, helper, s.files, s.helper, waiting},
	}
}

func (l *lane) serveFTP() (err error) {
	l.ftp, err = startFTPServer(l.srv)
	return err
}

// The files of the server: one of a few lines, and one that never ends.
const (
	shortFile = "short"
	longFile  = "long"
)

var shortText = []byte(strings.Repeat("A file of the bench has as much text as a few lines have.\r\n", 16))

// lineReader cuts what a control connection says into lines.
type lineReader struct{ rest []byte }

// read receives once and gives the lines that are complete, without their ends.
// An error is also the end of the connection.
func (r *lineReader) read(fd int) (lines []string, err error) {
	var b [1024]byte
	n, _, err := unix.Recvfrom(fd, b[:], 0)
	if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("receive: %w", err)
	}
	if n == 0 {
		return nil, errEnded
	}
	r.rest = append(r.rest, b[:n]...)
	for {
		line, rest, ok := strings.Cut(string(r.rest), "\r\n")
		if !ok {
			return lines, nil
		}
		lines, r.rest = append(lines, line), []byte(rest)
	}
}

var errEnded = errors.New("the connection has ended")

// hostPort is an address as PORT and the answer to PASV say it, RFC 959, 4.1.2.
func hostPort(a *unix.SockaddrInet4) string {
	return fmt.Sprintf("%d,%d,%d,%d,%d,%d", a.Addr[0], a.Addr[1], a.Addr[2], a.Addr[3], a.Port>>8, a.Port&0xff)
}

func parseHostPort(s string) (*unix.SockaddrInet4, error) {
	var b [6]byte
	parts := strings.Split(s, ",")
	if len(parts) != len(b) {
		return nil, fmt.Errorf("%q is no address", s)
	}
	for i, p := range parts {
		n, err := strconv.ParseUint(p, 10, 8)
		if err != nil {
			return nil, fmt.Errorf("%q is no address: %w", s, err)
		}
		b[i] = byte(n)
	}
	return &unix.SockaddrInet4{Addr: [4]byte(b[:4]), Port: int(b[4])<<8 | int(b[5])}, nil
}

// passiveAddress is where a 227 says that the server waits.
func passiveAddress(reply string) (*unix.SockaddrInet4, error) {
	_, after, _ := strings.Cut(reply, "(")
	inner, _, _ := strings.Cut(after, ")")
	return parseHostPort(inner)
}

// poller waits for many sockets on one thread.
type poller struct {
	fd     int
	events [128]unix.EpollEvent
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	return &poller{fd: fd}, nil
}

func (p *poller) close() { _ = unix.Close(p.fd) }

func (p *poller) add(fd int, events uint32) error {
	if err := unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)}); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// change waits for something else of a socket.
func (p *poller) change(fd int, events uint32) error {
	if err := unix.EpollCtl(p.fd, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)}); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// wait gives the sockets that are ready; none: the time is over. most: in
// milliseconds, -1: for ever.
func (p *poller) wait(most int) ([]unix.EpollEvent, error) {
	for {
		n, err := unix.EpollWait(p.fd, p.events[:], most)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("epoll: %w", err)
		}
		return p.events[:n], nil
	}
}
