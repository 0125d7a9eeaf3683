package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ftpKind is what the clients of a load do.
type ftpKind struct {
	active   bool // PORT instead of PASV
	standing bool // a session has transfers until the time is over, which count; else one, and sessions count
}

// ftpSessions has inFlight sessions at a time, each of which must succeed. The
// last ones, which end behind the measurement, do not count.
func ftpSessions(l *lane, kind ftpKind, length time.Duration) (a amount, err error) {
	err = inside(l.client, func() error {
		ready, err := newPoller()
		if err != nil {
			return err
		}
		defer ready.close()
		f := &ftpLoad{ftpKind: kind, ready: ready, serial: l.next(2 * connections), length: length, owners: map[int]*ftpClient{}}
		defer f.abandon()
		err = f.run()
		a = f.amount
		return err
	})
	return a, err
}

type ftpLoad struct {
	ftpKind
	ready  *poller
	serial uint32
	length time.Duration
	begun  time.Time
	owners map[int]*ftpClient // by each of their sockets
	open   int                // sessions
	amount
}

// ftpClient is one session. After the greeting it says the next of ftpWords
// with each reply.
type ftpClient struct {
	k       uint32 // the flow of its control connection
	control int
	at      [4]byte // its own address
	server  [4]byte
	said    lineReader
	word    int // the next one
	waiting int // the listener of PORT; 0: none
	data    int // 0: none
	stands  bool
	got     int  // bytes of the file
	whole   bool // it has ended
	done    bool // the server says so
}

// ftpWords are what a client says, and the replies that it must have for it: up
// to the transfer.
var ftpWords = []struct{ say, reply string }{
	{"", "220"}, {"USER anonymous", "331"}, {"PASS bench@example.com", "230"}, {"TYPE I", "200"},
}

func (f *ftpLoad) abandon() {
	for fd := range f.owners {
		_ = unix.Close(fd)
	}
}

// inTime says whether the measurement goes on.
func (f *ftpLoad) inTime() bool { return time.Since(f.begun) < f.length }

// count notes one unit.
func (f *ftpLoad) count() {
	if t := time.Since(f.begun); t < f.length {
		f.units++
		f.time = t
	}
}

func (f *ftpLoad) run() error {
	f.begun = time.Now()
	for n := uint32(0); ; {
		for f.open < inFlight && n < connections && f.inTime() {
			// Flows 256 apart have one client and one server, and two ports.
			if err := f.begin(f.serial + n/256*512 + n%256); err != nil {
				return err
			}
			n++
		}
		if f.open == 0 {
			return nil
		}
		events, err := f.ready.wait(int(givenUp.Milliseconds()))
		if err != nil {
			return err
		}
		if len(events) == 0 {
			return fmt.Errorf("%d of %d sessions hang", f.open, n)
		}
		for _, e := range events {
			x := f.owners[int(e.Fd)]
			if x == nil {
				continue // closed by what came before it
			}
			if err := f.step(x, int(e.Fd)); err != nil {
				return fmt.Errorf("session %d: %w", n, err)
			}
		}
	}
}

func (f *ftpLoad) step(x *ftpClient, fd int) error {
	switch fd {
	case x.control:
		return f.hear(x)
	case x.waiting:
		return f.accept(x)
	case x.data:
		if x.stands {
			return f.receive(x)
		}
		return f.connected(x)
	}
	return nil
}

// own takes a socket in.
func (f *ftpLoad) own(fd int, x *ftpClient, events uint32) error {
	f.owners[fd] = x
	return f.ready.add(fd, events)
}

// drop closes a socket.
func (f *ftpLoad) drop(fd *int) {
	delete(f.owners, *fd)
	_ = unix.Close(*fd)
	*fd = 0
}

// dialFTP begins a connection.
func dialFTP(src, dst *unix.SockaddrInet4, flags int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|flags, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	err = errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1), unix.Bind(fd, src))
	if err != nil {
		err = fmt.Errorf("prepare the socket on port %d: %w", src.Port, err)
	} else if err = unix.Connect(fd, dst); errors.Is(err, unix.EINPROGRESS) {
		err = nil
	}
	if err != nil {
		_ = unix.Close(fd)
		return 0, fmt.Errorf("connect to port %d: %w", dst.Port, err)
	}
	return fd, nil
}

func (f *ftpLoad) begin(k uint32) error {
	src, dst := tcpFlow(k, ftpPort)
	fd, err := dialFTP(src, dst, unix.SOCK_NONBLOCK)
	if err != nil {
		return err
	}
	f.open++
	return f.own(fd, &ftpClient{k: k, control: fd, at: src.Addr, server: dst.Addr}, unix.EPOLLIN)
}

func (x *ftpClient) say(line string) error {
	if _, err := unix.Write(x.control, []byte(line+"\r\n")); err != nil {
		return fmt.Errorf("say %q: %w", line, err)
	}
	return nil
}

// hear takes the server's replies.
func (f *ftpLoad) hear(x *ftpClient) error {
	lines, err := x.said.read(x.control)
	for _, line := range lines {
		if err := f.reply(x, line); err != nil {
			return fmt.Errorf("%w, at %q", err, line)
		}
	}
	if errors.Is(err, errEnded) && x.word == len(ftpWords)+1 {
		f.drop(&x.control)
		f.open--
		if !f.standing {
			f.count()
		}
		return nil
	}
	return err
}

var errUnexpected = errors.New("an unexpected reply")

func (f *ftpLoad) reply(x *ftpClient, line string) error {
	code, _, _ := strings.Cut(line, " ")
	if x.word < len(ftpWords) {
		if code != ftpWords[x.word].reply {
			return errUnexpected
		}
		if x.word++; x.word < len(ftpWords) {
			return x.say(ftpWords[x.word].say)
		}
		return f.ask(x)
	}
	switch {
	case code == "227" && !f.active:
		to, err := passiveAddress(line)
		if err != nil {
			return err
		}
		src, _ := tcpFlow(x.k+256, 0)
		if x.data, err = dialFTP(src, to, unix.SOCK_NONBLOCK); err != nil {
			return err
		}
		return f.own(x.data, x, unix.EPOLLOUT)
	case code == "200" && f.active:
		return x.say("RETR " + shortFile)
	case code == "150":
		return nil
	case code == "226":
		x.done = true
		return f.next(x)
	case code == "221" && x.word > len(ftpWords):
		return nil
	}
	return errUnexpected
}

// ask begins a transfer.
func (f *ftpLoad) ask(x *ftpClient) error {
	x.got, x.whole, x.done, x.stands = 0, false, false, false
	if !f.active {
		return x.say("PASV")
	}
	fd, err := listenFTP(&unix.SockaddrInet4{Addr: x.at}, 1)
	if err != nil {
		return err
	}
	x.waiting = fd
	name, err := unix.Getsockname(fd)
	if err != nil {
		return fmt.Errorf("name of a socket: %w", err)
	}
	if err := f.own(fd, x, unix.EPOLLIN); err != nil {
		return err
	}
	return x.say("PORT " + hostPort(name.(*unix.SockaddrInet4)))
}

func (f *ftpLoad) accept(x *ftpClient) error {
	fd, _, err := unix.Accept4(x.waiting, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("accept a data connection: %w", err)
	}
	f.drop(&x.waiting)
	x.data, x.stands = fd, true
	return f.own(fd, x, unix.EPOLLIN)
}

func (f *ftpLoad) connected(x *ftpClient) error {
	state, err := unix.GetsockoptInt(x.data, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil || state != 0 {
		return fmt.Errorf("data connection: %w", errors.Join(err, unix.Errno(state)))
	}
	x.stands = true
	return errors.Join(f.ready.change(x.data, unix.EPOLLIN), x.say("RETR "+shortFile))
}

func (f *ftpLoad) receive(x *ftpClient) error {
	var b [4096]byte
	n, _, err := unix.Recvfrom(x.data, b[:], 0)
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
		return nil
	case err != nil:
		return fmt.Errorf("receive a file: %w", err)
	case n > 0:
		x.got += n
		return nil
	case x.got != len(shortText):
		return fmt.Errorf("%d of %d bytes of a file", x.got, len(shortText))
	}
	f.drop(&x.data)
	x.whole = true
	return f.next(x)
}

// next goes on when the file is whole and the server says so.
func (f *ftpLoad) next(x *ftpClient) error {
	if !x.whole || !x.done {
		return nil
	}
	if f.standing {
		f.count()
		if f.inTime() {
			return f.ask(x)
		}
	}
	x.word++
	return x.say("QUIT")
}
