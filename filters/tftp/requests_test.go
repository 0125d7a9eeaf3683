package tftp

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

var (
	client4 = netip.MustParseAddrPort("10.0.0.2:50000")
	server4 = netip.MustParseAddrPort("203.0.113.10:69")
	client6 = netip.MustParseAddrPort("[fd00:a::2]:50000")
	server6 = netip.MustParseAddrPort("[2001:db8:b::10]:69")
)

var getFile = req(rrq, "file", "octet")

// bind is the permission for an answer to client4, as the journal has it.
const bind = "udp 203.0.113.1:50000 > 10.0.0.2:50000 from [203.0.113.10]"

func associate(t *testing.T, g *filtertest.Gateway, client, server netip.AddrPort) *filtertest.Flow {
	t.Helper()
	fl, err := g.Associate(client, server)
	if err != nil || !fl.Filtered {
		t.Fatalf("filtered: %v, %v", fl.Filtered, err)
	}
	return fl
}

func setup(t *testing.T, options string) (*filtertest.Gateway, *filtertest.Flow) {
	t.Helper()
	g := filtertest.New(t, New(), options)
	return g, associate(t, g, client4, server4)
}

// permissions wants exactly these changes of the kernel.
func permissions(t *testing.T, g *filtertest.Gateway, want ...string) {
	t.Helper()
	if got := g.Permissions(); !slices.Equal(got, want) {
		t.Errorf("permissions:\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

// ask sends a request that reaches the server as it is.
func ask(fl *filtertest.Flow, request string) {
	fl.Client.Send(request)
	fl.Server.Expect(request)
}

// wantError receives an error of the gateway's.
func wantError(t *testing.T, fl *filtertest.Flow, code byte, text string) {
	t.Helper()
	fl.Client.Expect("\x00\x05\x00" + string(code) + "refused by the gateway: " + text + "\x00")
}

func TestAnswerComesOnce(t *testing.T) {
	for _, c := range []struct {
		name           string
		client, server netip.AddrPort
		routed         bool
		external       string
	}{
		{"translated", client4, server4, false, "203.0.113.1:50000"},
		{"routed", client4, server4, true, "10.0.0.2:50000"},
		{"IPv6", client6, server6, false, "[fd00:a::2]:50000"},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := filtertest.New(t, New(), "")
			g.Routed = c.routed
			fl := associate(t, g, c.client, c.server)
			ask(fl, getFile)
			text := fmt.Sprintf("udp %s > %s from [%s]", c.external, c.client, c.server.Addr())
			g.Before(filtertest.Bound, text, filtertest.ToServer, getFile)
			external := netip.MustParseAddrPort(c.external)
			if to, in := g.Arrive(flow.UDP, netip.MustParseAddr("203.0.113.11"), external); in {
				t.Errorf("another host comes in to %s", to)
			}
			if to, in := g.Arrive(flow.UDP, c.server.Addr(), external); !in || to != c.client {
				t.Errorf("the answer comes to %s, %v", to, in)
			}
			if _, in := g.Arrive(flow.UDP, c.server.Addr(), external); in {
				t.Error("a second flow comes in")
			}
			permissions(t, g, "bound "+text, "used "+text)
			if len(g.Open()) > 0 {
				t.Errorf("open: %v", g.Open())
			}
		})
	}
}

func TestRepeatedRequest(t *testing.T) {
	g, fl := setup(t, "")
	for range 3 {
		ask(fl, getFile)
	}
	permissions(t, g, "bound "+bind, "armed "+bind, "armed "+bind)
	if len(g.Open()) != 1 {
		t.Errorf("open: %v", g.Open())
	}
	g.Arrive(flow.UDP, server4.Addr(), netip.MustParseAddrPort("203.0.113.1:50000"))
	ask(fl, getFile)
	permissions(t, g, "bound "+bind, "armed "+bind, "armed "+bind, "used "+bind, "bound "+bind)
}

func TestAnotherRequestHasItsOwn(t *testing.T) {
	g, fl := setup(t, "")
	ask(fl, getFile)
	ask(fl, req(rrq, "other", "octet"))
	if len(g.Open()) != 2 {
		t.Errorf("open: %v", g.Open())
	}
	for i := range 20 {
		ask(fl, req(rrq, fmt.Sprint("file-", i), "octet"))
	}
	if len(g.Open()) != maxWaiting {
		t.Errorf("%d are open, want %d", len(g.Open()), maxWaiting)
	}
}

func TestEndOfTheFlowVoids(t *testing.T) {
	for name, end := range map[string]func(*filtertest.Flow){
		"forgotten": func(fl *filtertest.Flow) { fl.Client.CloseWrite() },
		"cut":       func(fl *filtertest.Flow) { fl.Cut() },
	} {
		t.Run(name, func(t *testing.T) {
			g, fl := setup(t, "")
			ask(fl, getFile)
			end(fl)
			if err := fl.Wait(); name == "forgotten" && err != nil {
				t.Error(err)
			}
			permissions(t, g, "bound "+bind, "killed "+bind)
		})
	}
}

func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, fl := setup(t, "")
		ask(fl, getFile)
		time.Sleep(40 * time.Second)
		ask(fl, getFile)
		time.Sleep(40 * time.Second)
		if len(g.Open()) != 1 {
			t.Error("a repeated request does not start the time anew")
		}
		time.Sleep(21 * time.Second)
		permissions(t, g, "bound "+bind, "armed "+bind, "expired "+bind)
		ask(fl, getFile)
		permissions(t, g, "bound "+bind, "armed "+bind, "expired "+bind, "bound "+bind)
		fl.Cut()
		_ = fl.Wait()
	})
}

// A client that asks now and then from one port leaves nothing behind.
func TestForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &requests{}
		for range 3 {
			r.add(waiting{message: getFile, since: time.Now()})
			time.Sleep(filterapi.DefaultTimeout - time.Second)
		}
		if len(r.waiting) != 2 {
			t.Errorf("%d are kept, want 2", len(r.waiting))
		}
	})
}

func TestInstallFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, fl := setup(t, "")
		release := g.HoldKernel()
		fl.Client.Send(getFile)
		synctest.Wait()
		if got := fl.Server.Waiting(); got != "" {
			t.Errorf("the server has %q before the kernel has acknowledged", got)
		}
		release()
		fl.Server.Expect(getFile)
		release = g.HoldKernel()
		fl.Client.Send(getFile)
		synctest.Wait()
		if got := fl.Server.Waiting(); got != "" {
			t.Errorf("the server has the repeated %q before the kernel has acknowledged", got)
		}
		release()
		fl.Server.Expect(getFile)
		fl.Cut()
		_ = fl.Wait()
	})
}

func TestMalformedNeverReachesTheServer(t *testing.T) {
	g, fl := setup(t, "")
	fl.Client.Send(req(rrq, "", "octet"))
	wantError(t, fl, 4, "the file name is empty or has control characters")
	fl.Client.Send(req(rrq, "f", "octet", "blksize", "1"))
	wantError(t, fl, 8, "the value of option blksize is not from 8 to 65464")
	for _, stray := range []string{"\x00\x03\x00\x01data", "\x00\x04\x00\x01", "\x00\x06blksize\x00512\x00"} {
		fl.Client.Send(stray)
		wantError(t, fl, 5, "no transfer has this port")
	}
	fl.Client.Send("\x00\x05\x00\x00\x00") // is not answered
	fl.Client.Send("x")
	wantError(t, fl, 4, "not a request")
	permissions(t, g)
	ask(fl, getFile) // what is right is not held up by that
	if got := g.Sent(filtertest.ToServer); got != getFile {
		t.Errorf("the server saw %q", got)
	}
}

func TestReadOnly(t *testing.T) {
	g, fl := setup(t, "read_only: true")
	fl.Client.Send(req(wrq, "file", "octet"))
	wantError(t, fl, 2, "this rule is read-only")
	permissions(t, g)
	ask(fl, getFile)
	if g.Log.FilterMessage("request refused").Len() != 1 || g.Log.FilterMessage("transfer permitted").Len() != 1 {
		t.Errorf("log: %v", g.Log.All())
	}
	_, fl = setup(t, "read_only: false")
	ask(fl, req(wrq, "file", "octet"))
}

func TestOptions(t *testing.T) {
	for _, bad := range []string{"read_only: maybe", "readonly: true", "malformed: pass"} {
		if _, err := filtertest.ParseOptions(New(), bad); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}

// What the client hears when nothing can be opened, and that it may ask again.
func TestRefusedPermission(t *testing.T) {
	for _, c := range []struct {
		err  error
		code byte
		text string
	}{
		{filterapi.ErrPolicyDenied, 2, "the rules do not allow it"},
		{filterapi.ErrNetworkDenied, 2, "the rules do not allow it"},
		{filterapi.ErrQuota, 0, "too many transfers wait"},
		{filterapi.ErrAlreadyExists, 0, "no way is open for the answer"},
	} {
		g := filtertest.New(t, New(), "")
		g.Refuse = c.err
		fl := associate(t, g, client4, server4)
		for range 2 {
			fl.Client.Send(getFile)
			wantError(t, fl, c.code, c.text)
		}
		if got := g.Sent(filtertest.ToServer); got != "" {
			t.Errorf("%v: the server saw %q", c.err, got)
		}
		if n := g.Log.FilterMessage("request refused").FilterLevelExact(1).Len(); n > 0 {
			t.Errorf("%v: %d warnings", c.err, n)
		}
	}
}

func TestFromTheWellKnownPort(t *testing.T) {
	const failed = "\x00\x05\x00\x01no such file\x00"
	synctest.Test(t, func(t *testing.T) {
		g, fl := setup(t, "")
		fl.Server.Send(failed) // nobody asked
		ask(fl, getFile)
		fl.Server.Send("\x00\x03\x00\x01data", "\x00\x06tsize\x001\x00", "\x00\x05\x00\x01no end", "", getFile)
		fl.Server.Send(failed)
		fl.Client.Expect(failed)
		permissions(t, g, "bound "+bind, "killed "+bind)
		fl.Server.Send(failed)
		synctest.Wait()
		if got := fl.Client.Waiting(); got != "" {
			t.Errorf("the client has %q", got)
		}
		ask(fl, getFile)
		permissions(t, g, "bound "+bind, "killed "+bind, "bound "+bind)
		fl.Cut()
		_ = fl.Wait()
	})
}

// The log says what was asked for, once.
func TestLog(t *testing.T) {
	g, fl := setup(t, "")
	ask(fl, req(rrq, "a/file", "octet"))
	ask(fl, req(rrq, "a/file", "octet"))
	all := g.Log.FilterMessage("transfer permitted").All()
	if len(all) != 1 {
		t.Fatalf("log: %v", g.Log.All())
	}
	for key, want := range map[string]string{
		"flow": "udp 10.0.0.2:50000 > 203.0.113.10:69", "operation": "read", "file": "a/file", "mode": "octet",
	} {
		if got := fmt.Sprint(all[0].ContextMap()[key]); got != want {
			t.Errorf("%s: %q, want %q", key, got, want)
		}
	}
	for range 100 {
		fl.Client.Send("x")
		wantError(t, fl, 4, "not a request")
	}
	if n := g.Log.FilterMessage("request refused").FilterLevelExact(0).Len(); n != 1 {
		t.Errorf("%d records of what a client can repeat", n)
	}
}
