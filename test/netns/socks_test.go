package netns_test

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// Each version of SOCKS carries a file, for curl, and what the server sees is
// the gateway.
func TestSocksConnect(t *testing.T) {
	eachSocks(t, socksConfig(openly), func(s *scene) {
		peers := s.Srv.HTTP(80)
		_, hash := lab.Content(1 << 20)
		versions := []string{"--socks5", "--socks5-hostname"}
		if s.srv.Is4() {
			versions = append(versions, "--socks4", "--socks4a")
		}
		for _, v := range versions {
			out := filepath.Join(s.Dir(), "got"+v)
			s.Client.Run("curl", "-gsS", "--max-time", "20", v, s.socksAt().String(), "-o", out, s.url(80, 1<<20))
			if got, err := os.ReadFile(out); err != nil || lab.Hash(got) != hash {
				s.t.Errorf("%s: %d bytes with another hash, %v", v, len(got), err)
			}
		}
		for _, p := range peers.Addrs() {
			if p.Addr() != s.outside {
				s.t.Errorf("the server saw %v, want the gateway's %v", p, s.outside)
			}
		}
		r := s.flowRecord(to(s.srv, 80), resultIs("closed"))
		src, err := netip.ParseAddrPort(r.Text("src"))
		if r.Text("path") != "user" || r.Text("rule") != "plain" || err != nil || src.Addr() != s.client {
			s.t.Errorf("record %v", r)
		}
	})
}

// The answers of SOCKS 5 and 4 tell apart why something did not come about.
func TestSocksAnswers(t *testing.T) {
	eachSocks(t, socksConfig(openly), func(s *scene) {
		s.names()
		other := families[1]
		loopback := "127.0.0.1:8"
		if s.srv.Is6() {
			other, loopback = families[0], "[::1]:8"
		}
		s.Srv.Run("nft", "add table inet silent; add chain inet silent in { type filter hook input priority 0; }; add rule inet silent in tcp dport 9 drop")
		for _, c := range []struct {
			what    string
			code    byte
			command byte
			target  []byte
		}{
			{"a server that listens", 0, socksConnect, socksAddress(to(s.srv, 7))},
			{"a port where nobody listens", 5, socksConnect, socksAddress(to(s.srv, 8))},
			{"a port that is silent", 6, socksConnect, socksAddress(to(s.srv, 9))},
			{"a host that is not there", 4, socksConnect, socksAddress(to(s.nobody, 8))},
			{"a network without a route", 3, socksConnect, socksAddress(to(s.remote, 8))},
			{"a port that no rule allows", 2, socksConnect, socksAddress(to(s.srv, 23))},
			{"the gateway itself", 2, socksConnect, socksAddress(to(s.inside, 8))},
			{"the broadcast, or the routers', address of a link", 2, socksConnect, socksAddress(to(s.everybody(), 8))},
			{"the gateway's loopback", 2, socksConnect, socksAddress(netip.MustParseAddrPort(loopback))},
			{"the other address family", 8, socksConnect, socksAddress(to(other.srv, 8))},
			{"an unknown type of address", 8, socksConnect, []byte{9, 1, 2, 3}},
			{"an unknown command", 7, 9, socksAddress(to(s.srv, 7))},
			{"a name", 0, socksConnect, append([]byte{3, 8}, "srv.test\x00\x07"...)},
			{"a name that nobody has", 4, socksConnect, append([]byte{3, 11}, "nobody.test\x00\x07"...)},
			{"an address for a name", 0, socksConnect, append(append([]byte{3, byte(len(s.srv.String()))}, s.srv.String()...), 0, 7)},
		} {
			s.t.Run(c.what, func(t *testing.T) {
				sub := *s
				sub.t = t
				sub.code5(c.code, "", c.command, c.target)
			})
		}
		if s.srv.Is6() {
			return
		}
		for port, want := range map[byte]byte{7: 90, 8: 91, 23: 91} {
			c := s.Client.MustDial("tcp", s.socksAt().String(), 5*time.Second)
			deadline(s.t, c, 10*time.Second)
			ip := s.srv.As4()
			mustWrite(s.t, c, string([]byte{4, 1, 0, port})+string(ip[:])+"somebody\x00")
			got := make([]byte, 8)
			if _, err := io.ReadFull(c, got); err != nil || got[0] != 0 || got[1] != want {
				s.t.Errorf("SOCKS 4, port %d: % x, %v", port, got, err)
			}
		}
	})
}

// What is no SOCKS, or comes too slowly, costs a connection and nothing else.
func TestSocksBadClients(t *testing.T) {
	eachSocks(t, socksConfig("socks: {networks: lan, handshake_timeout: 1, connections: 3}\n"), func(s *scene) {
		for _, text := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x05\x00", "\x05\x01\x02", "\x05\x01\x00\x05\x01", "\x04\x01\x00\x07\x7f", ""} {
			c := s.Client.MustDial("tcp", s.socksAt().String(), 5*time.Second)
			deadline(s.t, c, 10*time.Second)
			if text != "" {
				mustWrite(s.t, c, text)
			}
			start := time.Now()
			if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
				s.t.Errorf("%q: the gateway does not hang up", text)
			}
			if d := time.Since(start); d > lab.Patience(4*time.Second) {
				s.t.Errorf("%q: held for %v", text, d)
			}
			_ = c.Close()
		}
		var held []socks
		for range 3 {
			held = append(held, s.must5(s.Client, "", socksConnect, to(s.srv, 7)))
		}
		c := s.Client.MustDial("tcp", s.socksAt().String(), 5*time.Second)
		deadline(s.t, c, 5*time.Second)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
			s.t.Errorf("the fourth connection: %v, want its end", err)
		}
		for _, k := range held {
			echo(s.t, k, "of those before")
		}
		for name, want := range map[string]uint64{"socks.over_connections": 1, "socks.bad": 6, "socks.requests": 3, "socks.clients": 3} {
			if n := counter(s.g, name); n != want {
				s.t.Errorf("%s: %d, want %d", name, n, want)
			}
		}
		second := s.must5(s.Client2, "", socksConnect, to(s.srv, 7))
		echo(s.t, second, "of somebody else")
		_ = held[0].Close()
		lab.Eventually(s.t, 5*time.Second, "there is room again", func() bool {
			k, err := s.ask5(s.Client, "", socksConnect, socksAddress(to(s.srv, 7)))
			return err == nil && k.code == 0
		})
	})
}

// A rule may be for users: it is for what they ask by SOCKS, and for nothing
// that passes by itself.
func TestSocksUsersInRules(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		l.Srv.EchoTCP(8)
		l.Srv.EchoTCP(9)
		rules := func(first, second string) lab.Config {
			c := socksConfig(byPassword)
			c.Rules = "  - {name: not, action: deny, from: lan, to: wan, protocols: plain, users: [" + first + "]}\n" +
				"  - {name: may, action: allow, from: lan, to: wan, protocols: plain, users: [" + second + ", " + first + "]}\n" +
				"  - {name: any, action: allow, from: lan, to: wan, protocols: probed, users: any, filters: {probe: {}}}\n" +
				"  - {name: all, action: allow, from: lan, to: wan, protocols: nine}\n"
			c.Protocols = "  probed: {tcp: 7, filter: probe}\n  plain: {tcp: 8}\n  nine: {tcp: 9}\n"
			return c
		}
		s := play(t, l, f, rules("alice", "bob"))
		s.code5(2, "alice", socksConnect, socksAddress(to(s.srv, 8)))
		s.must5(s.Client, "bob", socksConnect, to(s.srv, 8))
		r := s.flowRecord(to(s.srv, 8), func(r lab.Record) bool { return r.Text("user") == "alice" })
		if r.Text("result") != "denied" || r.Text("rule") != "not" {
			s.t.Errorf("record %v", r)
		}
		for _, user := range []string{"alice", "bob"} {
			k := s.must5(s.Client, user, socksConnect, to(s.srv, 7))
			echo(s.t, k, "of "+user)
			s.must5(s.Client, user, socksConnect, to(s.srv, 9))
		}
		s.rejected(s.Client, to(s.srv, 7), "a rule for users")
		s.rejected(s.Client, to(s.srv, 8), "a rule for users")
		s.dial(s.Client, to(s.srv, 9))
		var shown []struct {
			User string
			Dst  string
		}
		s.g.JSON(&shown, "flows")
		users := map[string]int{}
		for _, x := range shown {
			if x.Dst == to(s.srv, 7).String() {
				users[x.User]++
			}
		}
		if users["alice"] != 1 || users["bob"] != 1 {
			s.t.Errorf("gateway flows shows users %v", users)
		}
		out, _ := s.g.Command("sessions")
		if !strings.Contains(out, "alice") || !strings.Contains(out, "bob") {
			s.t.Errorf("gateway sessions:\n%s", out)
		}

		// The other way round, and the living flow of bob's is cut.
		k := s.must5(s.Client, "bob", socksConnect, to(s.srv, 8))
		echo(s.t, k, "of bob's")
		s.g.Reload(rules("bob", "alice"))
		s.isReset(k, "bob's connection")
		s.code5(2, "bob", socksConnect, socksAddress(to(s.srv, 8)))
		s.must5(s.Client, "alice", socksConnect, to(s.srv, 8))
	})
}

// Who does not know the password is nobody.
func TestSocksPassword(t *testing.T) {
	eachSocks(t, socksConfig(byPassword), func(s *scene) {
		s.Srv.HTTP(80)
		url := s.url(80, 10)
		s.Client.Run("curl", "-gsSf", "--max-time", "20", "--socks5", "alice:ecila@"+s.socksAt().String(), url)
		for _, wrong := range []string{"alice:alice@", "carol:lorac@", ""} {
			if out, status, err := s.Client.Try(20*time.Second, "curl", "-gsSf", "--max-time", "20", "--socks5", wrong+s.socksAt().String(), url); err != nil || status == 0 {
				s.t.Errorf("%q: status %d, %v\n%s", wrong, status, err, out)
			}
		}
		if s.srv.Is4() {
			if out, status, _ := s.Client.Try(20*time.Second, "curl", "-gsSf", "--max-time", "20", "--socks4", s.socksAt().String(), url); status == 0 {
				s.t.Errorf("SOCKS 4 needs no password\n%s", out)
			}
		}
		s.flowRecord(to(s.srv, 80), func(r lab.Record) bool { return r.Text("user") == "alice" && r.Text("result") == "closed" })
		for _, secret := range []string{"ecila", "lorac"} {
			if strings.Contains(s.g.Output.String(), secret) {
				s.t.Errorf("the log has the password %q", secret)
			}
		}
		// A hash of `gateway passwd` is as good.
		path, err := lab.Binary()
		if err != nil {
			s.t.Fatal(err)
		}
		hash := strings.TrimSpace(s.GW.Run("sh", "-c", "echo lorac | "+path+" passwd"))
		s.g.Reload(socksConfig(strings.Replace(byPassword, "socks:", "  carol: \""+hash+"\"\nsocks:", 1)))
		s.Client.Run("curl", "-gsSf", "--max-time", "20", "--socks5", "carol:lorac@"+s.socksAt().String(), url)
		// A user that is no more loses his connections.
		k := s.must5(s.Client, "bob", socksConnect, to(s.srv, 7))
		echo(s.t, k, "of bob's")
		s.g.Reload(socksConfig(strings.Replace(byPassword, "bob:", "robert:", 1)))
		s.isReset(k, "bob's connection")
	})
}

// B28, B43, B37, B47: what a client asks for raises the events of a connect, by a
// filter's word it is denied, killed, and over with the session.
func TestB28SocksConnectEvents(t *testing.T) {
	eachSocks(t, socksConfig(byPassword), func(s *scene) {
		seen := s.Srv.Capture()
		s.on("ConnectTCP", "deny")
		s.code5(2, "alice", socksConnect, socksAddress(to(s.srv, 7)))
		if n := len(lab.Select(seen.Stop(), lab.SYN(to(s.srv, 7)))); n != 0 {
			s.t.Errorf("srv saw %d SYNs", n)
		}
		s.code5(2, "alice", socksConnect, socksAddress(to(s.srv, 22)))
		if n := s.count(s.p, "ConnectTCP"); n != 1 {
			s.t.Errorf("%d events, want that of the one that the rules allow", n)
		}
		s.on("ConnectTCP", "attach")
		k := s.must5(s.Client, "alice", socksConnect, to(s.srv, 7))
		e := s.asked("ConnectTCP", k)
		if e.Source != "Explicit" || e.Rule != "probed" || e.Secondary || e.Dst != to(s.srv, 7).String() {
			s.t.Errorf("event %+v", e)
		}
		if k.at.Addr() != s.outside {
			s.t.Errorf("the answer names %v, want the gateway's %v", k.at, s.outside)
		}
		echo(s.t, k, "through a data filter")
		lab.Eventually(s.t, 3*time.Second, "the data filter has seen it", func() bool {
			return filtered(s.p, e.Conn, "internal") == "through a data filter"
		})
		names := s.p.Must("names", lab.ProbeArgs{Conn: e.Conn})
		if names.Addr != k.at.String() || names.Text != to(s.srv, 7).String() {
			s.t.Errorf("names %+v, the answer said %v", names, k.at)
		}
		for _, x := range s.p.Must("sessions", lab.ProbeArgs{}).Sessions {
			if x.ID == e.Session && (x.User != "alice" || x.Client != s.client.String()) {
				s.t.Errorf("session %+v", x)
			}
		}
		s.p.Must("kill", lab.ProbeArgs{Conn: e.Conn})
		s.isReset(k, "the client")
		s.p.Await(5*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Terminating" && x.Conn == e.Conn })
		lab.Eventually(s.t, 3*time.Second, "the server's end is gone", func() bool { return s.Srv.Connections(7) == 0 })

		s.on("ConnectTCP", "pass")
		one, two := s.must5(s.Client, "alice", socksConnect, to(s.srv, 7)), s.must5(s.Client2, "alice", socksConnect, to(s.srv, 7))
		echo(s.t, one, "one")
		e = s.asked("ConnectTCP", one)
		if out, status := s.g.Command("sessions", "disconnect", fmt.Sprint(e.Session)); status != 0 {
			s.t.Fatalf("disconnect: %d\n%s", status, out)
		}
		s.isReset(one, "the client of the session that has ended")
		echo(s.t, two, "of another session")
		echo(s.t, s.must5(s.Client, "alice", socksConnect, to(s.srv, 7)), "a new one")
	})
}

// B35: a filter plays the server of a SOCKS client.
func TestB35SocksEmulated(t *testing.T) {
	eachSocks(t, socksConfig(openly), func(s *scene) {
		s.p.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "emulate", Mode: "echo"})
		k := s.must5(s.Client, "", socksConnect, to(s.nobody, 7))
		echo(s.t, k, "nobody is there")
	})
}

// What a client sends behind its request, without waiting for the answer, is
// for the server; and a half-closed connection still carries the other way.
func TestSocksEarlyBytes(t *testing.T) {
	eachSocks(t, socksConfig(openly), func(s *scene) {
		for _, do := range []string{"pass", "attach"} {
			s.on("ConnectTCP", do)
			c := s.Client.MustDial("tcp", s.socksAt().String(), 5*time.Second)
			deadline(s.t, c, 10*time.Second)
			early := strings.Repeat("early ", 3000)
			mustWrite(s.t, c, "\x05\x01\x00\x05\x01\x00"+string(socksAddress(to(s.srv, 7)))+early)
			if err := c.(*net.TCPConn).CloseWrite(); err != nil {
				s.t.Fatal(err)
			}
			all, err := io.ReadAll(c)
			n := 2 + 4 + len(s.srv.AsSlice()) + 2
			if err != nil || len(all) < n || string(all[n:]) != early {
				s.t.Errorf("%s: %d bytes came back, %v, want %d", do, len(all), err, n+len(early))
			}
		}
	})
}

// B39: a large transfer arrives whole, and a slow reader costs no memory.
func TestB39SocksTransfer(t *testing.T) {
	eachSocks(t, socksConfig(openly), func(s *scene) {
		const total = 64 << 20
		for _, h := range []*lab.Host{s.Lab.Client, s.GW, s.Srv} {
			h.Run("sysctl", "-qw", "net.ipv4.tcp_rmem=4096 131072 4194304")
		}
		body, want := lab.Content(total)
		s.Srv.ServeTCP(8, func(c *net.TCPConn) {
			_, _ = c.Write(body)
			_ = c.CloseWrite()
			_, _ = io.Copy(io.Discard, c)
		})
		k := s.must5(s.Client, "", socksConnect, to(s.srv, 8))
		deadline(s.t, k, 60*time.Second)
		sum := sha256.New()
		if _, err := io.CopyN(sum, k, 1<<20); err != nil {
			s.t.Fatal(err)
		}
		before, err := s.g.RSS()
		if err != nil {
			s.t.Fatal(err)
		}
		time.Sleep(lab.Patience(time.Second)) // a reader that is slow
		after, err := s.g.RSS()
		if err != nil || after > before+16<<20 {
			s.t.Errorf("the daemon grew from %d to %d bytes, %v", before, after, err)
		}
		if _, err := io.Copy(sum, k); err != nil {
			s.t.Fatal(err)
		}
		if got := hex.EncodeToString(sum.Sum(nil)); got != want {
			s.t.Error("another hash")
		}
	})
}
