package userpath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// tcpLab is client -- gateway -- server in three network namespaces, with the
// rules of a gateway that takes over every TCP flow to the ports 8000-8999.
type tcpLab struct {
	testing.TB
	client, gateway, server *queueSpace
	tcp                     *TCP
	marks                   flow.Marks
}

func newTCPLab(tb testing.TB, change func(*TCPConfig)) *tcpLab {
	tb.Helper()
	l := &tcpLab{TB: tb, client: newQueueSpace(tb), gateway: newQueueSpace(tb), server: newQueueSpace(tb)}
	at := func(s *queueSpace) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), s.file.Fd()) }
	const common = `
		echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad
		echo 0 > /proc/sys/net/ipv6/conf/default/dad_transmits
		ip link set lo up
	`
	l.sh(l.client, common)
	l.sh(l.server, common)
	l.sh(l.gateway, common+`
		ip link add lan0 type veth peer name eth0 netns `+at(l.client)+`
		ip link add wan0 type veth peer name eth0 netns `+at(l.server)+`
		ip addr add 10.0.0.1/24 dev lan0; ip addr add fd00:a::1/64 dev lan0 nodad
		ip addr add 203.0.113.1/24 dev wan0; ip addr add 2001:db8:b::1/64 dev wan0 nodad
		ip link set lan0 up; ip link set wan0 up
		echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
		echo 30 > /proc/sys/net/ipv4/neigh/wan0/retrans_time_ms; echo 30 > /proc/sys/net/ipv6/neigh/wan0/retrans_time_ms
		for f in -4 -6; do
			ip $f rule add fwmark 0x06000000/0x07000000 lookup 100
			ip $f route add local default dev lo table 100
		done
	`)
	l.sh(l.client, `ip addr add 10.0.0.2/24 dev eth0; ip addr add fd00:a::2/64 dev eth0 nodad; ip link set eth0 up
		ip route add default via 10.0.0.1; ip -6 route add default via fd00:a::1`)
	l.sh(l.server, `ip addr add 203.0.113.10/24 dev eth0; ip addr add 2001:db8:b::10/64 dev eth0 nodad; ip link set eth0 up
		ip route add 10.0.0.0/24 via 203.0.113.1; ip -6 route add fd00:a::/64 via 2001:db8:b::1`)
	var err error
	if l.marks, err = flow.NewMarks(flow.DefaultMask); err != nil {
		tb.Fatal(err)
	}
	cfg := TCPConfig{Log: zap.NewNop(), Marks: l.marks}
	if change != nil {
		change(&cfg)
	}
	l.gateway.must(tb, func() error { l.tcp, err = NewTCP(cfg); return err })
	start(tb, l.tcp)
	l.rules()
	return l
}

func (l *tcpLab) sh(s *queueSpace, script string) {
	l.Helper()
	s.must(l, func() error { return runCommand("", "sh", "-ec", script) })
}

// rules are the gateway's, but that a SYN is not held: what is new goes to the
// listener at once. The upstream leg of a routed path has a conntrack zone.
func (l *tcpLab) rules() {
	l.Helper()
	text := strings.ReplaceAll(`table inet sluice {
	chain zone_in {
		type filter hook prerouting priority raw
		socket transparent 1 socket mark and 0x07000000 == 0x07000000 ct zone set 77
	}
	chain zone_out {
		type filter hook output priority raw
		meta mark and 0x07000000 == 0x07000000 fib saddr type != local ct zone set 77
	}
	chain own_out {
		type filter hook output priority mangle
		meta mark and 0x07000000 == 0x07000000 ct mark set 0x07000000
	}
	chain arrive {
		type filter hook prerouting priority -155
		iifname "lan0" ct state new tcp dport 8000-8999 ct mark set 0x06000000
	}
	chain steer {
		type filter hook prerouting priority mangle
		ct mark and 0x07000000 == 0x06000000 goto divert
		ct mark and 0x07000000 == 0x07000000 meta mark set 0x06000000
	}
	chain divert {
		meta mark set 0x06000000
		meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:PORT accept
		meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:PORT accept
	}
	chain forward {
		type filter hook forward priority filter
		policy drop
	}
	chain input {
		type filter hook input priority filter
		policy drop
		iif lo accept
		ct mark and 0x07000000 >= 0x06000000 accept
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
		ct state established,related accept
	}
}
`, "PORT", fmt.Sprint(l.tcp.Port()))
	l.gateway.must(l, func() error { return runCommand(text, "nft", "-f", "-") })
}

// takeOver runs a takeover in the gateway.
func (l *tcpLab) takeOver(ctx context.Context, job tcpJob) (p flow.Path) {
	l.gateway.must(l, func() error { p = l.tcp.takeOverNow(ctx, job); return nil })
	return p
}

func (l *tcpLab) listen(at string) *net.TCPListener {
	l.Helper()
	var ln net.Listener
	l.server.must(l, func() (err error) { ln, err = net.Listen("tcp", at); return err })
	l.Cleanup(func() { ln.Close() })
	return ln.(*net.TCPListener)
}

// connect opens a connection from the client's side.
func (l *tcpLab) connect(from, to netip.AddrPort) (c *net.TCPConn, err error) {
	l.Helper()
	err = l.client.in(func() (err error) {
		d := net.Dialer{Timeout: patience, LocalAddr: net.TCPAddrFromAddrPort(from)}
		conn, err := d.Dial("tcp", to.String())
		if err == nil {
			c = conn.(*net.TCPConn)
			l.Cleanup(func() { c.Close() })
		}
		return err
	})
	return c, err
}

// job is a takeover from the client to the server.
func (l *tcpLab) job(from, to string, d engine.Dial, filters ...filterapi.DataFilter) (tcpJob, *recorder) {
	r := newRecorder(l)
	j := tcpJob{takeover: r, dial: d, tuple: flow.Tuple{Proto: flow.TCP, Src: netip.MustParseAddrPort(from), Dst: netip.MustParseAddrPort(to)}}
	j.dial.Proto, j.dial.Target = flow.TCP, j.tuple.Dst
	for _, f := range filters {
		j.chain = append(j.chain, engine.Link{Filter: f, Name: "test"})
	}
	return j, r
}

func TestTakeoverIsTransparent(t *testing.T) {
	l := newTCPLab(t, nil)
	for _, c := range []struct {
		name, from, to string
		dial           engine.Dial
		seen           string // by the server; port 0: any
	}{
		{"routed", "10.0.0.2:40001", "203.0.113.10:8001",
			engine.Dial{Source: netip.MustParseAddrPort("10.0.0.2:40001"), Transparent: true}, "10.0.0.2:40001"},
		{"routed IPv6", "[fd00:a::2]:40002", "[2001:db8:b::10]:8002",
			engine.Dial{Source: netip.MustParseAddrPort("[fd00:a::2]:40002"), Transparent: true}, "[fd00:a::2]:40002"},
		{"translated", "10.0.0.2:40003", "203.0.113.10:8003",
			engine.Dial{Source: netip.MustParseAddrPort("203.0.113.1:0")}, "203.0.113.1:0"},
		{"translated to a port", "10.0.0.2:40004", "203.0.113.10:8004",
			engine.Dial{Source: netip.MustParseAddrPort("203.0.113.1:2004")}, "203.0.113.1:2004"},
		{"by the route", "10.0.0.2:40005", "203.0.113.10:8005", engine.Dial{}, "203.0.113.1:0"},
		{"from another network IPv6", "[fd00:a::2]:40006", "[2001:db8:b::10]:8006",
			engine.Dial{Source: netip.MustParseAddrPort("[2001:db8:b::1]:0")}, "[2001:db8:b::1]:0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ln := l.listen(c.to)
			job, rec := l.job(c.from, c.to, c.dial)
			if p := l.takeOver(context.Background(), job); p != flow.User {
				t.Fatalf("path %v, %+v", p, rec.wait())
			}
			ln.SetDeadline(time.Now().Add(patience))
			server, err := ln.AcceptTCP()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			// The server speaks before the client is there.
			mustWrite(t, server, "banner")
			seen, want := server.RemoteAddr().(*net.TCPAddr).AddrPort(), netip.MustParseAddrPort(c.seen)
			if seen.Addr().Unmap() != want.Addr() || want.Port() != 0 && seen.Port() != want.Port() {
				t.Errorf("the server saw %v, want %v", seen, want)
			}
			if rec.name.Addr() != want.Addr() || rec.name.Port() != seen.Port() || rec.peer != job.tuple.Dst {
				t.Errorf("connected as %v to %v; the server saw %v", rec.name, rec.peer, seen)
			}
			if n := rec.established.Load(); n != 0 {
				t.Errorf("established %d times before the client was there", n)
			}
			client, err := l.connect(job.tuple.Src, job.tuple.Dst)
			if err != nil {
				t.Fatal(err)
			}
			mustRead(t, client, "banner")
			mustWrite(t, client, "question")
			mustRead(t, server, "question")
			server.Close()
			mustEnd(t, client, io.EOF)
			client.Close()
			if e := rec.wait(); e.result != flow.Closed || e.counts != (flow.Counts{OutBytes: 8, InBytes: 6}) {
				t.Errorf("ended %+v", e)
			}
			if n := rec.established.Load(); n != 1 {
				t.Errorf("established %d times, want once", n)
			}
		})
	}
	if s := l.tcp.Stats(); s != (TCPStats{}) {
		t.Errorf("afterwards %+v, want nothing", s)
	}
}

func TestFailedDialTellsTheTruth(t *testing.T) {
	l := newTCPLab(t, nil)
	l.server.must(t, func() error {
		return runCommand("table inet t {\nchain c {\ntype filter hook input priority 0\ntcp dport 8666 drop\ntcp dport 8667 reject with icmpx admin-prohibited\n}\n}\n", "nft", "-f", "-")
	})
	for _, c := range []struct {
		name, to string
		path     flow.Path
		result   flow.Result
	}{
		{"closed port", "203.0.113.10:8009", flow.Reject, flow.Refused},
		{"closed port IPv6", "[2001:db8:b::10]:8009", flow.Reject, flow.Refused},
		{"no such host", "203.0.113.99:8009", flow.HostUnreachable, flow.Unreachable},
		{"no such host IPv6", "[2001:db8:b::99]:8009", flow.HostUnreachable, flow.Unreachable},
		{"no such network", "192.0.2.1:8009", flow.NetUnreachable, flow.Unreachable},
		{"no such network IPv6", "[2001:db8:c::1]:8009", flow.NetUnreachable, flow.Unreachable},
		{"silent", "203.0.113.10:8666", flow.Drop, flow.TimedOut},
		{"prohibited", "203.0.113.10:8667", flow.HostUnreachable, flow.Unreachable},
		{"prohibited IPv6", "[2001:db8:b::10]:8667", flow.Reject, flow.Refused},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			job, rec := l.job("10.0.0.2:41000", c.to, engine.Dial{})
			path := l.takeOver(ctx, job)
			if e := rec.wait(); path != c.path || e.result != c.result || e.reason == "" {
				t.Errorf("path %v, ended %+v; want %v and %v", path, e, c.path, c.result)
			}
		})
	}
	t.Run("killed", func(t *testing.T) {
		job, rec := l.job("10.0.0.2:41000", "203.0.113.10:8666", engine.Dial{})
		close(rec.kill)
		path := l.takeOver(context.Background(), job)
		if e := rec.wait(); path != flow.Reject || e.result != flow.CutByPolicy {
			t.Errorf("path %v, ended %+v; want reject and cut", path, e)
		}
	})
	t.Run("packet lost", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		job, rec := l.job("10.0.0.2:41000", "203.0.113.10:8666", engine.Dial{})
		path := l.takeOver(ctx, job)
		if e := rec.wait(); path != flow.Drop || e.result != flow.Failed {
			t.Errorf("path %v, ended %+v; want drop and failed", path, e)
		}
	})
	t.Run("foreign source", func(t *testing.T) {
		job, rec := l.job("10.0.0.2:41000", "203.0.113.10:8009", engine.Dial{Source: netip.MustParseAddrPort("198.51.100.7:0")})
		path := l.takeOver(context.Background(), job)
		if e := rec.wait(); path != flow.Drop || e.result != flow.Failed {
			t.Errorf("path %v, ended %+v; want drop and failed", path, e)
		}
	})
}

func TestUnknownConnectionIsReset(t *testing.T) {
	l := newTCPLab(t, nil)
	for i, to := range []string{"203.0.113.10:8010", "[2001:db8:b::10]:8010"} {
		from := []string{"10.0.0.2:42000", "[fd00:a::2]:42000"}[i]
		c, err := l.connect(netip.MustParseAddrPort(from), netip.MustParseAddrPort(to))
		if err == nil {
			mustEnd(t, c, unix.ECONNRESET)
		} else if !errors.Is(err, unix.ECONNRESET) { // it may come before connect returns
			t.Fatal(err)
		}
		if s := l.tcp.Stats(); s.Unknown != uint64(i+1) {
			t.Errorf("%d unknown, want %d", s.Unknown, i+1)
		}
	}
}

func TestInitiatorThatNeverComes(t *testing.T) {
	l := newTCPLab(t, func(c *TCPConfig) { c.WaitForInitiator = 10 * time.Millisecond })
	ln := l.listen("203.0.113.10:8011")
	job, rec := l.job("10.0.0.2:43000", "203.0.113.10:8011", engine.Dial{})
	if p := l.takeOver(context.Background(), job); p != flow.User {
		t.Fatalf("path %v", p)
	}
	server, err := ln.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	mustEnd(t, server, unix.ECONNRESET)
	if e := rec.wait(); e.result != flow.TimedOut || l.tcp.Stats().Expired != 1 {
		t.Errorf("ended %+v, stats %+v", e, l.tcp.Stats())
	}
	if len(l.tcp.waiting.m) != 0 {
		t.Error("the table still has the flow")
	}
}

func TestSecondAttemptReplacesTheFirst(t *testing.T) {
	l := newTCPLab(t, nil)
	l.listen("203.0.113.10:8012")
	job, first := l.job("10.0.0.2:43001", "203.0.113.10:8012", engine.Dial{})
	l.takeOver(context.Background(), job)
	second := newRecorder(t)
	job.takeover = second
	if p := l.takeOver(context.Background(), job); p != flow.User {
		t.Fatalf("path %v", p)
	}
	if e := first.wait(); e.result != flow.TimedOut {
		t.Errorf("the first ended %+v", e)
	}
	if c, err := l.connect(job.tuple.Src, job.tuple.Dst); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}
}

func TestOptionsThatSocketsHave(t *testing.T) {
	l := newTCPLab(t, func(c *TCPConfig) { c.Loops = 1 })
	ln := l.listen("203.0.113.10:8013")
	job, _ := l.job("10.0.0.2:44000", "203.0.113.10:8013", engine.Dial{})
	if p := l.takeOver(context.Background(), job); p != flow.User {
		t.Fatalf("path %v", p)
	}
	f := l.tcp.loops[0].flows()[0]
	client, err := l.connect(job.tuple.Src, job.tuple.Dst)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ln.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	for _, s := range []string{"one", "two"} { // the second send wants TCP_NODELAY
		mustWrite(t, client, s)
		mustRead(t, server, s)
	}
	// The sweep gives keepalive to a flow that has lived for a while.
	swept := make(chan struct{})
	f.mu.Lock()
	f.since = f.since.Add(-2 * keepaliveAfter)
	f.mu.Unlock()
	f.loop.post(func() { f.loop.sweep(l.tcp); close(swept) })
	<-swept
	for side := range f.ends {
		fd := f.ends[side].fd
		for _, o := range []struct {
			name                string
			level, option, want int
		}{
			{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			{"TCP_KEEPIDLE", unix.SOL_TCP, unix.TCP_KEEPIDLE, keepIdle},
			{"TCP_KEEPCNT", unix.SOL_TCP, unix.TCP_KEEPCNT, keepCount},
			{"TCP_NODELAY", unix.SOL_TCP, unix.TCP_NODELAY, 1},
		} {
			if got, err := unix.GetsockoptInt(fd, o.level, o.option); err != nil || got != o.want {
				t.Errorf("%s of the %s: %d, %v; want %d", o.name, f.sideName(side), got, err, o.want)
			}
		}
	}
	if mark, err := unix.GetsockoptInt(f.ends[sideFar].fd, unix.SOL_SOCKET, unix.SO_MARK); err != nil || mark != int(l.marks.Value(flow.Own)) {
		t.Errorf("the mark of the far end is %#x, %v", mark, err)
	}
}
