package userpath

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// udpTalker is a filter that plays a peer: it may greet, sends back what comes,
// and ends with an error at a word.
type udpTalker struct {
	greeting string
	last     string
	err      error
}

func (f *udpTalker) Pump(_ context.Context, _ filterapi.Connection, in, out filterapi.Socket) error {
	if out != nil {
		return errors.New("there is an external socket")
	}
	if f.greeting != "" {
		if err := in.Send(filterapi.NewBuffer([]byte(f.greeting), nil)); err != nil {
			return err
		}
	}
	for {
		b, err := in.Recv()
		if err != nil {
			return err
		}
		if f.last != "" && string(b.Data) == f.last {
			b.Release()
			return f.err
		}
		if err := in.Send(b); err != nil {
			return err
		}
	}
}

// udpFamilies are a client, a server and a stranger's address of each family.
var udpFamilies = []struct{ name, client, server, stranger string }{
	{"IPv4", "10.0.0.2:4000", "203.0.113.10:7", "198.51.100.7:5060"},
	{"IPv6", "[fd00:a::2]:4000", "[2001:db8:b::10]:7", "[2001:db8:c::7]:5060"},
}

func udpTuple(src, dst string) flow.Tuple {
	return flow.Tuple{Proto: flow.UDP, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)}
}

func udpLinks(filters ...filterapi.DataFilter) (links []engine.Link) {
	for _, f := range filters {
		links = append(links, udpLinkOf(f))
	}
	return links
}

func TestUDPEmulatedPeer(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		for _, a := range udpFamilies {
			seen := l.server.echo(a.server)
			c := l.client.listen(a.client)
			for _, front := range [][]filterapi.DataFilter{nil, {&udpCopier{}}} {
				f := l.request(udpRequest{tuple: udpTuple(a.client, a.server), emulated: true, chain: udpLinks(append(front, &udpTalker{})...)})
				if n := f.stood.Load(); n != 0 || f.connected != 0 {
					t.Errorf("%s: established %d times, connected %d times before the first datagram", a.name, n, f.connected)
				}
				for n := range 3 {
					l.ask(c, a.server, fmt.Appendf(nil, "question %d", n))
				}
				close(f.kill)
				if e := f.end(); e.counts != (flow.Counts{OutBytes: 30, InBytes: 30, OutPackets: 3, InPackets: 3}) || e.result != flow.CutByPolicy {
					t.Errorf("%s: ended %+v", a.name, e)
				}
				if n := f.stood.Load(); n != 1 {
					t.Errorf("%s: established %d times", a.name, n)
				}
			}
			for err, result := range map[error]flow.Result{nil: flow.Closed, filterapi.ErrReleased: flow.Failed, errUDPTest: flow.Failed} {
				f := l.request(udpRequest{tuple: udpTuple(a.client, a.server), emulated: true, chain: udpLinks(&udpTalker{last: "end", err: err})})
				if _, err := c.WriteToUDPAddrPort([]byte("end"), netip.MustParseAddrPort(a.server)); err != nil {
					t.Fatal(err)
				}
				e := f.end()
				if e.result != result || errors.Is(err, filterapi.ErrReleased) && !strings.Contains(e.reason, errNothingToRelease.Error()) {
					t.Errorf("%s: the filter returned %v: ended %+v", a.name, err, e)
				}
			}
			if len(seen) != 0 {
				t.Errorf("%s: the server saw %d datagrams", a.name, len(seen))
			}
		}
		none := newUDPFake(t)
		if p := l.u.take(udpRequest{tuple: udpTuple(udpFamilies[0].client, udpFamilies[0].server), emulated: true, control: none}); p != flow.Drop || none.end().result != flow.Failed {
			t.Errorf("without a filter: path %s", p)
		}
		if n := len(l.u.peers) + len(l.u.flows) + len(l.u.replies) + l.u.opening; n != 0 {
			t.Errorf("%d things left behind", n)
		}
	})
}

func TestUDPOriginate(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		for _, a := range udpFamilies {
			c := l.client.listen(a.client)
			f := newUDPFake(t)
			q := udpRequest{tuple: udpTuple(a.stranger, a.client), chain: udpLinks(&udpCopier{}, &udpTalker{greeting: "hello"}), control: f}
			q.dial = engine.Dial{Proto: flow.UDP, Target: q.tuple.Dst, Source: q.tuple.Src, Transparent: true}
			if err := l.u.originate(q); err != nil {
				t.Fatalf("%s: %v", a.name, err)
			}
			if data, from := l.read(c); string(data) != "hello" || from != q.tuple.Src {
				t.Errorf("%s: %q from %s, want the greeting from %s", a.name, data, from, q.tuple.Src)
			}
			l.ask(c, a.stranger, []byte("question"))
			if n := f.stood.Load(); n != 1 || f.connected != 1 {
				t.Errorf("%s: established %d times, connected %d times", a.name, n, f.connected)
			}
			close(f.kill)
			// The emulated peer is the initiator.
			if e := f.end(); e.counts != (flow.Counts{OutBytes: 13, InBytes: 8, OutPackets: 2, InPackets: 1}) || e.result != flow.CutByPolicy {
				t.Errorf("%s: ended %+v", a.name, e)
			}
		}
		if s := l.u.Stats(); s.Flows != 0 || s.Sockets != 0 || s.ErrorsSent != 0 {
			t.Errorf("left behind: %+v", s)
		}
		l.stop()
		late := newUDPFake(t)
		q := udpRequest{tuple: udpTuple("198.51.100.7:1", "10.0.0.2:1"), chain: udpLinks(&udpTalker{}), control: late}
		q.dial = engine.Dial{Target: q.tuple.Dst, Source: q.tuple.Src, Transparent: true}
		if err := l.u.originate(q); !errors.Is(err, errUDPClosed) || late.end().result != flow.Failed {
			t.Errorf("after the stop: %v", err)
		}
	})
}

// inbound is a flow from the server to the client.
func (l *udpLab) inbound(server, client string, filters ...filterapi.DataFilter) udpRequest {
	q := udpRequest{tuple: udpTuple(server, client), external: true, chain: udpLinks(filters...)}
	q.dial = engine.Dial{Proto: flow.UDP, Target: q.tuple.Dst, Source: q.tuple.Src, Transparent: true}
	return q
}

func TestUDPOneWay(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		for _, a := range udpFamilies {
			seen := l.client.echo(a.client)
			for _, filters := range [][]filterapi.DataFilter{nil, {&udpCopier{}}} {
				s := l.server.listen(a.server)
				q := l.inbound(a.server, a.client, filters...)
				q.oneWay = true
				before := l.u.Stats().OneWay
				f := l.request(q)
				for range 3 {
					if _, err := s.WriteToUDPAddrPort([]byte("in"), q.tuple.Dst); err != nil {
						t.Fatal(err)
					}
					l.saw(seen)
				}
				l.silent(s)
				if n := l.u.Stats().OneWay - before; n != 3 {
					t.Errorf("%s: %d answers were dropped, want 3", a.name, n)
				}
				close(f.kill)
				if e := f.end(); e.counts.OutPackets != 3 || e.counts.InPackets != 0 {
					t.Errorf("%s: ended %+v", a.name, e)
				}
				s.Close()
			}
		}
	})
}

// udpPaused counts what it receives once it goes on.
type udpPaused struct {
	on  chan struct{}
	got atomic.Int64
	all chan struct{}
	n   int64
}

func (f *udpPaused) Pump(_ context.Context, _ filterapi.Connection, in, _ filterapi.Socket) error {
	<-f.on
	for {
		b, err := in.Recv()
		if err != nil {
			return err
		}
		b.Release()
		if f.got.Add(1) == f.n {
			close(f.all)
		}
	}
}

// A burst of 64 KiB waits while the filter pauses, whatever the size of its
// datagrams.
func TestUDPBurstWaits(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		for _, a := range udpFamilies {
			c, tuple := l.client.listen(a.client), udpTuple(a.client, a.server)
			for _, size := range []int{1, 16, 160, 1400, 4096} {
				filter := &udpPaused{on: make(chan struct{}), all: make(chan struct{}), n: int64(udpBurstBytes / size)}
				f := l.request(udpRequest{
					tuple: tuple, chain: udpLinks(filter), burst: true,
					dial: engine.Dial{Proto: flow.UDP, Target: netip.MustParseAddrPort(a.server)},
				})
				data := bytes.Repeat([]byte("x"), size)
				for range filter.n {
					if _, err := c.WriteToUDPAddrPort(data, netip.MustParseAddrPort(a.server)); err != nil {
						t.Fatal(err)
					}
				}
				close(filter.on)
				select {
				case <-filter.all:
				case <-time.After(udpWaitLong):
					t.Errorf("%s: %d of %d datagrams of %d bytes waited (%+v)", a.name, filter.got.Load(), filter.n, size, l.u.Stats())
				}
				pump := l.u.find(udpKey{tuple.Src, tuple.Dst}).pump
				for _, s := range []*udpSocket{pump.sock, l.listener(tuple.Is4())} {
					if room := l.receiveBuffer(s); room < udpBurstBytes*768 {
						t.Errorf("%s: the socket has room for %d bytes", a.name, room)
					}
				}
				close(f.kill)
				f.end()
			}
		}
	})
}

func (l *udpLab) listener(is4 bool) *udpSocket {
	if is4 {
		return l.u.listeners[0].sock
	}
	return l.u.listeners[1].sock
}

func (l *udpLab) receiveBuffer(s *udpSocket) (n int) {
	l.Helper()
	var err error
	use := s.raw.Control(func(fd uintptr) { n, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF) })
	if err := errors.Join(use, err); err != nil {
		l.Fatal(err)
	}
	return n
}

// udpVisit is a filter that passes datagrams on and tells when it came and why
// it went.
type udpVisit struct {
	udpCopier
	came chan struct{}
	gone chan error
}

func (f *udpVisit) Pump(ctx context.Context, c filterapi.Connection, in, out filterapi.Socket) error {
	f.came <- struct{}{}
	err := f.udpCopier.Pump(ctx, c, in, out)
	f.gone <- ctx.Err()
	return err
}

// Each peer of a bind has a Pump of its own, which ends when the peer is
// forgotten, and there is another one when the peer comes back.
func TestUDPPeersOfABind(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		filter := &udpVisit{came: make(chan struct{}, 10), gone: make(chan error, 10)}
		asked := make(chan netip.AddrPort, 10)
		l.decide = func(_ context.Context, p flow.Packet) flow.Path {
			asked <- p.Src
			l.request(l.inbound(p.Src.String(), p.Dst.String(), filter))
			return flow.User
		}
		l.start(UDPConfig{})
		for _, a := range udpFamilies {
			seen := l.client.echo(a.client)
			addr := netip.MustParseAddrPort(a.server)
			for _, peer := range []netip.AddrPort{addr, netip.AddrPortFrom(addr.Addr().Next(), 9)} {
				s := l.server.listen(peer.String())
				for visit := range 2 {
					l.ask(s, a.client, fmt.Appendf(nil, "visit %d", visit))
					if from := <-asked; from != peer {
						t.Errorf("asked about %s, want %s", from, peer)
					}
					if got := l.saw(seen); got.from != peer {
						t.Errorf("the client saw %s, want %s", got.from, peer)
					}
					<-filter.came
					l.forget(peer.String(), a.client)
					select {
					case err := <-filter.gone:
						if !errors.Is(err, context.Canceled) {
							t.Errorf("%s: Pump ended while its context said %v", peer, err)
						}
					case <-time.After(udpWaitLong):
						t.Fatalf("%s: Pump goes on after the peer was forgotten", peer)
					}
					l.idle() // a datagram before that comes to a socket that closes
				}
			}
		}
		if len(asked)+len(filter.came) != 0 {
			t.Errorf("%d questions and %d calls of Pump too many", len(asked), len(filter.came))
		}
	})
}

// idle waits until no flow and no socket is left.
func (l *udpLab) idle() {
	l.Helper()
	for end := time.Now().Add(udpWaitLong); ; runtime.Gosched() {
		s := l.u.Stats()
		if s.Flows == 0 && s.Sockets == 0 {
			return
		}
		if time.Now().After(end) {
			l.Fatalf("%d flows and %d sockets are left", s.Flows, s.Sockets)
		}
	}
}

// A filter that returns at once, and a kill that comes at once, leave nothing
// behind.
func TestUDPFlowThatEndsAtOnce(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		for i := range 200 {
			f := newUDPFake(t)
			q := udpRequest{tuple: udpTuple(fmt.Sprintf("10.0.0.2:%d", 1000+i), udpServer), control: f, chain: udpLinks(udpGone{}, udpGone{})}
			q.dial = engine.Dial{Proto: flow.UDP, Target: q.tuple.Dst}
			if i%2 == 0 {
				q.chain = udpLinks(&udpCopier{})
				close(f.kill)
			}
			l.u.take(q)
			f.end()
		}
		for end := time.Now().Add(udpWaitLong); l.u.Stats().Flows != 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("left behind: %+v", l.u.Stats())
			}
		}
	})
}

type udpGone struct{}

func (udpGone) Pump(context.Context, filterapi.Connection, filterapi.Socket, filterapi.Socket) error {
	return io.ErrUnexpectedEOF
}
