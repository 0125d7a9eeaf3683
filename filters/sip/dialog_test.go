package sip

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

// talk is a call that stands, made by the client.
func talk(t *testing.T, g *filtertest.Gateway, more ...string) *filtertest.Flow {
	t.Helper()
	fl := associate(t, g, client4, proxy4)
	fl.Client.Send(request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000")))
	fl.Server.Send(answer(t, receive(fl.Server), "200 OK", "b1", bob.contact, sdp("203.0.113.10", "6000"), more...))
	contains(t, "200", receive(fl.Client), "SIP/2.0 200 OK")
	fl.Client.Send(request("ACK", bob.uri, alice, bob, "2", ";tag=b1", ""))
	receive(fl.Server)
	return fl
}

const (
	contact0 = "udp 203.0.113.1:40000 > 10.0.0.2:5060 from [203.0.113.10]"
	rtp0     = "udp 203.0.113.1:40002 > 10.0.0.2:4000 from [203.0.113.10]"
	rtcp0    = "udp 203.0.113.1:40003 > 10.0.0.2:4001 from [203.0.113.10]"
	rtpOut   = "udp 10.0.0.2 > 203.0.113.10:6000 as 203.0.113.1:40002"
	rtcpOut  = "udp 10.0.0.2 > 203.0.113.10:6001 as 203.0.113.1:40003"
)

// numbered makes a request another one of the same dialog.
func numbered(n int, text string) string {
	return strings.NewReplacer("CSeq: 1 ", fmt.Sprintf("CSeq: %d ", n)).Replace(text)
}

func TestCallEnds(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, g *filtertest.Gateway, fl *filtertest.Flow){
		"the client's BYE": func(t *testing.T, _ *filtertest.Gateway, fl *filtertest.Flow) {
			fl.Client.Send(request("BYE", bob.uri, alice, bob, "3", ";tag=b1", ""))
		},
		"the far end's BYE": func(t *testing.T, _ *filtertest.Gateway, fl *filtertest.Flow) {
			fl.Server.Send(request("BYE", "sip:alice@203.0.113.1:40000", bob, alice, "3", ";tag=a1", ""))
		},
		"its length": func(t *testing.T, _ *filtertest.Gateway, fl *filtertest.Flow) {
			time.Sleep(maxCallTime + time.Second)
		},
		"a second offer that meets no call": func(t *testing.T, _ *filtertest.Gateway, fl *filtertest.Flow) {
			fl.Client.Send(numbered(2, request("INVITE", bob.uri, alice, bob, "3", ";tag=b1", sdp("10.0.0.2", "4100"))))
			fl.Server.Send(answer(t, receive(fl.Server), "481 Gone", "b1", "", ""))
		},
		"the session's end": func(t *testing.T, g *filtertest.Gateway, fl *filtertest.Flow) {
			g.EndSession(client4.Addr())
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := filtertest.New(t, New(), "")
				fl := talk(t, g)
				open(t, g, contact0, rtp0, rtcp0, rtpOut, rtcpOut)
				end(t, g, fl)
				synctest.Wait()
				open(t, g)
			})
		})
	}
}

func TestCallLivesWithoutSignalling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := talk(t, g)
		fl.Cut() // silent for too long
		fl.End()
		time.Sleep(time.Hour)
		open(t, g, contact0, rtp0, rtcp0, rtpOut, rtcpOut)
	})
}

func TestSessionTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := talk(t, g, "x: 90;refresher=uac")
		time.Sleep(90 * time.Second)
		fl.Client.Send(numbered(2, request("UPDATE", bob.uri, alice, bob, "3", ";tag=b1", "")))
		fl.Server.Send(answer(t, receive(fl.Server), "200 OK", "b1", bob.contact, "", "Session-Expires: 90;refresher=uac"))
		receive(fl.Client)
		time.Sleep(90 * time.Second)
		synctest.Wait()
		open(t, g, contact0, rtp0, rtcp0, rtpOut, rtcpOut)
		time.Sleep(answerTime + time.Second)
		synctest.Wait()
		open(t, g)
	})
}

// A call that is not taken leaves nothing.
func TestCallRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, status := range []string{"486 Busy Here", "302 Moved", "401 Unauthorized", "603 Decline", "487 Request Terminated"} {
			g := filtertest.New(t, New(), "")
			fl := associate(t, g, client4, proxy4)
			fl.Client.Send(request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000")))
			invite := receive(fl.Server)
			fl.Server.Send(answer(t, invite, "100 Trying", "", "", ""), answer(t, invite, "183 Progress", "b1", bob.contact, sdp("203.0.113.10", "6000")))
			contains(t, "183", receive(fl.Client), "100 Trying", "183 Progress")
			open(t, g, contact0, rtp0, rtcp0, rtpOut, rtcpOut)
			if status[:3] == "487" {
				fl.Client.Send(request("CANCEL", bob.uri, alice, bob, "1", "", ""))
				fl.Server.Send(answer(t, receive(fl.Server), "200 OK", "b1", "", ""))
				contains(t, "200", receive(fl.Client), "SIP/2.0 200 OK")
			}
			fl.Server.Send(answer(t, invite, status, "b1", "", ""))
			contains(t, status, receive(fl.Client), status)
			open(t, g)
			fl.Client.Send(request("ACK", bob.uri, alice, bob, "1", ";tag=b1", ""))
			contains(t, "ACK", receive(fl.Server), "ACK ")
		}
	})
}

func TestCallWithoutAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := associate(t, g, client4, proxy4)
		fl.Client.Send(request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000")))
		invite := receive(fl.Server)
		time.Sleep(inviteTime - time.Second)
		fl.Server.Send(answer(t, invite, "180 Ringing", "b1", "", ""))
		receive(fl.Client)
		time.Sleep(inviteTime - time.Second)
		synctest.Wait()
		if len(g.Open()) == 0 {
			t.Error("it still rings, and everything is closed")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		open(t, g)
	})
}

// Second offers: other ports replace, the same ports stay, a refused one
// changes nothing.
func TestSecondOffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := talk(t, g)
		media, err := g.Inbound(flow.UDP, netip.MustParseAddrPort("203.0.113.10:6000"), netip.MustParseAddrPort("203.0.113.1:40002"))
		if err != nil {
			t.Fatal(err)
		}
		offer := func(n int, body string) string {
			fl.Client.Send(numbered(n, request("INVITE", bob.uri, alice, bob, fmt.Sprint("o", n), ";tag=b1", body)))
			return receive(fl.Server)
		}
		// The same again.
		got := offer(2, sdp("10.0.0.2", "4000"))
		contains(t, "the same", got, "m=audio 40002 ")
		fl.Server.Send(answer(t, got, "200 OK", "b1", bob.contact, sdp("203.0.113.10", "6000")))
		receive(fl.Client)
		open(t, g, contact0, rtp0, rtcp0, rtpOut, rtcpOut)
		// On hold, in both ways to say it: the ports stay.
		contains(t, "hold", offer(3, sdp("0.0.0.0", "4000")), "c=IN IP4 0.0.0.0", "m=audio 40002 ")
		// Another port, refused.
		got = offer(4, sdp("10.0.0.2", "4100"))
		contains(t, "another port", got, "m=audio 40004 ")
		fl.Server.Send(answer(t, got, "488 No", "b1", "", ""))
		receive(fl.Client)
		open(t, g, contact0, rtp0, rtcp0, rtpOut, rtcpOut)
		media.Server.Send("sound")
		media.Client.Expect("sound")
		// Another port and a second stream, taken.
		got = offer(5, sdp("10.0.0.2", "4100", "m=video 4200 RTP/AVP 96"))
		contains(t, "two streams", got, "m=audio 40006 ", "m=video 40008 ")
		fl.Server.Send(answer(t, got, "200 OK", "b1", bob.contact, sdp("203.0.113.10", "6002", "m=video 0 RTP/AVP 96")))
		receive(fl.Client)
		open(t, g, contact0, "udp 203.0.113.1:40006 > 10.0.0.2:4100 from [203.0.113.10]", "udp 203.0.113.1:40007 > 10.0.0.2:4101 from [203.0.113.10]",
			"udp 10.0.0.2 > 203.0.113.10:6002 as 203.0.113.1:40006", "udp 10.0.0.2 > 203.0.113.10:6003 as 203.0.113.1:40007")
		media.Server.ExpectReset()
		// The far end moves too, with an UPDATE.
		fl.Server.Send(numbered(1, request("UPDATE", "sip:alice@203.0.113.1:40000", bob, alice, "u", ";tag=a1", sdp("203.0.113.10", "6004"))))
		update := receive(fl.Client)
		contains(t, "UPDATE", update, "UPDATE sip:alice@10.0.0.2:5060 ", "m=audio 6004 ")
		fl.Client.Send(answer(t, update, "200 OK", "a1", alice.contact, sdp("10.0.0.2", "4100")))
		contains(t, "200", receive(fl.Server), "m=audio 40006 ", "Contact: <sip:alice@203.0.113.1:40000>")
		open(t, g, contact0, "udp 203.0.113.1:40006 > 10.0.0.2:4100 from [203.0.113.10]", "udp 203.0.113.1:40007 > 10.0.0.2:4101 from [203.0.113.10]",
			"udp 10.0.0.2 > 203.0.113.10:6004 as 203.0.113.1:40006", "udp 10.0.0.2 > 203.0.113.10:6005 as 203.0.113.1:40007")
		// The stream ends.
		got = offer(6, sdp("10.0.0.2", "0"))
		fl.Server.Send(answer(t, got, "200 OK", "b1", bob.contact, sdp("203.0.113.10", "0")))
		receive(fl.Client)
		open(t, g, contact0)
	})
}

// An offer in the 200, and its answer in the ACK, in both directions.
func TestOfferInAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := associate(t, g, client4, proxy4)
		fl.Client.Send(request("INVITE", bob.uri, alice, bob, "1", "", ""))
		fl.Server.Send(answer(t, receive(fl.Server), "200 OK", "b1", bob.contact, sdp("203.0.113.10", "6000")))
		contains(t, "200", receive(fl.Client), "m=audio 6000 ")
		open(t, g, contact0)
		ack := request("ACK", bob.uri, alice, bob, "2", ";tag=b1", sdp("10.0.0.2", "4000"))
		fl.Client.Send(ack, ack)
		got := receive(fl.Server)
		contains(t, "ACK", got, "m=audio 40002 ")
		if strings.Count(got, "m=audio 40002 ") != 2 {
			t.Errorf("the second ACK is another one: %s", got)
		}
		open(t, g, contact0, rtp0, rtcp0, rtpOut, rtcpOut)
		fl.Client.Send(request("BYE", bob.uri, alice, bob, "3", ";tag=b1", ""))
		synctest.Wait()
		open(t, g)

		in := associate(t, g, client4, proxy4)
		in.Server.Send(strings.Replace(request("INVITE", "sip:alice@203.0.113.1:5060", bob, alice, "4", "", ""), "call-1", "call-2", 1))
		invite := receive(in.Client)
		contains(t, "INVITE", invite, "INVITE sip:alice@10.0.0.2:5060 ")
		in.Client.Send(answer(t, invite, "200 OK", "a1", alice.contact, sdp("10.0.0.2", "4000")))
		ok := receive(in.Server)
		contains(t, "200", ok, "Contact: <sip:alice@203.0.113.1:40004>", "m=audio 40006 ", "c=IN IP4 203.0.113.1")
		in.Server.Send(strings.Replace(request("ACK", "sip:alice@203.0.113.1:40004", bob, alice, "5", ";tag=a1", sdp("203.0.113.10", "6000")), "call-1", "call-2", 1))
		contains(t, "ACK", receive(in.Client), "m=audio 6000 ", "ACK sip:alice@10.0.0.2:5060 ")
		if !g.Dial(flow.UDP, client4.Addr(), netip.MustParseAddrPort("203.0.113.10:6000")) {
			t.Error("the client's media does not get out")
		}
	})
}

// The kernel has acknowledged before anybody hears of an address.
func TestRuleInstallFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := associate(t, g, client4, proxy4)
		release := g.HoldKernel()
		fl.Client.Send(request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000")))
		if got := receive(fl.Server); got != "" {
			t.Errorf("the server has %q before the kernel's acknowledgement", got)
		}
		release()
		invite := receive(fl.Server)
		release = g.HoldKernel()
		fl.Server.Send(answer(t, invite, "200 OK", "b1", bob.contact, sdp("203.0.113.10", "6000")))
		if got := receive(fl.Client); got != "" {
			t.Errorf("the client has %q before the kernel's acknowledgement", got)
		}
		release()
		contains(t, "200", receive(fl.Client), "200 OK")
		g.Before(filtertest.Allowed, "6001", filtertest.ToClient, "200 OK")
	})
}

// Over TCP, and routed over IPv6: nothing is written, only what is needed opens,
// and the end of the connection ends the call.
func TestCallOverTCPRouted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := g.Connect(netip.MustParseAddrPort("[fd00:a::2]:50000"), proxy6)
		near := party{"", "[fd00:a::2]:50000", "a1", "<sip:alice@[fd00:a::2]:5060;transport=tcp>"}
		text := strings.ReplaceAll(request("INVITE", "sip:bob@[2001:db8:b::10]", near, bob, "1", "", sdp("fd00:a::2", "4001")), "SIP/2.0/UDP", "SIP/2.0/TCP")
		fl.Client.Send(text)
		invite := receive(fl.Server)
		if invite != text {
			t.Errorf("got\n%s\nwant\n%s", invite, text)
		}
		fl.Server.Send(answer(t, invite, "200 OK", "b1", bob.contact, sdp("2001:db8:b::10", "6000")))
		receive(fl.Client)
		open(t, g, "tcp [fd00:a::2]:5060 > [fd00:a::2]:5060 from [2001:db8:b::10]",
			"udp [fd00:a::2]:4001 > [fd00:a::2]:4001 from [2001:db8:b::10]", "udp [fd00:a::2]:4002 > [fd00:a::2]:4002 from [2001:db8:b::10]",
			"udp fd00:a::2 > [2001:db8:b::10]:6000", "udp fd00:a::2 > [2001:db8:b::10]:6001")
		in, err := g.Inbound(flow.TCP, netip.MustParseAddrPort("[2001:db8:b::10]:40000"), client6)
		if err != nil || !in.Filtered {
			t.Fatalf("a connection to the contact: %v", err)
		}
		fl.Client.CloseWrite()
		fl.Server.CloseWrite()
		if err := fl.Wait(); err != nil {
			t.Errorf("Pump: %v", err)
		}
		synctest.Wait()
		open(t, g)
	})
}

func TestOptions(t *testing.T) {
	for _, bad := range []string{
		"malformed: drop", "calls: 0", "calls: 1001", "registrations: -1", "media: [x]", "media: [10.0.0.1/8]", "media: [0.0.0.0/0]", "media: [\"::ffff:10.0.0.1\"]", "unknown: 1",
	} {
		if o, err := filtertest.ParseOptions(New(), bad); err == nil {
			t.Errorf("%q gives %+v", bad, o)
		}
	}
	o, err := filtertest.ParseOptions(New(), "{media: [198.51.100.7, \"2001:db8::/32\"], malformed: pass, calls: 3}")
	if err != nil {
		t.Fatal(err)
	}
	got := o.(*options)
	peer := netip.MustParseAddr("203.0.113.10")
	for addr, want := range map[string]bool{"198.51.100.7": true, "198.51.100.8": false, "2001:db8::1": true, "203.0.113.10": true, "203.0.113.11": false} {
		if got.mayCarry(netip.MustParseAddr(addr), peer) != want {
			t.Errorf("%s: not %v", addr, want)
		}
	}
	if !got.passMalformed || got.calls != 3 || got.registrations != defaultRegistrations {
		t.Errorf("%+v", got)
	}
}

// A panic in the parser's or the filter's code ends one connection.
func TestPanicEndsOneConnection(t *testing.T) {
	s := newSession(&filter{log: zap.NewNop(), stop: make(chan struct{})}, fakeSession{})
	if err := s.protect(func() { panic("x") }); err == nil {
		t.Error("no error")
	}
	s.Detach()
	if err := s.take(t.Context(), func() {}); errors.Is(err, nil) {
		t.Error("a session that is over takes a turn")
	}
}

// An answer that comes late changes nothing, and a CANCEL has the name of its
// INVITE though it leaves by another connection.
func TestLateAnswerAndCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := filtertest.New(t, New(), "")
		fl := associate(t, g, client4, proxy4)
		fl.Client.Send(request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000")))
		invite := receive(fl.Server)
		fl.Server.Send(answer(t, invite, "183 Progress", "b1", bob.contact, sdp("203.0.113.10", "6000")))
		receive(fl.Client)
		fl.Server.Send(request("UPDATE", "sip:alice@203.0.113.1:40000", bob, alice, "u", ";tag=a1", sdp("203.0.113.10", "6004")))
		fl.Client.Send(answer(t, receive(fl.Client), "200 OK", "a1", alice.contact, sdp("10.0.0.2", "4000")))
		contains(t, "200", receive(fl.Server), "m=audio 40002 ")
		want := []string{contact0, rtp0, rtcp0, "udp 10.0.0.2 > 203.0.113.10:6004 as 203.0.113.1:40002", "udp 10.0.0.2 > 203.0.113.10:6005 as 203.0.113.1:40003"}
		open(t, g, want...)
		fl.Server.Send(answer(t, invite, "183 Progress", "b1", bob.contact, sdp("203.0.113.10", "6000")))
		contains(t, "183", receive(fl.Client), "m=audio 6000 ")
		open(t, g, want...)

		in, err := g.Inbound(flow.UDP, netip.MustParseAddrPort("203.0.113.10:5999"), netip.MustParseAddrPort("203.0.113.1:40000"))
		if err != nil {
			t.Fatal(err)
		}
		in.Client.Send(request("CANCEL", bob.uri, alice, bob, "1", "", ""))
		cancel := receive(in.Server)
		contains(t, "CANCEL", cancel, "Via: SIP/2.0/UDP 203.0.113.1:5060;branch=z9hG4bK1\r\n")
		in.Server.Send(answer(t, cancel, "200 OK", "b1", "", ""))
		contains(t, "200", receive(in.Client), "Via: SIP/2.0/UDP 10.0.0.2:5060;branch=z9hG4bK1\r\n")
	})
}
