package netns_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// published is a rule that publishes client, a host of the inside, to the
// outside; more is added to it.
func published(name, protocols, more string) string {
	if more != "" {
		more = ", " + more
	}
	return fmt.Sprintf("  - {name: %s, action: publish, from: wan, address: 203.0.113.1, protocols: [%s], server: [10.0.0.2, \"fd00:a::2\"]%s}\n", name, protocols, more)
}

// outsideView is the family of a published server as those outside meet it.
type outsideView struct {
	name             string
	at               netip.Addr // where it is reached
	server           netip.Addr // its own
	peer, gateway    netip.Addr // who comes, and what the gateway is to the server
	other, secondary netip.Addr // another outside host; another inside host
}

func eachView(t *testing.T, f func(t *testing.T, v outsideView)) {
	t.Helper()
	for _, v := range []outsideView{
		{"v4", lab.Outside4, lab.Client4, lab.Srv4, lab.Inside4, lab.Other4, lab.Second4},
		{"v6", lab.Client6, lab.Client6, lab.Srv6, lab.Inside6, lab.Other6, lab.Second6},
	} {
		t.Run(v.name, func(t *testing.T) { f(t, v) })
	}
}

// pubModes are the two ways in which flows to a published server pass.
var pubModes = []struct{ name, key string }{{"kernel", ""}, {"user", "no_kernel_mode: true"}}

// A published server is reached at the gateway's address, or, in IPv6, at its
// own, in the kernel and in user space, by TCP and UDP; it sees the client or,
// if the rule says so, the gateway.
func TestPublishedServer(t *testing.T) {
	for _, mode := range pubModes {
		for _, source := range []string{"client", "gateway"} {
			t.Run(mode.name+"-"+source, func(t *testing.T) {
				t.Parallel()
				l := lab.New(t)
				web := l.Client.HTTP(80)
				l.Client.EchoUDP(53)
				more := "source: " + source
				if mode.key != "" {
					more += ", " + mode.key
				}
				g := l.Gateway(lab.Config{Rules: published("www", "http, dns", more)})
				inside := l.Client.Capture()
				eachView(t, func(t *testing.T, v outsideView) {
					want := v.peer
					if source == "gateway" {
						want = v.gateway
					}
					_, hash := lab.Content(1 << 20)
					if got := fetch(t, l.Srv, fmt.Sprintf("http://%s/1048576", netip.AddrPortFrom(v.at, 80))); lab.Hash(got) != hash {
						t.Errorf("%d bytes, another hash", len(got))
					}
					seen := web.Addrs()
					if p := seen[len(seen)-1].Addr(); p != want {
						t.Errorf("the server saw %s, want %s", p, want)
					}
					echo(t, l.Srv.MustDial("udp", netip.AddrPortFrom(v.at, 53).String(), 3*time.Second), "a datagram")
					f, ok := l.GW.Flow("udp", v.peer, netip.AddrPortFrom(v.at, 53))
					if !ok || f.Path() != mode.name {
						t.Errorf("conntrack: %+v, want path %s", f, mode.name)
					}
				})
				for _, p := range inside.Stop() {
					if !p.Out && p.Proto == "udp" && p.Dst.Port() == 53 {
						from := p.Src.Addr()
						if own := from == lab.Inside4 || from == lab.Inside6; own != (source == "gateway") {
							t.Errorf("a datagram came from %s", from)
						}
					}
				}
				if source == "client" && mode.name == "kernel" && g.Carries("tcp", 80) != 0 {
					t.Error("the daemon holds sockets of a flow in the kernel")
				}
			})
		}
	}
}

// What is not published stays silent: other ports, other addresses, other
// sources.
func TestUnpublishedStaysSilent(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Client.HTTP(80)
	l.Client.HTTP(81)
	l.Gateway(lab.Config{
		Networks: "  friend: {prefixes: [203.0.113.10, \"2001:db8:b::10\"]}\n",
		Rules:    strings.Replace(published("www", "http", ""), "from: wan", "from: friend", 1),
	})
	inside := l.Client.Capture()
	eachView(t, func(t *testing.T, v outsideView) {
		fetch(t, l.Srv, fmt.Sprintf("http://%s/10", netip.AddrPortFrom(v.at, 80)))
		for what, err := range map[string]error{
			"another port":   briefly(l.Srv, netip.AddrPortFrom(v.at, 81)),
			"another source": briefly(l.Other, netip.AddrPortFrom(v.at, 80)),
		} {
			if !timedOut(err) {
				t.Errorf("%s: %v, want silence", what, err)
			}
		}
	})
	if err := briefly(l.Srv, netip.AddrPortFrom(lab.Outside4b, 80)); !timedOut(err) {
		t.Errorf("the gateway's other address: %v, want silence", err)
	}
	for _, p := range inside.Stop() {
		if p.TCP != nil && p.TCP.SYN && !p.Out && p.Dst.Port() != 80 {
			t.Errorf("the server saw a SYN to %s", p.Dst)
		}
	}
}

// Who is inside reaches the published server by its external address, and the
// answers come back through the gateway.
func TestNUDP9PublishedHairpin(t *testing.T) {
	for _, mode := range pubModes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			web := l.Client.HTTP(80)
			l.Client.EchoUDP(53)
			rule := strings.Replace(published("www", "http, dns", mode.key), "from: wan", "from: [wan, lan]", 1)
			l.Gateway(lab.Config{Rules: rule})
			_, hash := lab.Content(100_000)
			if got := fetch(t, l.Client2, "http://203.0.113.1/100000"); lab.Hash(got) != hash {
				t.Errorf("%d bytes, another hash", len(got))
			}
			if p := web.Addrs()[0].Addr(); p != lab.Outside4 {
				t.Errorf("the server saw %s, want the address that was asked for", p)
			}
			echo(t, l.Client2.MustDial("udp", "203.0.113.1:53", 3*time.Second), "a datagram")
			f, ok := l.GW.Flow("udp", lab.Second4, netip.MustParseAddrPort("203.0.113.1:53"))
			if !ok || f.Path() != mode.name {
				t.Errorf("conntrack: %+v, want path %s", f, mode.name)
			}
		})
	}
}

// Ports that begin elsewhere at the server, alone and as a range, and a range of
// very many.
func TestPublishedPorts(t *testing.T) {
	for _, mode := range pubModes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Client.EchoTCP(8080)
			for port := 6000; port < 6003; port++ {
				l.Client.EchoTCP(port)
			}
			l.Client.EchoTCP(33000)
			l.Client.EchoTCP(42999)
			rule := func(name, proto, more string) string {
				if mode.key != "" {
					more += mode.key + ", "
				}
				return fmt.Sprintf("  - {name: %s, action: publish, from: wan, protocols: [%s], %saddress: 203.0.113.1, server: 10.0.0.2}\n", name, proto, more)
			}
			l.Gateway(lab.Config{
				Protocols: "  range: {tcp: 5000-5999}\n  wide: {tcp: 33000-42999, udp: 33000-42999}\n",
				Rules:     rule("www", "http", "server_port: 8080, ") + rule("game", "range", "server_port: 6000, ") + rule("many", "wide", ""),
			})
			for _, port := range []int{80, 5000, 5001, 5002, 33000, 42999} {
				echo(t, l.Srv.MustDial("tcp", netip.AddrPortFrom(lab.Outside4, uint16(port)).String(), 3*time.Second), fmt.Sprint("port ", port))
			}
			if err := connect(l.Srv, netip.AddrPortFrom(lab.Outside4, 5003), 3*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("a published port at which nobody listens: %v", err)
			}
			for _, port := range []uint16{6000, 4999, 43000} {
				if err := briefly(l.Srv, netip.AddrPortFrom(lab.Outside4, port)); !timedOut(err) {
					t.Errorf("port %d: %v, want silence", port, err)
				}
			}
		})
	}
}

// B44 for rules that publish: the first match decides, among access rules too.
func TestB44PublishedInOrder(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	first, second := l.Client.HTTP(80), l.Client2.HTTP(80)
	networks := "  friend: {prefixes: [203.0.113.10, \"2001:db8:b::10\"]}\n"
	deny := "  - {name: not-him, action: deny, from: friend, to: any, protocols: any}\n"
	special := "  - {name: special, action: publish, from: friend, address: 203.0.113.1, protocols: [http], server: 10.0.0.3}\n"
	g := l.Gateway(lab.Config{Networks: networks, Rules: deny + published("www", "http", "")})
	eachView(t, func(t *testing.T, v outsideView) {
		if err := briefly(l.Srv, netip.AddrPortFrom(v.at, 80)); !timedOut(err) {
			t.Errorf("denied before: %v, want silence", err)
		}
		fetch(t, l.Other, fmt.Sprintf("http://%s/10", netip.AddrPortFrom(v.at, 80)))
	})
	g.Reload(lab.Config{Networks: networks, Rules: published("www", "http", "") + deny})
	eachView(t, func(t *testing.T, v outsideView) {
		fetch(t, l.Srv, fmt.Sprintf("http://%s/10", netip.AddrPortFrom(v.at, 80)))
	})
	g.Reload(lab.Config{Networks: networks, Rules: special + published("www", "http", "")})
	before := len(first.Addrs())
	fetch(t, l.Srv, "http://203.0.113.1/10")
	fetch(t, l.Other, "http://203.0.113.1/10")
	if a, b := len(second.Addrs()), len(first.Addrs())-before; a != 1 || b != 1 {
		t.Errorf("the friend's server saw %d connections, the other one %d; want 1 each", a, b)
	}
	g.Reload(lab.Config{Networks: networks, Rules: "  - {name: own, action: deny, from: wan, to: gateway, protocols: [http]}\n" + special})
	if err := briefly(l.Srv, netip.MustParseAddrPort("203.0.113.1:80")); !timedOut(err) {
		t.Errorf("denied at the gateway before: %v, want silence", err)
	}
}

// B46 for rules that publish: what is published no more is cut, also what leads
// to another server now; the rest goes on.
func TestB46PublishedReload(t *testing.T) {
	for _, mode := range pubModes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			for _, port := range []int{80, 443, 22} {
				l.Client.EchoTCP(port)
			}
			l.Client2.EchoTCP(22)
			rule := func(protocol, server string) string {
				return fmt.Sprintf("  - {name: %s, action: publish, from: wan, address: 203.0.113.1, protocols: [%s], server: %s, no_kernel_mode: %v}\n",
					protocol, protocol, server, mode.key != "")
			}
			g := l.Gateway(lab.Config{Rules: rule("http", "10.0.0.2") + rule("https", "10.0.0.2") + rule("ssh", "10.0.0.2")})
			dial := func(port int) net.Conn {
				c := l.Srv.MustDial("tcp", netip.AddrPortFrom(lab.Outside4, uint16(port)).String(), 3*time.Second)
				echo(t, c, "before")
				return c
			}
			stays, gone, moved := dial(80), dial(443), dial(22)
			g.Reload(lab.Config{Rules: rule("ssh", "10.0.0.3") + rule("http", "10.0.0.2")})
			for what, c := range map[string]net.Conn{"no longer published": gone, "published from elsewhere": moved} {
				if err := ended(c); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s: %v, want a reset", what, err)
				}
			}
			echo(t, stays, "after")
			if err := briefly(l.Srv, netip.AddrPortFrom(lab.Outside4, 443)); !timedOut(err) {
				t.Errorf("a new connection to what is not published any more: %v", err)
			}
			echo(t, dial(22), "the other server")
		})
	}
}

// ended waits until a connection is over, and says how.
func ended(c net.Conn) error {
	_ = c.SetReadDeadline(time.Now().Add(lab.Patience(10 * time.Second)))
	_, err := c.Read(make([]byte, 1))
	return err
}

// Flow records, the list of binds and the rules name the rule that publishes.
func TestPublishedIsListed(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Client.HTTP(80)
	l.Client.EchoTCP(22)
	g := l.Gateway(lab.Config{Rules: published("www", "http", "") + published("shell", "ssh", "no_kernel_mode: true")})
	_ = l.Srv.MustDial("tcp", "203.0.113.1:80", 3*time.Second)
	shell := l.Srv.MustDial("tcp", "203.0.113.1:22", 3*time.Second)
	echo(t, shell, "hello")
	var flows []struct {
		Rule   string `json:"rule"`
		Path   string `json:"path"`
		NATDst string `json:"nat_dst"`
	}
	g.JSON(&flows, "flows")
	for rule, path := range map[string]string{"www": "kernel", "shell": "user"} {
		if !slices.ContainsFunc(flows, func(f struct {
			Rule   string `json:"rule"`
			Path   string `json:"path"`
			NATDst string `json:"nat_dst"`
		}) bool {
			return f.Rule == rule && f.Path == path && strings.HasPrefix(f.NATDst, "10.0.0.2:")
		}) {
			t.Errorf("no flow of rule %s in the %s: %+v", rule, path, flows)
		}
	}
	var binds []struct{ State, External, Client, By, Rule string }
	g.JSON(&binds, "binds")
	for _, want := range []string{"203.0.113.1:80 10.0.0.2:80 publish www", "203.0.113.1:22 10.0.0.2:22 publish shell",
		"[fd00:a::2]:80 [fd00:a::2]:80 publish www"} {
		if !slices.ContainsFunc(binds, func(b struct{ State, External, Client, By, Rule string }) bool {
			return b.External+" "+b.Client+" "+b.By == want && b.State == "allowed"
		}) {
			t.Errorf("no bind %q: %+v", want, binds)
		}
	}
	_ = shell.Close()
	g.AwaitRecord("flow", 5*time.Second, func(r lab.Record) bool {
		return r.Text("rule") == "shell" && r.Text("nat_dst") == "10.0.0.2:22"
	})
}

// A port at which the gateway itself listens is not published: the start, and a
// reload, say so.
func TestPublishedPortOfTheGateway(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.GW.EchoTCP(22)
	g := l.Gateway(lab.Config{Rules: published("www", "http", "")})
	out, status := g.Rewrite(l.Text(lab.Config{Rules: published("www", "http", "") + published("shell", "ssh", "")}))
	if status == 0 || !strings.Contains(out, `rule "shell"`) || !strings.Contains(out, "port 22") {
		t.Errorf("reload: status %d, %q", status, out)
	}
	l.Client.HTTP(80)
	fetch(t, l.Srv, "http://203.0.113.1/10") // the running policy stays
}

// What the gateway serves to its clients is not published, whichever comes first;
// and a port that becomes free in the same file is.
func TestPublishedPortOfSOCKS(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	rule := func(what string) string {
		return fmt.Sprintf("  - {name: taken, action: publish, from: wan, protocols: %s, server: 10.0.0.2}\n", what)
	}
	with := func(rules, extra string) string {
		return l.Text(lab.Config{Rules: rules, Protocols: "  proxy: {tcp: 1080}\n  ask: {udp: 5351}\n", Extra: extra})
	}
	for what, serve := range map[string]string{"proxy": "socks: {networks: lan}\n", "ask": "pcp: {networks: lan}\n"} {
		g := l.StartGateway(with(rule(what), serve))
		<-g.Done()
		if out := g.Output.String(); !strings.Contains(out, `rule "taken"`) {
			t.Errorf("%s: the start says %q", what, out)
		}
	}
	g := l.Gateway(lab.Config{Extra: "socks: {networks: lan}\n"})
	if out, status := g.Rewrite(with(rule("proxy"), "socks: {networks: lan}\n")); status == 0 || !strings.Contains(out, "port 1080") {
		t.Errorf("reload: status %d, %q", status, out)
	}
	if out, status := g.Rewrite(with(rule("proxy"), "socks: {networks: lan, port: 1081}\n")); status != 0 {
		t.Errorf("reload with the port free: %q", out)
	}
	l.Client.EchoTCP(1080)
	c := l.Srv.MustDial("tcp", "203.0.113.1:1080", 3*time.Second)
	echo(t, c, "published")
}

// ICMP errors of a published flow reach its client, translated.
func TestB63PublishedErrors(t *testing.T) {
	for _, mode := range pubModes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Gateway(lab.Config{Rules: published("www", "http, dns", mode.key)})
			eachView(t, func(t *testing.T, v outsideView) {
				if err := connect(l.Srv, netip.AddrPortFrom(v.at, 80), 3*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("a server that refuses: %v", err)
				}
				c := l.Srv.MustDial("udp", netip.AddrPortFrom(v.at, 53).String(), 3*time.Second)
				if _, err := c.Write([]byte("nobody listens")); err != nil {
					t.Fatal(err)
				}
				if err := ended(c); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("a datagram to a port at which nobody listens: %v", err)
				}
			})
		})
	}
}

// D12 for rules that publish: without the daemon the kernel's go on, and one that
// needs user space does not.
func TestB55PublishedWithoutTheDaemon(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Client.HTTP(80)
	l.Client.EchoTCP(22)
	g := l.Gateway(lab.Config{Rules: published("www", "http", "") + published("shell", "ssh", "no_kernel_mode: true")})
	echo(t, l.Srv.MustDial("tcp", "203.0.113.1:22", 3*time.Second), "hello")
	g.Kill()
	eachView(t, func(t *testing.T, v outsideView) {
		fetch(t, l.Srv, fmt.Sprintf("http://%s/10", netip.AddrPortFrom(v.at, 80)))
	})
	ctx, cancel := context.WithTimeout(t.Context(), silence())
	defer cancel()
	if _, err := l.Srv.Dial(ctx, "tcp", "203.0.113.1:22"); !timedOut(err) {
		t.Errorf("what needs user space: %v, want silence", err)
	}
}

// Without an address a server is published at every one that the gateway has, as
// they come; a rule before it keeps a port of the inside for the gateway.
func TestPublishedAtEveryAddress(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Client.HTTP(80)
	own := "  - {name: own, action: allow, from: lan, to: gateway, protocols: [http]}\n"
	publish := "  - {name: www, action: publish, from: [wan, lan], protocols: [http], server: 10.0.0.2}\n"
	g := l.Gateway(lab.Config{Rules: publish})
	fetch(t, l.Srv, "http://203.0.113.1/10")
	fetch(t, l.Srv, "http://203.0.113.2/10")
	fetch(t, l.Client2, "http://10.0.0.1/10")
	l.GW.Run("ip", "addr", "add", "203.0.113.77/24", "dev", "wan0")
	fetch(t, l.Srv, "http://203.0.113.77/10")
	g.Reload(lab.Config{Rules: own + publish})
	if err := connect(l.Client2, netip.MustParseAddrPort("10.0.0.1:80"), 3*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the gateway's own port, at which nobody listens: %v", err)
	}
	fetch(t, l.Srv, "http://203.0.113.2/10")
}

// Another protocol than TCP and UDP is published, in the kernel.
func TestPublishedGRE(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(lab.Config{Rules: published("tunnel", "gre", "")})
	inside := l.Client.Capture()
	eachView(t, func(t *testing.T, v outsideView) {
		if err := l.Srv.Do(func() error {
			c, err := net.DialIP("ip:47", nil, &net.IPAddr{IP: v.at.AsSlice()})
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte{0, 0, 0x08, 0, 1, 2, 3, 4})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		lab.Eventually(t, 3*time.Second, "the server sees it", func() bool {
			return len(lab.Select(inside.Peek(), func(s lab.Seen) bool {
				return !s.Out && s.Src.Addr() == v.peer && s.Dst.Addr() == v.server && s.TCP == nil
			})) > 0
		})
	})
}

// An address that is not the gateway's yet is no error, and the log names it.
func TestPublishedAtNoAddress(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(lab.Config{Rules: "  - {name: later, action: publish, from: wan, address: 203.0.113.77, protocols: [http], server: 10.0.0.2}\n"})
	r := g.AwaitRecord("a server is published at an address that is not the gateway's now", 5*time.Second, func(lab.Record) bool { return true })
	if r.Text("rule") != "later" || r.Text("address") != "203.0.113.77" {
		t.Errorf("the record says %v", r)
	}
}
