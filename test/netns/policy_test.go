package netns_test

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

const (
	allowWeb     = "  - {name: web, action: allow, from: lan, to: wan, protocols: [http]}\n"
	allowEcho    = "  - {name: echo, action: allow, from: lan, to: wan, protocols: [echo]}\n"
	echoProtocol = "  echo: {tcp: 7, udp: 7}\n"
	userEcho     = "  - {name: echo, action: allow, from: lan, to: wan, protocols: [echo], no_kernel_mode: true}\n"
)

// both runs a part of a test for each family: srv's address and the client's.
func both(t *testing.T, f func(t *testing.T, srv, client netip.Addr)) {
	t.Run("IPv4", func(t *testing.T) { f(t, lab.Srv4, lab.Client4) })
	t.Run("IPv6", func(t *testing.T) { f(t, lab.Srv6, lab.Client6) })
}

// inKernel fails unless the flow is carried by the kernel: its conntrack entry
// says so, and the daemon has no socket for it.
func inKernel(t testing.TB, l *lab.Lab, g *lab.Gateway, proto string, client netip.Addr, dst netip.AddrPort) {
	t.Helper()
	f, ok := l.GW.Flow(proto, client, dst)
	if !ok || f.Path() != "kernel" {
		t.Errorf("%s %s > %s is not marked kernel: %s", proto, client, dst, f.Line)
	}
	if n := g.Carries(proto, int(dst.Port())); n != 0 {
		t.Errorf("the daemon holds %d sockets for %s", n, dst)
	}
}

// inUser fails unless the daemon carries the flow with sockets of its own.
func inUser(t testing.TB, l *lab.Lab, g *lab.Gateway, proto string, client netip.Addr, dst netip.AddrPort) {
	t.Helper()
	f, ok := l.GW.Flow(proto, client, dst)
	if !ok || f.Path() != "user" {
		t.Errorf("%s %s > %s is not marked user: %s", proto, client, dst, f.Line)
	}
	if g.Carries(proto, int(dst.Port())) == 0 {
		t.Errorf("the daemon holds no socket for %s", dst)
	}
}

// B11: kernel mode is the default.
func TestB11KernelModeIsTheDefault(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.HTTP(80)
	peers := l.Srv.EchoTCP(7)
	g := l.Gateway(lab.Config{Protocols: echoProtocol, Rules: allowWeb + allowEcho})
	both(t, func(t *testing.T, srv, client netip.Addr) {
		at := netip.AddrPortFrom(srv, 7)
		echo(t, l.Client.MustDial("tcp", at.String(), 5*time.Second), "hello")
		inKernel(t, l, g, "tcp", client, at)
		_, hash := lab.Content(1 << 20)
		if got := fetch(t, l.Client, fmt.Sprintf("http://%s/1048576", netip.AddrPortFrom(srv, 80))); lab.Hash(got) != hash {
			t.Errorf("%d bytes, another hash", len(got))
		}
		saw := peers.Addrs()[len(peers.Addrs())-1].Addr()
		want := client
		if srv.Is4() {
			want = lab.Outside4
		}
		if saw != want {
			t.Errorf("srv saw %s, want %s", saw, want)
		}
	})
	if f, ok := l.GW.Flow("tcp", lab.Client4, netip.AddrPortFrom(lab.Srv4, 7)); !ok || f.ReplyDst.Addr() != lab.Outside4 {
		t.Errorf("conntrack shows no translation: %s", f.Line)
	}
}

// D3: a denied flow is refused at once inside, and silence outside; srv sees
// nothing of it.
func TestDefaultDeny(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	seen := l.Srv.Capture()
	l.Srv.EchoTCP(7)
	l.Client.EchoTCP(7)
	l.Client.EchoUDP(7)
	l.Gateway(lab.Config{Protocols: echoProtocol, Rules: allowWeb, NetworkRules: "  - {name: out, from: lan, to: wan, relation: nat}\n"})
	both(t, func(t *testing.T, srv, client netip.Addr) {
		start := time.Now()
		err := connect(l.Client, netip.AddrPortFrom(srv, 7), 3*time.Second)
		if !errors.Is(err, syscall.ECONNREFUSED) || time.Since(start) > lab.Patience(time.Second) {
			t.Errorf("a denied connect ends with %v after %v, want refused at once", err, time.Since(start))
		}
		u := l.Client.MustDial("udp", netip.AddrPortFrom(srv, 7).String(), time.Second)
		if err := udpError(u); err == nil || timedOut(err) {
			t.Errorf("a denied datagram: %v, want an ICMP error", err)
		}
		if !srv.Is4() {
			if err := briefly(l.Srv, netip.AddrPortFrom(client, 7)); !timedOut(err) {
				t.Errorf("a connect from outside: %v, want silence", err)
			}
		}
	})
	if err := briefly(l.Srv, netip.AddrPortFrom(lab.Outside4, 7)); !timedOut(err) {
		t.Errorf("a connect to the outside address: %v, want silence", err)
	}
	if p := lab.Select(seen.Stop(), func(s lab.Seen) bool { return !s.Out && s.Dst.Port() == 7 }); len(p) != 0 {
		t.Errorf("srv saw %d packets of denied flows", len(p))
	}
}

// udpError sends until an error comes back; nil: an answer came.
func udpError(c interface {
	Write([]byte) (int, error)
	Read([]byte) (int, error)
	SetReadDeadline(time.Time) error
}) error {
	if err := c.SetReadDeadline(time.Now().Add(lab.Patience(1500 * time.Millisecond))); err != nil {
		return err
	}
	if _, err := c.Write([]byte("anybody?")); err != nil {
		return err
	}
	_, err := c.Read(make([]byte, 64))
	return err
}

// B42: undefined protocols are dropped by the default rule and logged.
func TestB42UndefinedProtocol(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	seen := l.Srv.Capture()
	l.Srv.EchoTCP(4242)
	g := l.Gateway(lab.Config{Rules: "  - {name: all-defined, action: allow, from: lan, to: wan, protocols: [http, dns]}\n"})
	both(t, func(t *testing.T, srv, client netip.Addr) {
		if err := briefly(l.Client, netip.AddrPortFrom(srv, 4242)); err == nil {
			t.Error("an undefined protocol passed")
		}
		dst := netip.AddrPortFrom(srv, 4242).String()
		g.AwaitRecord("flow", 3*time.Second, func(r lab.Record) bool {
			return r.Text("result") == "denied" && r.Text("dst") == dst
		})
	})
	if n := len(lab.Select(seen.Stop(), func(s lab.Seen) bool { return !s.Out && s.Dst.Port() == 4242 })); n != 0 {
		t.Errorf("srv saw %d packets", n)
	}
}

// B44: the first rule that matches decides.
func TestB44RuleOrder(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.Srv.EchoTCP(7)
		deny := "  - {name: not-srv, action: deny, from: lan, to: server, protocols: [echo]}\n"
		c := lab.Config{
			Protocols: echoProtocol, Rules: allowEcho + deny,
			Networks: "  server: {interfaces: [wan0], prefixes: [203.0.113.10/32, '2001:db8:b::10/128']}\n",
		}
		g := l.Gateway(c)
		ask := func(t *testing.T, want error) {
			t.Helper()
			if err := connect(l.Client, to(f.srv, 7), 3*time.Second); !errors.Is(err, want) {
				t.Errorf("connect to %s: %v, want %v", f.srv, err, want)
			}
		}
		ask(t, nil)
		c.Rules = deny + allowEcho
		g.Reload(c)
		ask(t, syscall.ECONNREFUSED)
		c.Rules = allowEcho + deny
		g.Reload(c)
		ask(t, nil)
	})
}

// B44: without a network rule nothing passes between two networks.
func TestB44NoNetworkRule(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		seen := l.Srv.Capture()
		l.Srv.EchoTCP(7)
		g := l.Gateway(lab.Config{
			Protocols: echoProtocol, Rules: allowEcho,
			NetworkRules: "  - {name: elsewhere, from: lan, to: lan, relation: route}\n",
		})
		if err := briefly(l.Client, to(f.srv, 7)); err == nil {
			t.Errorf("%s: passed without a network rule", f.srv)
		}
		g.AwaitRecord("flow", 3*time.Second, func(r lab.Record) bool {
			return r.Text("result") == "denied" && strings.Contains(strings.ToLower(r.Text("reason")), "network")
		})
		if n := len(lab.Select(seen.Stop(), func(s lab.Seen) bool { return !s.Out && s.Dst.Port() == 7 })); n != 0 {
			t.Errorf("srv saw %d packets", n)
		}
	})
}

// B57: a broken configuration is refused with file, line and reason, at start,
// by check, and on reload, where the running policy stays.
func TestB57BrokenConfig(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	good := lab.Config{Protocols: echoProtocol, Rules: allowEcho}
	g := l.Gateway(good)
	before := l.GW.Run("nft", "list", "ruleset")
	for _, bad := range []struct{ name, text, reason string }{
		{"unknown key", l.Text(good) + "nonsense: 1\n", "nonsense"},
		{"bad value", strings.Replace(l.Text(good), "action: allow", "action: perhaps", 1), "perhaps"},
		{"unknown network", strings.Replace(l.Text(good), "from: lan, to: wan, protocols", "from: moon, to: wan, protocols", 1), "moon"},
		{"not YAML", "rules: [", ""},
	} {
		line := 0
		for i, s := range strings.Split(bad.text, "\n") {
			if bad.reason != "" && strings.Contains(s, bad.reason) {
				line = i + 1
			}
		}
		place := "gateway.yaml:"
		if line > 0 {
			place = fmt.Sprintf("gateway.yaml:%d:", line)
		}
		out, status := g.Rewrite(bad.text)
		if status == 0 || !strings.Contains(out, place) || !strings.Contains(out, bad.reason) {
			t.Errorf("%s: reload: status %d, want a failure at %s\n%s", bad.name, status, place, out)
		}
		if out, status := l.Command("check", l.Dir()+"/gateway.yaml"); status == 0 || !strings.Contains(out, place) {
			t.Errorf("%s: check: status %d, want a failure at %s\n%s", bad.name, status, place, out)
		}
		for _, srv := range []netip.Addr{lab.Srv4, lab.Srv6} {
			if err := connect(l.Client, netip.AddrPortFrom(srv, 7), 3*time.Second); err != nil {
				t.Errorf("%s: the running policy is gone: %v", bad.name, err)
			}
		}
	}
	if after := l.GW.Run("nft", "list", "ruleset"); stable(after) != stable(before) {
		t.Errorf("the ruleset has changed:\n%s", after)
	}
}

// stable leaves counters out of a ruleset.
func stable(ruleset string) string {
	f := strings.Fields(ruleset)
	for i := range f {
		if i > 0 && (f[i-1] == "packets" || f[i-1] == "bytes") {
			f[i] = "N"
		}
	}
	return strings.Join(f, " ")
}

// B57: a broken configuration at start leaves nothing behind.
func TestB57BrokenStart(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	before := l.GW.Snapshot()
	g := l.StartGateway(l.Text(lab.Config{}) + "nonsense: 1\n")
	lab.Eventually(t, 10*time.Second, "the gateway gives up", func() bool {
		select {
		case <-g.Done():
			return true
		default:
			return false
		}
	})
	if out := g.Output.String(); !strings.Contains(out, "nonsense") || !strings.Contains(out, "gateway.yaml:") {
		t.Errorf("no place and reason:\n%s", out)
	}
	if d := before.Diff(l.GW.Snapshot()); d != "" {
		t.Errorf("it left something:\n%s", d)
	}
}

// Ten thousand rules load and decide, first and last alike.
func TestTenThousandRules(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	l.Srv.EchoTCP(8)
	var networks, rules strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&networks, "  n%d: {prefixes: [198.18.%d.%d/32]}\n", i, i/250, i%250+1)
		fmt.Fprintf(&rules, "  - {name: r%d, action: allow, from: lan, to: n%d, protocols: [http]}\n", i, i)
		fmt.Fprintf(&rules, "  - {name: d%d, action: deny, from: lan, to: n%d, protocols: [https]}\n", i, i)
	}
	rules.WriteString("  - {name: last, action: allow, from: lan, to: wan, protocols: [echo]}\n")
	start := time.Now()
	g := l.Gateway(lab.Config{Networks: networks.String(), Protocols: echoProtocol, Rules: rules.String()})
	t.Logf("ready after %v", time.Since(start))
	both(t, func(t *testing.T, srv, client netip.Addr) {
		at := netip.AddrPortFrom(srv, 7)
		echo(t, l.Client.MustDial("tcp", at.String(), 5*time.Second), "hello")
		inKernel(t, l, g, "tcp", client, at)
		if err := briefly(l.Client, netip.AddrPortFrom(srv, 8)); err == nil {
			t.Error("what no rule allows passed")
		}
	})
}
