package netns_test

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// filesBySOCKS is FTP with its filter, and nothing else but a web server.
func filesBySOCKS(extra string) lab.Config {
	return lab.Config{
		Rules: "  - {name: files, action: allow, from: lan, to: wan, protocols: ftp, filters: {ftp: {}}}\n" +
			"  - {name: web, action: allow, from: lan, to: wan, protocols: http}\n",
		Extra: extra,
	}
}

// Passive FTP through SOCKS: the filter on the control connection opens the data
// connection for the same client, and it alone.
func TestSocksFTPPassive(t *testing.T) {
	eachSocksFTP(t, openly, func(s *scene, ftp *lab.FTPServer) {
		hash := ftp.Put(s.Srv, "file", 300_000)
		out := filepath.Join(s.Dir(), "got")
		s.Client.Run("curl", "-gsS", "--max-time", "30", "--socks5", s.socksAt().String(), "-o", out, "ftp://"+bracketed(s.srv)+"/file")
		if got, err := os.ReadFile(out); err != nil || lab.Hash(got) != hash {
			s.t.Errorf("%d bytes with another hash, %v", len(got), err)
		}
		data := s.g.AwaitRecord("flow", 10*time.Second, func(r lab.Record) bool { return r["secondary"] == true })
		if data.Text("rule") != "files" || data.Text("result") != "closed" || data.Text("path") != "user" {
			s.t.Errorf("data connection: %v", data)
		}
		// Without the filter's word no port above is open.
		s.code5(2, "", socksConnect, socksAddress(to(s.srv, 40000)))
	})
}

func eachSocksFTP(t *testing.T, extra string, run func(s *scene, ftp *lab.FTPServer)) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		ftp := l.Srv.VSFTPD()
		g := l.Gateway(filesBySOCKS(extra))
		run(&scene{Lab: l, family: f, t: t, g: g}, ftp)
	})
}

// Active FTP through SOCKS by hand: the client asks for a BIND and announces its
// address; the filter lets the server in, and nobody else; another address of
// the gateway's is refused.
func TestSocksFTPActive(t *testing.T) {
	eachSocksFTP(t, openly, func(s *scene, ftp *lab.FTPServer) {
		hash := ftp.Put(s.Srv, "file", 300_000)
		k := s.must5(s.Client, "", socksConnect, to(s.srv, 21))
		c := ftpOn(s.t, k)
		b := s.must5(s.Client, "", socksBind, to(s.srv, 21))
		family := 1
		if s.srv.Is6() {
			family = 2
		}
		announce := func(at netip.AddrPort) string { return fmt.Sprintf("EPRT |%d|%s|%d|", family, at.Addr(), at.Port()) }
		s.silent(s.Srv, b.at, "not announced yet")
		c.send(s.t, announce(to(b.at.Addr(), int(b.at.Port())%1000+50000)))
		c.want(s.t, "504")
		c.send(s.t, announce(b.at))
		c.want(s.t, "200")
		s.silent(s.Other, b.at, "not the server")
		c.send(s.t, "RETR file")
		c.want(s.t, "150")
		if err := b.answer(); err != nil || b.code != 0 || b.at.Addr() != s.srv {
			s.t.Fatalf("second answer: code %d, %v, %v", b.code, b.at, err)
		}
		got := make([]byte, 300_000)
		if _, err := io.ReadFull(b, got); err != nil || lab.Hash(got) != hash {
			s.t.Errorf("another hash, %v", err)
		}
		_ = b.Close()
		c.want(s.t, "226")
		c.quit(s.t)
	})
}

// What a filter opens for one user is not another's, nor anybody's who says no
// name, at the same host: neither a data connection nor a BIND.
func TestSocksOpensForOneUser(t *testing.T) {
	eachSocksFTP(t, byPassword, func(s *scene, ftp *lab.FTPServer) {
		hash := ftp.Put(s.Srv, "file", 300_000)
		alice := ftpOn(s.t, s.must5(s.Client, "alice", socksConnect, to(s.srv, 21)))
		bob := ftpOn(s.t, s.must5(s.Client, "bob", socksConnect, to(s.srv, 21)))
		bind := s.must5(s.Client, "alice", socksBind, to(s.srv, 21))
		bob.send(s.t, fmt.Sprintf("EPRT |%d|%s|%d|", map[bool]int{true: 1, false: 2}[s.srv.Is4()], bind.at.Addr(), bind.at.Port()))
		bob.want(s.t, "504")
		at := alice.passive(s.t, s.srv)
		s.code5(2, "bob", socksConnect, socksAddress(at))
		s.rejectedOrSilent(s.Client, at)
		data := s.must5(s.Client, "alice", socksConnect, at)
		alice.send(s.t, "RETR file")
		alice.want(s.t, "150")
		got, err := io.ReadAll(data)
		if err != nil || lab.Hash(got) != hash {
			s.t.Errorf("%d bytes with another hash, %v", len(got), err)
		}
		alice.want(s.t, "226")
	})
}

// Dante's socksify, with a program that knows nothing of SOCKS: active FTP by
// BIND, and a download by CONNECT.
func TestSocksDante(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	s := &scene{Lab: l, family: families[0], t: t}
	ftp := l.Srv.VSFTPD()
	hash := ftp.Put(l.Srv, "file", 300_000)
	l.Srv.HTTP(80)
	s.g = l.Gateway(filesBySOCKS(byPassword))
	conf := l.File("socks.conf", `
		route {
			from: 0.0.0.0/0 to: 0.0.0.0/0 via: 10.0.0.1 port = 1080
			proxyprotocol: socks_v5
			command: bind connect
			method: username
		}
	`)
	env := []string{"SOCKS_CONF=" + conf, "SOCKS_USERNAME=alice", "SOCKS_PASSWORD=ecila"}
	run := func(input string, name string, args ...string) string {
		t.Helper()
		script := l.File("script", input)
		p, err := l.Client.Start(env, "sh", append([]string{"-c", `exec socksify "$@" <` + script, "sh", name}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-p.Done():
		case <-time.After(lab.Patience(30 * time.Second)):
			p.Kill()
		}
		return p.Output.String()
	}
	out := run("open "+s.srv.String()+"\nuser anonymous x\nbinary\nget file "+l.Dir()+"/active\nquit\n", "inetutils-ftp", "-n", "-v")
	if got, err := os.ReadFile(filepath.Join(l.Dir(), "active")); err != nil || lab.Hash(got) != hash {
		t.Errorf("active FTP: %d bytes with another hash, %v\n%s\n%s", len(got), err, out, s.g.Output)
	}
	if ftp.Saw("PORT")+ftp.Saw("EPRT") == 0 {
		t.Error("the server saw no PORT: it was not active")
	}
	if out := run("", "curl", "-sSf", "--max-time", "20", s.url(80, 10)); len(out) != 10 {
		t.Errorf("curl: %q", out)
	}
	s.g.AwaitRecord("flow", 10*time.Second, func(r lab.Record) bool { return r.Text("user") == "alice" && strings.HasSuffix(r.Text("dst"), ":80") })
}

// proxychains4 is another one.
func TestSocksProxychains(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	s := &scene{Lab: l, family: families[0], t: t}
	l.Srv.HTTP(80)
	s.g = l.Gateway(filesBySOCKS(byPassword))
	_, hash := lab.Content(1 << 20)
	conf := l.File("proxychains.conf", "strict_chain\ntcp_read_time_out 15000\ntcp_connect_time_out 8000\n[ProxyList]\nsocks5 10.0.0.1 1080 bob bob\n")
	out := filepath.Join(l.Dir(), "got")
	l.Client.Run("proxychains4", "-q", "-f", conf, "curl", "-sSf", "--max-time", "20", "-o", out, s.url(80, 1<<20))
	if got, err := os.ReadFile(out); err != nil || lab.Hash(got) != hash {
		t.Errorf("%d bytes with another hash, %v", len(got), err)
	}
	s.g.AwaitRecord("flow", 10*time.Second, func(r lab.Record) bool { return r.Text("user") == "bob" && r.Text("rule") == "web" })
}
