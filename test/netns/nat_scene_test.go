package netns_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// The NAT's tests are named after the requirements that docs/nat.md lists:
// TestNUDP is RFC 4787, TestNTCP RFC 5382, TestNICMP RFC 5508, TestNCGN RFC 6888.
// IPv4 alone is translated.

// mode is what a network rule says of mapping and filtering.
type mode struct{ mapping, filtering string }

const (
	independent   = "endpoint-independent"
	byAddress     = "address-dependent"
	byAddressPort = "address-and-port-dependent"
)

// modes are all that the configuration allows.
var modes = []mode{{independent, independent}, {independent, byAddress}, {independent, byAddressPort}, {byAddressPort, byAddressPort}}

func (m mode) String() string { return m.mapping + " mapping, " + m.filtering + " filtering" }

// config lets everything out through a network rule of this mode; the last one is
// what a rule is that says nothing. more is what else the rule has, with commas.
func (m mode) config(more string) lab.Config {
	said := ""
	if m != modes[3] {
		said = fmt.Sprintf(", mapping: %s, filtering: %s", m.mapping, m.filtering)
	}
	return lab.Config{
		NetworkRules: fmt.Sprintf("  - {name: out, from: lan, to: wan, relation: nat%s%s}\n", said, more),
		Rules:        "  - {name: all, action: allow, from: lan, to: wan, protocols: any}\n",
	}
}

// cone is full cone: what the tests of mappings need no other filtering for.
var cone = mode{independent, independent}

// socket opens a UDP socket at an IPv4 address of a host.
func socket(h *lab.Host, at netip.AddrPort) *net.UDPConn {
	return h.MustListenPacket("udp4", at.String())
}

func addrPort(c *net.UDPConn) netip.AddrPort {
	a := c.LocalAddr().(*net.UDPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// hears waits for a datagram with this text and gives its source; what else
// comes is passed over. Not ok: it did not come in time.
func hears(t testing.TB, c *net.UDPConn, text string, d time.Duration) (netip.AddrPort, bool) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(d)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 65536)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		var late interface{ Timeout() bool }
		switch {
		case err == nil && string(b[:n]) == text:
			return netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), true
		case errors.As(err, &late) && late.Timeout(), errors.Is(err, net.ErrClosed):
			return netip.AddrPort{}, false
		}
	}
}

// sends sends a datagram with a text that no other one has, and gives it.
func sends(t testing.TB, from *net.UDPConn, to netip.AddrPort) string {
	t.Helper()
	text := fmt.Sprintf("%s to %s at %d", from.LocalAddr(), to, time.Now().UnixNano())
	if _, err := from.WriteToUDPAddrPort([]byte(text), to); err != nil {
		t.Fatalf("send to %s: %v", to, err)
	}
	return text
}

// seenBy sends a datagram to a server's socket and gives the address that it
// comes from there.
func seenBy(t testing.TB, server, client *net.UDPConn) netip.AddrPort {
	t.Helper()
	from, ok := hears(t, server, sends(t, client, addrPort(server)), lab.Patience(3*time.Second))
	if !ok {
		t.Fatalf("a datagram of %s never came to %s", client.LocalAddr(), server.LocalAddr())
	}
	return from
}

// reaches wants a datagram to an address to arrive at a socket, and gives the
// source that it has there.
func reaches(t testing.TB, from *net.UDPConn, to netip.AddrPort, at *net.UDPConn) netip.AddrPort {
	t.Helper()
	source, ok := hears(t, at, sends(t, from, to), lab.Patience(3*time.Second))
	if !ok {
		t.Errorf("a datagram of %s to %s never came to %s", from.LocalAddr(), to, at.LocalAddr())
	}
	return source
}

// lost wants a datagram to an address not to arrive at a socket.
func lost(t testing.TB, from *net.UDPConn, to netip.AddrPort, at *net.UDPConn) {
	t.Helper()
	if source, ok := hears(t, at, sends(t, from, to), silence()); ok {
		t.Errorf("a datagram of %s to %s came to %s as from %s", from.LocalAddr(), to, at.LocalAddr(), source)
	}
}

// all are equal to the first.
func all(seen []netip.AddrPort) bool {
	for _, a := range seen {
		if a != seen[0] {
			return false
		}
	}
	return true
}

// mirrorTCP is a server that tells each client the address that it sees of it,
// a line, and then echoes.
func mirrorTCP(h *lab.Host, port int) {
	h.ServeTCP(port, func(c *net.TCPConn) {
		if _, err := fmt.Fprintf(c, "%s\n", strings.Replace(c.RemoteAddr().String(), "::ffff:", "", 1)); err == nil {
			_, _ = io.Copy(c, c)
		}
	})
}

// dialFrom opens a TCP connection from a port of a host; it is closed with the
// lab.
func dialFrom(t testing.TB, l *lab.Lab, h *lab.Host, from, to netip.AddrPort) (net.Conn, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), lab.Patience(5*time.Second))
	defer cancel()
	c, err := h.DialFrom(ctx, "tcp4", from, to.String())
	if err == nil {
		l.OnClose(func() { _ = c.Close() })
	}
	return c, err
}

// mirrored opens a connection to a mirror and gives the address that it tells.
func mirrored(t testing.TB, l *lab.Lab, h *lab.Host, from, to netip.AddrPort) (netip.AddrPort, net.Conn) {
	t.Helper()
	c, err := dialFrom(t, l, h, from, to)
	if err != nil {
		t.Fatalf("%s to %s: %v", from, to, err)
	}
	return toldBy(t, c), c
}

// toldBy reads a mirror's line.
func toldBy(t testing.TB, c net.Conn) netip.AddrPort {
	t.Helper()
	deadline(t, c, 5*time.Second)
	var line []byte
	for b := make([]byte, 1); len(line) == 0 || line[len(line)-1] != '\n'; line = append(line, b[0]) {
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatalf("the mirror says %q, %v", line, err)
		}
	}
	a, err := netip.ParseAddrPort(strings.TrimSpace(string(line)))
	if err != nil {
		t.Fatalf("the mirror says %q", line)
	}
	return a
}
