package kernelpath

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

func testMarks(t testing.TB) flow.Marks {
	t.Helper()
	m, err := flow.NewMarks(flow.DefaultMask)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// await runs a task until the test ends, which must then end without an error.
func await(t testing.TB, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("a task ended with %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("a task does not end")
		}
	})
}

// next waits for what a task tells.
func next[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(5 * time.Second):
		t.Fatalf("no %s", what)
		panic("unreachable")
	}
}

// watchedRules mark every flow that the gateway forwards as the kernel's, except
// UDP to port 7777, which they mark as user space's.
const watchedRules = `
table inet carry {
	chain arrive { type filter hook prerouting priority -155; policy accept;
		iifname "lan0" ct state new udp dport 7777 ct mark set 0x06000000 accept
		iifname "lan0" ct state new ct mark set 0x05000abc
	}
	chain srcnat { type nat hook postrouting priority srcnat; policy accept;
		oifname "wan0" meta nfproto ipv4 meta l4proto { tcp, udp } snat to 203.0.113.1:20000-29999
		oifname "wan0" meta nfproto ipv4 snat to 203.0.113.1
	}
}`

const conntrackOn = "sysctl -qw net.netfilter.nf_conntrack_events=1 net.netfilter.nf_conntrack_acct=1 net.netfilter.nf_conntrack_timestamp=1"

func TestWatchTellsTheEndOfKernelFlows(t *testing.T) {
	j := newJourney(t)
	j.gw.nft(watchedRules)
	j.gw.sh(conntrackOn)
	ended := make(chan KernelFlow, 100)
	w := made(j.gw, func() (*Watch, error) {
		return NewWatch(testMarks(t), func(f KernelFlow) { ended <- f }, func() { t.Error("events were lost") })
	})
	await(t, w.Run)

	for _, to := range []string{"203.0.113.10", "2001:db8:b::10"} {
		for port := range uint16(2) {
			peer := net.JoinHostPort(to, []string{"7777", "5353"}[port])
			var local net.Addr
			j.client.in(func() error {
				c, err := net.Dial("udp", peer)
				if err != nil {
					return err
				}
				defer c.Close()
				local = c.LocalAddr()
				_, err = c.Write(make([]byte, 100))
				return err
			})
			want := flow.Tuple{Proto: flow.UDP, Src: netip.MustParseAddrPort(local.String()), Dst: netip.MustParseAddrPort(peer)}
			living := made(j.gw, func() ([]KernelFlow, error) { return Dump(t.Context(), testMarks(t)) })
			if len(living) != 1 || living[0].Tuple != want {
				t.Fatalf("dump: %+v, want %v", living, want)
			}
			kernels := made(j.gw, func() ([]KernelFlow, error) { return Dump(t.Context(), testMarks(t), flow.Kernel) })
			if len(kernels) != int(port) {
				t.Fatalf("dump of kernel flows to %s: %v", peer, kernels)
			}
			j.gw.sh("conntrack -D -p udp 2>/dev/null; conntrack -f ipv6 -D -p udp 2>/dev/null || true; conntrack -F 2>/dev/null")
			if port == 0 {
				continue // user space's: not told
			}
			f := next(t, "end of "+want.String(), ended)
			checkEnd(t, f, want)
		}
	}
	if s := w.Stats(); s.Events != 2 || s.Losses != 0 || s.Malformed != 0 || len(ended) != 0 {
		t.Errorf("%+v, %d more ends", s, len(ended))
	}
}

func checkEnd(t *testing.T, f KernelFlow, want flow.Tuple) {
	t.Helper()
	if f.Tuple != want || f.Mark != 0x05000abc || f.ID == 0 || f.Status == 0 {
		t.Errorf("ended %+v, want %v", f, want)
	}
	size := uint64(20 + 8 + 100)
	if want.Is4() {
		if src := f.Translation.Src; src.Addr() != netip.MustParseAddr("203.0.113.1") || src.Port() < 20000 || src.Port() > 29999 || f.Translation.Dst.IsValid() {
			t.Errorf("translation %+v", f.Translation)
		}
	} else {
		size += 20
		if f.Translation != (flow.Translation{}) {
			t.Errorf("translation %+v of IPv6", f.Translation)
		}
	}
	if f.Counts != (flow.Counts{OutBytes: size, OutPackets: 1}) {
		t.Errorf("counts %+v, want one packet of %d bytes", f.Counts, size)
	}
	if age := time.Since(f.Start); age < 0 || age > time.Minute || f.Stop.Before(f.Start) {
		t.Errorf("from %v to %v", f.Start, f.Stop)
	}
}

func TestWatchTCPStateAndICMP(t *testing.T) {
	j := newJourney(t)
	j.gw.nft(watchedRules)
	j.gw.sh(conntrackOn)
	j.client.sh("ping -qc 1 203.0.113.10; ping -qc 1 2001:db8:b::10")
	client, server := connectTCP(j, "203.0.113.10:80")
	defer client.Close()
	defer server.Close()
	flows := made(j.gw, func() ([]KernelFlow, error) { return Dump(t.Context(), testMarks(t), flow.Kernel) })
	seen := map[flow.Proto]KernelFlow{}
	for _, f := range flows {
		seen[f.Proto] = f
	}
	if f := seen[flow.ICMP]; f.Dst.Port() != 8 || f.Translation.Dst.IsValid() || f.Translation.Src.Addr() != netip.MustParseAddr("203.0.113.1") || f.Counts.InPackets != 1 {
		t.Errorf("ping: %+v", f)
	}
	if f := seen[flow.ICMPv6]; f.Dst.Port() != 128 || f.Translation != (flow.Translation{}) || f.Counts.InPackets != 1 {
		t.Errorf("ping over IPv6: %+v", f)
	}
	const established = 3 // TCP_CONNTRACK_ESTABLISHED
	if f := seen[flow.TCP]; f.TCPState != established || f.Dst.Port() != 80 {
		t.Errorf("established connection: %+v", f)
	}
}

// TestWatchLivesThroughLoss floods a small buffer while nobody reads.
func TestWatchLivesThroughLoss(t *testing.T) {
	s := newSpace(t)
	s.nft(`table inet carry {
		chain out { type filter hook output priority 0; policy accept;
			ct mark set 0x05000000
		}
	}`)
	s.sh(conntrackOn)
	lost, ended := make(chan struct{}, 1), make(chan KernelFlow, 1000)
	w := made(s, func() (*Watch, error) {
		return NewWatch(testMarks(t), func(f KernelFlow) { ended <- f }, func() { lost <- struct{}{} })
	})
	if err := forceReadBuffer(w.conn, 4096); err != nil {
		t.Fatal(err)
	}
	send := func(n int) {
		s.in(func() error {
			for range n {
				c, err := net.Dial("udp", "127.0.0.1:9")
				if err != nil {
					return err
				}
				c.Write([]byte("x"))
				c.Close()
			}
			return nil
		})
		s.sh("conntrack -F 2>/dev/null")
	}
	send(200)
	await(t, w.Run)
	next(t, "word of a loss", lost)
	for len(ended) > 0 {
		<-ended
	}
	send(1)
	next(t, "end after the loss", ended)
	if s := w.Stats(); s.Losses == 0 || s.Events >= 201 {
		t.Errorf("%+v", s)
	}
}

// TestWatchWakesForKernelFlowsOnly looks at what the socket filter lets in.
func TestWatchWakesForKernelFlowsOnly(t *testing.T) {
	s := newSpace(t)
	s.nft(`table inet carry {
		chain out { type filter hook output priority 0; policy accept;
		udp dport 1 ct mark set 0x06000000
		udp dport 2 ct mark set 0xf5000000
		udp dport 3 ct mark set 0x0d000000
		udp dport 4 ct mark set 0x07000000
		}
	}`)
	s.sh(conntrackOn)
	w := made(s, func() (*Watch, error) { return NewWatch(testMarks(t), func(KernelFlow) {}, func() {}) })
	defer w.Close()
	s.in(func() error {
		for port := 1; port <= 5; port++ {
			c, err := net.DialUDP("udp", nil, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
			if err != nil {
				return err
			}
			c.Write([]byte("x"))
			c.Close()
		}
		return nil
	})
	s.sh("conntrack -F 2>/dev/null")
	got := map[uint16]bool{}
	w.conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	for len(got) < 2 {
		n, err := w.in.read()
		if err != nil {
			t.Fatalf("%v; so far %v", err, got)
		}
		for i := range n {
			b := w.in.datagram(i)
			m, _, _ := nextMessage(b)
			f, ok := parseEntry(m.data[nfHeaderSize:])
			if !ok {
				t.Fatalf("event % x", b)
			}
			got[f.Dst.Port()] = true
		}
	}
	// Everything was deleted at once: what else there is waits already.
	w.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := w.in.read(); err == nil || len(got) != 2 || !got[2] || !got[3] {
		t.Errorf("ports %v and %d more, want 2 and 3 alone", got, n)
	}
}

func TestDumpStopsWithItsContext(t *testing.T) {
	s := newSpace(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	s.in(func() error {
		if _, err := Dump(ctx, testMarks(t)); !errors.Is(err, context.Canceled) {
			t.Errorf("dump with a cancelled context: %v", err)
		}
		return nil
	})
}

// rawEvents gives destroy events as they come from the kernel.
func rawEvents(t testing.TB) [][]byte {
	t.Helper()
	j := newJourney(t)
	j.gw.nft(watchedRules)
	j.gw.sh(conntrackOn)
	conn := made(j.gw, func() (*netlink.Conn, error) {
		return netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{Groups: 1 << (groupDestroy - 1)})
	})
	defer conn.Close()
	j.client.sh("ping -qc 1 203.0.113.10; ping -qc 1 2001:db8:b::10")
	j.client.try("curl -s --noproxy '*' --max-time 5 http://203.0.113.10:1/; curl -s --noproxy '*' --max-time 5 'http://[2001:db8:b::10]:1/'")
	j.gw.sh("conntrack -F 2>/dev/null")
	in, err := newRawReader(conn, 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	var events [][]byte
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	for seen := map[flow.Proto]bool{}; len(seen) < 3; {
		b, err := in.read()
		if err != nil {
			t.Fatal(err)
		}
		m, _, ok := nextMessage(b)
		if !ok {
			t.Fatalf("event % x", b)
		}
		f, ok := parseEntry(m.data[nfHeaderSize:])
		if !ok {
			t.Fatalf("event % x", m.data)
		}
		if f.Mark != 0 {
			seen[f.Proto] = true
		}
		events = append(events, append([]byte(nil), b...))
	}
	return events
}

// timo reads an event with the general library.
func timo(t testing.TB, datagram []byte) conntrack.Event {
	m, _, _ := nextMessage(datagram)
	var e conntrack.Event
	msg := netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(m.kind), Flags: netlink.HeaderFlags(m.flags)}, Data: m.data}
	if err := e.Unmarshal(msg); err != nil {
		t.Fatal(err)
	}
	return e
}

// TestParserAgreesWithLibrary reads the kernel's events in both ways.
func TestParserAgreesWithLibrary(t *testing.T) {
	for _, raw := range rawEvents(t) {
		m, _, _ := nextMessage(raw)
		got, _ := parseEntry(m.data[nfHeaderSize:])
		want := timo(t, raw).Flow
		o := want.TupleOrig
		from, to := o.Proto.SourcePort, o.Proto.DestinationPort
		if o.Proto.ICMPv4 || o.Proto.ICMPv6 {
			from, to = o.Proto.ICMPID, uint16(o.Proto.ICMPType)
		}
		tuple := flow.Tuple{Proto: flow.Proto(o.Proto.Protocol), Src: netip.AddrPortFrom(o.IP.SourceAddress, from), Dst: netip.AddrPortFrom(o.IP.DestinationAddress, to)}
		counts := flow.Counts{OutBytes: want.CountersOrig.Bytes, OutPackets: want.CountersOrig.Packets, InBytes: want.CountersReply.Bytes, InPackets: want.CountersReply.Packets}
		if got.Tuple != tuple || got.Counts != counts || got.Mark != want.Mark || got.ID != want.ID || got.Status != uint32(want.Status.Value) ||
			!got.Start.Equal(want.Timestamp.Start) || !got.Stop.Equal(want.Timestamp.Stop) {
			t.Errorf("read %+v, the library %+v", got, want)
		}
		if p := want.ProtoInfo.TCP; p != nil && p.State != got.TCPState {
			t.Errorf("state %d, the library says %d", got.TCPState, p.State)
		}
		if markOf(m.data[nfHeaderSize:]) != want.Mark {
			t.Errorf("mark of %v", got.Tuple)
		}
	}
}

func FuzzParseEntry(f *testing.F) {
	f.Add(appendTupleAttr(nil, flow.Tuple{Proto: flow.TCP, Src: netip.MustParseAddrPort("10.0.0.1:1"), Dst: netip.MustParseAddrPort("10.0.0.2:2")}))
	f.Fuzz(func(t *testing.T, b []byte) {
		markOf(b)
		if e, ok := parseEntry(b); ok && (!e.Src.IsValid() || !e.Dst.IsValid()) {
			t.Fatalf("read %+v", e)
		}
		for rest, ok := b, true; ok; {
			_, rest, ok = nextMessage(rest)
		}
	})
}

func BenchmarkParseEntry(b *testing.B) {
	events := rawEvents(b)
	b.Run("own", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			m, _, _ := nextMessage(events[i%len(events)])
			if _, ok := parseEntry(m.data[nfHeaderSize:]); !ok {
				b.Fatal("not read")
			}
		}
	})
	b.Run("others-mark", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			m, _, _ := nextMessage(events[i%len(events)])
			markOf(m.data[nfHeaderSize:])
		}
	})
	b.Run("ti-mo", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			timo(b, events[i%len(events)])
		}
	})
}
