package sip

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

// The lines of the list of attacks that apply to SIP.

// nothing fails the test if anything was permitted.
func nothing(t *testing.T, g *filtertest.Gateway) {
	t.Helper()
	if got := g.Permissions(); len(got) > 0 {
		t.Errorf("permissions:\n%s", strings.Join(got, "\n"))
	}
}

// register is a REGISTER over TCP.
func register(contact string, more ...string) string {
	return msg("", append([]string{
		"REGISTER sip:example.org SIP/2.0", "Via: SIP/2.0/TCP 10.0.0.2:5060;branch=z9hG4bKr", "From: <sip:a@example.org>;tag=a",
		"To: <sip:a@example.org>", "Call-ID: reg", "CSeq: 1 REGISTER", "Contact: " + contact,
	}, more...)...)
}

func TestAttackSlipstream(t *testing.T) {
	post := "POST / HTTP/1.1\r\nHost: 203.0.113.10:5060\r\nContent-Length: 300\r\n\r\n"
	for _, first := range []string{post, "GET / HTTP/1.0\r\n\r\n", "POST sip:x HTTP/1.1\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00", "220 x\r\n", "\x00", " ", "x"} {
		g := filtertest.New(t, New(), "")
		fl := g.Connect(client4, proxy4)
		// The body is a segment of its own that begins with a real request.
		_ = fl.Client.Offer(first)
		_ = fl.Client.Offer(register("<sip:a@10.0.0.2:3306;transport=tcp>"))
		fl.Client.ExpectReset()
		fl.Server.ExpectReset()
		if err := fl.Wait(); !errors.Is(err, errNotSIP) {
			t.Errorf("%q: %v", first, err)
		}
		nothing(t, g)
	}
}

func TestAttackSlipstreamPassed(t *testing.T) {
	g := filtertest.New(t, New(), "malformed: pass")
	fl := g.Connect(client4, proxy4)
	post, reg := "POST / HTTP/1.1\r\n\r\n", register("<sip:a@10.0.0.2:3306;transport=tcp>")
	fl.Client.Send(post, reg)
	fl.Server.Expect(post + reg)
	fl.Server.Send("SIP/2.0 200 OK\r\n\r\n")
	fl.Client.Expect("SIP/2.0 200 OK\r\n\r\n")
	if err := fl.Wait(); !errors.Is(err, filterapi.ErrReleased) {
		t.Errorf("Pump: %v, want ErrReleased", err)
	}
	nothing(t, g)
}

// A datagram stands for itself: what is not SIP opens nothing, and ends nothing.
func TestAttackForgedDatagram(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, options := range []string{"", "malformed: pass"} {
			g := filtertest.New(t, New(), options)
			fl := associate(t, g, client4, proxy4)
			garbage := "POST / HTTP/1.1\r\n\r\n" + register("<sip:a@10.0.0.2>")
			fl.Client.Send(garbage)
			fl.Server.Send("garbage")
			passed := receive(fl.Server) + receive(fl.Client)
			if want := map[string]string{"": "", "malformed: pass": garbage + "garbage"}[options]; passed != want {
				t.Errorf("%q: passed %q", options, passed)
			}
			nothing(t, g)
			fl.Client.Send(register("<sip:a@10.0.0.2>"))
			contains(t, "REGISTER", receive(fl.Server), "Contact: <sip:a@203.0.113.1:40000>")
		}
	})
}

func TestAttackContentLength(t *testing.T) {
	for _, length := range []string{"-1", "2147483648", "4294967296", "65536", "1, 1", "0x1", ""} {
		g := filtertest.New(t, New(), "")
		fl := g.Connect(client4, proxy4)
		_ = fl.Client.Offer(strings.Replace(register("<sip:a@10.0.0.2>"), "Content-Length: 0", "Content-Length: "+length, 1))
		fl.Client.ExpectReset()
		nothing(t, g)
	}
	// Twice, and a second message behind a body that is shorter than said.
	g := filtertest.New(t, New(), "")
	fl := g.Connect(client4, proxy4)
	_ = fl.Client.Offer(strings.Replace(register("<sip:a@10.0.0.2>"), "Content-Length: 0", "Content-Length: 0\r\nl: 0", 1))
	fl.Client.ExpectReset()
	nothing(t, g)
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := g.Connect(client4, proxy4)
		inner := register("<sip:a@10.0.0.2>")
		outer := strings.Replace(request("OPTIONS", bob.uri, alice, bob, "1", "", ""), "Content-Length: 0", fmt.Sprintf("Content-Length: %d", len(inner)), 1)
		fl.Client.Send(outer, inner)
		contains(t, "body", receive(fl.Server), "Contact: <sip:a@10.0.0.2>")
		nothing(t, g)
	})
}

// A message in any segments, and several in one.
func TestAttackSegments(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		text := request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000"))
		var want string
		for i := range len(text) {
			g := filtertest.New(t, New(), "")
			fl := g.Connect(netip.MustParseAddrPort("10.0.0.2:50000"), proxy4)
			if i == 0 {
				fl.Client.Send(text)
			} else {
				fl.Client.Send(text[:i], text[i:])
			}
			got := receive(fl.Server)
			if i == 0 {
				want = got
			}
			if got == "" || got != want {
				t.Fatalf("cut at %d:\n%s\nwant\n%s", i, got, want)
			}
		}
		g := filtertest.New(t, New(), "")
		fl := g.Connect(netip.MustParseAddrPort("10.0.0.2:50000"), proxy4)
		fl.Client.Send("\r\n\r\n" + request("OPTIONS", bob.uri, alice, bob, "0", "", "") + text)
		got := receive(fl.Server)
		contains(t, "both", got, "\r\n\r\nOPTIONS ", "INVITE ", "m=audio 4000")
	})
}

// Media and contacts of other hosts than the one that owns the connection.
func TestAttackThirdHosts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, c := range map[string]struct{ text, status string }{
			"another inside host":  {request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.3", "4000")), "488"},
			"an outside host":      {request("INVITE", bob.uri, alice, bob, "1", "", sdp("203.0.113.11", "4000")), "488"},
			"the gateway":          {request("INVITE", bob.uri, alice, bob, "1", "", sdp("203.0.113.1", "4000")), "488"},
			"a name":               {request("INVITE", bob.uri, alice, bob, "1", "", sdp("host.example.org", "4000")), "488"},
			"port 22":              {request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "22")), "488"},
			"port 1023":            {request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "1023")), "488"},
			"another host's RTCP":  {request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000", "a=rtcp:4001 IN IP4 10.0.0.3")), "488"},
			"port 65535":           {request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "65535")), "488"},
			"RTCP at port 22":      {request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000", "a=rtcp:22")), "488"},
			"broken SDP":           {request("INVITE", bob.uri, alice, bob, "1", "", "x"), "400"},
			"multipart":            {strings.Replace(request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000")), "application/sdp", "multipart/mixed;boundary=x", 1), "415"},
			"another contact":      {register("<sip:a@10.0.0.3>"), "403"},
			"a contact at port 22": {register("<sip:a@10.0.0.2:22>"), "403"},
			"a broken contact":     {register("<sip:a@b@10.0.0.2>"), "400"},
			"a contact outside":    {register("<sip:a@203.0.113.11>"), "403"},
		} {
			g := filtertest.New(t, New(), "")
			fl := associate(t, g, client4, proxy4)
			fl.Client.Send(c.text)
			got := receive(fl.Client)
			contains(t, name, got, "SIP/2.0 "+c.status+" ", "Warning: 399 gateway ")
			if passed := receive(fl.Server); passed != "" {
				t.Errorf("%s: the server got %q", name, passed)
			}
			open(t, g)
			// Again: the same answer. Its ACK goes no further.
			fl.Client.Send(c.text)
			if again := receive(fl.Client); again != got {
				t.Errorf("%s: %q, then %q", name, got, again)
			}
			fl.Client.Send(strings.Replace(strings.Replace(request("ACK", bob.uri, alice, bob, "1", ";tag=x", ""), "1 ACK", "1 ACK", 1), "ACK sip", "ACK sip", 1))
			if passed := receive(fl.Server); strings.HasPrefix(c.text, "INVITE") && passed != "" {
				t.Errorf("%s: the server got %q", name, passed)
			}
		}
	})
}

// The far end names a third host, or a low port: the stream is off.
func TestAttackThirdHostInAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, body := range []string{
			sdp("203.0.113.11", "6000"), sdp("10.0.0.3", "6000"), sdp("203.0.113.10", "22"), sdp("203.0.113.10", "6000", "a=rtcp:6001 IN IP4 203.0.113.11"), sdp("2001:db8:b::10", "6000"),
		} {
			g := filtertest.New(t, New(), "media: [198.51.100.0/24]")
			fl := associate(t, g, client4, proxy4)
			fl.Client.Send(request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000")))
			fl.Server.Send(answer(t, receive(fl.Server), "200 OK", "b1", bob.contact, body))
			contains(t, "200", receive(fl.Client), "m=audio 0 RTP/AVP 0")
			open(t, g, "udp 203.0.113.1:40000 > 10.0.0.2:5060 from [203.0.113.10]")
		}
		g := filtertest.New(t, New(), "media: [198.51.100.0/24]")
		fl := associate(t, g, client4, proxy4)
		fl.Client.Send(request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000")))
		fl.Server.Send(answer(t, receive(fl.Server), "200 OK", "b1", bob.contact, sdp("198.51.100.7", "6000")))
		contains(t, "200", receive(fl.Client), "m=audio 6000 RTP/AVP 0")
		if !g.Dial(flow.UDP, client4.Addr(), netip.MustParseAddrPort("198.51.100.7:6000")) {
			t.Error("the media server that the rule names is closed")
		}
		if _, in := g.Arrive(flow.UDP, proxy4.Addr(), netip.MustParseAddrPort("203.0.113.1:40002")); in {
			t.Error("the proxy may send media, though it named another host")
		}
		// The same in an offer of the far end's.
		in := associate(t, g, netip.MustParseAddrPort("10.0.0.9:5060"), proxy4)
		in.Server.Send(request("INVITE", "sip:x@203.0.113.1", bob, alice, "2", "", sdp("203.0.113.11", "6000")))
		contains(t, "answer", receive(in.Server), "SIP/2.0 488 ")
		if passed := receive(in.Client); passed != "" {
			t.Errorf("the client got %q", passed)
		}
	})
}

// The retransmission of a request has the same ports, and opens nothing more.
func TestAttackRetransmittedRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := associate(t, g, client4, proxy4)
		text := request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000"))
		fl.Client.Send(text)
		first := receive(fl.Server)
		fl.Client.Send(text, text)
		if again := receive(fl.Server); again != first+first {
			t.Errorf("first\n%s\nthen\n%s", first, again)
		}
		ok := answer(t, first, "200 OK", "b1", bob.contact, sdp("203.0.113.10", "6000"))
		fl.Server.Send(ok)
		got := receive(fl.Client)
		before := g.Permissions()
		fl.Server.Send(ok, ok)
		if again := receive(fl.Client); again != got+got {
			t.Errorf("first\n%s\nthen\n%s", got, again)
		}
		fl.Client.Send(text)
		if again := receive(fl.Server); again != "" {
			t.Errorf("the server got an answered INVITE again: %q", again)
		}
		if after := g.Permissions(); len(after) != len(before) {
			t.Errorf("permissions:\n%s", strings.Join(after[len(before):], "\n"))
		}
		open(t, g, "udp 203.0.113.1:40000 > 10.0.0.2:5060 from [203.0.113.10]",
			"udp 203.0.113.1:40002 > 10.0.0.2:4000 from [203.0.113.10]", "udp 203.0.113.1:40003 > 10.0.0.2:4001 from [203.0.113.10]",
			"udp 10.0.0.2 > 203.0.113.10:6000 as 203.0.113.1:40002", "udp 10.0.0.2 > 203.0.113.10:6001 as 203.0.113.1:40003")
	})
}

// Nobody else ends or changes a call; an answer that nobody asked for opens
// nothing.
func TestAttackForeignMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := associate(t, g, client4, proxy4)
		fl.Client.Send(request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000")))
		invite := receive(fl.Server)
		fl.Server.Send(answer(t, invite, "200 OK", "b1", bob.contact, sdp("203.0.113.10", "6000")))
		receive(fl.Client)
		before := strings.Join(g.Open(), "\n")
		foreign := associate(t, g, client4, netip.AddrPortFrom(other4, 5060))
		mallory := party{"sip:m@203.0.113.11", "203.0.113.11:5060", "b1", "<sip:m@203.0.113.11>"}
		for _, method := range []string{"BYE", "INVITE", "UPDATE"} {
			foreign.Server.Send(request(method, "sip:alice@203.0.113.1:5060", mallory, alice, "m"+method, ";tag=a1", sdp("203.0.113.11", "6000")))
			contains(t, method, receive(foreign.Server), "SIP/2.0 481 ")
		}
		foreign.Server.Send(answer(t, invite, "200 OK", "b1", mallory.contact, sdp("203.0.113.11", "6000")))
		if got := receive(foreign.Client); got != "" {
			t.Errorf("the client got %q", got)
		}
		if after := strings.Join(g.Open(), "\n"); after != before {
			t.Errorf("open:\n%s\nbefore:\n%s", after, before)
		}
	})
}

func TestAttackFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "{calls: 2, registrations: 2}")
		fl := associate(t, g, client4, proxy4)
		for i := range 4 {
			call := strings.NewReplacer("call-1", fmt.Sprintf("call-%d", i), "z9hG4bK1", fmt.Sprintf("z9hG4bK%d", i))
			fl.Client.Send(call.Replace(request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000"))))
			if got := receive(fl.Client); (got != "") != (i >= 2) {
				t.Errorf("call %d: %q", i, got)
			}
			fl.Client.Send(strings.Replace(register(fmt.Sprintf("<sip:a@10.0.0.2:%d>", 6000+i)), "z9hG4bKr", fmt.Sprintf("z9hG4bKr%d", i), 1))
			if got := receive(fl.Client); (got != "") != (i >= 2) || i >= 2 && !strings.HasPrefix(got, "SIP/2.0 503 ") {
				t.Errorf("registration %d: %q", i, got)
			}
			receive(fl.Server)
		}
		for i := range 2 * maxTransactions {
			fl.Client.Send(strings.Replace(request("OPTIONS", bob.uri, alice, bob, "1", "", ""), "z9hG4bK1", fmt.Sprintf("z9hG4bKo%d", i), 1))
			receive(fl.Server)
		}
		contains(t, "too many requests", receive(fl.Client), "SIP/2.0 503 ")
		time.Sleep(inviteTime + time.Second)
		synctest.Wait()
		open(t, g)
		fl.Client.Send(request("INVITE", bob.uri, alice, bob, "n", "", sdp("10.0.0.2", "4000")))
		contains(t, "a call after the flood", receive(fl.Server), "INVITE ")
	})
}

func TestAttackQuota(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for err, status := range map[error]string{
			filterapi.ErrQuota: "503", filterapi.ErrNoPorts: "503", filterapi.ErrPolicyDenied: "403", filterapi.ErrNetworkDenied: "403", filterapi.ErrTerminating: "503",
		} {
			g := filtertest.New(t, New(), "")
			g.Refuse = err
			fl := associate(t, g, client4, proxy4)
			fl.Client.Send(request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000")))
			contains(t, err.Error(), receive(fl.Client), "SIP/2.0 "+status+" ")
			open(t, g)
		}
	})
}
