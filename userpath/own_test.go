package userpath

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// markOf is the mark of a socket.
func markOf(t *testing.T, c any) uint32 {
	t.Helper()
	type raw interface {
		SyscallConn() (syscall.RawConn, error)
	}
	var got int
	control := func(fd uintptr) {
		var err error
		if got, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK); err != nil {
			t.Error(err)
		}
	}
	s, ok := c.(raw)
	if !ok {
		t.Fatalf("%T has no descriptor", c)
	}
	r, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Control(control); err != nil {
		t.Fatal(err)
	}
	return uint32(got)
}

func TestOwnSockets(t *testing.T) {
	marks, err := flow.NewMarks(flow.DefaultMask)
	if err != nil {
		t.Fatal(err)
	}
	own := marks.Value(flow.Own)
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			u := NewUser(nil, nil, marks)
			ctx, stop := context.WithCancel(context.Background())
			defer stop()
			ran := make(chan error, 1)
			go func() { ran <- u.Run(ctx) }()
			free := netip.AddrPortFrom(netip.MustParseAddr(host), 0)

			ln, err := u.Listen(free)
			if err != nil {
				t.Fatal(err)
			}
			at := ln.Addr().(*net.TCPAddr).AddrPort()
			if _, err := u.Listen(at); !errors.Is(err, unix.EADDRINUSE) {
				t.Errorf("a second listener: %v", err)
			}
			c, err := u.Dial(ctx, flow.TCP, free, at)
			if err != nil {
				t.Fatal(err)
			}
			s, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			mustWrite(t, c, "hello")
			c.(interface{ CloseWrite() error }).CloseWrite()
			if got, err := io.ReadAll(s); err != nil || string(got) != "hello" {
				t.Errorf("read %q, %v", got, err)
			}

			p, err := u.ListenPacket(free)
			if err != nil {
				t.Fatal(err)
			}
			d, err := u.Dial(ctx, flow.UDP, netip.AddrPort{}, p.LocalAddr().(*net.UDPAddr).AddrPort())
			if err != nil {
				t.Fatal(err)
			}
			mustWrite(t, d, "datagram")
			buf := make([]byte, 100)
			if n, _, err := p.ReadFrom(buf); err != nil || string(buf[:n]) != "datagram" {
				t.Errorf("read %q, %v", buf[:n], err)
			}
			for _, x := range []any{c, s, p, d} {
				if m := markOf(t, x); m != own {
					t.Errorf("%T has the mark %#x, want %#x", x, m, own)
				}
			}

			if err := d.Close(); err != nil {
				t.Error(err)
			}
			ln.Close()
			if _, err := u.Dial(ctx, flow.TCP, netip.AddrPort{}, at); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("to a closed port: %v", err)
			}
			if _, err := u.Dial(ctx, flow.ICMP, netip.AddrPort{}, at); !errors.Is(err, filterapi.ErrInvalidArgument) {
				t.Errorf("neither TCP nor UDP: %v", err)
			}
			if len(u.open) != 3 {
				t.Errorf("%d sockets are known, want 3", len(u.open))
			}
			stop()
			if err := <-ran; err != nil {
				t.Error(err)
			}
			c.SetReadDeadline(time.Now().Add(patience))
			if _, err := c.Read(buf); !errors.Is(err, net.ErrClosed) {
				t.Errorf("after the end: %v", err)
			}
			if _, err := u.ListenPacket(free); !errors.Is(err, filterapi.ErrTerminating) {
				t.Errorf("a socket after the end: %v", err)
			}
		})
	}
}
