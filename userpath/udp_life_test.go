package userpath

import (
	"context"
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

const udpServer = "203.0.113.10:7"

func TestUDPIdlePeerEndsAndPortStays(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{PeerIdle: 300 * time.Millisecond, SocketIdle: 2 * time.Second})
		seen := l.server.echo(udpServer)
		c := l.client.listen("10.0.0.2:4000")
		f := l.take("10.0.0.2:4000", udpServer, "203.0.113.1:0")
		begun := time.Now()
		l.ask(c, udpServer, []byte("one"))
		first := l.saw(seen).from
		if e := f.end(); e.result != flow.Closed || e.counts.InPackets != 1 || time.Since(begun) < 300*time.Millisecond {
			t.Fatalf("ended %+v after %v", e, time.Since(begun))
		}
		if s := l.u.Stats(); s.Flows != 0 || s.Sockets != 1 {
			t.Fatalf("after the peer: %+v", s)
		}
		// Forgotten, and nobody to ask: lost.
		if _, err := c.WriteToUDPAddrPort([]byte("lost"), netip.MustParseAddrPort(udpServer)); err != nil {
			t.Fatal(err)
		}
		l.silent(c)
		if s := l.u.Stats(); s.NoFlow != 1 {
			t.Errorf("NoFlow %d, want 1", s.NoFlow)
		}
		f = l.take("10.0.0.2:4000", udpServer, "203.0.113.1:0")
		l.ask(c, udpServer, []byte("two"))
		if again := l.saw(seen).from; again != first {
			t.Errorf("the server saw %s, before that %s", again, first)
		}
		f.end()
		for end := time.Now().Add(udpWaitLong); l.u.Stats().Sockets != 0; {
			if time.Now().After(end) {
				t.Fatal("the idle upstream socket stays open")
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
}

// A flow whose protocol has a timeout ends by that, and so does its socket.
func TestUDPIdleOfItsOwn(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		l.server.echo(udpServer)
		c := l.client.listen("10.0.0.2:4000")
		q := udpRequest{tuple: udpTuple("10.0.0.2:4000", udpServer), idle: 300 * time.Millisecond}
		q.dial = engine.Dial{Proto: flow.UDP, Target: q.tuple.Dst, Source: netip.MustParseAddrPort("203.0.113.1:0")}
		begun := time.Now()
		f := l.request(q)
		other := l.take("10.0.0.2:4001", udpServer, "203.0.113.1:0")
		l.ask(c, udpServer, []byte("one"))
		if e := f.end(); e.result != flow.Closed || time.Since(begun) < 300*time.Millisecond {
			t.Fatalf("ended %+v after %v", e, time.Since(begun))
		}
		for end := time.Now().Add(udpWaitLong); l.u.Stats().Sockets != 1; {
			if time.Now().After(end) {
				t.Fatal("the idle upstream socket stays open")
			}
			time.Sleep(20 * time.Millisecond)
		}
		close(other.kill) // only now
		other.end()
	})
}

func TestUDPTrafficKeepsAPeer(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{PeerIdle: 2 * time.Second})
		l.server.echo(udpServer)
		c := l.client.listen("10.0.0.2:4000")
		f := l.take("10.0.0.2:4000", udpServer, "203.0.113.1:0")
		for end := time.Now().Add(4500 * time.Millisecond); time.Now().Before(end); {
			l.ask(c, udpServer, []byte("still here"))
			l.silentFor(c, 100*time.Millisecond)
		}
		select {
		case e := <-f.ended:
			t.Fatalf("ended %+v", e)
		default:
		}
	})
}

func TestUDPKill(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		l.server.echo(udpServer)
		c := l.client.listen("10.0.0.2:4000")
		f := l.take("10.0.0.2:4000", udpServer, "10.0.0.2:4000")
		l.ask(c, udpServer, []byte("one"))
		close(f.kill)
		if _, err := c.WriteToUDPAddrPort([]byte("two"), netip.MustParseAddrPort(udpServer)); err != nil {
			t.Fatal(err)
		}
		l.silent(c)
		if e := f.end(); e.result != flow.CutByPolicy || e.counts.OutPackets != 1 {
			t.Errorf("ended %+v", e)
		}
		if s := l.u.Stats(); s.Flows != 0 || s.Sockets != 0 {
			t.Errorf("left behind: %+v", s)
		}
		l.stop()
		select {
		case e := <-f.ended:
			t.Errorf("ended twice: %+v", e)
		default:
		}
	})
}

func TestUDPStopEndsEveryFlow(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		direct := l.take("10.0.0.2:4000", udpServer, "203.0.113.1:0")
		held := l.take("10.0.0.2:4001", udpServer, "203.0.113.1:0", udpLinkOf(&udpCopier{}))
		l.stop()
		for _, f := range []*udpFake{direct, held} {
			if e := f.end(); e.result != flow.CutByPolicy {
				t.Errorf("ended %+v", e)
			}
		}
		late := newUDPFake(t)
		q := udpRequest{tuple: flow.Tuple{Proto: flow.UDP, Src: netip.MustParseAddrPort("10.0.0.2:4002"), Dst: netip.MustParseAddrPort(udpServer)}, control: late}
		q.dial.Target = q.tuple.Dst
		if p := l.u.take(q); p != flow.Drop || late.end().result != flow.Failed {
			t.Errorf("a flow was taken over after the end: %s", p)
		}
	})
}

func TestUDPTakenOverAgain(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		l.server.echo(udpServer)
		c := l.client.listen("10.0.0.2:4000")
		first := l.take("10.0.0.2:4000", udpServer, "203.0.113.1:0")
		l.ask(c, udpServer, []byte("one"))
		q := l.u.find(udpKey{netip.MustParseAddrPort("10.0.0.2:4000"), netip.MustParseAddrPort(udpServer)}).udpRequest
		if p := l.u.take(q); p != flow.User || first.connected != 1 {
			t.Fatalf("the same takeover: path %s, connected %d times", p, first.connected)
		}
		second := l.take("10.0.0.2:4000", udpServer, "203.0.113.1:0")
		if e := first.end(); e.result != flow.Closed {
			t.Errorf("the first ended %+v", e)
		}
		l.ask(c, udpServer, []byte("two"))
		close(second.kill)
		if e := second.end(); e.counts.OutPackets != 1 {
			t.Errorf("the second ended %+v", e)
		}
	})
}

// A flow that conntrack remembers and the pump does not is asked about.
func TestUDPAskAgain(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		asked := make(chan flow.Packet, 16)
		l.decide = func(_ context.Context, p flow.Packet) flow.Path {
			asked <- p
			if p.Src.Port() == 4000 {
				l.take(p.Src.String(), p.Dst.String(), "203.0.113.1:0")
				return flow.User
			}
			return flow.PortUnreachable
		}
		l.start(UDPConfig{})
		l.server.echo(udpServer)
		refused := l.client.dial("10.0.0.2:4001", udpServer)
		for range 2 { // the second within the time of the refusal
			if _, err := refused.Write([]byte("no")); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
				t.Fatal(err)
			}
			_ = refused.SetReadDeadline(time.Now().Add(udpQuiet))
			_, _ = refused.Read(make([]byte, 10))
		}
		want := flow.Tuple{Proto: flow.UDP, Src: netip.MustParseAddrPort("10.0.0.2:4001"), Dst: netip.MustParseAddrPort(udpServer)}
		if p := <-asked; p.Tuple != want || len(asked) != 0 {
			t.Errorf("asked about %s and %d more times, want %s once", p.Tuple, len(asked), want)
		}
		if s := l.u.Stats(); s.NoFlow != 2 || s.ErrorsSent != 1 {
			t.Errorf("stats %+v", s)
		}
		c := l.client.listen("10.0.0.2:4000")
		l.ask(c, udpServer, []byte("yes")) // held until the answer is there
		l.ask(c, udpServer, []byte("and more"))
		if p := <-asked; p.Src.Port() != 4000 || len(asked) != 0 {
			t.Errorf("asked about %s and %d more times", p.Tuple, len(asked))
		}
	})
}

func TestUDPBounds(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{MaxSockets: 2, MaxPeers: 2, MaxFlows: 3})
		refuse := func(src, dst string, want flow.Path) {
			t.Helper()
			f := newUDPFake(t)
			q := udpRequest{tuple: flow.Tuple{Proto: flow.UDP, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)}, control: f}
			q.dial = engine.Dial{Proto: flow.UDP, Target: q.tuple.Dst}
			if p := l.u.take(q); p != want {
				t.Errorf("%s > %s: path %s, want %s", src, dst, p, want)
			} else if e := f.end(); e.result != flow.Failed || e.reason == "" || f.connected != 0 {
				t.Errorf("%s > %s: ended %+v", src, dst, e)
			}
		}
		one := l.take("10.0.0.2:1000", "203.0.113.10:1", "")
		two := l.take("10.0.0.2:1000", "203.0.113.10:2", "10.0.0.2:1000")
		refuse("10.0.0.2:1000", "203.0.113.10:3", flow.Exhausted) // peers
		three := l.take("10.0.0.2:1001", "203.0.113.10:1", "")
		refuse("10.0.0.2:1001", "203.0.113.10:2", flow.Exhausted) // flows
		close(three.kill)
		three.end()
		four := l.take("10.0.0.2:1002", "203.0.113.10:1", "")
		close(two.kill)
		two.end()
		refuse("10.0.0.2:1003", "203.0.113.10:1", flow.Exhausted) // sockets
		for _, f := range []*udpFake{one, four} {
			close(f.kill)
			f.end()
		}
		refuse("10.0.0.2:0", "203.0.113.10:1", flow.Drop)
		refuse("10.0.0.2:1", "[2001:db8:b::10]:1", flow.Drop)
		if n := len(l.u.peers) + len(l.u.flows) + len(l.u.replies) + l.u.opening; n != 0 {
			t.Errorf("%d things left behind", n)
		}
	})
}

// A stranger upstream is not heard.
func TestUDPUnknownPeer(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		seen := l.server.echo(udpServer)
		stranger := l.server.listen("203.0.113.11:9")
		c := l.client.listen("10.0.0.2:4000")
		l.take("10.0.0.2:4000", udpServer, "203.0.113.1:0")
		l.ask(c, udpServer, []byte("one"))
		external := l.saw(seen).from
		udpShell(t, "nft", "insert rule inet sluice input udp dport "+
			netip.AddrPortFrom(external.Addr(), external.Port()).String()[len(external.Addr().String())+1:]+" accept")
		udpShell(t, "nft", "insert rule inet sluice arrive iifname wan0 accept")
		if _, err := stranger.WriteToUDPAddrPort([]byte("hello"), external); err != nil {
			t.Fatal(err)
		}
		l.silent(c)
		if s := l.u.Stats(); s.UnknownPeer != 1 {
			t.Errorf("UnknownPeer %d, want 1", s.UnknownPeer)
		}
	})
}
