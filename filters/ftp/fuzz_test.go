package ftp

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/sluicegw/sluice/filterapi/filtertest"
)

var clientSeeds = []string{
	portIn, "PORT 10,0,0,2,19,137\n", "PORT 10,0,0,2,0,22\r\n", "PORT 266,0,0,2,19,137\r\n", "PORT 10,0,0,3,19,137\r\n",
	"EPRT |1|10.0.0.2|5001|\r\n", "EPRT |2|fd00:a::2|5001|\r\n", "eprt !1!10.0.0.2!65535!\r\n", "PASV\r\n", "EPSV\r\n", "EPSV ALL\r\nPASV\r\n", "EPSV 1\r\n",
	"USER a\r\nPASS b\r\nTYPE I\r\n" + portIn + "RETR x\r\nQUIT\r\n", "AUTH TLS\r\n\x16\x03\x01", "STOR x\r\nDELE y\r\n", "REIN\r\n",
	"\xff\xf4\xff\xf2ABOR\r\n", "POST / HTTP/1.1\r\n\r\n" + portIn, "CWD caf\xc3\xa9\r\n", "CWD \xe9\r\n", "CWD \xff\xff\r\n", "\r\n", "X\r\n", "NOOP \r\r\n", "CWD \xe2\x82",
	"PASV\r\n" + portIn + "EPSV\r\nABOR\r\nPASV\r\n", "MDTM 20250101000000 a\r\n", "ENC x\r\n",
}

var serverSeeds = []string{
	banner, "220-a\r\n220 b\r\n", "120 wait\r\n220 ok\r\n", "220\r\n", "421 bye\r\n", "200 ok\r\n", "500 no\r\n", "150 x\r\n226 y\r\n",
	"227 Entering Passive Mode (203,0,113,10,19,137).\r\n", "227 (192,168,1,1,19,137)\r\n", "227 (203,0,113,10,0,22)\r\n", "227 (1,2,3,4,5,6,7)\r\n",
	"229 Extended (|||5001|)\r\n", "229 (|||22|)\r\n", "229 (|1|1.2.3.4|5001|)\r\n", "227-x\r\n227 203,0,113,10,19,137\r\n",
	banner + "227 (203,0,113,10,19,137)\r\n200 ok\r\n229 (|||5001|)\r\n", "234 go\r\n", "100 \r\r\n", "HTTP/1.1 200 OK\r\n", "\x16\x03\x01", "220 \x00\r\n", "22",
}

// Cutting a command off never depends on what follows it, and a beginning of
// it is never refused.
func FuzzCommand(f *testing.F) {
	for _, s := range clientSeeds {
		f.Add([]byte(s))
	}
	o := &options{}
	f.Fuzz(func(t *testing.T, in []byte) {
		cmd, n, err := cutCommand(in, o.classOf)
		switch {
		case err != nil:
			if n != 0 || !errors.Is(err, errNotFTP) {
				t.Fatalf("%q: %d, %v", in, n, err)
			}
			return
		case n == 0:
			if bytes.IndexByte(in, '\n') >= 0 || len(in) >= maxLine {
				t.Fatalf("%q is taken for the beginning of a line", in)
			}
			return
		}
		line := in[:n]
		if !bytes.Equal(cmd.raw, line) || line[n-1] != '\n' || bytes.Count(line, []byte("\n")) != 1 || n > maxLine {
			t.Fatalf("%q: line %q", in, cmd.raw)
		}
		for i := range n {
			if _, m, err := cutCommand(line[:i], o.classOf); err != nil || m != 0 {
				t.Fatalf("%q is refused at byte %d: %v", line, i, err)
			}
		}
		if cmd.verb != "" && o.classOf(cmd.verb) == unknown || strings.ContainsAny(cmd.verb+cmd.arg, "\x00\n\r") {
			t.Fatalf("%q: %+v", line, cmd)
		}
		for _, parse := range []func() (string, error){
			func() (string, error) { a, err := parsePort(cmd.arg); return canonical(formatPort, a, err) },
			func() (string, error) { a, err := parseEprt(cmd.arg, true); return canonical(formatEprt, a, err) },
		} {
			// One address has one way to be written, but for the delimiter.
			want := cmd.arg
			if got, err := parse(); err == nil && got != want && got != strings.ReplaceAll(want, want[:1], "|") {
				t.Fatalf("%q is read as %q", want, got)
			}
		}
	})
}

func canonical[A any](format func(A) string, a A, err error) (string, error) {
	if err != nil {
		return "", err
	}
	return format(a), nil
}

// The same for replies, and an address is read only if it is in the text.
func FuzzReply(f *testing.F) {
	for _, s := range serverSeeds {
		f.Add([]byte(s), false)
		f.Add([]byte(s), true)
	}
	f.Fuzz(func(t *testing.T, in []byte, inside bool) {
		open := 0
		if inside {
			open = 227
		}
		line, n, err := cutReply(in, open)
		if err != nil {
			if n != 0 || !errors.Is(err, errNotFTP) {
				t.Fatalf("%q: %d, %v", in, n, err)
			}
			return
		}
		if n == 0 {
			return
		}
		if !bytes.Equal(line.raw, in[:n]) || line.code < 100 || line.code > 599 || inside && line.code != open {
			t.Fatalf("%q: %+v", in, line)
		}
		for i := range n {
			if _, m, err := cutReply(in[:i], open); err != nil || m != 0 {
				t.Fatalf("%q is refused at byte %d: %v", in[:n], i, err)
			}
		}
		if a, from, to, err := findAddress(line.text()); err == nil && line.text()[from:to] != formatPort(a) {
			t.Fatalf("%q is read as %v", line.raw, a)
		}
		if p, err := findPort(line.text()); err == nil && !strings.Contains(line.text(), fmt.Sprint(p)) {
			t.Fatalf("%q is read as port %d", line.raw, p)
		}
	})
}

// Two random streams in random segments: no panic, no hang, nothing opens that
// the streams do not say, and nothing stays open.
func FuzzControl(f *testing.F) {
	for i, c := range clientSeeds {
		f.Add(c, banner+serverSeeds[i%len(serverSeeds)], uint64(i))
		f.Add(c+c, banner+strings.Join(serverSeeds[5:12], ""), uint64(i))
	}
	f.Add("AUTH \n", "200 \n200 ,", uint64(3)) // the server goes before AUTH is read
	for i, s := range serverSeeds {
		f.Add("PASV\r\nEPSV\r\n"+portIn, s, uint64(i))
	}
	rules := []string{"", "read_only: true", "malformed: pass", "auth_tls: pass"}
	f.Fuzz(func(t *testing.T, client, server string, seed uint64) {
		if len(client)+len(server) > 32<<10 {
			return // more than the machine's windows hold tells nothing new
		}
		rule := rules[seed%4]
		g := filtertest.New(t, New(), rule)
		fl := g.Connect(client4, server4)
		r := rand.New(rand.NewPCG(seed, 2))
		clientSegments, serverSegments := split(r, client), split(r, server)
		var wg sync.WaitGroup
		for end, segments := range map[*filtertest.End][]string{fl.Client: clientSegments, fl.Server: serverSegments} {
			wg.Go(func() {
				for _, s := range segments {
					if end.Offer(s) != nil {
						return
					}
				}
				end.CloseWrite()
			})
			wg.Go(func() {
				if _, err := end.ReadAll(); err != nil && !errors.Is(err, filtertest.ErrReset) {
					t.Errorf("an end is left open: %v", err)
				}
			})
		}
		_ = fl.Wait()
		if open := g.Open(); len(open) > 0 {
			t.Errorf("open at the end: %v", open)
		}
		judge(t, g, client, server, rule)
		wg.Wait()
	})
}

// read finds, in the plainest way, what the streams name in whole lines: how
// often the client asked for a passive port and the server answered anything,
// the addresses that the client proposed and the ports that the server said.
func read(client, server string) (asked, answered int, proposed, said map[string]bool) {
	proposed, said = map[string]bool{}, map[string]bool{}
	for line := range strings.Lines(client) {
		up := strings.ToUpper(strings.TrimRight(line, "\r\n"))
		switch {
		case strings.HasPrefix(up, "PASV"), strings.HasPrefix(up, "EPSV"):
			asked++
		case strings.HasPrefix(up, "PORT "):
			var h [4]int
			var p1, p2 int
			if n, _ := fmt.Sscanf(up, "PORT %d,%d,%d,%d,%d,%d", &h[0], &h[1], &h[2], &h[3], &p1, &p2); n == 6 {
				proposed[fmt.Sprintf("%d.%d.%d.%d:%d", h[0], h[1], h[2], h[3], p1*256+p2)] = true
			}
		case strings.HasPrefix(up, "EPRT ") && len(up) > 6:
			if f := strings.Split(up[5:], up[5:6]); len(f) == 5 {
				proposed[f[2]+":"+f[3]] = true
			}
		}
	}
	for line := range strings.Lines(server) {
		answered++
		digits := strings.FieldsFunc(line, func(r rune) bool { return r < '0' || r > '9' })
		if n := len(digits); n >= 7 && digits[0] == "227" {
			var p1, p2 int
			fmt.Sscan(digits[n-2], &p1)
			fmt.Sscan(digits[n-1], &p2)
			said[fmt.Sprint(p1*256+p2)] = true
		} else if n >= 2 && digits[0] == "229" {
			for _, d := range digits[1:] {
				said[d] = true
			}
		}
	}
	return asked, answered, proposed, said
}

// judge is the oracle: what opened must stand in the stream that may name it.
func judge(t *testing.T, g *filtertest.Gateway, client, server, rule string) {
	asked, answered, proposed, said := read(client, server)
	for _, e := range g.Journal() {
		switch e.What {
		case filtertest.Allowed:
			asked--
			var port int
			n, _ := fmt.Sscanf(e.Text, "tcp 10.0.0.2 > 203.0.113.10:%d", &port)
			if n != 1 || port < 1024 || !said[fmt.Sprint(port)] || asked < 0 {
				t.Errorf("opened without being negotiated: %v", e)
			}
		case filtertest.Reserved, filtertest.Armed:
			_, to, _ := strings.Cut(e.Text, " > ")
			to, from, _ := strings.Cut(to, " from ")
			var port int
			n, _ := fmt.Sscanf(to, "10.0.0.2:%d", &port)
			if n != 1 || port < 1024 || !proposed[to] {
				t.Errorf("bound without being negotiated: %v", e)
			}
			if e.What == filtertest.Armed {
				answered--
			}
			if e.What == filtertest.Reserved && from != "[]" || e.What == filtertest.Armed && from != "[203.0.113.10]" || answered < 0 {
				t.Errorf("bound for too many: %v", e)
			}
		case filtertest.Bound:
			t.Errorf("bound without being reserved: %v", e)
		}
	}
	if rule == "malformed: pass" || rule == "auth_tls: pass" {
		return
	}
	for line := range strings.Lines(g.Sent(filtertest.ToServer)) {
		if verb, _, _ := strings.Cut(strings.ToUpper(strings.TrimRight(line, "\r\n")), " "); verbs[verb] == writes && rule == "read_only: true" {
			t.Errorf("the server saw %q", line)
		} else if !strings.Contains(client, line) && verb != "PORT" && verb != "EPRT" {
			t.Errorf("the server saw %q, which the client never sent", line)
		}
	}
}
