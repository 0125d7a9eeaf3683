package userpath

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// udpWaitLong is how long a test waits for what must happen.
const udpWaitLong = 10 * time.Second

// udpQuiet is how long a test listens for what must not happen.
const udpQuiet = 300 * time.Millisecond

// udpInLab runs a test in a process of its own whose network namespace is the
// gateway. It and those of the hosts have no name and vanish with the process.
func udpInLab(t testing.TB, test func(*udpLab)) {
	t.Helper()
	const env = "SLUICE_UDP_LAB"
	if os.Getenv(env) == "" {
		args := []string{"-test.run=^" + t.Name() + "$", "-test.v", "-test.count=1", "-test.timeout=120s"}
		if _, ok := t.(*testing.B); ok {
			args = []string{"-test.run=^$", "-test.bench=^" + t.Name() + "$", "-test.benchtime=1x", "-test.timeout=120s"}
		}
		cmd := exec.Command("/proc/self/exe", args...)
		cmd.Env = append(os.Environ(), env+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		runtime.LockOSThread() // Pdeathsig is the death of this thread
		defer runtime.UnlockOSThread()
		out, err := cmd.CombinedOutput()
		if _, ok := t.(*testing.B); ok || testing.Verbose() || err != nil {
			t.Logf("in the lab:\n%s", out)
		}
		if err != nil {
			t.Fatalf("the test failed in its network namespaces: %v", err)
		}
		return
	}
	l := newUDPLab(t)
	test(l)
}

// udpHost is a network namespace and the thread that lives in it.
type udpHost struct {
	t   testing.TB
	tid int
	run chan func()
}

func newUDPHost(t testing.TB) *udpHost {
	h := &udpHost{t: t, run: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		h.tid = unix.Gettid()
		ready <- err
		for f := range h.run {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("make a network namespace: %v", err)
	}
	return h
}

// do runs f in the namespace; sockets made in f stay there.
func (h *udpHost) do(f func()) {
	done := make(chan struct{})
	h.run <- func() { defer close(done); f() }
	<-done
}

func (h *udpHost) sh(script string) {
	h.t.Helper()
	udpShell(h.t, "nsenter", fmt.Sprintf("--net=/proc/%d/task/%d/ns/net", os.Getpid(), h.tid), "sh", "-ec", script)
}

func udpShell(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// listen opens a UDP socket on the host.
func (h *udpHost) listen(at string) *net.UDPConn {
	h.t.Helper()
	var c *net.UDPConn
	var err error
	h.do(func() { c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at))) })
	if err != nil {
		h.t.Fatal(err)
	}
	_ = c.SetReadBuffer(4 << 20)
	h.t.Cleanup(func() { c.Close() })
	return c
}

// dial opens a connected UDP socket on the host.
func (h *udpHost) dial(from, to string) *net.UDPConn {
	h.t.Helper()
	var c *net.UDPConn
	var err error
	h.do(func() {
		c, err = net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(from)), net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to)))
	})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { c.Close() })
	return c
}

// hearErrors makes the socket report soft ICMP errors too. (ip(7))
func (l *udpLab) hearErrors(c *net.UDPConn) {
	l.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		l.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		level, name := unix.SOL_IP, unix.IP_RECVERR
		if c.LocalAddr().(*net.UDPAddr).IP.To4() == nil {
			level, name = unix.SOL_IPV6, unix.IPV6_RECVERR
		}
		if err := unix.SetsockoptInt(int(fd), level, name, 1); err != nil {
			l.Fatal(err)
		}
	})
	if err != nil {
		l.Fatal(err)
	}
}

// udpSeen is a datagram as an echo server saw it.
type udpSeen struct {
	from netip.AddrPort
	data []byte
}

// echo answers every datagram with its own bytes.
func (h *udpHost) echo(at string) <-chan udpSeen {
	h.t.Helper()
	c := h.listen(at)
	seen := make(chan udpSeen, 4096)
	go func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
			seen <- udpSeen{from, bytes.Clone(buf[:n])}
			_, _ = c.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	return seen
}

// udpLab is client -- gateway (this process) -- server.
type udpLab struct {
	testing.TB
	client, server *udpHost
	u              *UDP
	stopped        chan error
	cancel         context.CancelFunc
	// decide answers about flows that are not known any more.
	decide func(context.Context, flow.Packet) flow.Path
}

func newUDPLab(t testing.TB) *udpLab {
	l := &udpLab{TB: t, client: newUDPHost(t), server: newUDPHost(t)}
	// Without duplicate address detection addresses work at once.
	const noDAD = "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad; echo 0 > /proc/sys/net/ipv6/conf/default/dad_transmits; ip link set lo up\n"
	l.client.sh(noDAD)
	l.server.sh(noDAD)
	udpShell(t, "sh", "-ec", noDAD+fmt.Sprintf(`
		ip link add lan0 type veth peer name eth0 netns %d
		ip link add wan0 type veth peer name eth0 netns %d
		ip addr add 10.0.0.1/24 dev lan0; ip addr add fd00:a::1/64 dev lan0 nodad
		ip addr add 203.0.113.1/24 dev wan0; ip addr add 2001:db8:b::1/64 dev wan0 nodad
		ip link set lan0 up; ip link set wan0 up
		echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
		for f in -4 -6; do ip $f rule add fwmark 0x06000000/0x07000000 lookup 100; ip $f route add local default dev lo table 100; done
	`, l.client.tid, l.server.tid))
	l.client.sh(`ip addr add 10.0.0.2/24 dev eth0; ip addr add fd00:a::2/64 dev eth0 nodad; ip link set eth0 up
		ip route add default via 10.0.0.1; ip -6 route add default via fd00:a::1`)
	l.server.sh(`for i in 10 11 12; do ip addr add 203.0.113.$i/24 dev eth0; ip addr add 2001:db8:b::$i/64 dev eth0 nodad; done
		ip link set eth0 up; ip route add 10.0.0.0/24 via 203.0.113.1; ip -6 route add fd00:a::/64 via 2001:db8:b::1`)
	return l
}

// start runs a UDP and the rules that lead to it.
func (l *udpLab) start(c UDPConfig) {
	l.Helper()
	marks, err := flow.NewMarks(flow.DefaultMask)
	if err != nil {
		l.Fatal(err)
	}
	c.Marks = marks
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	if l.u, err = NewUDP(c); err != nil {
		l.Fatal(err)
	}
	l.u.asks.decide = l.decide
	l.rules("ct mark set 0x06000000", l.u.Port())
	var ctx context.Context
	ctx, l.cancel = context.WithCancel(context.Background())
	l.stopped = make(chan error, 1)
	go func() { l.stopped <- l.u.Run(ctx) }()
	l.Cleanup(l.stop)
}

func (l *udpLab) stop() {
	if l.cancel == nil {
		return
	}
	l.cancel()
	l.cancel = nil
	if err := <-l.stopped; err != nil {
		l.Errorf("Run: %v", err)
	}
}

// rules are those of the gateway, but that new UDP flows are not queued:
// first says what becomes of them. The zone rules keep the upstream leg of the
// routed path apart from the client's.
func (l *udpLab) rules(first string, port uint16) {
	l.Helper()
	text := fmt.Sprintf(`table inet sluice {
	chain zone_in {
		type filter hook prerouting priority raw
		socket transparent 1 socket mark and 0x07000000 == 0x07000000 ct zone set 77
	}
	chain zone_out {
		type filter hook output priority raw
		meta mark and 0x07000000 == 0x01000000 notrack
		meta mark and 0x07000000 == 0x07000000 fib saddr type != local ct zone set 77
	}
	chain own_out {
		type filter hook output priority mangle
		meta mark and 0x07000000 == 0x07000000 ct mark set 0x07000000
	}
	chain arrive {
		type filter hook prerouting priority -155
		ct mark and 0x07000000 != 0 accept
		ct state != new accept
		meta l4proto udp %s
	}
	chain steer {
		type filter hook prerouting priority mangle
		ct mark and 0x07000000 == 0x06000000 goto divert
		ct mark and 0x07000000 == 0x07000000 meta mark set 0x06000000
	}
	chain divert {
		meta mark set 0x06000000
		meta nfproto ipv4 meta l4proto udp tproxy ip to 127.0.0.1:%d accept
		meta nfproto ipv6 meta l4proto udp tproxy ip6 to [::1]:%d accept
	}
	chain forward {
		type filter hook forward priority filter
		policy drop
		ct mark and 0x07000000 == 0x05000000 accept
	}
	chain input {
		type filter hook input priority filter
		policy drop
		iif lo accept
		ct mark and 0x07000000 >= 0x06000000 accept
		ct state established,related accept
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
	}
}
`, first, port, port)
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		l.Fatalf("nft: %v\n%s", err, out)
	}
}
