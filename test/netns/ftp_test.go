package netns_test

import (
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

// ftpConfig has one rule, for FTP with its filter; options are the filter's.
func ftpConfig(options string) lab.Config {
	return lab.Config{Rules: "  - {name: ftp, action: allow, from: lan, to: wan, protocols: [ftp], filters: {ftp: {" + options + "}}}\n"}
}

func ftpURL(srv netip.Addr, name string) string {
	return "ftp://" + strings.TrimSuffix(netip.AddrPortFrom(srv, 21).String(), ":21") + "/" + name
}

// kernelData counts the data connections of FTP that conntrack shows, and
// fails for each that is not carried by the kernel.
func kernelData(t testing.TB, l *lab.Lab) int {
	t.Helper()
	n := 0
	for _, f := range l.GW.Conntrack() {
		if passive := f.Dst.Port() >= 40000 && f.Dst.Port() <= 40100; !passive && f.Src.Port() != 20 {
			continue
		}
		n++
		if f.Path() != "kernel" {
			t.Errorf("a data connection that is not in the kernel: %s", f.Line)
		}
	}
	return n
}

// Real clients, all ways to open a data connection, both directions.
func TestFTPCurl(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	ftp := l.Srv.VSFTPD()
	hash := ftp.Put(l.Srv, "file", 2_000_000)
	g := l.Gateway(ftpConfig(""))
	for _, way := range []struct {
		name, verb string
		srv        netip.Addr
		args       []string
	}{
		{"PASV", "PASV", lab.Srv4, []string{"--disable-epsv"}},
		{"EPSV-v4", "EPSV", lab.Srv4, nil},
		{"EPSV-v6", "EPSV", lab.Srv6, nil},
		{"PORT", "PORT", lab.Srv4, []string{"-P", "-", "--disable-eprt"}},
		{"EPRT-v4", "EPRT", lab.Srv4, []string{"-P", "-"}},
		{"EPRT-v6", "EPRT", lab.Srv6, []string{"-P", "-"}},
	} {
		t.Run(way.name, func(t *testing.T) {
			before, data := ftp.Saw(way.verb), kernelData(t, l)
			out := filepath.Join(l.Dir(), way.name)
			curl(t, l, append(way.args, "-o", out, ftpURL(way.srv, "file"))...)
			if got, err := os.ReadFile(out); err != nil || lab.Hash(got) != hash {
				t.Errorf("download: %d bytes with another hash, %v", len(got), err)
			}
			curl(t, l, append(way.args, "-T", out, ftpURL(way.srv, "in/"+way.name))...)
			if got, err := os.ReadFile(filepath.Join(ftp.Upload, way.name)); err != nil || lab.Hash(got) != hash {
				t.Errorf("upload: %d bytes with another hash, %v", len(got), err)
			}
			if ftp.Saw(way.verb) < before+2 {
				t.Errorf("the server saw %d more %s, want 2", ftp.Saw(way.verb)-before, way.verb)
			}
			lab.Eventually(t, time.Second, "conntrack shows two more data connections", func() bool { return kernelData(t, l) >= data+2 })
		})
	}
	noPermissions(t, g)
}

func curl(t testing.TB, l *lab.Lab, args ...string) {
	t.Helper()
	out, status, err := l.Client.Try(20*time.Second, "curl", append([]string{"-gsS"}, args...)...)
	if err != nil || status != 0 {
		t.Fatalf("curl %s: status %d, %v\n%s", strings.Join(args, " "), status, err, out)
	}
}

// noPermissions waits until the gateway lists none that lets anybody in. One
// that is used up is listed as long as conntrack remembers its flow.
func noPermissions(t testing.TB, g *lab.Gateway) {
	t.Helper()
	lab.Eventually(t, 5*time.Second, "all permissions are gone", func() bool { return len(openPermissions(g)) == 0 })
}

type permission struct{ State, Direction, Client, Target, External string }

func openPermissions(g *lab.Gateway) []permission {
	var list []permission
	g.JSON(&list, "permissions")
	return slices.DeleteFunc(list, func(p permission) bool { return p.State == "used" })
}

func TestFTPLftp(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	ftp := l.Srv.VSFTPD()
	hash := ftp.Put(l.Srv, "file", 1_000_000)
	l.Gateway(ftpConfig(""))
	for _, srv := range []netip.Addr{lab.Srv4, lab.Srv6} {
		for _, passive := range []string{"on", "off"} {
			name := fmt.Sprintf("%v-%s", srv.Is4(), passive)
			out := filepath.Join(l.Dir(), name)
			text, status, err := l.Client.Try(30*time.Second, "lftp", "-c", fmt.Sprintf(
				"set ftp:passive-mode %s; set net:max-retries 1; set net:timeout 15; open %s; get /file -o %s; cd /in; put %s -o %s",
				passive, ftpURL(srv, ""), out, out, name))
			if err != nil || status != 0 {
				t.Fatalf("lftp, passive %s, %s: status %d, %v\n%s", passive, srv, status, err, text)
			}
			for _, path := range []string{out, filepath.Join(ftp.Upload, name)} {
				if got, err := os.ReadFile(path); err != nil || lab.Hash(got) != hash {
					t.Errorf("%s: %d bytes with another hash, %v", path, len(got), err)
				}
			}
		}
	}
	if kernelData(t, l) < 8 {
		t.Error("conntrack shows too few data connections")
	}
}

// The daemon is stopped in mid-transfer: the data connection goes on.
func TestFTPDataInKernel(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	ftp := l.Srv.VSFTPD()
	ftp.Put(l.Srv, "file", 32<<20)
	g := l.Gateway(ftpConfig(""))
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		c := loginFTP(t, l.Client, srv)
		data := c.passive(t, srv)
		c.send(t, "RETR file")
		d, err := l.Client.Dial(t.Context(), "tcp", data.String())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		c.want(t, "150")
		readFull(t, d, 1<<20)
		if n := g.Carries("tcp", int(data.Port())); n != 0 {
			t.Errorf("the daemon holds %d sockets of the data connection", n)
		}
		g.Freeze()
		defer g.Thaw()
		readFull(t, d, 31<<20)
		g.Thaw()
		c.want(t, "226")
		c.quit(t)
	})
	noPermissions(t, g)
}

// read_only: what would change something is answered by the gateway.
func TestFTPReadOnly(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	ftp := l.Srv.VSFTPD()
	hash := ftp.Put(l.Srv, "file", 100_000)
	l.Gateway(ftpConfig("read_only: true"))
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		out := filepath.Join(l.Dir(), "got")
		curl(t, l, "-o", out, ftpURL(srv, "file"))
		if got, err := os.ReadFile(out); err != nil || lab.Hash(got) != hash {
			t.Errorf("download: %d bytes with another hash, %v", len(got), err)
		}
		if _, status, err := l.Client.Try(20*time.Second, "curl", "-gsS", "-T", out, ftpURL(srv, "in/up")); err != nil || status == 0 {
			t.Errorf("upload: status %d, %v", status, err)
		}
		c := loginFTP(t, l.Client, srv)
		for _, line := range []string{
			"STOR x", "stor x", "STOU", "APPE x", "DELE file", "RMD in", "XRMD in", "MKD y", "XMKD y", "RNFR file", "RNTO z", "SITE CHMOD 777 file",
		} {
			c.send(t, line)
			c.want(t, "5")
		}
		c.send(t, "PWD")
		c.want(t, "257")
		c.quit(t)
	})
	for _, verb := range []string{"STOR", "STOU", "APPE", "DELE", "RMD", "XRMD", "MKD", "XMKD", "RNFR", "RNTO", "SITE"} {
		if n := ftp.Saw(verb); n != 0 {
			t.Errorf("the server saw %d %s", n, verb)
		}
	}
	if left, err := os.ReadDir(ftp.Upload); err != nil || len(left) != 0 {
		t.Errorf("the upload folder has %v, %v", left, err)
	}
}

func TestFTPAuthTLS(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	ftp := l.Srv.VSFTPD()
	l.Gateway(ftpConfig(""))
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		c := loginFTP(t, l.Client, srv)
		for _, line := range []string{"AUTH TLS", "AUTH SSL", "auth tls"} {
			c.send(t, line)
			c.want(t, "5")
		}
		c.quit(t)
	})
	if n := ftp.Saw("AUTH"); n != 0 {
		t.Errorf("the server saw %d AUTH", n)
	}
}

// B60: what PORT and EPRT must not open.
func TestB60FTPBounce(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		ftp := l.Srv.VSFTPD()
		g := l.Gateway(ftpConfig(""))
		lines := map[netip.Addr][]string{
			lab.Srv4: {
				"PORT 10,0,0,3,200,10", "PORT 203,0,113,11,200,10", "PORT 10,0,0,1,200,10", "PORT 127,0,0,1,200,10",
				"PORT 10,0,0,2,0,22", "PORT 10,0,0,2,3,255", "PORT 266,0,0,2,200,10", "PORT 10,0,0,2,200,266", "PORT 10,0,0,2,200",
				"EPRT |1|10.0.0.3|51210|", "EPRT |1|10.0.0.2|22|", "EPRT |2|fd00:a::2|51210|", "EPRT |1|10.0.0.2|99999|",
			},
			lab.Srv6: {"EPRT |2|fd00:a::3|51210|", "EPRT |2|fd00:a::2|22|", "EPRT |1|10.0.0.2|51210|", "EPRT |2|::1|51210|"},
		}[f.srv]
		c := loginFTP(t, l.Client, f.srv)
		for _, line := range lines {
			c.send(t, line)
			if got := c.reply(t); !strings.HasPrefix(got, "5") {
				t.Errorf("%s: %q, want 5xx", line, got)
			}
		}
		c.quit(t)
		if n := ftp.Saw("PORT") + ftp.Saw("EPRT"); n != 0 {
			t.Errorf("the server saw %d of them", n)
		}
		noPermissions(t, g)
	})
}

// B60: an HTTP request to port 21 that carries a PORT line opens nothing.
func TestB60FTPSlipstream(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		heard := make(chan string, 16)
		l.Srv.ServeTCP(21, func(c *net.TCPConn) {
			_, _ = c.Write([]byte("220 welcome\r\n"))
			b := make([]byte, 4096)
			for {
				n, err := c.Read(b)
				if err != nil {
					close(heard)
					return
				}
				heard <- string(b[:n])
				_, _ = c.Write([]byte("200 PORT command successful\r\n"))
			}
		})
		g := l.Gateway(ftpConfig(""))
		line := activeLine(f.client, 3306)
		c := l.Client.MustDial("tcp", to(f.srv, 21).String(), 5*time.Second)
		deadline(t, c, 10*time.Second)
		mustWrite(t, c, "POST / HTTP/1.1\r\nHost: srv:21\r\nContent-Length: 1000\r\n\r\n")
		_, _ = c.Write([]byte(line + "\r\n")) // may be cut by now
		_, _ = c.Write([]byte(strings.Repeat("x", 500)))
		readToEnd(c)
		for said := range heard {
			if strings.Contains(said, "203,0,113") || strings.Contains(said, line) {
				t.Errorf("the server was told to connect: %q", said)
			}
		}
		noPermissions(t, g)
		for _, tracked := range l.GW.Conntrack() {
			if tracked.Src.Addr() == f.srv {
				t.Errorf("a connection from srv: %s", tracked.Line)
			}
		}
	})
}

func readToEnd(c net.Conn) {
	b := make([]byte, 4096)
	for {
		if _, err := c.Read(b); err != nil {
			return
		}
	}
}

// B18: a data connection's permission is for one connection, of one client, to
// one address and port.
func TestB18FTPExactAndOnce(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		ftp := l.Srv.VSFTPD()
		ftp.Put(l.Srv, "file", 1000)
		seen, elsewhere := l.Srv.Capture(), l.Other.Capture()
		g := l.Gateway(ftpConfig(""))
		opened := map[netip.AddrPort]bool{}
		c := loginFTP(t, l.Client, f.srv)
		data := c.passive(t, f.srv)
		opened[data] = true
		dropped := func(h *lab.Host, at netip.AddrPort) {
			t.Helper()
			if err := briefly(h, at); !timedOut(err) {
				t.Errorf("%s to %s: %v, want dropped", h.Name, at, err)
			}
		}
		dropped(l.Client2, data)
		dropped(l.Client, to(f.other, int(data.Port())))
		dropped(l.Client, next(data, 1))
		d, err := l.Client.Dial(t.Context(), "tcp", data.String())
		if err != nil {
			t.Fatalf("the announced address: %v", err)
		}
		dropped(l.Client, data)
		c.send(t, "RETR file")
		c.want(t, "150")
		readFull(t, d, 1000)
		c.want(t, "226")
		_ = d.Close()
		c.quit(t)
		for _, s := range lab.Select(seen.Stop(), func(s lab.Seen) bool {
			return s.TCP != nil && s.TCP.SYN && !s.TCP.ACK && !s.Out && s.Dst.Port() != 21
		}) {
			if !opened[s.Dst] {
				t.Errorf("srv saw a SYN to %s that was not announced, or a second one", s.Dst)
			}
			delete(opened, s.Dst)
		}
		if n := len(lab.Select(elsewhere.Stop(), func(s lab.Seen) bool { return s.TCP != nil && !s.Out })); n != 0 {
			t.Errorf("other saw %d packets", n)
		}
		noPermissions(t, g)
	})
}

// A permission ends with its control connection.
func TestFTPPermissionGoneAfterQuit(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.VSFTPD()
	seen := l.Srv.Capture()
	g := l.Gateway(ftpConfig(""))
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		c := loginFTP(t, l.Client, srv)
		data := c.passive(t, srv)
		if list := openPermissions(g); len(list) != 1 || list[0].Target != data.String() {
			t.Errorf("want one permission, to %s: %+v", data, list)
		}
		c.quit(t)
		noPermissions(t, g)
		if err := briefly(l.Client, data); !timedOut(err) {
			t.Errorf("after QUIT: %v, want dropped", err)
		}
	})
	if n := len(lab.Select(seen.Stop(), func(s lab.Seen) bool { return s.TCP != nil && !s.Out && s.Dst.Port() >= 40000 && s.Dst.Port() <= 40100 })); n != 0 {
		t.Errorf("srv saw %d packets to announced ports", n)
	}
}
