package netns_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// tftpPort is one UDP port of a host that a test plays itself.
type tftpPort struct {
	*net.UDPConn
	t testing.TB
}

// udpPort opens a port of a host, in the family of its address.
func udpPort(t testing.TB, h *lab.Host, at netip.AddrPort) tftpPort {
	t.Helper()
	network := map[bool]string{true: "udp4", false: "udp6"}[at.Addr().Is4()]
	return tftpPort{h.MustListenPacket(network, at.String()), t}
}

func (p tftpPort) send(to netip.AddrPort, message string) {
	p.t.Helper()
	if _, err := p.WriteToUDPAddrPort([]byte(message), to); err != nil {
		p.t.Fatalf("send to %s: %v", to, err)
	}
}

// want receives a datagram and fails unless it is this one, from there.
func (p tftpPort) want(from netip.AddrPort, message string) {
	p.t.Helper()
	if at, got := p.receive(); at != from || got != message {
		p.t.Fatalf("received %q from %s, want %q from %s", got, at, message, from)
	}
}

func (p tftpPort) receive() (netip.AddrPort, string) {
	p.t.Helper()
	from, message, ok := p.wait(lab.Patience(5 * time.Second))
	if !ok {
		p.t.Fatal("nothing comes")
	}
	return from, message
}

// wait receives a datagram; false: none comes.
func (p tftpPort) wait(d time.Duration) (from netip.AddrPort, message string, ok bool) {
	p.t.Helper()
	if err := p.SetReadDeadline(time.Now().Add(d)); err != nil {
		p.t.Fatal(err)
	}
	b := make([]byte, 65536)
	n, from, err := p.ReadFromUDPAddrPort(b)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Fatalf("receive: %v", err)
	}
	return netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), string(b[:n]), err == nil
}

// silent fails if anything comes that is not one of these messages, repeated.
func (p tftpPort) silent(what string, but ...string) {
	p.t.Helper()
	for until := time.Now().Add(silence()); ; {
		from, got, ok := p.wait(time.Until(until))
		if !ok {
			return
		}
		if !slices.Contains(but, got) {
			p.t.Errorf("%s: received %q from %s", what, got, from)
		}
	}
}

// ask sends a request, as a client does again and again, until at has received
// something, and gives what that is.
func (p tftpPort) ask(to netip.AddrPort, message string, at tftpPort) (from netip.AddrPort, got string) {
	p.t.Helper()
	for range 10 {
		p.send(to, message)
		if from, got, ok := at.wait(lab.Patience(time.Second)); ok {
			return from, got
		}
	}
	p.t.Fatalf("%q, sent to %s, has no effect", message, to)
	return from, ""
}

// drain drops what has come.
func (p tftpPort) drain() {
	p.t.Helper()
	for ok := true; ok; {
		_, _, ok = p.wait(time.Millisecond)
	}
}

func (p tftpPort) addr() netip.AddrPort { return p.LocalAddr().(*net.UDPAddr).AddrPort() }

// The messages of TFTP.
func tftpRequest(op byte, fields ...string) string {
	return "\x00" + string(op) + strings.Join(fields, "\x00") + "\x00"
}

func tftpBlock(op byte, n int) string {
	return string(binary.BigEndian.AppendUint16([]byte{0, op}, uint16(n)))
}

// tftpErrorCode is the code of an error message; -1: it is none.
func tftpErrorCode(message string) int {
	if len(message) < 5 || !strings.HasPrefix(message, "\x00\x05") || message[len(message)-1] != 0 {
		return -1
	}
	return int(binary.BigEndian.Uint16([]byte(message[2:4])))
}

const (
	tftpRead  = 1
	tftpWrite = 2
	tftpData3 = 3
	tftpAck   = 4
)

var tftpGetFile = tftpRequest(tftpRead, "file", "octet")

// The daemon is stopped in mid-transfer: the transfer goes on.
func TestTFTPInKernel(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	s := l.Srv.TFTPD()
	const block = 1428
	content, _ := lab.Content(5 << 20)
	s.Put(l.Srv, "file", content)
	g := l.Gateway(tftpConfig(""))
	both(t, func(t *testing.T, srv, client netip.Addr) {
		c := udpPort(t, l.Client, netip.AddrPortFrom(client, 0))
		from, answer := c.ask(netip.AddrPortFrom(srv, 69), tftpRequest(tftpRead, "file", "octet", "blksize", fmt.Sprint(block)), c)
		if from.Addr() != srv || from.Port() == 69 || !strings.HasPrefix(answer, "\x00\x06") {
			t.Fatalf("%q from %s", answer, from)
		}
		c.send(from, tftpBlock(tftpAck, 0))
		var got []byte
		defer g.Thaw()
		for n := 1; len(got) < len(content); n++ {
			at, data := c.receive()
			for at != from || !strings.HasPrefix(data, tftpBlock(tftpData3, n)) {
				at, data = c.receive() // something that was repeated
			}
			got = append(got, data[4:]...)
			c.send(from, tftpBlock(tftpAck, n))
			if n == 700 {
				g.Freeze()
			}
		}
		if !bytes.Equal(got, content) {
			t.Error("another file")
		}
		g.Thaw()
		f := slices.IndexFunc(tftpData(t, l), func(f lab.Tracked) bool { return f.Src == from })
		if f < 0 {
			t.Fatalf("conntrack does not show the transfer from %s", from)
		}
		if f := tftpData(t, l)[f]; f.ReplySrc != c.addr() || f.OutBytes < int64(len(content)) {
			t.Errorf("conntrack does not show the whole transfer to %s: %s", c.addr(), f.Line)
		}
		if n := g.Carries("udp", int(from.Port())); n != 0 {
			t.Errorf("the daemon holds %d sockets of the transfer", n)
		}
	})
	noPermissions(t, g)
}

// An answer comes once for each request, and from that server alone.
func TestTFTPExactAndOnce(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(tftpConfig(""))
	others := map[netip.Addr]netip.Addr{lab.Srv4: lab.Other4, lab.Srv6: lab.Other6}
	both(t, func(t *testing.T, srv, client netip.Addr) {
		at := netip.AddrPortFrom(srv, 69)
		server := udpPort(t, l.Srv, at)
		c := udpPort(t, l.Client, netip.AddrPortFrom(client, 0))
		port := func(h *lab.Host, a netip.Addr) tftpPort { return udpPort(t, h, netip.AddrPortFrom(a, 0)) }
		ask := func() netip.AddrPort {
			server.drain()
			from, got := c.ask(at, tftpGetFile, server)
			if got != tftpGetFile {
				t.Fatalf("the server was asked %q", got)
			}
			return from
		}
		from := ask()
		if want := map[bool]netip.Addr{true: lab.Outside4, false: client}[srv.Is4()]; from.Addr() != want {
			t.Errorf("the request came from %s, want %s", from, want)
		}
		stranger := port(l.Other, others[srv])
		stranger.send(from, "another host")
		if again := ask(); again != from {
			t.Errorf("the repeated request came from %s, the first from %s", again, from)
		}
		if list := openPermissions(g); len(list) != 1 || list[0].External != from.String() || list[0].Client != c.addr().String() {
			t.Errorf("want one permission, from %s to %s: %+v", from, c.addr(), list)
		}

		first, second, third := port(l.Srv, srv), port(l.Srv, srv), port(l.Srv, srv)
		stranger.send(from, "another host, when it was asked again")
		first.send(netip.AddrPortFrom(from.Addr(), from.Port()^1), "another port")
		first.send(from, "data")
		second.send(from, "a second flow")
		c.want(first.addr(), "data")
		noPermissions(t, g)
		second.send(from, "a second flow, later")
		stranger.send(from, "another host, later")
		c.silent("before the client asks again")
		c.send(first.addr(), "ack")
		first.want(from, "ack")
		first.send(from, "more data")
		c.want(first.addr(), "more data")

		ask()
		third.send(from, "the second answer")
		c.want(third.addr(), "the second answer")
		c.send(third.addr(), "ack")
		third.want(from, "ack")
	})
	noPermissions(t, g)
}

// One client port that asks two servers at the same time.
func TestTFTPTwoServers(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(tftpConfig(""))
	others := map[netip.Addr]netip.Addr{lab.Srv4: lab.Other4, lab.Srv6: lab.Other6}
	both(t, func(t *testing.T, srv, client netip.Addr) {
		c := udpPort(t, l.Client, netip.AddrPortFrom(client, 0))
		type answer struct {
			port tftpPort
			to   netip.AddrPort
		}
		var answers []answer
		for h, a := range map[*lab.Host]netip.Addr{l.Srv: srv, l.Other: others[srv]} {
			at := netip.AddrPortFrom(a, 69)
			server := udpPort(t, h, at)
			from, _ := c.ask(at, tftpGetFile, server)
			answers = append(answers, answer{udpPort(t, h, netip.AddrPortFrom(a, 0)), from})
		}
		for _, a := range answers {
			a.port.send(a.to, "data")
			c.want(a.port.addr(), "data")
			c.send(a.port.addr(), "ack")
			a.port.want(a.to, "ack")
		}
	})
	noPermissions(t, g)
}

// What is no request is answered by the gateway, or lost; the server hears
// nothing of it, and nothing opens.
func TestB60TFTPMalformed(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	seen := l.Srv.Capture()
	g := l.Gateway(tftpConfig(""))
	both(t, func(t *testing.T, srv, client netip.Addr) {
		at := netip.AddrPortFrom(srv, 69)
		udpPort(t, l.Srv, at)
		c := udpPort(t, l.Client, netip.AddrPortFrom(client, 0))
		for _, bad := range []struct {
			message string
			code    int
		}{
			{"\x00\x01\x00\x08\x21\x12\xa4\x42abcdefghijkl", 4}, // STUN
			{"GET / HTTP/1.1\r\n\r\n", 4},
			{tftpRequest(tftpRead, "file"), 4},
			{tftpRequest(tftpRead, "file", "mail"), 4},
			{tftpRequest(tftpRead, "file", "octet", "blksize"), 4},
			{tftpRequest(tftpRead, "file", "octet", "blksize", "7"), 8},
			{tftpRequest(tftpRead, "file", "octet", "tsize", "0", "tsize", "0"), 8},
			{tftpRequest(tftpWrite, "fi\nle", "octet"), 4},
			{tftpRequest(tftpRead, strings.Repeat("f", 600), "octet"), 4},
			{tftpBlock(tftpAck, 0), 5},
			{tftpBlock(tftpData3, 1) + "data", 5},
			{"\x00\x09", 4},
			{"", 4},
		} {
			c.drain()
			from, got := c.ask(at, bad.message, c)
			if from != at || tftpErrorCode(got) != bad.code {
				t.Errorf("%q: answered %q from %s, want error %d", bad.message, got, from, bad.code)
			}
		}
		c.send(at, "\x00\x05\x00\x01no\x00")
		c.silent("an error is not answered")
	})
	noPermissions(t, g)
	for _, s := range lab.Select(seen.Stop(), func(s lab.Seen) bool { return s.Proto == "udp" }) {
		t.Errorf("srv saw %q", s.Payload)
	}
}

// What a server says from its well-known port: an error passes and ends what
// the request opened; nothing else passes.
func TestTFTPFromTheWellKnownPort(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(tftpConfig(""))
	both(t, func(t *testing.T, srv, client netip.Addr) {
		at := netip.AddrPortFrom(srv, 69)
		server := udpPort(t, l.Srv, at)
		c := udpPort(t, l.Client, netip.AddrPortFrom(client, 0))
		from, _ := c.ask(at, tftpGetFile, server)
		const refusal = "\x00\x05\x00\x01file not found\x00"
		server.send(from, tftpBlock(tftpData3, 1)+"data")
		server.send(from, refusal)
		c.want(at, refusal)
		noPermissions(t, g)
		udpPort(t, l.Srv, netip.AddrPortFrom(srv, 0)).send(from, "data")
		server.send(from, refusal)
		c.silent("after the server's error")
	})
}

// read_only: a write request is answered by the gateway.
func TestTFTPReadOnly(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	s := l.Srv.TFTPD()
	content, _ := lab.Content(10_000)
	s.Put(l.Srv, "file", content)
	seen := l.Srv.Capture()
	g := l.Gateway(tftpConfig("read_only: true"))
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		for _, c := range tftpClients {
			local := filepath.Join(l.Dir(), "got-"+c.name)
			out, status, err := c.get(l, srv, "octet", "file", local)
			wantFile(t, local, content, fmt.Sprintf("%s, get: status %d, %v\n%s", c.name, status, err, out))
			out, _, err = c.put(l, srv, "octet", local, "up")
			if err != nil || !strings.Contains(out, "this rule is read-only") {
				t.Errorf("%s, put: the user reads %q, %v", c.name, out, err)
			}
		}
	})
	if list, err := os.ReadDir(s.Root); err != nil || len(list) != 1 {
		t.Errorf("the server has %v, %v", list, err)
	}
	for _, s := range lab.Select(seen.Stop(), func(s lab.Seen) bool {
		return !s.Out && s.Dst.Port() == 69 && !strings.HasPrefix(string(s.Payload), "\x00\x01")
	}) {
		t.Errorf("srv saw %q", s.Payload)
	}
	g.AwaitRecord("request refused", time.Second, func(r lab.Record) bool { return r.Text("operation") == "write" && r.Text("file") == "up" })
	noPermissions(t, g)
}

// What the server refuses, the client reads in the server's own words.
func TestTFTPServerRefuses(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.TFTPD()
	g := l.Gateway(tftpConfig(""))
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		for _, c := range tftpClients {
			out, _, err := c.get(l, srv, "octet", "no-such-file", filepath.Join(l.Dir(), "got"))
			if err != nil || !strings.Contains(out, "File not found") {
				t.Errorf("%s: the user reads %q, %v", c.name, out, err)
			}
		}
	})
	noPermissions(t, g)
}

// Without the filter the answer is what it is: a flow from outside.
func TestTFTPWithoutFilter(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(lab.Config{Rules: "  - {name: tftp, action: allow, from: lan, to: wan, protocols: [tftp]}\n"})
	both(t, func(t *testing.T, srv, client netip.Addr) {
		at := netip.AddrPortFrom(srv, 69)
		server := udpPort(t, l.Srv, at)
		c := udpPort(t, l.Client, netip.AddrPortFrom(client, 0))
		from, _ := c.ask(at, tftpGetFile, server)
		udpPort(t, l.Srv, netip.AddrPortFrom(srv, 0)).send(from, "data")
		c.silent("from another port")
		server.send(from, "data")
		c.want(at, "data")
	})
}
