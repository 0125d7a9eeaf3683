package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// These tests send real packets through the table, without any daemon.

// short is what counts as silence; an answer may take as long as patient, on a
// machine that is busy with other things.
const (
	short   = 500 * time.Millisecond
	patient = 5 * time.Second
)

// flowPolicy: TCP 80 and UDP 53 are the kernel's, TCP 666 is refused, TCP 21
// and 5060 are asked about, everything else is dropped.
func flowPolicy() Input {
	in := twoZones()
	any4, any6 := "0.0.0.0/0", "::/0"
	in.Compiled.Forward[0].Stages = []policy.Stage{
		ports4(box("10.0.0.0/24", any4, flow.TCP, flow.TCP, 80, 80, policy.ClassKernel),
			box("10.0.0.0/24", any4, flow.UDP, flow.UDP, 53, 53, policy.ClassKernel),
			box("10.0.0.0/24", any4, flow.TCP, flow.TCP, 666, 666, policy.ClassReject),
			box("10.0.0.0/24", any4, flow.TCP, flow.TCP, 21, 21, policy.ClassAsk),
			box("10.0.0.0/24", any4, flow.TCP, flow.TCP, 5060, 5060, policy.ClassAskOpen)),
		{Is6: true, Kind: policy.KindPorts, Boxes: []policy.Box{
			box("fd00:a::/64", any6, flow.TCP, flow.UDP, 53, 80, policy.ClassKernel),
			box("fd00:a::/64", any6, flow.TCP, flow.TCP, 666, 666, policy.ClassReject)}},
	}
	return in
}

func newGateway(t *testing.T) (journey, *Table) {
	t.Helper()
	j := newJourney(t)
	// The answer tells that duplicate address detection is over everywhere.
	const ping = "ping -6 -n -c 1 -i 0.2 -w 5 2001:db8:b::10"
	j.client.sh(ping + " || " + ping + " || " + ping)
	table := openTable(t, j.gw)
	o := testOptions(t)
	o.Native = false
	mustLoad(t, table, mustBuild(t, flowPolicy(), o))
	return j, table
}

// serve accepts on a port and tells every peer how it looks from here.
func serve(t *testing.T, s space, address string) {
	t.Helper()
	l := made(s, func() (net.Listener, error) { return net.Listen("tcp", address) })
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintln(c, c.RemoteAddr())
			t.Cleanup(func() { _ = c.Close() })
		}
	}()
}

// serveUDP is the same for datagrams.
func serveUDP(t *testing.T, s space, address string) {
	t.Helper()
	c := made(s, func() (net.PacketConn, error) { return net.ListenPacket("udp", address) })
	t.Cleanup(func() { _ = c.Close() })
	go func() {
		buf := make([]byte, 64)
		for {
			_, peer, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo([]byte(peer.String()+"\n"), peer)
		}
	}()
}

// ask connects from an address (empty: any) and gives what the far end saw,
// and the connection, whose next read waits for a short time.
func ask(t *testing.T, s space, network, from, to string) (string, net.Conn, error) {
	t.Helper()
	return askFor(t, patient, s, network, from, to)
}

func askFor(t *testing.T, wait time.Duration, s space, network, from, to string) (string, net.Conn, error) {
	t.Helper()
	var c net.Conn
	var err error
	s.in(func() error {
		d := net.Dialer{Timeout: wait}
		if from != "" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
		}
		c, err = d.Dial(network, to)
		return nil
	})
	if err != nil {
		return "", nil, err
	}
	t.Cleanup(func() { _ = c.Close() })
	if network == "udp" {
		_, _ = c.Write([]byte("?"))
	}
	_ = c.SetDeadline(time.Now().Add(wait))
	buf := make([]byte, 128)
	n, err := c.Read(buf)
	_ = c.SetDeadline(time.Now().Add(short))
	return strings.TrimSpace(string(buf[:n])), c, err
}

func wantSeen(t *testing.T, s space, network, to, prefix string) net.Conn {
	t.Helper()
	seen, c, err := ask(t, s, network, "", to)
	if err != nil || !strings.HasPrefix(seen, prefix) {
		t.Errorf("%s %s: the far end saw %q, %v; want %s", network, to, seen, err, prefix)
	}
	return c
}

func wantSilence(t *testing.T, s space, from, to string) {
	t.Helper()
	var late net.Error
	if seen, _, err := askFor(t, short, s, "tcp", from, to); !errors.As(err, &late) || !late.Timeout() {
		t.Errorf("tcp %s: %q, %v; want silence", to, seen, err)
	}
}

func TestFlowKernelDecides(t *testing.T) {
	j, _ := newGateway(t)
	for _, port := range []string{"80", "666", "777"} {
		serve(t, j.server, ":"+port)
	}
	serveUDP(t, j.server, "203.0.113.10:53")
	serveUDP(t, j.server, "203.0.113.10:54")

	for _, network := range []string{"tcp", "udp"} {
		to := map[string]string{"tcp": "203.0.113.10:80", "udp": "203.0.113.10:53"}[network]
		seen, _, err := ask(t, j.client, network, "", to)
		peer, _ := netip.ParseAddrPort(seen)
		if err != nil || peer.Addr().String() != "203.0.113.1" || peer.Port() < 20000 || peer.Port() > 29999 {
			t.Errorf("%s: the server saw %q, %v", network, seen, err)
		}
		if list := j.gw.sh("conntrack -L -p " + network); !strings.Contains(list, fmt.Sprintf("mark=%d", 5<<24)) {
			t.Errorf("no mark of a kernel flow in\n%s", list)
		}
	}
	wantSeen(t, j.client, "tcp", "[2001:db8:b::10]:80", "[fd00:a::2]:")
	for _, to := range []string{"203.0.113.10:666", "[2001:db8:b::10]:666"} {
		if _, _, err := ask(t, j.client, "tcp", "", to); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("denied %s: %v", to, err)
		}
	}
	wantSilence(t, j.client, "", "203.0.113.10:777")
	if seen, _, err := askFor(t, short, j.client, "udp", "", "203.0.113.10:54"); err == nil {
		t.Errorf("udp 54 passed: %q", seen)
	}
	j.server.sh("ip route add 10.0.0.0/24 via 203.0.113.1")
	serve(t, j.client, ":80")
	wantSilence(t, j.server, "", "10.0.0.2:80")
	for _, counter := range []string{"refused", "discarded"} {
		if list := j.gw.sh("nft list counter inet sluice " + counter); strings.Contains(list, "packets 0 ") {
			t.Errorf("nothing counted: %s", list)
		}
	}
}

// Without a listener a closed queue loses new flows, an open one lets them
// pass in the kernel.
func TestFlowQueuesWithoutListener(t *testing.T) {
	j, _ := newGateway(t)
	serve(t, j.server, "203.0.113.10:21")
	serve(t, j.server, "203.0.113.10:5060")
	wantSilence(t, j.client, "", "203.0.113.10:21")
	wantSeen(t, j.client, "tcp", "203.0.113.10:5060", "203.0.113.1:")
}

func TestFlowSpoofedAndHalf(t *testing.T) {
	j, _ := newGateway(t)
	serve(t, j.server, "203.0.113.10:80")
	j.client.sh("ip addr add 192.0.2.9/32 dev lo")
	wantSilence(t, j.client, "192.0.2.9", "203.0.113.10:80")
	if list := j.gw.sh("nft list counter inet sluice spoofed"); strings.Contains(list, "packets 0 ") {
		t.Error("nothing counted as spoofed")
	}
	c := wantSeen(t, j.client, "tcp", "203.0.113.10:80", "203.0.113.1:")
	j.gw.sh("conntrack -D -p tcp")
	_, _ = c.Write([]byte("picked up in the middle"))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection without its beginning: %v", err)
	}
	if list := j.gw.sh("nft list counter inet sluice not_syn"); strings.Contains(list, "packets 0 ") {
		t.Error("nothing counted as not_syn")
	}
}

// A host without an address asks with the unspecified one, to which no route
// leads back: it comes as far as the rules for the gateway.
func TestFlowFromNoAddress(t *testing.T) {
	j, _ := newGateway(t)
	j.client.sh("ip addr flush dev eth0")
	fd := made(j.client, func() (int, error) {
		return unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	})
	defer unix.Close(fd)
	if err := errors.Join(unix.BindToDevice(fd, "eth0"), unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
		unix.Bind(fd, &unix.SockaddrInet4{Port: 68})); err != nil {
		t.Fatal(err)
	}
	j.gw.nft(`table ip heard { chain c { type filter hook input priority -10; policy accept; ip saddr 0.0.0.0 udp dport 67 counter name "asks"; }; counter asks { }; }`)
	if err := unix.Sendto(fd, []byte("?"), 0, &unix.SockaddrInet4{Port: 67, Addr: [4]byte{255, 255, 255, 255}}); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if !strings.Contains(j.gw.sh("nft list counter ip heard asks"), "packets 0 ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("it was not heard:\n%s", j.gw.sh("nft list counters"))
		}
	}
	if list := j.gw.sh("nft list counter inet sluice spoofed"); !strings.Contains(list, "packets 0 ") {
		t.Errorf("it counts as spoofed: %s", list)
	}
}

// The cut bit ends a living flow, and other people's bits are kept.
func TestFlowCutAndOtherMarks(t *testing.T) {
	j, _ := newGateway(t)
	j.gw.nft(`table ip other { chain c { type filter hook prerouting priority -170; meta mark set 0x12; ct mark set ct mark or 0x34; }; }`)
	serve(t, j.server, "203.0.113.10:80")
	c := wantSeen(t, j.client, "tcp", "203.0.113.10:80", "203.0.113.1:")
	if list := j.gw.sh("conntrack -L -p tcp"); !strings.Contains(list, fmt.Sprintf("mark=%d", 0x05000034)) {
		t.Errorf("marks in\n%s", list)
	}
	j.gw.nft(`table ip cutter { chain c { type filter hook prerouting priority -170; ct mark set ct mark or 0x08000000; }; }`)
	_, _ = c.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a flow that was cut: %v", err)
	}
}

func TestFlowOutboundOnce(t *testing.T) {
	j, table := newGateway(t)
	serve(t, j.server, ":2000")
	p := nat.Permission{ID: 1, Direction: nat.Outbound, Proto: flow.TCP, Client: netip.MustParseAddrPort("10.0.0.2:0"),
		Target: netip.MustParseAddrPort("203.0.113.10:2000"), Timeout: time.Minute}
	wantSilence(t, j.client, "", "203.0.113.10:2000")
	install(t, table, p)
	c := wantSeen(t, j.client, "tcp", "203.0.113.10:2000", "203.0.113.1:")
	wantSilence(t, j.client, "", "203.0.113.10:2000")
	_, _ = c.Write([]byte("still there"))
	if held, err := table.Permissions(); err != nil || len(held) != 0 {
		t.Errorf("after its use: %+v, %v", held, err)
	}
	if err := table.Remove(context.Background(), p); err != nil {
		t.Errorf("remove what was used up: %v", err)
	}
	p.Multiple = true
	install(t, table, p)
	for range 3 {
		wantSeen(t, j.client, "tcp", "203.0.113.10:2000", "203.0.113.1:")
	}
	if err := table.Remove(context.Background(), p); err != nil {
		t.Error(err)
	}
	wantSilence(t, j.client, "", "203.0.113.10:2000")

	p.ID, p.Multiple = 2, false
	p.Client, p.Target = netip.MustParseAddrPort("[fd00:a::2]:0"), netip.MustParseAddrPort("[2001:db8:b::10]:2000")
	install(t, table, p)
	wantSeen(t, j.client, "tcp", "[2001:db8:b::10]:2000", "[fd00:a::2]:")
	wantSilence(t, j.client, "", "[2001:db8:b::10]:2000")
}

func TestFlowInboundTranslated(t *testing.T) {
	j, table := newGateway(t)
	serve(t, j.client, "10.0.0.2:80")
	j.server.sh("ip addr add 203.0.113.11/24 dev eth0")
	p := nat.Permission{ID: 1, Direction: nat.Inbound, Proto: flow.TCP, Client: netip.MustParseAddrPort("10.0.0.2:80"),
		External: netip.MustParseAddrPort("203.0.113.1:8080"), AnySource: true}
	wantSilence(t, j.server, "", "203.0.113.1:8080")
	install(t, table, p)
	wantSeen(t, j.server, "tcp", "203.0.113.1:8080", "203.0.113.10:")
	wantSilence(t, j.server, "", "203.0.113.1:8080")

	p.AnySource, p.Sources = false, []netip.Prefix{netip.MustParsePrefix("203.0.113.10/32"), netip.MustParsePrefix("203.0.113.11/32")}
	install(t, table, p)
	if seen, _, err := ask(t, j.server, "tcp", "203.0.113.11", "203.0.113.1:8080"); err != nil || !strings.HasPrefix(seen, "203.0.113.11:") {
		t.Errorf("second source: %q, %v", seen, err)
	}
	wantSilence(t, j.server, "203.0.113.10", "203.0.113.1:8080")

	p.Sources, p.Multiple = p.Sources[:1], true
	install(t, table, p)
	wantSilence(t, j.server, "203.0.113.11", "203.0.113.1:8080")
	wantSeen(t, j.server, "tcp", "203.0.113.1:8080", "203.0.113.10:")

	// Hairpin: an inside host shows the external address.
	p.AnySource = true
	install(t, table, p)
	wantSeen(t, j.client, "tcp", "203.0.113.1:8080", "203.0.113.1:")
	if err := table.Remove(context.Background(), p); err != nil {
		t.Error(err)
	}
	wantSilence(t, j.server, "", "203.0.113.1:8080")
}
