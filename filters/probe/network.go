package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// network is that of the order's session, or of nobody.
func (f *Filter) network(a args) (filterapi.Network, error) {
	if a.Session == 0 {
		return f.fw, nil
	}
	s, err := f.session(a)
	if err != nil {
		return nil, err
	}
	return s.Network(), nil
}

// dialTime bounds an order to dial unless it says otherwise.
const dialTime = 5 * time.Second

// dial connects, says a text and tells what of the same length came back.
func (f *Filter) dial(a args, out *reply) error {
	n, err := f.network(a)
	if err != nil {
		return err
	}
	from, err1 := addrPort(a.Local)
	to, err2 := addrPort(a.Remote)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	limit := dialTime
	if a.TimeoutMS > 0 {
		limit = time.Duration(a.TimeoutMS) * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	c, err := n.Dial(ctx, a.proto(), from, to)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	out.Addr = c.LocalAddr().String()
	if err := c.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, a.Text); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	b := make([]byte, len(a.Text))
	_, err = io.ReadFull(c, b)
	out.Text = string(b)
	return err
}

// listen opens a socket that answers everything with itself until it is closed.
func (f *Filter) listen(a args, out *reply) error {
	n, err := f.network(a)
	if err != nil {
		return err
	}
	at, err1 := addrPort(a.Local)
	from, err2 := ipFilter(a.Sources)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	if a.proto() == flow.UDP {
		c, err := n.ListenPacket(at, from)
		if err != nil {
			return err
		}
		go echoDatagrams(c)
		out.Addr, out.Socket = c.LocalAddr().String(), f.open(c)
		return nil
	}
	l, err := n.Listen(at, from)
	if err != nil {
		return err
	}
	go echoStreams(l)
	out.Addr, out.Socket = l.Addr().String(), f.open(l)
	return nil
}

func (f *Filter) open(s socket) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lastID++
	f.sockets[f.lastID] = s
	return f.lastID
}

func echoStreams(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return // closed
		}
		go func() {
			defer func() { _ = c.Close() }()
			_, _ = io.Copy(c, c)
		}()
	}
}

func echoDatagrams(c net.PacketConn) {
	b := make([]byte, 65536)
	for {
		n, from, err := c.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_, _ = c.WriteTo(b[:n], from)
		}
	}
}

func (f *Filter) closeSocket(a args, _ *reply) error {
	f.mu.Lock()
	s := f.sockets[a.Socket]
	delete(f.sockets, a.Socket)
	f.mu.Unlock()
	if s == nil {
		return filterapi.ErrNotFound
	}
	return s.Close()
}

func (f *Filter) restrict(a args, _ *reply) error {
	f.mu.Lock()
	s := f.sockets[a.Socket]
	f.mu.Unlock()
	if s == nil {
		return filterapi.ErrNotFound
	}
	from, err := ipFilter(a.Sources)
	if err != nil {
		return err
	}
	return s.SetIPFilter(from)
}
