package netns_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// download reads without an end and counts; it stops when the connection does.
type download struct {
	conn  net.Conn
	bytes atomic.Int64
	ended chan error
}

func startDownload(l *lab.Lab, at netip.AddrPort) *download {
	l.T.Helper()
	d := &download{conn: l.Client.MustDial("tcp", at.String(), 5*time.Second), ended: make(chan error, 1)}
	go func() {
		b := make([]byte, 256<<10)
		for {
			n, err := d.conn.Read(b)
			d.bytes.Add(int64(n))
			if err != nil {
				d.ended <- err
				return
			}
		}
	}()
	d.moves(l.T, 1<<20)
	return d
}

// moves waits until n more bytes have come.
func (d *download) moves(t testing.TB, n int64) {
	t.Helper()
	want := d.bytes.Load() + n
	lab.Eventually(t, 10*time.Second, "the transfer goes on", func() bool { return d.bytes.Load() >= want })
}

// stands waits until nothing has come for two seconds.
func (d *download) stands(t testing.TB) {
	t.Helper()
	last, since := d.bytes.Load(), time.Now()
	lab.Eventually(t, 15*time.Second, "the transfer stands still", func() bool {
		if now := d.bytes.Load(); now != last {
			last, since = now, time.Now()
		}
		return time.Since(since) >= 2*time.Second
	})
}

const streams = "  stream: {tcp: 9000}\n  other: {tcp: 9001}\n"

func streamRules(noKernelMode string) string {
	return "  - {name: stream, action: allow, from: lan, to: wan, protocols: [stream], no_kernel_mode: " + noKernelMode + "}\n" +
		"  - {name: other, action: allow, from: lan, to: wan, protocols: [other]}\n"
}

// B10: with no_kernel_mode the flow stalls when the daemon is stopped, without
// it the flow goes on.
func TestB10NoKernelMode(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.Stream(9000)
	l.Srv.Stream(9001)
	g := l.Gateway(lab.Config{Protocols: streams, Rules: streamRules("true")})
	both(t, func(t *testing.T, srv, client netip.Addr) {
		user := startDownload(l, netip.AddrPortFrom(srv, 9000))
		kernel := startDownload(l, netip.AddrPortFrom(srv, 9001))
		inUser(t, l, g, "tcp", client, netip.AddrPortFrom(srv, 9000))
		g.Freeze()
		defer g.Thaw()
		user.stands(t)
		kernel.moves(t, 16<<20)
		g.Thaw()
		user.moves(t, 4<<20)
		_, _ = user.conn.Close(), kernel.conn.Close()
	})
}

// B54: switched live, new flows of the rule move; nothing else is touched.
func TestB54LiveNoKernelMode(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.Stream(9000)
	l.Srv.Stream(9001)
	g := l.Gateway(lab.Config{Protocols: streams, Rules: streamRules("false")})
	both(t, func(t *testing.T, srv, client netip.Addr) {
		at := netip.AddrPortFrom(srv, 9000)
		first, other := startDownload(l, at), startDownload(l, netip.AddrPortFrom(srv, 9001))
		inKernel(t, l, g, "tcp", client, at)
		if out, status := g.Command("rules", "set", "stream", "--no-kernel-mode=on"); status != 0 {
			t.Fatalf("rules set: status %d\n%s", status, out)
		}
		second := startDownload(l, at)
		g.Freeze()
		defer g.Thaw()
		second.stands(t)
		first.moves(t, 4<<20)
		other.moves(t, 4<<20)
		g.Thaw()
		second.moves(t, 4<<20)
		if out, status := g.Command("rules", "set", "stream", "--no-kernel-mode=off"); status != 0 {
			t.Fatalf("rules set: status %d\n%s", status, out)
		}
		third := startDownload(l, at)
		g.Freeze()
		third.moves(t, 4<<20)
		g.Thaw()
		for _, d := range []*download{first, second, third, other} {
			_ = d.conn.Close()
		}
	})
	if out, status := g.Command("rules", "set", "no-such-rule", "--no-kernel-mode=on"); status == 0 || !strings.Contains(out, "no-such-rule") {
		t.Errorf("an unknown rule: status %d, %q", status, out)
	}
}

// B46: a reload cuts what is now denied, kernel and user, idle or not, and
// leaves alone what is still allowed.
func TestB46ReloadCuts(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		for _, port := range []int{7, 8, 9, 10} {
			l.Srv.EchoTCP(port)
		}
		protocols := "  kernel: {tcp: 7}\n  user: {tcp: 8}\n  kept-kernel: {tcp: 9}\n  kept-user: {tcp: 10}\n"
		rule := func(name, more string) string {
			return "  - {name: " + name + ", action: allow, from: lan, to: wan, protocols: [" + name + "]" + more + "}\n"
		}
		kept := rule("kept-kernel", "") + rule("kept-user", ", no_kernel_mode: true")
		g := l.Gateway(lab.Config{Protocols: protocols, Rules: kept + rule("kernel", "") + rule("user", ", no_kernel_mode: true")})
		var denied, allowed []net.Conn
		for port := uint16(7); port <= 10; port++ {
			c := l.Client.MustDial("tcp", to(f.srv, int(port)).String(), 5*time.Second)
			echo(t, c, "alive")
			if port <= 8 {
				denied = append(denied, c)
			} else {
				allowed = append(allowed, c)
			}
		}
		atSrv := l.Srv.Connections(7) + l.Srv.Connections(8)
		g.Reload(lab.Config{Protocols: protocols, Rules: kept})
		for _, c := range denied { // idle: nobody sends
			deadline(t, c, 3*time.Second)
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s > %s is now denied; the idle client reads %v, want a reset", c.LocalAddr(), c.RemoteAddr(), err)
			}
		}
		lab.Eventually(t, 3*time.Second, "the server's ends are reset too", func() bool {
			return atSrv == 2 && l.Srv.Connections(7)+l.Srv.Connections(8) == 0
		})
		for _, c := range allowed {
			echo(t, c, "still here")
		}
	})
}

// D12, B55: without the daemon living kernel flows and new flows that the
// kernel decides go on; what needs user space is dropped, unless its rule fails
// open. A restart adopts what is there.
func TestB55KilledDaemon(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		for _, port := range []int{7, 8, 9} {
			l.Srv.EchoTCP(port)
		}
		c := lab.Config{
			Protocols: "  kernel: {tcp: 7}\n  closed: {tcp: 8}\n  open: {tcp: 9}\n",
			Rules: "  - {name: kernel, action: allow, from: lan, to: wan, protocols: [kernel]}\n" +
				"  - {name: closed, action: allow, from: lan, to: wan, protocols: [closed], no_kernel_mode: true}\n" +
				"  - {name: open, action: allow, from: lan, to: wan, protocols: [open], no_kernel_mode: true, fail: open}\n",
		}
		g := l.Gateway(c)
		living := l.Client.MustDial("tcp", to(f.srv, 7).String(), 5*time.Second)
		echo(t, living, "before")
		g.Kill()
		echo(t, living, "after the daemon's death")
		echo(t, l.Client.MustDial("tcp", to(f.srv, 7).String(), 5*time.Second), "new in the kernel")
		echo(t, l.Client.MustDial("tcp", to(f.srv, 9).String(), 5*time.Second), "fail open")
		if err := briefly(l.Client, to(f.srv, 8)); !timedOut(err) {
			t.Errorf("a flow that needs user space: %v, want dropped", err)
		}
		l.Gateway(c)
		echo(t, living, "after the restart")
		echo(t, l.Client.MustDial("tcp", to(f.srv, 8).String(), 5*time.Second), "user space is back")
	})
}

// B59: `gateway down` undoes everything; other tables are never touched.
func TestB59Down(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	l.GW.Run("nft", "-f", l.File("others.nft", `
		table inet others {
			chain c {
				type filter hook forward priority 10
				tcp dport 7 accept
			}
		}
		table ip others {
			set s {
				type ipv4_addr
				elements = { 192.0.2.1 }
			}
		}
	`))
	l.GW.Run("ip", "rule", "add", "fwmark", "0x1", "lookup", "77", "pref", "500")
	others := l.GW.Run("nft", "list", "table", "inet", "others") + l.GW.Run("nft", "list", "table", "ip", "others")
	before := l.GW.Snapshot()
	g := l.Gateway(userConfig())
	for _, srv := range []netip.Addr{lab.Srv4, lab.Srv6} {
		echo(t, l.Client.MustDial("tcp", netip.AddrPortFrom(srv, 7).String(), 5*time.Second), "hello")
	}
	if now := l.GW.Run("nft", "list", "table", "inet", "others") + l.GW.Run("nft", "list", "table", "ip", "others"); now != others {
		t.Errorf("another table has changed:\n%s", now)
	}
	if status := g.Stop(); status != 0 {
		t.Errorf("the gateway ends with status %d", status)
	}
	g.Down()
	if d := before.Diff(l.GW.Snapshot()); d != "" {
		t.Errorf("not undone:\n%s", d)
	}
	g.Down() // again is fine
}

// A second gateway in the same place is refused, and the first goes on.
func TestSecondInstance(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	c := userConfig()
	l.Gateway(c)
	second := l.StartGateway(l.Text(c))
	ctx, cancel := context.WithTimeout(context.Background(), lab.Patience(10*time.Second))
	defer cancel()
	if status, err := second.Wait(ctx); err != nil || status == 0 {
		t.Errorf("a second gateway: status %d, %v", status, err)
	}
	for _, srv := range []netip.Addr{lab.Srv4, lab.Srv6} {
		echo(t, l.Client.MustDial("tcp", netip.AddrPortFrom(srv, 7).String(), 5*time.Second), "the first goes on")
	}
}

// The commands that show a running gateway's state, and what needs no gateway.
func TestShow(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	l.Srv.HTTP(80)
	g := l.Gateway(lab.Config{Protocols: echoProtocol, Rules: userEcho + allowWeb})
	user := l.Client.MustDial("tcp", netip.AddrPortFrom(lab.Srv4, 7).String(), 5*time.Second)
	echo(t, user, "hello")
	web := l.Client.MustDial("tcp", netip.AddrPortFrom(lab.Srv6, 80).String(), 5*time.Second)

	var rules []struct {
		Name         string
		NoKernelMode bool `json:"no_kernel_mode"`
	}
	g.JSON(&rules, "rules")
	if len(rules) != 2 || rules[0].Name != "echo" || !rules[0].NoKernelMode || rules[1].Name != "web" || rules[1].NoKernelMode {
		t.Errorf("rules: %+v", rules)
	}
	var flows []struct{ Path, Proto, Src, Dst, Rule string }
	g.JSON(&flows, "flows")
	want := map[string]string{user.LocalAddr().String(): "user", web.LocalAddr().String(): "kernel"}
	for _, f := range flows {
		if want[f.Src] == f.Path {
			delete(want, f.Src)
		}
	}
	if len(want) != 0 {
		t.Errorf("flows lack %v: %+v", want, flows)
	}
	var permissions []any
	g.JSON(&permissions, "permissions")
	if len(permissions) != 0 {
		t.Errorf("permissions: %v", permissions)
	}
	if out, status := g.Command("rules"); status != 0 || !strings.Contains(out, "web") {
		t.Errorf("rules as a table: status %d\n%s", status, out)
	}
	if out, status := l.Command("probe"); status != 0 || !strings.Contains(out, "tproxy") || !strings.Contains(out, "flowtable") {
		t.Errorf("probe: status %d\n%s", status, out)
	}
	if out, status := l.Command("check", l.Dir()+"/gateway.yaml"); status != 0 || !strings.Contains(out, "table inet sluice") {
		t.Errorf("check: status %d\n%s", status, out)
	}
	if _, status := l.Command("no-such-command"); status == 0 {
		t.Error("an unknown command succeeds")
	}
}

// Every flow is logged once, with its path, rule, bytes and result.
func TestFlowLog(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(7)
	g := l.Gateway(userConfig())
	c := l.Client.MustDial("tcp", netip.AddrPortFrom(lab.Srv4, 7).String(), 5*time.Second)
	echo(t, c, "twelve bytes")
	src := c.LocalAddr().String()
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(c); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	r := g.AwaitRecord("flow", 5*time.Second, func(r lab.Record) bool { return r.Text("src") == src })
	if r.Text("path") != "user" || r.Text("rule") != "echo" || r.Text("result") != "closed" {
		t.Errorf("the record: %v", r)
	}
}

// B62: what runs on the gateway itself is protected by rules that name it, and
// the gateway's own traffic works.
func TestB62GatewayAsHost(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.GW.EchoTCP(2200)
		l.GW.EchoTCP(2201)
		l.Srv.EchoTCP(7)
		l.Gateway(lab.Config{
			Protocols: "  admin: {tcp: 2200}\n  shut: {tcp: 2201}\n",
			Rules:     "  - {name: admin, action: allow, from: lan, to: gateway, protocols: [admin, ping]}\n",
		})
		echo(t, l.Client.MustDial("tcp", to(f.inside, 2200).String(), 5*time.Second), "the administrator")
		if err := connect(l.Client, to(f.inside, 2201), 3*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a port of the gateway that no rule names: %v", err)
		}
		l.Client.Run("ping", "-c1", "-W5", f.inside.String())
		for _, port := range []int{2200, 2201} {
			if err := briefly(l.Srv, to(f.outside, port)); !timedOut(err) {
				t.Errorf("the gateway's port %d from outside: %v, want silence", port, err)
			}
		}
		echo(t, l.GW.MustDial("tcp", to(f.srv, 7).String(), 5*time.Second), "the gateway's own")
	})
}
