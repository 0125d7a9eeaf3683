package netns_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// plainRouter makes gw the simplest router there is, without Sluice.
func plainRouter(l *lab.Lab) {
	l.T.Helper()
	path := l.File("plain.nft", `
		table ip plain {
			chain post {
				type nat hook postrouting priority srcnat
				oifname "wan0" masquerade
			}
		}
		table inet count {
			chain f {
				type filter hook forward priority filter
				ct state new ct mark set 0x5000000
			}
		}
	`)
	l.GW.Run("nft", "-f", path)
}

// The tests below are the harness's own: the network that it builds carries
// traffic, and what it reads is what is there.

func TestHarnessTopology(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	plainRouter(l)
	peers := l.Srv.HTTP(80)
	for _, from := range []*lab.Host{l.Client, l.Client2} {
		for _, to := range []netip.Addr{lab.Srv4, lab.Srv6} {
			_, hash := lab.Content(1 << 20)
			if got := fetch(t, from, fmt.Sprintf("http://%s/1048576", netip.AddrPortFrom(to, 80))); lab.Hash(got) != hash {
				t.Errorf("%s from %s: %d bytes, another hash", to, from.Name, len(got))
			}
		}
	}
	want := []netip.Addr{lab.Outside4, lab.Client6, lab.Outside4, lab.Second6}
	for i, p := range peers.Addrs() {
		if p.Addr() != want[i] {
			t.Errorf("connection %d: the server saw %s, want %s", i, p.Addr(), want[i])
		}
	}
}

func TestHarnessConntrackAndCapture(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	plainRouter(l)
	seen := l.Srv.Capture()
	l.Srv.EchoTCP(7)
	l.Srv.EchoUDP(7)
	for _, to := range []netip.Addr{lab.Srv4, lab.Srv6} {
		at := netip.AddrPortFrom(to, 7)
		tcp := l.Client.MustDial("tcp", at.String(), 3*time.Second)
		echo(t, tcp, "through tcp")
		echo(t, l.Client.MustDial("udp", at.String(), 3*time.Second), "through udp")
		for _, proto := range []string{"tcp", "udp"} {
			f, ok := l.GW.Flow(proto, addrOf(l.Client, to), at)
			if !ok || f.Mark != 0x5000000 || f.ReplySrc != at {
				t.Errorf("conntrack of %s to %s: %+v", proto, at, f)
			}
		}
		if n := len(l.GW.Sockets("tcp")); n != 0 {
			t.Errorf("gw has %d sockets of its own", n)
		}
	}
	packets := seen.Stop()
	for _, to := range []netip.Addr{lab.Srv4, lab.Srv6} {
		at := netip.AddrPortFrom(to, 7)
		if n := len(lab.Select(packets, lab.SYN(at))); n != 1 {
			t.Errorf("%d SYNs to %s in the capture, want 1", n, at)
		}
		if n := len(lab.Select(packets, lab.UDPTo(at))); n != 1 {
			t.Errorf("%d datagrams to %s in the capture, want 1", n, at)
		}
	}
}

func TestHarnessServers(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	plainRouter(l)
	ftp := l.Srv.VSFTPD()
	hash := ftp.Put(l.Srv, "file", 300_000)
	for _, url := range []string{"ftp://203.0.113.10/file", "ftp://[2001:db8:b::10]/file"} {
		out := filepath.Join(l.Dir(), "got")
		l.Client.Run("curl", "-sS", "--max-time", "20", "-o", out, url)
		if got, err := os.ReadFile(out); err != nil || lab.Hash(got) != hash {
			t.Errorf("%s: %d bytes with another hash, %v", url, len(got), err)
		}
	}
	for _, srv := range []netip.Addr{lab.Srv4, lab.Srv6} {
		c := loginFTP(t, l.Client, srv)
		d, err := l.Client.Dial(t.Context(), "tcp", c.passive(t, srv).String())
		if err != nil {
			t.Fatal(err)
		}
		c.send(t, "RETR file")
		c.want(t, "150")
		readFull(t, d, 300_000)
		_ = d.Close()
		c.want(t, "226")
		c.quit(t)
	}
	if ftp.Saw("EPSV") != 3 || ftp.Saw("PASV") != 1 || ftp.Saw("STOR") != 0 {
		t.Errorf("the server saw %d EPSV and %d STOR, want 3 and 0", ftp.Saw("EPSV"), ftp.Saw("STOR"))
	}
}

func TestHarnessStream(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	plainRouter(l)
	l.Srv.Stream(9000)
	d := startDownload(l, netip.AddrPortFrom(lab.Srv6, 9000))
	d.moves(t, 4<<20)
	l.GW.Run("nft", "add chain inet count stop { type filter hook forward priority 5; policy drop; }")
	d.stands(t)
	l.GW.Run("nft", "delete", "chain", "inet", "count", "stop")
	d.moves(t, 4<<20)
}

// A route that is narrower than the ends believe: what TestB63 stands on.
func TestHarnessPathMTU(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	plainRouter(l)
	l.Srv.EchoTCP(7)
	narrow(l)
	inside := l.Client.Capture()
	both(t, func(t *testing.T, srv, _ netip.Addr) { upload(t, l, netip.AddrPortFrom(srv, 7)) })
	packets := inside.Stop()
	for _, proto := range []string{"icmp", "icmpv6"} {
		if len(lab.Select(packets, func(s lab.Seen) bool {
			return s.Proto == proto && (s.ICMPType == 3 && s.ICMPCode == 4 || s.ICMPType == 2)
		})) == 0 {
			t.Errorf("no %s error was needed: the way out is not narrow", proto)
		}
	}
}

func TestHarnessRefusals(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	plainRouter(l)
	for _, to := range []netip.Addr{lab.Srv4, lab.Srv6} {
		if err := connect(l.Client, netip.AddrPortFrom(to, 9), 3*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a port where nobody listens at %s: %v", to, err)
		}
	}
	l.Srv.Run("nft", "add table inet silent; add chain inet silent in { type filter hook input priority 0; }; add rule inet silent in tcp dport 9 drop")
	if err := briefly(l.Client, netip.AddrPortFrom(lab.Srv4, 9)); !timedOut(err) {
		t.Errorf("a silent port: %v", err)
	}
}

func TestHarnessSnapshot(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	before := l.GW.Snapshot()
	if d := before.Diff(l.GW.Snapshot()); d != "" {
		t.Fatalf("two snapshots of nothing differ:\n%s", d)
	}
	plainRouter(l)
	l.GW.Run("ip", "rule", "add", "fwmark", "1", "lookup", "100")
	if err := l.GW.Sysctl("net/ipv4/conf/wan0/rp_filter", "2"); err != nil {
		t.Fatal(err)
	}
	d := before.Diff(l.GW.Snapshot())
	for _, want := range []string{"ip rule", "nft ruleset", "wan0/rp_filter"} {
		if !strings.Contains(d, want) {
			t.Errorf("the difference does not name %s:\n%s", want, d)
		}
	}
}

func TestHarnessProcess(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	out, status, err := l.Client.Try(5*time.Second, "sh", "-c", "ip -o -4 addr show dev eth0; exit 7")
	if err != nil || status != 7 || !strings.Contains(out, "10.0.0.2/24") {
		t.Errorf("status %d, %v, %q", status, err, out)
	}
	if _, _, err := l.Client.Try(50*time.Millisecond, "sleep", "1000"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a program that does not end: %v", err)
	}
}

// echo writes a line and wants it back.
func echo(t testing.TB, c io.ReadWriter, line string) {
	t.Helper()
	if d, ok := c.(interface{ SetDeadline(time.Time) error }); ok {
		if err := d.SetDeadline(time.Now().Add(lab.Patience(5 * time.Second))); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.WriteString(c, line); err != nil {
		t.Fatalf("send: %v", err)
	}
	got := make([]byte, len(line))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, []byte(line)) {
		t.Fatalf("sent %q, got %q, %v", line, got, err)
	}
}

// fetch gets a URL with curl and gives the body.
func fetch(t testing.TB, from *lab.Host, url string) []byte {
	t.Helper()
	body, err := tryFetch(from, url)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func tryFetch(from *lab.Host, url string) ([]byte, error) {
	out, err := os.CreateTemp("", "sluice-fetch.")
	if err != nil {
		return nil, err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	text, status, err := from.Try(20*time.Second, "curl", "-gsS", "-o", out.Name(), url)
	if err != nil || status != 0 {
		return nil, fmt.Errorf("curl %s: status %d, %v: %s", url, status, err, text)
	}
	return os.ReadFile(out.Name())
}

// connect opens a TCP connection and closes it.
func connect(from *lab.Host, to netip.AddrPort, d time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), lab.Patience(d))
	defer cancel()
	c, err := from.Dial(ctx, "tcp", to.String())
	if err == nil {
		_ = c.Close()
	}
	return err
}

// silence is how long nothing must come: a second, on a slow machine two.
func silence() time.Duration { return min(lab.Patience(time.Second), 2*time.Second) }

// briefly is connect for where silence is expected: it gives up soon, also on a
// slow machine.
func briefly(from *lab.Host, to netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(context.Background(), silence())
	defer cancel()
	c, err := from.Dial(ctx, "tcp", to.String())
	if err == nil {
		_ = c.Close()
	}
	return err
}

func timedOut(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// addrOf is the address of an inside host in the family of another address.
func addrOf(h *lab.Host, like netip.Addr) netip.Addr {
	switch {
	case h.Name == "client" && like.Is4():
		return lab.Client4
	case h.Name == "client":
		return lab.Client6
	case like.Is4():
		return lab.Second4
	}
	return lab.Second6
}
