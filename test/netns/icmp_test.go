package netns_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

func udpAnswer(c net.Conn, d time.Duration) error {
	if err := c.SetReadDeadline(time.Now().Add(lab.Patience(d))); err != nil {
		return err
	}
	_, err := c.Read(make([]byte, 64))
	return err
}

// B63: an ICMP error for a flow reaches its sender, also translated; ping
// works.
func TestB63ICMPErrors(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(lab.Config{
		Protocols: echoProtocol,
		Rules: "  - {name: echo, action: allow, from: lan, to: wan, protocols: [echo]}\n" +
			"  - {name: ping, action: allow, from: lan, to: wan, protocols: [ping]}\n",
	})
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		l.Client.Run("ping", "-c1", "-W5", srv.String())
		c := l.Client.MustDial("udp", netip.AddrPortFrom(srv, 7).String(), time.Second)
		mustWrite(t, c, "nobody listens")
		if err := udpAnswer(c, 3*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("port unreachable comes as %v", err)
		}
		if err := connect(l.Client, netip.AddrPortFrom(srv, 7), 3*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("the server's reset comes as %v", err)
		}
	})
}

// B63: path MTU discovery works: a large transfer passes a gateway whose way out
// is narrower than both ends believe.
func TestB63PathMTU(t *testing.T) {
	for name, rules := range map[string]string{"kernel": allowEcho, "user": userEcho} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Srv.EchoTCP(7)
			narrow(l)
			l.Gateway(lab.Config{Protocols: echoProtocol, Rules: rules})
			both(t, func(t *testing.T, srv, _ netip.Addr) { upload(t, l, netip.AddrPortFrom(srv, 7)) })
		})
	}
}

// B62: with mss: clamp a large transfer passes a narrow way out though the errors
// that tell of it get lost, since neither end makes larger segments; without it
// the transfer stands.
func TestB62ClampMSS(t *testing.T) {
	for _, clamp := range []bool{true, false} {
		t.Run(fmt.Sprint(clamp), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Srv.EchoTCP(7)
			narrow(l)
			l.Client.Run("nft", "add table inet lost; add chain inet lost in { type filter hook input priority 0; }; "+
				"add rule inet lost in icmp type destination-unreachable drop; add rule inet lost in icmpv6 type packet-too-big drop")
			l.Client.Run("sysctl", "-qw", "net.ipv4.tcp_mtu_probing=0")
			rule := "  - {name: out, from: lan, to: wan, relation: nat%s}\n"
			g := l.Gateway(lab.Config{
				Protocols: echoProtocol, Rules: allowEcho,
				NetworkRules: fmt.Sprintf(rule, map[bool]string{true: ", mss: clamp"}[clamp]),
			})
			both(t, func(t *testing.T, srv, client netip.Addr) {
				at := netip.AddrPortFrom(srv, 7)
				c := l.Client.MustDial("tcp", at.String(), 5*time.Second)
				defer c.Close()
				echo(t, c, "small")
				inKernel(t, l, g, "tcp", client, at)
				if clamp {
					upload(t, l, at)
					return
				}
				mustWrite(t, c, strings.Repeat("large", 1000))
				if err := c.SetReadDeadline(time.Now().Add(silence())); err != nil {
					t.Fatal(err)
				}
				if n, err := c.Read(make([]byte, 100)); !timedOut(err) {
					t.Errorf("without it %d bytes came back, %v", n, err)
				}
			})
		})
	}
}

// narrow makes the way out narrower than its link. Linux 6.1 forwards IPv6
// by a route's MTU only if that is locked.
func narrow(l *lab.Lab) {
	l.T.Helper()
	l.GW.Run("ip", "route", "replace", "203.0.113.0/24", "dev", "wan0", "mtu", "1300")
	l.GW.Run("ip", "-6", "route", "replace", "2001:db8:b::/64", "dev", "wan0", "proto", "kernel", "metric", "256", "mtu", "lock", "1300")
}

// upload sends a quarter MiB to an echo server and compares what comes back.
func upload(t *testing.T, l *lab.Lab, at netip.AddrPort) {
	t.Helper()
	body, hash := lab.Content(256 << 10)
	c := l.Client.MustDial("tcp", at.String(), 5*time.Second).(*net.TCPConn)
	deadline(t, c, 20*time.Second)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(body)
		sent <- errors.Join(err, c.CloseWrite())
	}()
	got, err := io.ReadAll(c)
	if err != nil || lab.Hash(got) != hash {
		t.Errorf("%d bytes came back, another hash, %v", len(got), err)
	}
	if err := <-sent; err != nil {
		t.Errorf("send: %v", err)
	}
}
