package kernelpath

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// cutRules are the chains that a Cutter needs, after the pattern of the table.
const cutRules = watchedRules + `
table inet cutting {
	chain leave { type filter hook output priority raw; policy accept;
		meta mark & 0x07000000 == 0x01000000 notrack
	}
	chain arrive { type filter hook prerouting priority -155; policy accept;
		ct mark & 0x0f000000 vmap { 0x05000000 : accept, 0x0d000000 : goto cut }
		iifname { "lan0", "wan0" } meta l4proto tcp ct state new tcp flags & (fin|syn|rst|ack) != syn counter drop
	}
	chain forward { type filter hook forward priority filter; policy drop;
		ct mark & 0x0f000000 vmap { 0x05000000 : accept, 0x0d000000 : goto cut }
	}
	chain cut {
		meta l4proto tcp counter reject with tcp reset
		counter drop
	}
}`

func newTestCutter(t *testing.T, j journey) *Cutter {
	t.Helper()
	c := made(j.gw, func() (*Cutter, error) {
		return NewCutter(CutConfig{Marks: testMarks(t), Logger: zaptest.NewLogger(t)})
	})
	t.Cleanup(func() { c.Close() })
	await(t, c.Run)
	return c
}

func tupleOf(p flow.Proto, client net.Conn) flow.Tuple {
	return flow.Tuple{Proto: p, Src: netip.MustParseAddrPort(client.LocalAddr().String()), Dst: netip.MustParseAddrPort(client.RemoteAddr().String())}
}

// resetWithin waits for a read to end by a reset.
func resetWithin(t *testing.T, what string, c net.Conn, limit time.Duration) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(limit))
	start := time.Now()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("%s read %v after %v, want a reset", what, err, time.Since(start))
		return
	}
	t.Logf("%s was reset after %v", what, time.Since(start))
}

func TestCutResetsIdleConnection(t *testing.T) {
	j := newJourney(t)
	j.gw.nft(cutRules)
	j.gw.sh(conntrackOn)
	c := newTestCutter(t, j)
	ended := make(chan KernelFlow, 10)
	w := made(j.gw, func() (*Watch, error) {
		return NewWatch(testMarks(t), func(f KernelFlow) { ended <- f }, func() { t.Error("events were lost") })
	})
	await(t, w.Run)

	for _, to := range []string{"203.0.113.10:80", "[2001:db8:b::10]:80"} {
		client, server := connectTCP(j, to)
		bystander, bystanderServer := connectTCP(j, strings.Replace(to, ":80", ":81", 1))
		tuple := tupleOf(flow.TCP, client)
		if err := c.Cut(t.Context(), tuple, tuple.Reverse()); err != nil {
			t.Fatal(err)
		}
		resetWithin(t, "client of "+to, client, 2*time.Second)
		resetWithin(t, "server "+to, server, 2*time.Second)
		f := next(t, "end of "+tuple.String(), ended)
		if f.Tuple != tuple || !testMarks(t).IsCut(f.Mark) || f.Mark&0xfff != 0xabc {
			t.Errorf("ended %+v with mark %#x, want %v cut", f, f.Mark, tuple)
		}
		if err := c.Cut(t.Context(), tuple); err != nil {
			t.Errorf("cut again: %v", err)
		}
		if _, err := bystander.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		bystanderServer.SetReadDeadline(time.Now().Add(2 * time.Second))
		if _, err := bystanderServer.Read(make([]byte, 1)); err != nil {
			t.Errorf("the connection that was not cut: %v", err)
		}
		for _, x := range []net.Conn{client, server, bystander, bystanderServer} {
			x.Close()
		}
	}
}

// TestCutResetsBusyConnection cuts while data flows.
func TestCutResetsBusyConnection(t *testing.T) {
	j := newJourney(t)
	j.gw.nft(cutRules)
	c := newTestCutter(t, j)
	client, server := connectTCP(j, "203.0.113.10:80")
	defer client.Close()
	defer server.Close()
	broke := make(chan error, 1)
	go func() {
		b := make([]byte, 16<<10)
		for {
			if _, err := client.Write(b); err != nil {
				broke <- err
				return
			}
		}
	}()
	buf := make([]byte, 64<<10)
	for total := 0; total < 1<<20; {
		n, err := server.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		total += n
	}
	if err := c.Cut(t.Context(), tupleOf(flow.TCP, client)); err != nil {
		t.Fatal(err)
	}
	server.SetReadDeadline(time.Now().Add(2 * time.Second))
	for {
		_, err := server.Read(buf)
		if errors.Is(err, unix.ECONNRESET) {
			break
		}
		if err != nil {
			t.Fatalf("server: %v", err)
		}
	}
	if err := next(t, "error at the client", broke); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
		t.Errorf("client: %v", err)
	}
}

func TestCutStopsUDP(t *testing.T) {
	j := newJourney(t)
	j.gw.nft(cutRules)
	j.gw.sh(conntrackOn)
	c := newTestCutter(t, j)
	ended := make(chan KernelFlow, 10)
	w := made(j.gw, func() (*Watch, error) {
		return NewWatch(testMarks(t), func(f KernelFlow) { ended <- f }, func() { t.Error("events were lost") })
	})
	await(t, w.Run)
	server := made(j.server, func() (net.PacketConn, error) { return net.ListenPacket("udp", "203.0.113.10:5353") })
	defer server.Close()
	client := made(j.client, func() (net.Conn, error) { return net.Dial("udp", "203.0.113.10:5353") })
	defer client.Close()
	buf := make([]byte, 10)
	client.Write([]byte("before"))
	server.SetReadDeadline(time.Now().Add(2 * time.Second))
	n, peer, err := server.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "before" {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	tuple := tupleOf(flow.UDP, client)
	if err := c.Cut(t.Context(), tuple); err != nil {
		t.Fatal(err)
	}
	client.Write([]byte("after"))
	server.WriteTo([]byte("answer"), peer)
	// The entry ends after both datagrams met the mark.
	if f := next(t, "end of "+tuple.String(), ended); f.Tuple != tuple || f.Counts.InPackets == 0 {
		t.Errorf("ended %+v", f)
	}
	for who, x := range map[string]interface {
		SetReadDeadline(time.Time) error
		Read([]byte) (int, error)
	}{"client": client, "server": server.(*net.UDPConn)} {
		x.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if n, err := x.Read(buf); err == nil {
			t.Errorf("%s got %q after the cut", who, buf[:n])
		}
	}
}

// TestCutUnoffloads lets a flow look offloaded to the part that decides.
func TestCutNeedsAWayOutOfTheFlowtable(t *testing.T) {
	called := 0
	c := &Cutter{cfg: CutConfig{Unoffload: func(context.Context) error { called++; return unix.EIO }}}
	if err := c.unoffload(t.Context()); !errors.Is(err, unix.EIO) || called != 1 {
		t.Errorf("%v after %d calls", err, called)
	}
	c.cfg.Unoffload = nil
	if c.unoffload(t.Context()) == nil {
		t.Error("offloaded flows were left alone without a word")
	}
}

func TestCutLeavesOtherPathsAlone(t *testing.T) {
	j := newJourney(t)
	j.gw.nft(watchedRules)
	c := newTestCutter(t, j)
	client, server := connectTCP(j, "203.0.113.10:80")
	defer client.Close()
	defer server.Close()
	attrs := appendAttr32(appendTupleAttr(nil, tupleOf(flow.TCP, client)), ctaMark, 0xabc)
	if err := c.entries.request(ctMsgNew, unix.AF_INET, attrs, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Cut(t.Context(), tupleOf(flow.TCP, client)); err != nil {
		t.Fatal(err)
	}
	f := made(j.gw, func() (KernelFlow, error) {
		f, ok, err := c.entries.entry(tupleOf(flow.TCP, client))
		if !ok {
			t.Error("no entry")
		}
		return f, err
	})
	if f.Status&statusFixedTimeout != 0 || f.Mark != 0xabc {
		t.Errorf("%+v, mark %#x", f, f.Mark)
	}
}

func TestProbeChecksums(t *testing.T) {
	for _, pair := range [][2]string{{"10.0.0.1:80", "10.0.0.2:4000"}, {"[2001:db8::1]:80", "[2001:db8::ffff:2]:4000"}} {
		from, to := netip.MustParseAddrPort(pair[0]), netip.MustParseAddrPort(pair[1])
		b := probePacket(from, to, 3<<30)
		got, flags, ok := flow.ParsePacket(b)
		if want := (flow.Tuple{Proto: flow.TCP, Src: from, Dst: to}); !ok || got != want || flags != flow.FlagACK {
			t.Errorf("probe says %v flags %x", got, flags)
		}
		sum := onesSum(uint32(flow.TCP)+20, from.Addr().AsSlice())
		if sum = onesSum(onesSum(sum, to.Addr().AsSlice()), b[len(b)-20:]); sum != 0xffff {
			t.Errorf("checksum of %v: %#x", pair, sum)
		}
	}
}
