package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ftpServer has the files of a lane's srv namespace: one thread that waits for
// the sockets of all sessions. It asks for no password and believes each client;
// what a gateway must not let pass is the tests' business.
type ftpServer struct {
	ready    *poller
	listener int
	over     int                 // an eventfd: readable when it shall end
	owners   map[int]*ftpSession // by each of their sockets
	done     sync.WaitGroup
}

// ftpSession is one control connection and what hangs on it.
type ftpSession struct {
	control int
	local   [4]byte
	said    lineReader
	waiting int                 // the listener of PASV; 0: none
	peer    *unix.SockaddrInet4 // of PORT; nil: none
	data    int                 // 0: none
	stands  bool                // data does
	file    string              // that RETR has asked for; empty: none
}

// startFTPServer listens on every address of a namespace.
func startFTPServer(ns string) (*ftpServer, error) {
	s := &ftpServer{owners: map[int]*ftpSession{}}
	err := inside(ns, func() (err error) {
		if s.ready, err = newPoller(); err != nil {
			return err
		}
		if s.over, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
			return fmt.Errorf("eventfd: %w", err)
		}
		if s.listener, err = listenFTP(&unix.SockaddrInet4{Port: ftpPort}, backlog); err != nil {
			return err
		}
		return errors.Join(s.ready.add(s.over, unix.EPOLLIN), s.ready.add(s.listener, unix.EPOLLIN))
	})
	if err != nil {
		return nil, fmt.Errorf("FTP server: %w", err)
	}
	s.done.Go(func() {
		if err := inside(ns, s.serve); err != nil {
			fmt.Fprintln(os.Stderr, "bench: FTP server: "+err.Error()) // the load meets its silence
		}
	})
	return s, nil
}

func listenFTP(at *unix.SockaddrInet4, n int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), // inherited by what is accepted
		unix.Bind(fd, at),
		unix.Listen(fd, n),
	); err != nil {
		_ = unix.Close(fd)
		return 0, fmt.Errorf("listen at port %d: %w", at.Port, err)
	}
	return fd, nil
}

func (s *ftpServer) close() {
	_, _ = unix.Write(s.over, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // ends serve
	s.done.Wait()
	for fd := range s.owners {
		_ = unix.Close(fd)
	}
	_, _ = unix.Close(s.listener), unix.Close(s.over)
	s.ready.close()
}

func (s *ftpServer) serve() error {
	for {
		events, err := s.ready.wait(-1)
		if err != nil {
			return err
		}
		for _, e := range events {
			fd := int(e.Fd)
			x := s.owners[fd]
			var err error
			switch {
			case fd == s.over:
				return nil
			case fd == s.listener:
				err = s.accept()
			case x == nil: // closed by what came before it
			case fd == x.control:
				err = s.hear(x)
			case fd == x.waiting:
				err = s.acceptData(x)
			case fd == x.data:
				err = s.connected(x)
			}
			if x != nil && err != nil {
				s.end(x) // a client may go at any time
			} else if err != nil {
				return err
			}
		}
	}
}

// own takes a socket in.
func (s *ftpServer) own(fd int, x *ftpSession, events uint32) error {
	s.owners[fd] = x
	return s.ready.add(fd, events)
}

// drop closes one socket of a session, if it is there.
func (s *ftpServer) drop(fd *int) {
	if *fd != 0 {
		delete(s.owners, *fd)
		_ = unix.Close(*fd)
	}
	*fd = 0
}

func (s *ftpServer) end(x *ftpSession) {
	for _, fd := range []*int{&x.control, &x.waiting, &x.data} {
		s.drop(fd)
	}
}

// accept takes new sessions and greets them.
func (s *ftpServer) accept() error {
	for {
		fd, _, err := unix.Accept4(s.listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.ECONNABORTED), errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("accept: %w", err)
		}
		x := &ftpSession{control: fd}
		name, err := unix.Getsockname(fd)
		if at, ok := name.(*unix.SockaddrInet4); ok {
			x.local = at.Addr
		}
		if err := errors.Join(err, s.own(fd, x, unix.EPOLLIN), x.say("220 Ready.")); err != nil {
			s.end(x)
		}
	}
}

// say sends one reply.
func (x *ftpSession) say(line string) error {
	_, err := unix.Write(x.control, []byte(line+"\r\n"))
	return err
}

func (s *ftpServer) hear(x *ftpSession) error {
	lines, err := x.said.read(x.control)
	for _, line := range lines {
		if err == nil {
			err = s.command(x, line)
		}
	}
	return err
}

func (s *ftpServer) command(x *ftpSession, line string) error {
	verb, arg, _ := strings.Cut(line, " ")
	switch verb {
	case "USER":
		return x.say("331 Please specify the password.")
	case "PASS":
		return x.say("230 Login successful.")
	case "TYPE":
		return x.say("200 Switching to Binary mode.")
	case "PASV":
		return s.passive(x)
	case "PORT":
		peer, err := parseHostPort(arg)
		if err != nil {
			return err
		}
		x.peer = peer
		return x.say("200 PORT command successful.")
	case "RETR":
		x.file = arg
		if x.peer != nil {
			return s.connect(x)
		}
		return s.transfer(x)
	case "QUIT":
		return errors.Join(x.say("221 Goodbye."), errEnded)
	}
	return x.say("500 Unknown command.")
}

// passive opens a port of the address that the client knows.
func (s *ftpServer) passive(x *ftpSession) error {
	s.drop(&x.waiting)
	fd, err := listenFTP(&unix.SockaddrInet4{Addr: x.local}, 1)
	if err != nil {
		return err
	}
	x.waiting = fd
	name, err := unix.Getsockname(fd)
	if err != nil {
		return fmt.Errorf("name of a socket: %w", err)
	}
	if err := s.own(fd, x, unix.EPOLLIN); err != nil {
		return err
	}
	return x.say("227 Entering Passive Mode (" + hostPort(name.(*unix.SockaddrInet4)) + ").")
}

func (s *ftpServer) acceptData(x *ftpSession) error {
	fd, _, err := unix.Accept4(x.waiting, unix.SOCK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("accept a data connection: %w", err)
	}
	s.drop(&x.waiting)
	x.data, x.stands = fd, true
	return s.transfer(x)
}

// connect begins the data connection of PORT, from a port that the kernel
// chooses, as most servers do.
func (s *ftpServer) connect(x *ftpSession) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	x.data = fd
	peer := x.peer
	x.peer = nil
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: x.local}); err != nil {
		return fmt.Errorf("bind a data connection: %w", err)
	}
	if err := unix.Connect(fd, peer); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fmt.Errorf("data connection: %w", err)
	}
	return s.own(fd, x, unix.EPOLLOUT)
}

func (s *ftpServer) connected(x *ftpSession) error {
	state, err := unix.GetsockoptInt(x.data, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil || state != 0 {
		s.drop(&x.data)
		x.file = ""
		return x.say("425 Failed to establish connection.")
	}
	x.stands = true
	return s.transfer(x)
}

// transfer sends the file once both are there, the connection and the command.
func (s *ftpServer) transfer(x *ftpSession) error {
	if !x.stands || x.file == "" {
		return nil
	}
	if err := x.say("150 Opening BINARY mode data connection."); err != nil {
		return err
	}
	file, fd := x.file, x.data
	x.file, x.stands = "", false
	if file == longFile {
		x.data = 0
		go pour(fd)
		return nil
	}
	_, err := unix.Write(fd, shortText)
	s.drop(&x.data)
	if err != nil {
		return fmt.Errorf("send the file: %w", err)
	}
	return x.say("226 Transfer complete.")
}
