package netns_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
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

func narrow(l *lab.Lab) {
	l.T.Helper()
	l.GW.Run("ip", "route", "replace", "203.0.113.0/24", "dev", "wan0", "mtu", "1300")
	l.GW.Run("ip", "-6", "route", "replace", "2001:db8:b::/64", "dev", "wan0", "proto", "kernel", "metric", "256", "mtu", "1300")
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
