package netns_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// tftpConfig has one rule, for TFTP with its filter; options are the filter's.
func tftpConfig(options string) lab.Config {
	return lab.Config{Rules: "  - {name: tftp, action: allow, from: lan, to: wan, protocols: [tftp], filters: {tftp: {" + options + "}}}\n"}
}

// tftpData gives the transfers that conntrack shows, and fails for each that
// is not carried by the kernel.
func tftpData(t testing.TB, l *lab.Lab) (found []lab.Tracked) {
	t.Helper()
	for _, f := range l.GW.Conntrack() {
		if f.Proto != "udp" || f.Src.Addr() != lab.Srv4 && f.Src.Addr() != lab.Srv6 {
			continue
		}
		found = append(found, f)
		if f.Path() != "kernel" {
			t.Errorf("a transfer that is not in the kernel: %s", f.Line)
		}
	}
	return found
}

// tftpClient is a real client that gets or puts one file.
type tftpClient struct {
	name string
	get  func(l *lab.Lab, srv netip.Addr, mode, remote, local string) (string, int, error)
	put  func(l *lab.Lab, srv netip.Addr, mode, local, remote string) (string, int, error)
}

func tftpHPA(l *lab.Lab, srv netip.Addr, mode string, command ...string) (string, int, error) {
	return l.Client.Try(30*time.Second, "tftp", append([]string{"-m", mode, srv.String(), "-c"}, command...)...)
}

func atftp(l *lab.Lab, srv netip.Addr, args ...string) (string, int, error) {
	return l.Client.Try(30*time.Second, "atftp", append(args, srv.String(), "69")...)
}

var tftpClients = []tftpClient{
	{
		"tftp-hpa",
		func(l *lab.Lab, srv netip.Addr, mode, remote, local string) (string, int, error) {
			return tftpHPA(l, srv, mode, "get", remote, local)
		},
		func(l *lab.Lab, srv netip.Addr, mode, local, remote string) (string, int, error) {
			return tftpHPA(l, srv, mode, "put", local, remote)
		},
	},
	{
		"atftp",
		func(l *lab.Lab, srv netip.Addr, mode, remote, local string) (string, int, error) {
			return atftp(l, srv, "--option", "mode "+mode, "--get", "-r", remote, "-l", local)
		},
		func(l *lab.Lab, srv netip.Addr, mode, local, remote string) (string, int, error) {
			return atftp(l, srv, "--option", "mode "+mode, "--put", "-l", local, "-r", remote)
		},
	},
}

// tftpServers starts one of the servers on srv. atftpd has no IPv6 of its own
// when it runs alone.
var tftpServers = []struct {
	name  string
	srv   netip.Addr
	start func(l *lab.Lab) *lab.TFTPServer
}{
	{"tftpd-hpa-v4", lab.Srv4, func(l *lab.Lab) *lab.TFTPServer { return l.Srv.TFTPD() }},
	{"tftpd-hpa-v6", lab.Srv6, func(l *lab.Lab) *lab.TFTPServer { return l.Srv.TFTPD() }},
	{"atftpd-v4", lab.Srv4, func(l *lab.Lab) *lab.TFTPServer { return l.Srv.ATFTPD() }},
}

// Real clients and servers, both directions, both modes.
func TestTFTPClients(t *testing.T) {
	t.Parallel()
	for _, server := range tftpServers {
		t.Run(server.name, func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			s, srv := server.start(l), server.srv
			binary, _ := lab.Content(100_000)
			files := map[string][]byte{"octet": binary, "netascii": []byte(strings.Repeat("a line of text\n", 3000))}
			g := l.Gateway(tftpConfig(""))
			transfers := 0
			for mode, content := range files {
				s.Put(l.Srv, mode, content)
				for _, c := range tftpClients {
					local, remote := filepath.Join(l.Dir(), c.name+mode), "up-"+c.name+mode
					out, status, err := c.get(l, srv, mode, mode, local)
					wantFile(t, local, content, fmt.Sprintf("%s, get %s: status %d, %v\n%s", c.name, mode, status, err, out))
					out, status, err = c.put(l, srv, mode, local, remote)
					wantFile(t, filepath.Join(s.Root, remote), content, fmt.Sprintf("%s, put %s: status %d, %v\n%s", c.name, mode, status, err, out))
					transfers += 2
				}
			}
			if n := len(tftpData(t, l)); n != transfers {
				t.Errorf("conntrack shows %d transfers, want %d", n, transfers)
			}
			noPermissions(t, g)
			for _, want := range []string{"read", "write"} {
				g.AwaitRecord("transfer permitted", time.Second, func(r lab.Record) bool {
					return r.Text("operation") == want && strings.Contains(r.Text("file"), "netascii") && r.Text("mode") == "netascii"
				})
			}
		})
	}
}

// wantFile waits until a file has this content: a server may write the last of
// it when the client has gone.
func wantFile(t testing.TB, path string, content []byte, what string) {
	t.Helper()
	lab.Eventually(t, 2*time.Second, what, func() bool {
		got, err := os.ReadFile(path)
		return err == nil && bytes.Equal(got, content)
	})
}

// Blocks that fit a packet, and blocks that come in fragments.
func TestTFTPBlocks(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	s := l.Srv.TFTPD()
	content, _ := lab.Content(1 << 20)
	s.Put(l.Srv, "file", content)
	g := l.Gateway(tftpConfig(""))
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		for i, options := range [][]string{
			{"blksize 1428", "tsize 0"}, {"blksize 16384", "timeout 3"}, {"blksize 65464"},
		} {
			local := filepath.Join(l.Dir(), "got")
			var args []string
			for _, o := range options {
				args = append(args, "--option", o)
			}
			before := tftpData(t, l)
			out, status, err := atftp(l, srv, append(args, "--get", "-r", "file", "-l", local)...)
			wantFile(t, local, content, fmt.Sprintf("get, %v: status %d, %v\n%s", options, status, err, out))
			remote := fmt.Sprintf("up-%d-%v", i, srv.Is4())
			out, status, err = atftp(l, srv, append(args, "--put", "-r", remote, "-l", local)...)
			wantFile(t, filepath.Join(s.Root, remote), content, fmt.Sprintf("put, %v: status %d, %v\n%s", options, status, err, out))
			after := slices.DeleteFunc(tftpData(t, l), func(f lab.Tracked) bool {
				return slices.ContainsFunc(before, func(b lab.Tracked) bool { return b.Src == f.Src && b.Dst == f.Dst })
			})
			if len(after) != 2 {
				t.Errorf("%v: conntrack shows %d more transfers, want 2", options, len(after))
			}
		}
	})
	noPermissions(t, g)
}

// A server that knows windowsize, and multicast, which the gateway takes out
// of the request: the transfer is an ordinary one.
func TestTFTPWindowAndMulticast(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	s := l.Srv.ATFTPD()
	content, _ := lab.Content(1 << 20)
	s.Put(l.Srv, "file", content)
	l.Gateway(tftpConfig(""))
	for _, option := range []string{"windowsize 16", "multicast "} {
		seen := l.Srv.Capture()
		local := filepath.Join(l.Dir(), "got-"+option)
		out, status, err := atftp(l, lab.Srv4, "--option", option, "--option", "blksize 1428", "--get", "-r", "file", "-l", local)
		wantFile(t, local, content, fmt.Sprintf("%s: status %d, %v\n%s", option, status, err, out))
		name, _, _ := strings.Cut(option, " ")
		asked := lab.Select(seen.Stop(), lab.UDPTo(netip.AddrPortFrom(lab.Srv4, 69)))
		if len(asked) != 1 || bytes.Contains(asked[0].Payload, []byte(name)) != (name == "windowsize") {
			t.Errorf("%s: the server was asked with %+v", name, asked)
		}
	}
	if n := len(tftpData(t, l)); n != 2 {
		t.Errorf("conntrack shows %d transfers, want 2", n)
	}
}

// One client that asks for one small file after the other, always from the
// same port.
func TestTFTPManyFilesFromOnePort(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	s := l.Srv.TFTPD()
	g := l.Gateway(tftpConfig(""))
	const files = 30
	both(t, func(t *testing.T, srv, _ netip.Addr) {
		var commands strings.Builder
		for i := range files {
			name := fmt.Sprintf("%v-%d", srv.Is4(), i)
			s.Put(l.Srv, name, []byte("file "+name))
			fmt.Fprintf(&commands, "get %s %s\n", name, filepath.Join(l.Dir(), name))
		}
		seen := l.Srv.Capture()
		script := l.File("commands", commands.String())
		out, status, err := l.Client.Try(60*time.Second, "sh", "-c", fmt.Sprintf("exec tftp -m octet %s <%s", srv, script))
		for i := range files {
			name := fmt.Sprintf("%v-%d", srv.Is4(), i)
			wantFile(t, filepath.Join(l.Dir(), name), []byte("file "+name), fmt.Sprintf("status %d, %v\n%s", status, err, out))
		}
		// A request whose answer was lost is repeated, seconds later.
		if n := len(lab.Select(seen.Stop(), lab.UDPTo(netip.AddrPortFrom(srv, 69)))); n != files {
			t.Errorf("the server was asked %d times for %d files", n, files)
		}
	})
	noPermissions(t, g)
}

// With no_kernel_mode the transfer is carried by the daemon: it stands while
// the daemon does.
func TestTFTPNoKernelMode(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	s := l.Srv.TFTPD()
	content, _ := lab.Content(1 << 20)
	s.Put(l.Srv, "file", content)
	c := tftpConfig("")
	c.Rules = strings.Replace(c.Rules, "filters:", "no_kernel_mode: true, filters:", 1)
	g := l.Gateway(c)
	both(t, func(t *testing.T, srv, client netip.Addr) {
		local := filepath.Join(l.Dir(), "got")
		out, status, err := atftp(l, srv, "--option", "blksize 8192", "--get", "-r", "file", "-l", local)
		wantFile(t, local, content, fmt.Sprintf("get: status %d, %v\n%s", status, err, out))
		p := udpPort(t, l.Client, netip.AddrPortFrom(client, 0))
		from, first := p.ask(netip.AddrPortFrom(srv, 69), tftpRequest(tftpRead, "file", "octet"), p)
		if n := g.Carries("udp", int(from.Port())); n == 0 {
			t.Error("the daemon holds no socket of the transfer")
		}
		g.Freeze()
		defer g.Thaw()
		p.send(from, tftpBlock(tftpAck, 1))
		p.silent("while the daemon stands", first) // which the server had repeated
		g.Thaw()
		at, block := p.receive()
		for at != from || block == first {
			at, block = p.receive()
		}
		if block != tftpBlock(tftpData3, 2)+string(content[512:1024]) {
			t.Errorf("%d bytes that are not the second block", len(block))
		}
	})
}
