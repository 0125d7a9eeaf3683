package userpath

import (
	"bytes"
	"math"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// udpFake is the engine's side of one flow.
type udpFake struct {
	t          testing.TB
	kill       chan struct{}
	name, peer netip.AddrPort
	connected  int
	stood      atomic.Int32 // calls of Established
	ended      chan udpEnded
}

type udpEnded struct {
	counts flow.Counts
	result flow.Result
	reason string
}

func newUDPFake(t testing.TB) *udpFake {
	return &udpFake{t: t, kill: make(chan struct{}), ended: make(chan udpEnded, 2)}
}

func (f *udpFake) Conn() filterapi.Connection { return nil }
func (f *udpFake) Connected(name, peer netip.AddrPort) {
	f.name, f.peer = name, peer
	f.connected++
}
func (f *udpFake) Established()            { f.stood.Add(1) }
func (f *udpFake) Killed() <-chan struct{} { return f.kill }
func (f *udpFake) Ended(c flow.Counts, r flow.Result, reason string) {
	f.ended <- udpEnded{c, r, reason}
}

// end waits for Ended.
func (f *udpFake) end() udpEnded {
	f.t.Helper()
	select {
	case e := <-f.ended:
		return e
	case <-time.After(udpWaitLong):
		f.t.Fatal("the flow did not end")
	}
	return udpEnded{}
}

// take takes a flow over; source "" is the route's own choice.
func (l *udpLab) take(src, dst, source string, links ...engine.Link) *udpFake {
	l.Helper()
	q := udpRequest{tuple: flow.Tuple{Proto: flow.UDP, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)}, chain: links}
	q.dial = engine.Dial{Proto: flow.UDP, Target: q.tuple.Dst}
	if source != "" {
		q.dial.Source = netip.MustParseAddrPort(source)
		q.dial.Transparent = q.dial.Source == q.tuple.Src
	}
	return l.request(q)
}

func (l *udpLab) request(q udpRequest) *udpFake {
	l.Helper()
	f := newUDPFake(l)
	q.control = f
	if p := l.u.take(q); p != flow.User {
		l.Fatalf("take over %s: path %s, %v", q.tuple, p, <-f.ended)
	}
	return f
}

// forget lets a flow look as if it had been idle for long.
func (l *udpLab) forget(src, dst string) {
	l.Helper()
	f := l.u.find(udpKey{netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)})
	if f == nil {
		l.Fatalf("%s > %s has ended", src, dst)
	}
	f.last.Store(math.MinInt64)
}

// ask sends a datagram and wants the same bytes back, from the same address.
func (l *udpLab) ask(c *net.UDPConn, to string, data []byte) {
	l.Helper()
	peer := netip.MustParseAddrPort(to)
	if _, err := c.WriteToUDPAddrPort(data, peer); err != nil {
		l.Fatalf("send %d bytes to %s: %v", len(data), to, err)
	}
	got, from := l.read(c)
	if from != peer || !bytes.Equal(got, data) {
		l.Fatalf("sent %d bytes to %s, got %d bytes from %s", len(data), to, len(got), from)
	}
}

func (l *udpLab) read(c *net.UDPConn) ([]byte, netip.AddrPort) {
	l.Helper()
	buf := make([]byte, 65536)
	_ = c.SetReadDeadline(time.Now().Add(udpWaitLong))
	n, from, err := c.ReadFromUDPAddrPort(buf)
	if err != nil {
		l.Fatalf("receive: %v (%+v)", err, l.u.Stats())
	}
	return buf[:n], netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

// silent wants nothing to arrive.
func (l *udpLab) silent(c *net.UDPConn) {
	l.Helper()
	l.silentFor(c, udpQuiet)
}

func (l *udpLab) silentFor(c *net.UDPConn, d time.Duration) {
	l.Helper()
	_ = c.SetReadDeadline(time.Now().Add(d))
	if n, from, err := c.ReadFromUDPAddrPort(make([]byte, 65536)); err == nil {
		l.Fatalf("got %d bytes from %s, want silence", n, from)
	}
}

func (l *udpLab) saw(seen <-chan udpSeen) udpSeen {
	l.Helper()
	select {
	case s := <-seen:
		return s
	case <-time.After(udpWaitLong):
		l.Fatalf("the server saw nothing (%+v)", l.u.Stats())
	}
	return udpSeen{}
}
