package kernelpath

import (
	"context"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// marker is a flow that is told after all that came before it.
func marker(t *testing.T, j journey, told <-chan flow.Tuple, others ...flow.Tuple) {
	t.Helper()
	local := sendOne(t, j, "203.0.113.10:9999")
	want := flow.Tuple{Proto: flow.UDP, Src: local, Dst: netip.MustParseAddrPort("203.0.113.10:9999")}
	for _, o := range append(others, want) {
		if got := next(t, "word of "+o.String(), told); got != o {
			t.Fatalf("told of %s, want %s", got, o)
		}
	}
}

// sendOne sends one datagram and gives its source.
func sendOne(t *testing.T, j journey, to string) netip.AddrPort {
	t.Helper()
	c := made(j.client, func() (net.Conn, error) { return net.Dial("udp", to) })
	defer c.Close()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	return netip.MustParseAddrPort(c.LocalAddr().String())
}

// sendUnheard is sendOne that waits for the datagram's arrival, so that its
// event does not come when it is wanted again.
func sendUnheard(t *testing.T, j journey, to string) {
	t.Helper()
	l := made(j.server, func() (net.PacketConn, error) { return net.ListenPacket("udp", to) })
	defer l.Close()
	sendOne(t, j, to)
	if err := l.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := l.ReadFrom(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
}

func TestEstablishedWhileWanted(t *testing.T) {
	j := newJourney(t)
	j.client.sh("ping -6 -n -c 1 -i 0.2 -w 5 2001:db8:b::10")
	j.gw.nft(watchedRules)
	j.gw.sh(conntrackOn)
	// A modular kernel loads conntrack's netlink part behind the back of the
	// first who listens; a gateway's probe has asked it before.
	j.gw.in(func() error {
		_, err := Dump(context.Background(), testMarks(t), flow.Kernel)
		return err
	})
	told := make(chan flow.Tuple, 100)
	w := made(j.gw, func() (*Watch, error) {
		return NewWatch(testMarks(t), func(KernelFlow) {}, func() { t.Error("events were lost") })
	})
	w.OnEstablished(func(f flow.Tuple) { told <- f })
	await(t, w.Run)

	switchTo := func(on bool) {
		t.Helper()
		if err := w.Established(on); err != nil {
			t.Fatal(err)
		}
	}
	switchTo(false) // once too often is no error
	sendUnheard(t, j, "203.0.113.10:5353")
	switchTo(true)
	switchTo(true)
	marker(t, j, told)

	// Answers and user space's flows are not told, nor a SYN without an answer.
	sendOne(t, j, "203.0.113.10:7777")
	j.server.nft(`table inet silent { chain c { type filter hook input priority 0; policy accept; tcp dport 81 drop; }; }`)
	j.client.in(func() error {
		d := net.Dialer{Timeout: short}
		if c, err := d.Dial("tcp", "203.0.113.10:81"); err == nil {
			t.Error("port 81 answers")
			c.Close()
		}
		return nil
	})
	marker(t, j, told)

	for _, to := range []string{"203.0.113.10:80", "[2001:db8:b::10]:80"} {
		client, server := connectTCP(j, to)
		tuple := tupleOf(flow.TCP, client)
		if got := next(t, "word of "+tuple.String(), told); got != tuple {
			t.Errorf("told of %s, want %s", got, tuple)
		}
		exchange(t, client, server, 1)
		exchange(t, server, client, 1)
		client.Close()
		server.Close()
	}
	for len(told) > 0 { // an established flow may be told again
		<-told
	}
	if s := w.Stats(); s.Established == 0 || s.EstablishedLosses != 0 || s.Malformed != 0 {
		t.Errorf("stats: %+v", s)
	}

	switchTo(false)
	sendOne(t, j, "203.0.113.10:5354")
	if got := next(t, "word while one still wants it", told); got.Dst.Port() != 5354 {
		t.Errorf("told of %s", got)
	}
	switchTo(false)
	sendUnheard(t, j, "203.0.113.10:5355")
	switchTo(true)
	marker(t, j, told)
}

// Too many events are counted, and no end of a flow goes missing with them.
func TestEstablishedLosses(t *testing.T) {
	j := newJourney(t)
	j.gw.nft(watchedRules)
	j.gw.sh(conntrackOn)
	told := make(chan flow.Tuple, 10000)
	ended := make(chan KernelFlow, 10000)
	w := made(j.gw, func() (*Watch, error) {
		return NewWatch(testMarks(t), func(f KernelFlow) { ended <- f }, func() { t.Error("ends were lost") })
	})
	w.OnEstablished(func(f flow.Tuple) { told <- f })
	raw, err := w.begun.conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 2048) })
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Established(true); err != nil {
		t.Fatal(err)
	}
	sources := map[netip.AddrPort]bool{} // one that comes again belongs to the same flow
	for range 50 {                       // nobody reads yet
		sources[sendOne(t, j, "203.0.113.10:5353")] = true
	}
	await(t, w.Run)
	for deadline := time.Now().Add(5 * time.Second); w.Stats().EstablishedLosses == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no loss was counted")
		}
	}
	for len(told) > 0 {
		<-told
	}
	marker(t, j, told)
	j.gw.sh("conntrack -F 2>/dev/null")
	for range sources {
		next(t, "end", ended)
	}
}
