package sip

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

var (
	client4 = netip.MustParseAddrPort("10.0.0.2:5060")
	proxy4  = netip.MustParseAddrPort("203.0.113.10:5060")
	client6 = netip.MustParseAddrPort("[fd00:a::2]:5060")
	proxy6  = netip.MustParseAddrPort("[2001:db8:b::10]:5060")
	other4  = netip.MustParseAddr("203.0.113.11")
)

// msg writes a message: the lines get their ends, and a length if there is a
// body.
func msg(body string, lines ...string) string {
	text := strings.Join(lines, "\r\n") + "\r\n"
	return text + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body)
}

func sdp(host, port string, more ...string) string {
	family := "IP4"
	if strings.Contains(host, ":") {
		family = "IP6"
	}
	lines := append([]string{
		"v=0", "o=a 1 1 IN " + family + " " + host, "s=-", "c=IN " + family + " " + host, "t=0 0", "m=audio " + port + " RTP/AVP 0",
	}, more...)
	return strings.Join(lines, "\r\n") + "\r\n"
}

const typeSDP = "Content-Type: application/sdp"

// party is one end of a dialog: it writes requests and answers.
type party struct {
	uri, via, tag, contact string
}

var (
	alice = party{"sip:alice@10.0.0.2:5060", "10.0.0.2:5060", "a1", "<sip:alice@10.0.0.2:5060>"}
	bob   = party{"sip:bob@203.0.113.10", "203.0.113.10:5060", "b1", "<sip:bob@203.0.113.10:5060>"}
)

// request writes a request of from to to.
func request(method, uri string, from, to party, branch, toTag, body string, more ...string) string {
	lines := []string{
		method + " " + uri + " SIP/2.0",
		"Via: SIP/2.0/UDP " + from.via + ";branch=z9hG4bK" + branch,
		"From: <sip:x@example.org>;tag=" + from.tag,
		"To: <sip:y@example.org>" + toTag,
		"Call-ID: call-1", "CSeq: 1 " + method, "Max-Forwards: 70", "Contact: " + from.contact,
	}
	if body != "" {
		lines = append(lines, typeSDP)
	}
	return msg(body, append(lines, more...)...)
}

// answer writes an answer to a request as its receiver has got it.
func answer(t *testing.T, req string, status string, tag, contact, body string, more ...string) string {
	t.Helper()
	lines := []string{"SIP/2.0 " + status}
	for _, h := range []string{"Via: ", "From: ", "To: ", "Call-ID: ", "CSeq: "} {
		_, after, ok := strings.Cut(req, "\r\n"+h)
		if !ok {
			t.Fatalf("no %s in %q", h, req)
		}
		value, _, _ := strings.Cut(after, "\r\n")
		if h == "To: " && !strings.Contains(value, "tag=") {
			value += ";tag=" + tag
		}
		lines = append(lines, h+value)
	}
	if contact != "" {
		lines = append(lines, "Contact: "+contact)
	}
	if body != "" {
		lines = append(lines, typeSDP)
	}
	return msg(body, append(lines, more...)...)
}

// receive takes all that waits at an end. It must be in a bubble.
func receive(e *filtertest.End) string {
	synctest.Wait()
	text := e.Waiting()
	if text != "" {
		e.Expect(text)
	}
	return text
}

func contains(t *testing.T, what, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%s: no %q in\n%s", what, p, text)
		}
	}
}

func without(t *testing.T, what, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if strings.Contains(text, p) {
			t.Errorf("%s: %q in\n%s", what, p, text)
		}
	}
}

func open(t *testing.T, g *filtertest.Gateway, want ...string) {
	t.Helper()
	if got := strings.Join(g.Open(), "\n"); got != strings.Join(want, "\n") {
		t.Errorf("open:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
	}
}

func associate(t *testing.T, g *filtertest.Gateway, client, peer netip.AddrPort) *filtertest.Flow {
	t.Helper()
	fl, err := g.Associate(client, peer)
	if err != nil || !fl.Filtered {
		t.Fatalf("associate: %v, filtered %v", err, fl.Filtered)
	}
	return fl
}

func TestCallOutward(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := associate(t, g, client4, proxy4)
		fl.Client.Send(request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000")))
		invite := receive(fl.Server)
		contains(t, "INVITE", invite, "Via: SIP/2.0/UDP 203.0.113.1:5060;branch=z9hG4bK1\r\n", "Contact: <sip:alice@203.0.113.1:40000>\r\n",
			"c=IN IP4 203.0.113.1\r\n", "o=a 1 1 IN IP4 203.0.113.1\r\n", "m=audio 40002 RTP/AVP 0\r\n")
		without(t, "INVITE", invite, "10.0.0.2")
		open(t, g, "udp 203.0.113.1:40000 > 10.0.0.2:5060 from []", "udp 203.0.113.1:40002 > 10.0.0.2:4000 from []", "udp 203.0.113.1:40003 > 10.0.0.2:4001 from []")

		fl.Server.Send(answer(t, invite, "200 OK", "b1", bob.contact, sdp("203.0.113.10", "6000")))
		ok := receive(fl.Client)
		contains(t, "200", ok, "Via: SIP/2.0/UDP 10.0.0.2:5060;branch=z9hG4bK1\r\n", "c=IN IP4 203.0.113.10\r\n", "m=audio 6000 RTP/AVP 0\r\n")
		open(t, g, "udp 203.0.113.1:40000 > 10.0.0.2:5060 from [203.0.113.10]",
			"udp 203.0.113.1:40002 > 10.0.0.2:4000 from [203.0.113.10]", "udp 203.0.113.1:40003 > 10.0.0.2:4001 from [203.0.113.10]",
			"udp 10.0.0.2 > 203.0.113.10:6000 as 203.0.113.1:40002", "udp 10.0.0.2 > 203.0.113.10:6001 as 203.0.113.1:40003")
		g.Before(filtertest.Armed, "40002", filtertest.ToClient, "200 OK")

		fl.Client.Send(request("ACK", bob.uri, alice, bob, "2", ";tag=b1", ""))
		contains(t, "ACK", receive(fl.Server), "203.0.113.1:40000")
		media, err := g.Inbound(flow.UDP, netip.MustParseAddrPort("203.0.113.10:6000"), netip.MustParseAddrPort("203.0.113.1:40002"))
		if err != nil || media.Filtered {
			t.Fatalf("media: %v, filtered %v", err, media.Filtered)
		}
		out, err := g.Outbound(flow.UDP, netip.MustParseAddrPort("10.0.0.2:4001"), netip.MustParseAddrPort("203.0.113.10:6001"))
		if err != nil || out.Filtered {
			t.Fatalf("RTCP: %v, filtered %v", err, out.Filtered)
		}
		if _, in := g.Arrive(flow.UDP, other4, netip.MustParseAddrPort("203.0.113.1:40002")); in {
			t.Error("another host's media gets in")
		}

		// The far end hangs up, at the contact that it was told.
		in, err := g.Inbound(flow.UDP, netip.MustParseAddrPort("203.0.113.10:5999"), netip.MustParseAddrPort("203.0.113.1:40000"))
		if err != nil || !in.Filtered {
			t.Fatalf("signalling: %v", err)
		}
		in.Server.Send(request("BYE", "sip:alice@203.0.113.1:40000", bob, alice, "3", ";tag=a1", ""))
		bye := receive(in.Client)
		contains(t, "BYE", bye, "BYE sip:alice@10.0.0.2:5060 SIP/2.0\r\n")
		open(t, g)
		media.Server.ExpectReset()
		out.Server.ExpectReset()
		in.Client.Send(answer(t, bye, "200 OK", "a1", "", ""))
		contains(t, "200 to BYE", receive(in.Server), "SIP/2.0 200 OK")
		time.Sleep(answerTime + time.Second)
		in.Server.ExpectReset()
	})
}
