package netns_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// ftpClient speaks FTP line by line, as no real client can be made to.
type ftpClient struct {
	conn  net.Conn
	lines *bufio.Reader
}

func loginFTP(t testing.TB, from *lab.Host, srv netip.Addr) *ftpClient {
	t.Helper()
	return ftpOn(t, from.MustDial("tcp", netip.AddrPortFrom(srv, 21).String(), 10*time.Second))
}

// ftpOn logs in on a control connection that stands.
func ftpOn(t testing.TB, conn net.Conn) *ftpClient {
	t.Helper()
	c := &ftpClient{conn: conn}
	c.lines = bufio.NewReader(c.conn)
	deadline(t, c.conn, 60*time.Second)
	c.want(t, "220")
	c.send(t, "USER anonymous")
	if got := c.reply(t); strings.HasPrefix(got, "331") {
		c.send(t, "PASS a@b")
		c.want(t, "230")
	}
	c.send(t, "TYPE I")
	c.want(t, "200")
	return c
}

func (c *ftpClient) send(t testing.TB, line string) {
	t.Helper()
	mustWrite(t, c.conn, line+"\r\n")
}

// reply is the last line of the next reply.
func (c *ftpClient) reply(t testing.TB) string {
	t.Helper()
	for {
		line, err := c.lines.ReadString('\n')
		if err != nil {
			t.Fatalf("ftp: no reply: %q, %v", line, err)
		}
		if len(line) > 3 && line[3] == ' ' && line[0] >= '1' && line[0] <= '5' {
			return strings.TrimRight(line, "\r\n")
		}
	}
}

func (c *ftpClient) want(t testing.TB, code string) string {
	t.Helper()
	got := c.reply(t)
	if !strings.HasPrefix(got, code) {
		t.Fatalf("ftp: got %q, want %s", got, code)
	}
	return got
}

func (c *ftpClient) quit(t testing.TB) {
	t.Helper()
	c.send(t, "QUIT")
	c.want(t, "221")
	_ = c.conn.Close()
}

// passive asks for a passive data connection and gives its address.
func (c *ftpClient) passive(t testing.TB, srv netip.Addr) netip.AddrPort {
	t.Helper()
	if srv.Is4() {
		c.send(t, "PASV")
		return hostPort(t, c.want(t, "227"))
	}
	c.send(t, "EPSV")
	got := c.want(t, "229")
	_, after, _ := strings.Cut(got, "|||")
	port, err := strconv.Atoi(strings.TrimRight(after, "|). "))
	if err != nil {
		t.Fatalf("ftp: %q", got)
	}
	return netip.AddrPortFrom(srv, uint16(port))
}

// hostPort reads h1,h2,h3,h4,p1,p2 out of a PORT line or a 227 reply.
func hostPort(t testing.TB, line string) netip.AddrPort {
	t.Helper()
	i := strings.IndexByte(line, '(') + 1
	if i == 0 {
		i = strings.IndexByte(line, ' ') + 1
	}
	var h [4]byte
	var hi, lo uint16
	if _, err := fmt.Sscanf(line[i:], "%d,%d,%d,%d,%d,%d", &h[0], &h[1], &h[2], &h[3], &hi, &lo); err != nil {
		t.Fatalf("no address in %q: %v", line, err)
	}
	return netip.AddrPortFrom(netip.AddrFrom4(h), hi<<8|lo)
}

func readFull(t testing.TB, c net.Conn, n int64) {
	t.Helper()
	deadline(t, c, 30*time.Second)
	if got, err := io.CopyN(io.Discard, c, n); err != nil {
		t.Fatalf("%d of %d bytes: %v", got, n, err)
	}
}

// ftpScript is an FTP server that shows each command to the test and waits for
// the test's answer.
type ftpScript struct {
	commands chan string
	replies  chan string
}

func scriptFTP(l *lab.Lab) *ftpScript {
	l.T.Helper()
	s := &ftpScript{commands: make(chan string, 16), replies: make(chan string, 16)}
	l.Srv.ServeTCP(21, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "220 script\r\n")
		lines := bufio.NewScanner(c)
		for lines.Scan() {
			switch line := lines.Text(); {
			case strings.HasPrefix(line, "USER"):
				_, _ = io.WriteString(c, "230 in\r\n")
			case strings.HasPrefix(line, "TYPE"):
				_, _ = io.WriteString(c, "200 binary\r\n")
			case line == "QUIT":
				_, _ = io.WriteString(c, "221 bye\r\n")
				return
			default:
				s.commands <- line
				_, _ = io.WriteString(c, <-s.replies)
			}
		}
	})
	return s
}

func (s *ftpScript) command(t testing.TB) string {
	t.Helper()
	select {
	case line := <-s.commands:
		return line
	case <-time.After(lab.Patience(5 * time.Second)):
		t.Fatal("no command reaches the server")
		return ""
	}
}

// announced reads the address of a PORT or EPRT line.
func announced(t testing.TB, line string) netip.AddrPort {
	t.Helper()
	if strings.HasPrefix(line, "PORT") {
		return hostPort(t, line)
	}
	f := strings.Split(line, "|")
	if len(f) != 5 {
		t.Fatalf("no address in %q", line)
	}
	at, err := netip.ParseAddrPort(net.JoinHostPort(f[2], f[3]))
	if err != nil {
		t.Fatalf("no address in %q: %v", line, err)
	}
	return at
}

// activeLine announces the client's own address and port.
func activeLine(client netip.Addr, port uint16) string {
	if client.Is4() {
		return fmt.Sprintf("PORT 10,0,0,2,%d,%d", port>>8, port&255)
	}
	return fmt.Sprintf("EPRT |2|%s|%d|", client, port)
}

// B18 for active FTP: reserved early, armed on the positive answer only, open
// for the server alone and once, gone with the control connection.
func TestB18FTPActiveArmedLate(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	server := scriptFTP(l)
	arrivals := l.Client.EchoTCP(45000)
	g := l.Gateway(ftpConfig(""))
	both(t, func(t *testing.T, srv, client netip.Addr) {
		came := len(arrivals.Addrs())
		c := loginFTP(t, l.Client, srv)
		c.send(t, activeLine(client, 45000))
		at := announced(t, server.command(t))
		want := client
		if srv.Is4() {
			want = lab.Outside4
		}
		if at.Addr() != want {
			t.Errorf("the server is told %s, want %s", at, want)
		}
		silent := func(h *lab.Host, when string) {
			t.Helper()
			if err := briefly(h, at); !timedOut(err) {
				t.Errorf("%s, %s: %v, want silence", h.Name, when, err)
			}
		}
		silent(l.Srv, "before the server has agreed")
		server.replies <- "200 PORT command successful\r\n"
		c.want(t, "200")
		silent(l.Other, "never named")
		d := l.Srv.MustDial("tcp", at.String(), 5*time.Second)
		echo(t, d, "data")
		silent(l.Srv, "the second time")
		if n := len(arrivals.Addrs()) - came; n != 1 {
			t.Errorf("the client has seen %d connections, want 1", n)
		}
		echo(t, d, "still up")

		c.send(t, activeLine(client, 45000))
		again := announced(t, server.command(t))
		server.replies <- "500 no\r\n"
		c.want(t, "500")
		at = again
		silent(l.Srv, "after the server has refused")

		c.send(t, activeLine(client, 45000))
		at = announced(t, server.command(t))
		server.replies <- "200 yes\r\n"
		c.want(t, "200")
		c.quit(t)
		noPermissions(t, g)
		silent(l.Srv, "after QUIT")
	})
}

// B60: commands in pieces and in one piece work; what is malformed does not.
func TestB60FTPSegments(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	server := scriptFTP(l)
	l.Client.EchoTCP(45000)
	l.Gateway(ftpConfig(""))
	both(t, func(t *testing.T, srv, client netip.Addr) {
		c := loginFTP(t, l.Client, srv)
		line := activeLine(client, 45000)
		for _, cut := range []int{2, 7, len(line) - 2} {
			mustWrite(t, c.conn, line[:cut])
			awaitAcked(t, l.Client)
			mustWrite(t, c.conn, line[cut:]+"\r\n")
			at := announced(t, server.command(t))
			server.replies <- "200 yes\r\n"
			c.want(t, "200")
			echo(t, l.Srv.MustDial("tcp", at.String(), 5*time.Second), "data")
		}
		mustWrite(t, c.conn, "TYPE I\r\n"+line+"\r\n")
		at := announced(t, server.command(t))
		server.replies <- "200 yes\r\n"
		c.want(t, "200")
		c.want(t, "200")
		echo(t, l.Srv.MustDial("tcp", at.String(), 5*time.Second), "data")
		mustWrite(t, c.conn, line+"\n")
		c.want(t, "5")
		c.quit(t)
	})
}

// awaitAcked waits until a host has nothing unacknowledged: what was written
// left as a segment of its own.
func awaitAcked(t testing.TB, h *lab.Host) {
	t.Helper()
	lab.Eventually(t, 3*time.Second, "the segment is acknowledged", func() bool {
		for _, line := range strings.Split(h.Run("ss", "-Htn", "state", "established", "dport = :21"), "\n") {
			if f := strings.Fields(line); len(f) >= 2 && f[1] != "0" {
				return false
			}
		}
		return true
	})
}

// A 227 reply in two segments is understood.
func TestFTPSplitReply(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Srv.EchoTCP(40001)
	l.Srv.ServeTCP(21, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "220 script\r\n")
		lines := bufio.NewScanner(c)
		for lines.Scan() {
			switch line := lines.Text(); line {
			case "PASV":
				_, _ = io.WriteString(c, "227 Entering Passive Mode (203,0,113,1")
				_, _ = io.WriteString(c, "0,156,65)\r\n")
			case "TYPE I":
				_, _ = io.WriteString(c, "200 binary\r\n")
			default:
				_, _ = io.WriteString(c, "230 in\r\n")
			}
		}
	})
	l.Gateway(ftpConfig(""))
	c := loginFTP(t, l.Client, lab.Srv4)
	at := c.passive(t, lab.Srv4)
	if want := netip.AddrPortFrom(lab.Srv4, 40001); at != want {
		t.Fatalf("the client is told %s, want %s", at, want)
	}
	echo(t, l.Client.MustDial("tcp", at.String(), 5*time.Second), "data")
}
