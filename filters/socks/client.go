package socks

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// client is one connection of a client's, from its greeting to the end of what
// it asked for:
//
//	greeting -- password -- request --+-- CONNECT -- dialled -- answer -- carried
//	   |           |           |      +-- BIND -- answer -- peer -- answer -- carried
//	   +-----------+-----------+      +-- ASSOCIATE -- answer -- until it closes
//	         handshake time
type client struct {
	f     *Filter
	set   *Settings
	conn  net.Conn
	at    netip.AddrPort
	local netip.Addr // the gateway's address that it came to
	has   *tally
	user  string // under f.mu

	ctx  context.Context
	stop context.CancelCauseFunc
}

// serve serves the client and closes its connection, unless the gateway carries
// it.
func (c *client) serve() {
	unwatch := context.AfterFunc(c.ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	defer unwatch()
	_ = c.conn.SetDeadline(time.Now().Add(c.set.Handshake)) // a connection that is closed says so when it is read
	q, err := c.greet()
	if err == nil {
		_ = c.conn.SetDeadline(time.Time{})
		if c.ctx.Err() != nil { // the deadline was taken away from it
			err = context.Cause(c.ctx)
		}
	}
	switch {
	case err == nil:
		c.f.count.requests.Add(1)
	case errors.Is(err, errPassword):
		c.f.count.password.Add(1)
	default:
		c.f.count.bad.Add(1)
	}
	if err != nil {
		c.f.log.Debug("no request", zap.Stringer("client", c.at), zap.Error(err))
		c.hangUp()
		return
	}
	s, err := c.f.sessions.get(who{c.at.Addr(), c.user})
	if err != nil {
		c.deny(q, err)
		return
	}
	defer c.f.sessions.put(s)
	switch {
	case q.command == cmdConnect:
		c.connect(s, q)
	case q.command == cmdBind:
		c.bind(s, q)
	case q.command == cmdAssociate && q.version == version5:
		c.associate(s, q)
	default:
		c.answerLast(q, badCommand)
	}
}

// greet reads up to the end of the request. What it refuses it has answered.
func (c *client) greet() (request, error) {
	b, err := read(c.conn, 1)
	if err != nil {
		return request{}, err
	}
	switch b[0] {
	case version4:
		q, err := readRequest4(c.conn)
		if err == nil && c.set.Authenticate != nil {
			// SOCKS 4 names a user and proves nothing.
			err = errors.New("SOCKS 4 has no password")
			_ = c.send(q.answer(notAllowed, netip.AddrPort{}))
		}
		return q, err
	case version5:
		if err := c.method(); err != nil {
			return request{}, err
		}
		q, err := readRequest5(c.conn)
		if errors.Is(err, errAddressType) {
			_ = c.send(q.answer(badAddress, netip.AddrPort{}))
		}
		return q, err
	}
	return request{}, fmt.Errorf("%w: version %d", errNotSOCKS, b[0])
}

var errPassword = errors.New("wrong password")

// method agrees on how the client proves who he is, and lets him.
func (c *client) method() error {
	offers, err := readMethods(c.conn)
	if err != nil {
		return err
	}
	want := byte(methodNone)
	if c.set.Authenticate != nil {
		want = methodPassword
	}
	if !slices.Contains(offers, want) {
		_ = c.send([]byte{version5, methodRefused})
		return errors.New("the client offers no method that will do")
	}
	if err := c.send([]byte{version5, want}); err != nil || want == methodNone {
		return err
	}
	user, password, err := readPassword(c.conn)
	if err != nil {
		return err
	}
	right, err := c.authenticate(user, password)
	if err != nil {
		return err
	}
	if !right {
		c.f.log.Info("wrong password", zap.Stringer("client", c.at), zap.String("user", user))
		_ = c.send([]byte{1, 1})
		return errPassword
	}
	return c.send([]byte{1, 0})
}

// authenticate looks at a password when it is the client's turn, and has the
// client be that user. An error: its time was over before.
func (c *client) authenticate(user, password string) (right bool, err error) {
	ctx, cancel := context.WithTimeout(c.ctx, c.set.Handshake)
	defer cancel()
	select {
	case c.has.checking <- struct{}{}:
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	right = c.set.Authenticate(user, password)
	<-c.has.checking
	if !right {
		return false, nil
	}
	// Whoever took the user away meanwhile finds the client, or is found here.
	c.f.mu.Lock()
	c.user = user
	s := c.f.settings
	c.f.mu.Unlock()
	return s.Has == nil || s.Has(user), nil
}

func (c *client) send(b []byte) error {
	_, err := c.conn.Write(b)
	return err
}

// answerTime is how long a client may take for an answer of a few bytes.
const answerTime = 10 * time.Second

// answer sends a reply after which the conversation goes on.
func (c *client) answer(q request, a netip.AddrPort) error {
	_ = c.conn.SetWriteDeadline(time.Now().Add(answerTime))
	if err := c.send(q.answer(granted, a)); err != nil {
		return err
	}
	_ = c.conn.SetWriteDeadline(time.Time{})
	return nil
}

// deny answers why something did not come about.
func (c *client) deny(q request, err error) {
	c.f.log.Debug("request refused", zap.Stringer("client", c.at), zap.Stringer("target", q.target), zap.Error(err))
	c.answerLast(q, codeOf(err))
}

// answerLast sends a reply and hangs up.
func (c *client) answerLast(q request, x code) {
	switch x {
	case notAllowed:
		c.f.count.denied.Add(1)
	case failed:
		c.f.count.failed.Add(1)
	}
	_ = c.conn.SetWriteDeadline(time.Now().Add(answerTime))
	_ = c.send(q.answer(x, netip.AddrPort{})) // who has gone needs no answer
	c.hangUp()
}

// The end of a connection whose last answer must arrive: what the client has
// sent and nobody read would have a close become a reset, which destroys it.
const (
	lingerTime  = time.Second
	lingerBytes = 64 << 10
)

func (c *client) hangUp() {
	if w, ok := c.conn.(interface{ CloseWrite() error }); ok && w.CloseWrite() == nil {
		_ = c.conn.SetReadDeadline(time.Now().Add(lingerTime))
		_, _ = io.CopyN(io.Discard, c.conn, lingerBytes)
	}
	_ = c.conn.Close()
}

// errNoAddress: a name has no address of the client's family.
var errNoAddress = errors.New("the name has no address")

// codes are the answers to errors, the first that fits.
var codes = []struct {
	err  error
	code code
}{
	{syscall.ECONNREFUSED, refused},
	{syscall.ECONNRESET, refused},
	{syscall.EACCES, refused}, // ICMPv6 "administratively prohibited"
	{syscall.ENETUNREACH, netUnreachable},
	{syscall.ENONET, netUnreachable},
	{syscall.EHOSTUNREACH, hostUnreachable},
	{syscall.EHOSTDOWN, hostUnreachable},
	{syscall.ENOPROTOOPT, hostUnreachable},
	{syscall.ETIMEDOUT, expired},
	{context.DeadlineExceeded, expired},
	{errFamily, badAddress},
	{errNoAddress, hostUnreachable},
	{filterapi.ErrPolicyDenied, notAllowed},
	{filterapi.ErrNetworkDenied, notAllowed},
	{filterapi.ErrInvalidArgument, notAllowed},
}

func codeOf(err error) code {
	for _, c := range codes {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	return failed
}

// watch calls gone when the client hangs up, until the function that it returns
// is called. Not a byte is taken from the connection.
func (c *client) watch(gone func()) (unwatch func()) {
	raw, ok := c.conn.(syscall.Conn)
	if !ok {
		return func() {}
	}
	rc, err := raw.SyscallConn()
	if err != nil {
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		var b [1]byte
		left := false
		err := rc.Read(func(fd uintptr) bool {
			n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
			if errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EINTR) {
				return false
			}
			left = err != nil || n == 0
			return true // it has more to say: that is somebody else's
		})
		if err == nil && left {
			gone()
		}
	}()
	return func() {
		_ = c.conn.SetReadDeadline(time.Unix(1, 0))
		<-done
		_ = c.conn.SetReadDeadline(time.Time{})
	}
}
