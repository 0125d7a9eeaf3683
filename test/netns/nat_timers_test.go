package netns_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// rest is how many seconds conntrack will still keep a flow of the client's if it
// carries nothing.
func rest(l *lab.Lab, proto string, src netip.Addr, dst netip.AddrPort) int {
	l.T.Helper()
	var seconds int
	lab.Eventually(l.T, lab.Patience(5*time.Second), fmt.Sprintf("%s from %s to %s is known", proto, src, dst), func() bool {
		f, ok := l.GW.Flow(proto, src, dst)
		if !ok {
			return false
		}
		var err error
		seconds, err = strconv.Atoi(strings.Fields(f.Line)[4])
		return err == nil
	})
	return seconds
}

// expires waits for something that comes of the end of a flow. Conntrack forgets
// what has expired when it meets it; by itself that may take a minute.
func expires(l *lab.Lab, what string, ok func() bool) {
	l.T.Helper()
	lab.Eventually(l.T, lab.Patience(30*time.Second), what, func() bool {
		l.GW.Conntrack()
		return ok()
	})
}

// about wants a number of seconds that were n a moment ago.
func about(t *testing.T, what string, got, n int) {
	t.Helper()
	if got > n || got < n-int(lab.Patience(5*time.Second).Seconds()) {
		t.Errorf("%s: conntrack keeps it for %d s, want %d", what, got, n)
	}
}

const everything = "  - {name: all, action: allow, from: lan, to: wan, protocols: any}\n"

// RFC 4787, REQ-5: a UDP flow that carries nothing lives for 300 s, answered or
// not, one of DNS for 10 s, and one of a protocol with a timeout as long as that
// says: whether the kernel decides it, or user space, or carries it.
func TestNUDP05IdleTimer(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	for _, port := range []int{53, 9000, 9001, 9003, 9004} {
		l.Srv.EchoUDP(port)
	}
	g := l.Gateway(lab.Config{
		Protocols: "  carried: {udp: [9003, 9005], timeout: 2}\n  brief: {udp: [9001, 9004], timeout: 100}\n  long: {udp: 9002, timeout: 600}\n",
		Rules: "  - {name: carried, action: allow, from: lan, to: wan, protocols: carried, no_kernel_mode: true}\n" +
			everything,
	})
	srv := lab.Srv4
	for _, c := range []struct {
		port     int
		answered bool
		want     int
	}{{9000, true, 300}, {9010, false, 300}, {53, true, 10}, {9001, true, 100}, {9004, true, 100}, {9002, false, 600}} {
		at := netip.AddrPortFrom(srv, uint16(c.port))
		conn := l.Client.MustDial("udp4", at.String(), time.Second)
		if c.answered {
			echo(t, conn, "hello")
		} else if _, err := conn.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		about(t, fmt.Sprintf("UDP port %d", c.port), rest(l, "udp", lab.Client4, at), c.want)
	}
	conn := l.Client.MustDial("udp4", netip.AddrPortFrom(srv, 9003).String(), time.Second)
	begun := time.Now()
	echo(t, conn, "hello")
	g.AwaitRecord("flow", lab.Patience(20*time.Second), func(r lab.Record) bool { return r.Text("rule") == "carried" })
	if d := time.Since(begun); d < 2*time.Second {
		t.Errorf("a flow in user space ended after %v", d)
	}
}

// A protocol's timeout holds in the kernel: the flow is gone and its end told.
func TestNUDP05FlowEnds(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoUDP(9001)
	g := l.Gateway(lab.Config{Protocols: "  brief: {udp: 9001, timeout: 2}\n", Rules: everything})
	conn := l.Client.MustDial("udp4", netip.AddrPortFrom(lab.Srv4, 9001).String(), time.Second)
	begun := time.Now()
	echo(t, conn, "hello")
	expires(l, "the flow ends", func() bool {
		return slices.ContainsFunc(g.Records("flow"), func(r lab.Record) bool {
			return strings.HasSuffix(r.Text("dst"), ":9001") && r.Text("path") == "kernel"
		})
	})
	if d := time.Since(begun); d < 2*time.Second || d > lab.Patience(15*time.Second) {
		t.Errorf("the flow ended after %v", d)
	}
}

// RFC 5382, REQ-5: a connection that stands may be idle for two hours and four
// minutes at the least, one that opens or closes for four minutes.
func TestNTCP05Timers(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.ServeTCP(9000, func(c *net.TCPConn) { time.Sleep(time.Minute) })
	l.Srv.Run("nft", "add table inet mute; add chain inet mute c { type filter hook input priority 0; }; add rule inet mute c tcp dport 9001 drop")
	l.Gateway(lab.Config{Rules: everything})
	at := netip.AddrPortFrom(lab.Srv4, 9000)
	c := l.Client.MustDial("tcp4", at.String(), 5*time.Second).(*net.TCPConn)
	if got := rest(l, "tcp", lab.Client4, at); got < 7440-60 {
		t.Errorf("established: conntrack keeps it for %d s", got)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, lab.Patience(5*time.Second), "the FIN is seen", func() bool {
		f, ok := l.GW.Flow("tcp", lab.Client4, at)
		return ok && f.State != "ESTABLISHED"
	})
	about(t, "half closed", rest(l, "tcp", lab.Client4, at), 240)
	silent := netip.AddrPortFrom(lab.Srv4, 9001)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		if c, err := l.Client.Dial(ctx, "tcp4", silent.String()); err == nil {
			c.Close()
		}
	}()
	about(t, "half open", rest(l, "tcp", lab.Client4, silent), 240)
}

// RFC 5508, REQ-2: a query lives for 60 s.
func TestNICMP02QueryTimer(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(lab.Config{Rules: everything})
	l.Client.Run("ping", "-c1", "-W5", lab.Srv4.String())
	seconds := -1
	for _, f := range l.GW.Conntrack() {
		if f.Proto == "icmp" && f.Src.Addr() == lab.Client4 {
			seconds, _ = strconv.Atoi(strings.Fields(f.Line)[4])
		}
	}
	about(t, "ping", seconds, 60)
}

// A reload changes the timers, and what the gateway found is back after it is
// down.
func TestB59TimersAreUndone(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	before := l.GW.Snapshot()
	c := lab.Config{Rules: everything, Extra: "timeouts: {udp: 200, icmp: 70, tcp_established: 7500, tcp_transitory: 250}\n"}
	g := l.Gateway(c)
	send := func(port uint16) int {
		at := netip.AddrPortFrom(lab.Srv4, port)
		conn := l.Client.MustDial("udp4", at.String(), time.Second)
		if _, err := conn.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		return rest(l, "udp", lab.Client4, at)
	}
	about(t, "before the reload", send(9000), 200)
	c.Extra = "timeouts: {udp: 150}\n"
	g.Reload(c)
	about(t, "after the reload", send(9001), 150)
	g.Stop()
	g.Down()
	if d := before.Diff(l.GW.Snapshot()); d != "" {
		t.Errorf("after down:\n%s", d)
	}
}
