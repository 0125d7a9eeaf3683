package netns_test

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// publishedFTP publishes client's FTP server with its filter, to wan and, for
// hairpin, to lan.
func publishedFTP(options, more string) lab.Config {
	rule := published("ftp", "ftp", "filters: {ftp: {"+options+"}}"+more)
	return lab.Config{Rules: strings.Replace(rule, "from: wan", "from: [wan, lan]", 1)}
}

// publishedData are the data connections to and from client's FTP server that
// conntrack shows; each must be on the path.
func publishedData(t testing.TB, l *lab.Lab, path string) int {
	t.Helper()
	n := 0
	for _, f := range l.GW.Conntrack() {
		passive := f.Dst.Port() > 1024 && (f.Dst.Addr() == lab.Outside4 || f.Dst.Addr() == lab.Client6)
		active := f.Src.Port() == 20 && (f.Src.Addr() == lab.Client4 || f.Src.Addr() == lab.Client6)
		if !passive && !active || f.Path() == "own" {
			continue
		}
		n++
		if f.Path() != path {
			t.Errorf("a data connection that is not on the path %s: %s", path, f.Line)
		}
	}
	return n
}

// A published FTP server: real clients outside, every way to open a data
// connection, both directions, whomever the server sees. The data connections
// are in the kernel, or in user space if the rule says so.
func TestPublishedFTPCurl(t *testing.T) {
	for _, mode := range pubModes {
		for _, source := range []string{"client", "gateway"} {
			t.Run(mode.name+"-"+source, func(t *testing.T) {
				t.Parallel()
				l := lab.New(t)
				ftp := l.Client.VSFTPD()
				hash := ftp.Put(l.Client, "file", 500_000)
				more := ", source: " + source
				if mode.key != "" {
					more += ", " + mode.key
				}
				g := l.Gateway(publishedFTP("", more))
				outside := l.Srv.Capture()
				for _, way := range []struct {
					name, verb string
					at         netip.Addr
					args       []string
				}{
					{"PASV", "PASV", lab.Outside4, []string{"--disable-epsv"}},
					{"EPSV-v4", "EPSV", lab.Outside4, nil},
					{"EPSV-v6", "EPSV", lab.Client6, nil},
					{"PORT", "PORT", lab.Outside4, []string{"-P", "-", "--disable-eprt"}},
					{"EPRT-v4", "EPRT", lab.Outside4, []string{"-P", "-"}},
					{"EPRT-v6", "EPRT", lab.Client6, []string{"-P", "-"}},
				} {
					t.Run(way.name, func(t *testing.T) {
						before, data := ftp.Saw(way.verb), publishedData(t, l, mode.name)
						out := filepath.Join(l.Dir(), way.name)
						curlFrom(t, l.Srv, append(way.args, "-o", out, ftpURL(way.at, "file"))...)
						if got, err := os.ReadFile(out); err != nil || lab.Hash(got) != hash {
							t.Errorf("download: %d bytes with another hash, %v", len(got), err)
						}
						curlFrom(t, l.Srv, append(way.args, "-T", out, ftpURL(way.at, "in/"+way.name))...)
						if got, err := os.ReadFile(filepath.Join(ftp.Upload, way.name)); err != nil || lab.Hash(got) != hash {
							t.Errorf("upload: %d bytes with another hash, %v", len(got), err)
						}
						if ftp.Saw(way.verb) < before+2 {
							t.Errorf("the server saw %d more %s, want 2", ftp.Saw(way.verb)-before, way.verb)
						}
						lab.Eventually(t, time.Second, "conntrack shows two more data connections", func() bool { return publishedData(t, l, mode.name) >= data+2 })
					})
				}
				noPermissions(t, g)
				for _, s := range lab.Select(outside.Stop(), func(s lab.Seen) bool { return s.TCP != nil && s.TCP.SYN && !s.TCP.ACK && !s.Out }) {
					usual := s.Src.Port() == 20 || source == "gateway"
					if a := s.Src.Addr(); !usual || a != lab.Outside4 && a != lab.Client6 && a != lab.Outside6 {
						t.Errorf("the server's data connection was seen from %s", s.Src)
					}
				}
			})
		}
	}
}

func curlFrom(t testing.TB, from *lab.Host, args ...string) {
	t.Helper()
	out, status, err := from.Try(20*time.Second, "curl", append([]string{"-gsS"}, args...)...)
	if err != nil || status != 0 {
		t.Fatalf("curl %s: status %d, %v\n%s", strings.Join(args, " "), status, err, out)
	}
}

// The same by lftp, outside and, by the external address, inside.
func TestPublishedFTPLftp(t *testing.T) {
	for _, mode := range pubModes {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			ftp := l.Client.VSFTPD()
			hash := ftp.Put(l.Client, "file", 300_000)
			more := ""
			if mode.key != "" {
				more = ", " + mode.key
			}
			l.Gateway(publishedFTP("", more))
			for _, way := range []struct {
				from *lab.Host
				at   netip.Addr
			}{{l.Srv, lab.Outside4}, {l.Srv, lab.Client6}, {l.Client2, lab.Outside4}} {
				for _, passive := range []string{"on", "off"} {
					name := fmt.Sprintf("%s-%v-%s", way.from.Name, way.at.Is4(), passive)
					out := filepath.Join(l.Dir(), name)
					text, status, err := way.from.Try(30*time.Second, "lftp", "-c", fmt.Sprintf(
						"set ftp:passive-mode %s; set net:max-retries 1; set net:timeout 15; open %s; get /file -o %s; cd /in; put %s -o %s",
						passive, ftpURL(way.at, ""), out, out, name))
					if err != nil || status != 0 {
						t.Fatalf("lftp %s: status %d, %v\n%s", name, status, err, text)
					}
					for _, path := range []string{out, filepath.Join(ftp.Upload, name)} {
						if got, err := os.ReadFile(path); err != nil || lab.Hash(got) != hash {
							t.Errorf("%s: %d bytes with another hash, %v", path, len(got), err)
						}
					}
				}
			}
		})
	}
}

// B18 for a published server: an announced address is for the owner of the
// control connection, once.
func TestB18PublishedFTPExactAndOnce(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	ftp := l.Client.VSFTPD()
	ftp.Put(l.Client, "file", 1000)
	inside := l.Client.Capture()
	g := l.Gateway(publishedFTP("", ""))
	opened := 0
	eachView(t, func(t *testing.T, v outsideView) {
		c := loginFTP(t, l.Srv, v.at)
		data := c.passive(t, v.at)
		if data.Addr() != v.at {
			t.Fatalf("the server is announced at %s", data)
		}
		opened++
		dropped := func(h *lab.Host, at netip.AddrPort) {
			t.Helper()
			if err := briefly(h, at); !timedOut(err) {
				t.Errorf("%s to %s: %v, want dropped", h.Name, at, err)
			}
		}
		dropped(l.Other, data)
		dropped(l.Srv, next(data, 1))
		d, err := l.Srv.Dial(t.Context(), "tcp", data.String())
		if err != nil {
			t.Fatalf("the announced address: %v", err)
		}
		defer d.Close()
		dropped(l.Srv, data)
		c.send(t, "RETR file")
		c.want(t, "150")
		readFull(t, d, 1000)
		c.want(t, "226")
		// What was announced and not used goes with the control connection.
		data = c.passive(t, v.at)
		c.quit(t)
		noPermissions(t, g)
		dropped(l.Srv, data)
	})
	syns := lab.Select(inside.Stop(), func(s lab.Seen) bool {
		return s.TCP != nil && s.TCP.SYN && !s.TCP.ACK && !s.Out && s.Dst.Port() != 21
	})
	if len(syns) != opened {
		t.Errorf("the server saw %d data connections, want %d: %v", len(syns), opened, syns)
	}
}

// B60 for a published server: what an outside client must not make it do.
func TestB60PublishedFTPBounce(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	ftp := l.Client.VSFTPD()
	g := l.Gateway(publishedFTP("", ""))
	for at, lines := range map[netip.Addr][]string{
		lab.Outside4: {
			"PORT 203,0,113,11,200,10", "PORT 10,0,0,3,200,10", "PORT 10,0,0,2,200,10", "PORT 203,0,113,1,200,10", "PORT 127,0,0,1,200,10",
			"PORT 203,0,113,10,0,22", "PORT 203,0,113,10,3,255", "PORT 266,0,113,10,200,10", "EPRT |1|203.0.113.11|51210|", "EPRT |1|203.0.113.10|22|",
		},
		lab.Client6: {"EPRT |2|2001:db8:b::11|51210|", "EPRT |2|2001:db8:b::10|22|", "EPRT |2|fd00:a::3|51210|", "EPRT |1|203.0.113.10|51210|"},
	} {
		c := loginFTP(t, l.Srv, at)
		for _, line := range lines {
			c.send(t, line)
			if got := c.reply(t); !strings.HasPrefix(got, "5") {
				t.Errorf("%s: %q, want 5xx", line, got)
			}
		}
		c.quit(t)
	}
	if n := ftp.Saw("PORT") + ftp.Saw("EPRT"); n != 0 {
		t.Errorf("the server saw %d of them", n)
	}
	noPermissions(t, g)
}

// B60 for a published server: TYPE and PORT, or PORT and RETR, in one segment;
// PORT byte by byte.
func TestB60PublishedFTPSegments(t *testing.T) {
	for _, source := range []string{"client", "gateway"} {
		t.Run(source, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			ftp := l.Client.VSFTPD()
			ftp.Put(l.Client, "file", 1000)
			l.Gateway(publishedFTP("", ", source: "+source))
			wait := l.Srv.MustListen("tcp4", "203.0.113.10:0")
			port := wait.Addr().(*net.TCPAddr).Port
			line := fmt.Sprintf("PORT 203,0,113,10,%d,%d", port>>8, port&255)
			c := loginFTP(t, l.Srv, lab.Outside4)
			take := func() {
				t.Helper()
				d, err := wait.Accept()
				if err != nil {
					t.Fatal(err)
				}
				readFull(t, d, 1000)
				_ = d.Close()
				c.want(t, "226")
			}
			mustWrite(t, c.conn, "TYPE I\r\n"+line+"\r\nRETR file\r\n")
			for _, code := range []string{"200", "200", "150"} {
				c.want(t, code)
			}
			take()
			for _, b := range []byte(line + "\r\n") {
				mustWrite(t, c.conn, string(b))
			}
			c.want(t, "200")
			c.send(t, "RETR file")
			c.want(t, "150")
			take()
			c.quit(t)
		})
	}
}

// B60 for a published server: a server that names another host, or a low port,
// opens nothing but its own high ports.
func TestB60PublishedFTPForeignReply(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	replies := []string{
		"227 Entering Passive Mode (10,0,0,3,200,10).", "227 Entering Passive Mode (203,0,113,1,200,11).",
		"227 Entering Passive Mode (10,0,0,2,0,22).", "227 Entering Passive Mode (10,0,0,2,200,266).",
	}
	l.Client.ServeTCP(21, func(c *net.TCPConn) {
		_, _ = c.Write([]byte("220 hello\r\n"))
		b := make([]byte, 100)
		for _, reply := range replies {
			if n, err := c.Read(b); err != nil || !bytes.HasPrefix(b[:n], []byte("PASV")) {
				return
			}
			_, _ = c.Write([]byte(reply + "\r\n"))
		}
		_, _ = c.Read(b)
	})
	l.Client.EchoTCP(200<<8 | 10)
	l.Client.EchoTCP(200<<8 | 11)
	g := l.Gateway(publishedFTP("", ""))
	c := &ftpClient{conn: l.Srv.MustDial("tcp", "203.0.113.1:21", 5*time.Second)}
	c.lines = bufio.NewReader(c.conn)
	deadline(t, c.conn, 30*time.Second)
	c.want(t, "220")
	for range 2 {
		c.send(t, "PASV")
		at := hostPort(t, c.want(t, "227"))
		if at.Addr() != lab.Outside4 {
			t.Errorf("announced at %s", at)
		}
		echo(t, l.Srv.MustDial("tcp", at.String(), 5*time.Second), "the server's own port")
	}
	for range 2 {
		c.send(t, "PASV")
		c.want(t, "425")
	}
	_ = c.conn.Close()
	noPermissions(t, g)
}
