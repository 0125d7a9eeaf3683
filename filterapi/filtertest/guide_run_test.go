package filtertest_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/config"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

func TestExec(t *testing.T) {
	g := filtertest.New(t, Exec{}, "")
	fl := g.Connect(client, server)
	fl.Client.Send("43", "21\x00user\x00") // two segments
	fl.Server.Expect("40000\x00user\x00")
	g.Before(filtertest.Bound, ":4321 from [203.0.113.10]", filtertest.ToServer, "40000")
	if err := fl.Wait(); !errors.Is(err, filterapi.ErrReleased) {
		t.Errorf("Pump: %v", err)
	}
	external := netip.AddrPortFrom(g.External, 40000)
	if _, in := g.Arrive(flow.TCP, client.Addr(), external); in {
		t.Error("somebody else is let in")
	}
	if to, in := g.Arrive(flow.TCP, server.Addr(), external); !in || to.Port() != 4321 {
		t.Errorf("the server is sent to %v, let in: %v", to, in)
	}
	fl.Server.Send("output")
	fl.Client.Expect("output")
}

func TestExecExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, Exec{}, "")
		g.Connect(client, server).Client.Send("4321\x00")
		synctest.Wait()
		before := len(g.Open())
		time.Sleep(filterapi.DefaultTimeout) // at once
		synctest.Wait()
		if before != 1 || len(g.Open()) != 0 {
			t.Errorf("open: %d, a minute later %v", before, g.Open())
		}
	})
}

// Whatever a client says, at most one port of its own is opened, and only what
// a strict reader would take for one.
func FuzzExec(f *testing.F) {
	f.Add("4321\x00", 3)
	f.Add("0\x00rest", 1)
	f.Add("GET / HTTP/1.1\r\n", 5)
	f.Fuzz(func(t *testing.T, text string, cut int) {
		if len(text) == 0 {
			return
		}
		g := filtertest.New(t, Exec{}, "")
		fl := g.Connect(client, server)
		cut = min(max(cut, 0), len(text))
		for _, segment := range []string{text[:cut], text[cut:]} {
			_ = fl.Client.Offer(segment) // it may be reset meanwhile
		}
		fl.Client.CloseWrite()
		_ = fl.Wait()
		want := regexp.MustCompile("^[0-9]{4,5}\x00").MatchString(text)
		if n := len(g.Open()); n > 1 || n == 1 && !want {
			t.Errorf("%q opened %v", text, g.Open())
		}
	})
}

// The example is short: a filter is no big thing.
func TestExecIsShort(t *testing.T) {
	source, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	_, code, _ := strings.Cut(string(source), "\n\n// Exec is")
	if n := strings.Count(code, "\n"); n < 20 || n > 60 {
		t.Errorf("the example filter has %d lines, want at most 60", n)
	}
}

// Every block of code in the guide is code that was compiled and run.
func TestGuideIsThisCode(t *testing.T) {
	page, err := os.ReadFile("../../docs/writing-a-filter.md")
	if err != nil {
		t.Fatal(err)
	}
	var code strings.Builder
	for _, file := range []string{"example_test.go", "guide_test.go", "guide_run_test.go", "../../cmd/gateway/filters.go"} {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		code.Write(source)
	}
	blocks := regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```$").FindAllStringSubmatch(string(page), -1)
	seen := map[string]int{}
	for _, b := range blocks {
		seen[b[1]]++
		switch b[1] {
		case "go":
			if !strings.Contains(code.String(), b[2]) {
				t.Errorf("the guide has code that is not in the tests:\n%s", b[2])
			}
		case "yaml":
			if _, err := config.Parse("guide", []byte(b[2]), config.OptionParsers{"rexec": nil}); err != nil {
				t.Errorf("the guide's configuration: %v", err)
			}
		case "sh":
		default:
			t.Errorf("a block of %q in the guide, which nobody checks", b[1])
		}
	}
	if seen["go"] < 10 || seen["yaml"] != 1 {
		t.Errorf("the guide's blocks: %v", seen)
	}
	for _, name := range regexp.MustCompile("`(?:Gateway|Flow|End)\\.([A-Za-z]+)`").FindAllStringSubmatch(string(page), -1) {
		if !has(name[1]) {
			t.Errorf("the guide names %s, which filtertest does not have", name[0])
		}
	}
}

// has says whether the machine, a flow or an end has a field or method.
func has(name string) bool {
	for _, t := range []reflect.Type{reflect.TypeFor[filtertest.Gateway](), reflect.TypeFor[filtertest.Flow](), reflect.TypeFor[filtertest.End]()} {
		_, field := t.FieldByName(name)
		_, method := reflect.PointerTo(t).MethodByName(name)
		if field || method {
			return true
		}
	}
	return false
}

func TestGuideEvents(t *testing.T) {
	p := &puppet{raised: func(ev filterapi.Event) error { return handle(ev, passing{"!"}) }}
	g := filtertest.New(t, p, "")
	fl := g.Connect(client, server)
	fl.Client.Send("a")
	fl.Server.Expect("a!")
	if fl := g.Connect(client, netip.MustParseAddrPort("203.0.113.10:25")); fl.Filtered {
		t.Error("port 25 is filtered")
	}
	if _, err := g.Associate(client, netip.MustParseAddrPort("203.0.113.10:53")); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("a low port: %v", err)
	}
	if _, err := g.Associate(client, netip.MustParseAddrPort("203.0.113.10:5300")); err != nil {
		t.Errorf("a high port: %v", err)
	}
	if err := g.Raise(client, &filterapi.TerminatingEvent{}); !errors.Is(err, filterapi.ErrNotSupported) {
		t.Errorf("the end: %v", err)
	}
}

func TestGuideLines(t *testing.T) {
	for text, c := range map[string]struct {
		says, gets string
		reset      bool
	}{
		"allowed":   {"helo me\r\nquit\r\n", "helo me\r\nquit\r\n", false},
		"forbidden": {"helo me\r\nVrfy you\r\n", "helo me\r\n", true},
		"too long":  {strings.Repeat("x", 2000) + "\n", "", true},
	} {
		p := &puppet{pump: func(in, out filterapi.Socket) error { return lines(in, out, "VRFY") }}
		fl := filtertest.New(t, p, "").Connect(client, server)
		fl.Client.Send(c.says)
		if c.reset {
			fl.Client.ExpectReset()
			if err := fl.Wait(); err == nil {
				t.Errorf("%s: no error", text)
			}
			continue
		}
		fl.Client.CloseWrite()
		fl.Server.Expect(c.gets)
		fl.Server.ExpectEOF()
		fl.Server.Send("bye")
		fl.Server.CloseWrite()
		fl.Client.Expect("bye")
		fl.Client.ExpectEOF()
		if err := fl.Wait(); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestGuideSplit(t *testing.T) {
	p := &puppet{pump: func(in, out filterapi.Socket) error {
		for {
			b, err := in.Recv()
			if err != nil {
				return err
			}
			if err := after(b, "\n", out, in); err != nil {
				return err
			}
		}
	}}
	fl := filtertest.New(t, p, "").Connect(client, server)
	fl.Client.Send("none", "before\nbehind")
	fl.Server.Expect("nonebefore\n")
	fl.Client.Expect("behind")
}

func TestGuidePermissions(t *testing.T) {
	p, g, fl := open(t)
	var sent strings.Builder
	action, err := announce(p, fl.Conn, &sent, "DATA 5001")
	if err != nil || sent.String() != "DATA 5001\n" || len(g.Open()) != 1 {
		t.Fatalf("sent %q, open %v, %v", sent.String(), g.Open(), err)
	}
	if err := action.Cancel(); err != nil {
		t.Error(err)
	}
	if _, err := announce(p, fl.Conn, &sent, "DATA 22"); err == nil || len(g.Open()) > 0 {
		t.Errorf("port 22: %v, open %v", err, g.Open())
	}
	for _, agreed := range []bool{true, false} {
		bind, at, err := reserve(p, fl.Conn, 5002)
		if err != nil {
			t.Fatal(err)
		}
		if _, in := g.Arrive(flow.TCP, server.Addr(), at); in {
			t.Error("reserved, and somebody is let in")
		}
		if err := arm(bind, fl.Conn, agreed); err != nil {
			t.Error(err)
		}
		if _, in := g.Arrive(flow.TCP, server.Addr(), at); in != agreed {
			t.Errorf("agreed %v, let in %v", agreed, in)
		}
	}
	pair, err := media(p, fl.Conn, p, 7000)
	if err != nil || len(pair) != 2 || name(t, pair[0]).Port()%2 != 0 {
		t.Fatalf("a pair: %v, %v", pair, err)
	}
	g.Arrive(flow.UDP, server.Addr(), name(t, pair[1]))
	if told := seen[*filterapi.EstablishedEvent](p); len(told) != 1 || told[0].Context != "media" {
		t.Errorf("told %v", told)
	}
	inside, _, err := lend(p, fl.Conn, server)
	if err != nil || !g.Dial(flow.TCP, client.Addr(), inside) {
		t.Errorf("lent %v, %v", inside, err)
	}
}

func TestGuideRest(t *testing.T) {
	p := &puppet{handle: func(c filterapi.Connection) error {
		if c.Tuple().Proto == flow.UDP {
			return nil
		}
		return c.EmulateForConnect(closed{})
	}}
	g := filtertest.New(t, p, "")
	fl := g.Connect(client, server)
	fl.Client.Expect("421 closed until Monday\r\n")
	fl.Client.ExpectEOF()
	again, err := p.fw.ClientSession(client.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if _, err := watch(again, server, passing{"!"}); err != nil {
		t.Fatal(err)
	}
	udp, err := g.Associate(client, server)
	if err != nil {
		t.Fatal(err)
	}
	udp.Client.Send("a")
	udp.Server.Expect("a!")

	l, err := p.fw.Listen(netip.AddrPortFrom(g.Inside, 1080), nil)
	if err != nil {
		t.Fatal(err)
	}
	remote, err := g.World().Listen(server, nil)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			err = relay(context.Background(), p.fw, c, server)
		}
		done <- err
	}()
	c, err := g.World().Dial(t.Context(), flow.TCP, client, netip.AddrPortFrom(g.Inside, 1080))
	if err != nil {
		t.Fatal(err)
	}
	far, err := remote.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprint(c, "x"); err != nil {
		t.Error(err)
	}
	if _, err := far.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
	_ = c.Close()
	if err := <-done; err != nil {
		t.Errorf("relay: %v", err)
	}
}

func TestGuideTunnel(t *testing.T) {
	p := &puppet{handle: func(filterapi.Connection) error { return nil }}
	g := filtertest.New(t, p, "")
	g.Access = func(_ netip.Addr, q filterapi.HostAccess) error {
		if q.Target.Port() == 23 {
			return filterapi.ErrPolicyDenied
		}
		return nil
	}
	remote, err := g.World().Listen(server, nil)
	if err != nil {
		t.Fatal(err)
	}
	own, err := p.fw.Listen(netip.AddrPortFrom(g.Inside, 1080), nil)
	if err != nil {
		t.Fatal(err)
	}
	session, err := p.fw.PrivateSession(client.Addr(), "alice")
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	for _, target := range []netip.AddrPort{netip.AddrPortFrom(server.Addr(), 23), server} {
		done := make(chan error, 1)
		go func() {
			c, err := own.Accept()
			if err == nil {
				err = tunnel(context.Background(), session, c, target)
			}
			done <- err
		}()
		c, err := g.World().Dial(t.Context(), flow.TCP, netip.AddrPortFrom(client.Addr(), 0), netip.AddrPortFrom(g.Inside, 1080))
		if err != nil {
			t.Fatal(err)
		}
		if target != server {
			b := make([]byte, 3)
			if _, err := io.ReadFull(c, b); err != nil || string(b) != "no\n" {
				t.Errorf("%q, %v", b, err)
			}
			if err := <-done; !errors.Is(err, filterapi.ErrPolicyDenied) {
				t.Errorf("tunnel: %v", err)
			}
			continue
		}
		far, err := remote.Accept()
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "yes\n" {
			t.Errorf("%q, %v", b, err)
		}
		go func() { _, _ = io.WriteString(c, "through") }()
		b = make([]byte, 7)
		if _, err := io.ReadFull(far, b); err != nil || string(b) != "through" {
			t.Errorf("the far end reads %q, %v", b, err)
		}
		_, _ = c.Close(), far.Close()
		if err := <-done; err != nil {
			t.Errorf("tunnel: %v", err)
		}
	}
}
