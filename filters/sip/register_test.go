package sip

import (
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

// fakeSession is as much of a session as it takes to have an address.
type fakeSession struct{ filterapi.Session }

func (fakeSession) ClientAddr() netip.Addr { return client4.Addr() }

const reserved0 = "udp 203.0.113.1:40000 > 10.0.0.2:5060 from []"

// again gives a request another number and branch.
func again(text, n string) string {
	return strings.NewReplacer("z9hG4bKr", "z9hG4bKr"+n, "CSeq: 1 ", "CSeq: "+n+" ").Replace(text)
}

func TestRegistration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := associate(t, g, client4, proxy4)
		text := register("<sip:a@10.0.0.2>;q=0.7", "Expires: 600")
		fl.Client.Send(text)
		asked := receive(fl.Server)
		contains(t, "REGISTER", asked, "Contact: <sip:a@203.0.113.1:40000>;q=0.7\r\n", "Via: SIP/2.0/TCP 203.0.113.1:5060;branch=z9hG4bKr\r\n")
		open(t, g, reserved0)
		// A challenge gives the port back.
		fl.Server.Send(answer(t, asked, "401 Unauthorized", "r", "", ""))
		contains(t, "401", receive(fl.Client), "Via: SIP/2.0/TCP 10.0.0.2:5060;branch=z9hG4bKr\r\n")
		open(t, g)
		fl.Client.Send(again(text, "2"))
		asked = receive(fl.Server)
		contains(t, "REGISTER", asked, "Contact: <sip:a@203.0.113.1:40001>;q=0.7\r\n")
		fl.Server.Send(answer(t, asked, "200 OK", "r", "<sip:x@203.0.113.77>;expires=9, <sip:a@203.0.113.1:40001>;expires=60", "", "Expires: 600"))
		contains(t, "200", receive(fl.Client), "Contact: <sip:x@203.0.113.77>;expires=9, <sip:a@10.0.0.2:5060>;expires=60\r\n")
		at := netip.MustParseAddrPort("203.0.113.1:40001")
		armed := "udp 203.0.113.1:40001 > 10.0.0.2:5060 from [203.0.113.10]"
		open(t, g, armed)
		if _, in := g.Arrive(flow.UDP, other4, at); in {
			t.Error("another host gets in")
		}
		// Refreshed: the same port, for as long again.
		time.Sleep(50 * time.Second)
		fl.Client.Send(again(text, "3"))
		asked = receive(fl.Server)
		contains(t, "REGISTER", asked, "Contact: <sip:a@203.0.113.1:40001>;q=0.7\r\n")
		fl.Server.Send(answer(t, asked, "200 OK", "r", "<sip:a@203.0.113.1:40001>;expires=60", ""))
		receive(fl.Client)
		// The flow is silent for too long, and the client's session has no other:
		// the proxy still gets in.
		fl.Cut()
		fl.End()
		time.Sleep(50 * time.Second)
		synctest.Wait()
		open(t, g, armed)
		in, err := g.Inbound(flow.UDP, proxy4, at)
		if err != nil || !in.Filtered {
			t.Fatalf("the proxy's request: %v", err)
		}
		in.Server.Send(request("INVITE", "sip:a@203.0.113.1:40001", bob, alice, "i", "", sdp("203.0.113.10", "6000")))
		invite := receive(in.Client)
		contains(t, "INVITE", invite, "INVITE sip:a@10.0.0.2:5060 SIP/2.0\r\n", "m=audio 6000 ")
		in.Client.Send(answer(t, invite, "180 Ringing", "a1", alice.contact, ""), answer(t, invite, "200 OK", "a1", alice.contact, sdp("10.0.0.2", "4000")))
		contains(t, "answers", receive(in.Server), "Contact: <sip:alice@203.0.113.1:40001>", "m=audio 40002 ")
		if to, in := g.Arrive(flow.UDP, proxy4.Addr(), netip.MustParseAddrPort("203.0.113.1:40003")); !in || to != netip.MustParseAddrPort("10.0.0.2:4001") {
			t.Errorf("RTCP gets to %s, %v", to, in)
		}
		in.Client.Send(request("BYE", bob.uri, party{alice.uri, alice.via, "a1", alice.contact}, bob, "b", ";tag=b1", ""))
		contains(t, "BYE", receive(in.Server), "Via: SIP/2.0/UDP 203.0.113.1:40001;")
		open(t, g, armed)
		// It expires, and nothing comes in by it any more.
		time.Sleep(15 * time.Second)
		synctest.Wait()
		open(t, g)
		time.Sleep(answerTime)
		in.Server.ExpectReset()
	})
}

// What takes a registration away.
func TestRegistrationEnds(t *testing.T) {
	const name = "<sip:a@203.0.113.1:40000>"
	for what, c := range map[string]struct {
		contact, expires, status, answered string
		want                               []string
	}{
		"expires 0 of the contact":      {"<sip:a@10.0.0.2>;expires=0", "", "200 OK", "", nil},
		"Expires: 0":                    {"<sip:a@10.0.0.2>", "Expires: 0", "200 OK", "", nil},
		"all":                           {"*", "Expires: 0", "200 OK", "", nil},
		"a list without it":             {"<sip:a@10.0.0.2>", "Expires: 600", "200 OK", "<sip:b@203.0.113.77>;expires=600", nil},
		"granted 0":                     {"<sip:a@10.0.0.2>", "Expires: 600", "200 OK", name + ";expires=0", nil},
		"refused, as it was before":     {"<sip:a@10.0.0.2>", "Expires: 0", "403 Forbidden", "", []string{contact0}},
		"challenged, as it was before":  {"<sip:a@10.0.0.2>", "Expires: 0", "401 Unauthorized", "", []string{contact0}},
		"a registrar that lists nobody": {"<sip:a@10.0.0.2>", "Expires: 600", "200 OK", "", []string{contact0}},
	} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := filtertest.New(t, New(), "")
				fl := associate(t, g, client4, proxy4)
				fl.Client.Send(register("<sip:a@10.0.0.2>", "Expires: 600"))
				fl.Server.Send(answer(t, receive(fl.Server), "200 OK", "r", name+";expires=600", ""))
				receive(fl.Client)
				open(t, g, contact0)
				text := again(register(c.contact), "2")
				if c.expires != "" {
					text = again(register(c.contact, c.expires), "2")
				}
				fl.Client.Send(text)
				fl.Server.Send(answer(t, receive(fl.Server), c.status, "r", c.answered, ""))
				receive(fl.Client)
				open(t, g, c.want...)
			})
		})
	}
}

// Two lines of one telephone at one address: it stays until both have gone. And
// a contact that asks for TCP, and some that are none of the gateway's.
func TestRegistrationsShareAContact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := associate(t, g, client4, proxy4)
		line := func(user, n, expires, contact string) string {
			fl.Client.Send(strings.ReplaceAll(again(register(contact, "Expires: "+expires), n), "sip:a@example.org", "sip:"+user+"@example.org"))
			asked := receive(fl.Server)
			fl.Server.Send(answer(t, asked, "200 OK", "r", "", "", "Expires: "+expires))
			receive(fl.Client)
			return asked
		}
		line("one", "1", "600", "<sip:a@10.0.0.2>")
		line("two", "2", "600", "<sip:a@10.0.0.2>")
		line("one", "3", "0", "<sip:a@10.0.0.2>")
		open(t, g, contact0)
		line("two", "4", "0", "<sip:a@10.0.0.2>")
		open(t, g)
		contains(t, "TCP", line("one", "5", "600", "<sip:a@10.0.0.2:5062;transport=TCP>"), "<sip:a@203.0.113.1:40001;transport=TCP>")
		open(t, g, "tcp 203.0.113.1:40001 > 10.0.0.2:5062 from [203.0.113.10]")
		contains(t, "others", line("two", "6", "600", "<sip:a@voicemail.example.org>, <sips:a@10.0.0.2>, <tel:+123>"), "<sip:a@voicemail.example.org>, <sips:a@10.0.0.2>, <tel:+123>")
		open(t, g, "tcp 203.0.113.1:40001 > 10.0.0.2:5062 from [203.0.113.10]")
	})
}

// With rport in its Via the client finds its own address there, not the
// gateway's.
func TestViaLooksUntranslated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := associate(t, g, client4, proxy4)
		fl.Client.Send(strings.Replace(request("OPTIONS", bob.uri, alice, bob, "1", "", ""), "branch=z9hG4bK1", "rport;branch=z9hG4bK1", 1))
		got := receive(fl.Server)
		contains(t, "OPTIONS", got, "Via: SIP/2.0/UDP 203.0.113.1:5060;rport;branch=z9hG4bK1\r\n", "Contact: <sip:alice@203.0.113.1:5060>")
		fl.Server.Send(strings.Replace(answer(t, got, "200 OK", "b1", "", ""), ";rport;", ";received=203.0.113.1;rport=5060;", 1))
		contains(t, "200", receive(fl.Client), "Via: SIP/2.0/UDP 10.0.0.2:5060;received=10.0.0.2;rport=5060;branch=z9hG4bK1\r\n")
	})
}

// A subscription keeps the client reachable.
func TestSubscription(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := associate(t, g, client4, proxy4)
		fl.Client.Send(request("SUBSCRIBE", bob.uri, alice, bob, "1", "", "", "Event: dialog", "Expires: 300"))
		got := receive(fl.Server)
		open(t, g, reserved0)
		fl.Server.Send(answer(t, got, "202 Accepted", "b1", "", "", "Expires: 120"))
		receive(fl.Client)
		open(t, g, contact0)
		in, err := g.Inbound(flow.UDP, proxy4, netip.MustParseAddrPort("203.0.113.1:40000"))
		if err != nil {
			t.Fatal(err)
		}
		in.Server.Send(request("NOTIFY", "sip:alice@203.0.113.1:40000", bob, alice, "n", ";tag=a1", ""))
		contains(t, "NOTIFY", receive(in.Client), "NOTIFY sip:alice@10.0.0.2:5060 ")
		time.Sleep(121 * time.Second)
		synctest.Wait()
		open(t, g)
	})
}
