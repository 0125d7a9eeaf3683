package socks

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

var (
	inside  = netip.MustParseAddrPort("10.0.0.1:1080")
	alice   = netip.MustParseAddr("10.0.0.2")
	server  = netip.MustParseAddrPort("203.0.113.10:80")
	servers = map[string]netip.AddrPort{"v4": server, "v6": netip.MustParseAddrPort("[2001:db8:b::10]:80")}
)

func settings() Settings {
	return Settings{Listen: []netip.AddrPort{inside}, PerClient: 4, Handshake: 2 * time.Second, Connect: 2 * time.Second, Bind: 2 * time.Second}
}

// start serves by settings, with a server outside that answers "hello".
func start(t testing.TB, s Settings) (*filtertest.Gateway, *Filter) {
	t.Helper()
	f := New()
	g := filtertest.New(t, f, "")
	if err := f.Configure(s); err != nil {
		t.Fatal(err)
	}
	l, err := g.World().Listen(server, nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c) }()
		}
	}()
	return g, f
}

// dial connects a client.
func dial(t testing.TB, g *filtertest.Gateway, from netip.Addr) net.Conn {
	t.Helper()
	c, err := g.World().Dial(t.Context(), flow.TCP, netip.AddrPortFrom(from, 0), inside)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// say writes and reads as much as is wanted.
func say(t testing.TB, c net.Conn, what, want string) {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if what != "" { // a pipe would wait for a reader even of nothing
		if _, err := io.WriteString(c, what); err != nil {
			t.Fatalf("say %q: %v", what, err)
		}
	}
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("say %q: % x, %v; want % x", what, got[:n], err, want)
	}
}

// hungUp wants the end of a connection.
func hungUp(t testing.TB, c net.Conn) {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("%d bytes, %v, want the end", n, err)
	}
}

const hello5, granted5 = "\x05\x01\x00", "\x05\x00"

func TestConnect(t *testing.T) {
	g, _ := start(t, settings())
	for name, request := range map[string]string{
		"4": "\x04\x01\x00\x50\xcb\x00\x71\x0auser\x00",
		"5": "\x05\x01\x00\x01\xcb\x00\x71\x0a\x00\x50",
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, g, alice)
			if name == "4" {
				say(t, c, request, "\x00\x5a")
				_, _ = io.ReadFull(c, make([]byte, 6))
			} else {
				say(t, c, hello5, granted5)
				say(t, c, request, "\x05\x00\x00\x01\xcb\x00\x71\x01")
				_, _ = io.ReadFull(c, make([]byte, 2))
			}
			say(t, c, "hello", "hello")
		})
	}
}

// Everything that goes wrong has its code, and the end of the connection.
func TestAnswers(t *testing.T) {
	g, _ := start(t, settings())
	g.Access = func(_ netip.Addr, q filterapi.HostAccess) error {
		if q.Target.Port() == 23 {
			return filterapi.ErrPolicyDenied
		}
		return nil
	}
	for request, want := range map[string]string{
		"\x05\x01\x00\x01\xcb\x00\x71\x0a\x00\x51":                   "\x05\x05", // nobody listens
		"\x05\x01\x00\x01\xcb\x00\x71\x0a\x00\x17":                   "\x05\x02", // no rule
		"\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x50":                   "\x05\x02", // the gateway
		"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50":                   "\x05\x02", // its loopback
		"\x05\x01\x00\x04" + strings.Repeat("\x20", 16) + "\x00\x50": "\x05\x08",
		"\x05\x01\x00\x02":                         "\x05\x08",
		"\x05\x07\x00\x01\xcb\x00\x71\x0a\x00\x50": "\x05\x07",
	} {
		c := dial(t, g, alice)
		say(t, c, hello5, granted5)
		say(t, c, request, want)
		if rest, err := io.ReadAll(c); len(rest) != 8 || err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("% x: %d bytes follow, %v", request, len(rest), err)
		}
	}
	c := dial(t, g, alice)
	say(t, c, "\x04\x01\x00\x51\xcb\x00\x71\x0a\x00", "\x00\x5b")
}

func TestCodes(t *testing.T) {
	for err, want := range map[error]code{
		filterapi.ErrPolicyDenied: notAllowed, filterapi.ErrNetworkDenied: notAllowed, syscall.ECONNREFUSED: refused,
		syscall.ENETUNREACH: netUnreachable, syscall.EHOSTUNREACH: hostUnreachable, syscall.ETIMEDOUT: expired,
		errFamily: badAddress, errNoAddress: hostUnreachable, filterapi.ErrNoPorts: failed,
		errors.Join(filterapi.ErrNetworkDenied, syscall.ENETUNREACH): netUnreachable,
	} {
		if got := codeOf(err); got != want {
			t.Errorf("%v: %d, want %d", err, got, want)
		}
	}
}

func TestPassword(t *testing.T) {
	s := settings()
	s.Authenticate = func(user, password string) bool { return user == "alice" && password == "secret" }
	g, _ := start(t, s)
	c := dial(t, g, alice)
	say(t, c, "\x05\x02\x00\x02", "\x05\x02")
	say(t, c, "\x01\x05alice\x06secret", "\x01\x00")
	say(t, c, "\x05\x01\x00\x01\xcb\x00\x71\x0a\x00\x50", "\x05\x00\x00")
	if i := slices.IndexFunc(g.Flows(), func(f *filtertest.Flow) bool { return f.Conn.Session().User() == "alice" }); i < 0 {
		t.Error("no flow is alice's")
	}
	for name, talk := range map[string][][2]string{
		"wrong":       {{"\x05\x01\x02", "\x05\x02"}, {"\x01\x05alice\x05wrong", "\x01\x01"}},
		"not offered": {{"\x05\x01\x00", "\x05\xff"}},
		"SOCKS 4":     {{"\x04\x01\x00\x50\xcb\x00\x71\x0aalice\x00", "\x00\x5b"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, g, alice)
			for _, x := range talk {
				say(t, c, x[0], x[1])
			}
			if name != "SOCKS 4" {
				hungUp(t, c)
			}
		})
	}
}

// Who guesses has one password looked at at a time, whatever he opens: another
// client's is next.
func TestGuessingHoldsNobodyUp(t *testing.T) {
	s := settings()
	looking, look := make(chan string), make(chan bool)
	s.Authenticate = func(user, _ string) bool {
		looking <- user
		return <-look
	}
	g, _ := start(t, s)
	offer := func(from netip.Addr) net.Conn {
		c := dial(t, g, from)
		say(t, c, "\x05\x01\x02", "\x05\x02")
		say(t, c, "\x01\x05guess\x01x", "")
		return c
	}
	guesses := []net.Conn{offer(alice), offer(alice), offer(alice)}
	<-looking
	other := dial(t, g, netip.MustParseAddr("10.0.0.3"))
	say(t, other, "\x05\x01\x02", "\x05\x02")
	say(t, other, "\x01\x03bob\x01x", "")
	if user := <-looking; user != "bob" {
		t.Fatalf("%q is looked at, and bob waits", user)
	}
	look <- true
	look <- true // one of them is the first of the guesses
	for range len(guesses) - 1 {
		<-looking
		look <- true
	}
	say(t, other, "", "\x01\x00")
	for _, c := range guesses {
		say(t, c, "", "\x01\x00")
	}
}

// A user that is taken away while his password is looked at is nobody.
func TestUserGoneMeanwhile(t *testing.T) {
	s := settings()
	s.Has = func(string) bool { return false }
	s.Authenticate = func(string, string) bool { return true }
	g, _ := start(t, s)
	c := dial(t, g, alice)
	say(t, c, "\x05\x01\x02", "\x05\x02")
	say(t, c, "\x01\x03bob\x01x", "\x01\x01")
	hungUp(t, c)
}

// A client has as many connections as it may, another one its own.
func TestLimit(t *testing.T) {
	g, f := start(t, settings())
	var held []net.Conn
	for range 4 {
		c := dial(t, g, alice)
		say(t, c, hello5, granted5)
		held = append(held, c)
	}
	hungUp(t, dial(t, g, alice))
	say(t, dial(t, g, netip.MustParseAddr("10.0.0.3")), hello5, granted5)
	_ = held[0].Close()
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		f.mu.Lock()
		n := f.counts[alice].connections
		f.mu.Unlock()
		if n == 3 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d are counted still", n)
		}
	}
	say(t, dial(t, g, alice), hello5, granted5)
}

// bind5 asks for a BIND that awaits the server and gives its address.
func bind5(t *testing.T, g *filtertest.Gateway) (net.Conn, netip.AddrPort) {
	t.Helper()
	c := dial(t, g, alice)
	say(t, c, hello5, granted5)
	say(t, c, "\x05\x02\x00\x01\xcb\x00\x71\x0a\x00\x50", "\x05\x00\x00\x01\xcb\x00\x71\x01")
	port := make([]byte, 2)
	if _, err := io.ReadFull(c, port); err != nil {
		t.Fatal(err)
	}
	return c, netip.AddrPortFrom(g.External, uint16(port[0])<<8|uint16(port[1]))
}

// A bind discards; with approval it is open to the host that the client has a
// connection to, and the first who comes from there is joined to the client.
func TestBind(t *testing.T) {
	s := settings()
	s.ApproveBinds = true
	g, _ := start(t, s)
	_, at := bind5(t, g)
	if !slices.ContainsFunc(g.Permissions(), func(s string) bool {
		return strings.HasPrefix(s, "discards") && strings.Contains(s, at.String())
	}) {
		t.Errorf("without a connection %v is %v", at, g.Permissions())
	}
	control := dial(t, g, alice)
	say(t, control, hello5, granted5)
	say(t, control, "\x05\x01\x00\x01\xcb\x00\x71\x0a\x00\x50", "\x05\x00\x00\x01\xcb\x00\x71\x01")
	c, at := bind5(t, g)
	peer, err := g.World().Dial(t.Context(), flow.TCP, netip.AddrPortFrom(server.Addr(), 20), at)
	if err != nil {
		t.Fatal(err)
	}
	say(t, c, "", "\x05\x00\x00\x01\xcb\x00\x71\x0a\x00\x14")
	go func() { _, _ = io.WriteString(peer, "data") }()
	say(t, c, "", "data")
}

// Datagrams have a head before them, in both directions; a name is no peer
// without a resolver, a fragment is nobody's.
func TestAssociate(t *testing.T) {
	g, _ := start(t, settings())
	peer, err := g.World().ListenPacket(netip.MustParseAddrPort("203.0.113.10:53"), nil)
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, g, alice)
	say(t, c, hello5, granted5)
	say(t, c, "\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00", "\x05\x00\x00\x01\x0a\x00\x00\x01")
	port := make([]byte, 2)
	if _, err := io.ReadFull(c, port); err != nil {
		t.Fatal(err)
	}
	relay := net.UDPAddrFromAddrPort(netip.AddrPortFrom(inside.Addr(), uint16(port[0])<<8|uint16(port[1])))
	own, err := g.World().ListenPacket(netip.AddrPortFrom(alice, 5000), nil)
	if err != nil {
		t.Fatal(err)
	}
	const head = "\x00\x00\x00\x01\xcb\x00\x71\x0a\x00\x35"
	send := func(text string) {
		t.Helper()
		if _, err := own.WriteTo([]byte(text), relay); err != nil {
			t.Fatal(err)
		}
	}
	b := make([]byte, 100)
	send("\x00\x00\x01\x01\xcb\x00\x71\x0a\x00\x35fragment")
	send(head + "question")
	_ = peer.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, from, err := peer.ReadFrom(b)
	if err != nil || string(b[:n]) != "question" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	if _, err := peer.WriteTo([]byte("answer"), from); err != nil {
		t.Fatal(err)
	}
	_ = own.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, _, err = own.ReadFrom(b); err != nil || string(b[:n]) != head+"answer" {
		t.Fatalf("% x, %v", b[:n], err)
	}
}

// An answer says what it was given.
func TestAddresses(t *testing.T) {
	for name, at := range servers {
		b := appendAddress(nil, at)
		got, err := readTarget(bytes.NewReader(b))
		if err != nil || netip.AddrPortFrom(got.addr, got.port) != at {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if b := appendAddress(nil, netip.AddrPort{}); string(b) != "\x01\x00\x00\x00\x00\x00\x00" {
		t.Errorf("no address: % x", b)
	}
	if got, err := readTarget(strings.NewReader("\x03\x0910.0.0.99\x00\x50")); err != nil || got.addr != netip.MustParseAddr("10.0.0.99") {
		t.Errorf("an address for a name: %v, %v", got, err)
	}
}
