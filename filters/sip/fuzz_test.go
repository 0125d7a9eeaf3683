package sip

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// fakeGateway judges every permission call of a session in which the client
// speaks with one proxy.
type fakeGateway struct {
	filterapi.Session
	filterapi.Firewall
	t     *testing.T
	ports uint16
	open  map[any]bool
}

func (g *fakeGateway) ClientAddr() netip.Addr                              { return client4.Addr() }
func (g *fakeGateway) Close()                                              {}
func (g *fakeGateway) ClientSession(netip.Addr) (filterapi.Session, error) { return g, nil }

func (g *fakeGateway) BindForClient(b filterapi.Bind) ([]filterapi.Connection, error) {
	if b.IPFilter == nil || len(b.IPFilter.Prefixes()) > 0 {
		g.t.Fatalf("a bind that is not reserved first: %+v", b)
	}
	var out []filterapi.Connection
	for _, c := range b.Clients {
		if c.Addr() != client4.Addr() || c.Port() < lowestPort {
			g.t.Fatalf("a bind for %s", c)
		}
		g.ports++
		f := &fakeBind{g: g, name: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), 40000+g.ports)}
		g.open[f] = true
		out = append(out, f)
	}
	return out, nil
}

func (g *fakeGateway) AllowFutureConnect(f filterapi.FutureConnect) (filterapi.Action, error) {
	if f.Target.Addr() != proxy4.Addr() || f.Target.Port() < lowestPort || f.Proto != flow.UDP || f.Flags != 0 {
		g.t.Fatalf("the client is let out to %s, flags %x", f.Target, f.Flags)
	}
	a := &fakeAction{g}
	g.open[a] = true
	return a, nil
}

type fakeAction struct{ g *fakeGateway }

func (a *fakeAction) Cancel() error { delete(a.g.open, a); return nil }

type fakeBind struct {
	filterapi.Connection
	g    *fakeGateway
	name netip.AddrPort
}

func (b *fakeBind) ExternalName() (netip.AddrPort, error) { return b.name, nil }
func (b *fakeBind) Kill()                                 { delete(b.g.open, b) }
func (b *fakeBind) SetIPFilter(f *filterapi.IPFilter) error {
	if !b.g.open[b] {
		return filterapi.ErrTerminating
	}
	if f == nil || slices.ContainsFunc(f.Prefixes(), func(p netip.Prefix) bool { return p.Addr() != proxy4.Addr() || !p.IsSingleIP() }) {
		b.g.t.Fatalf("a bind is open for %v", f.Prefixes())
	}
	return nil
}

type fakeFlow struct{ filterapi.Connection }

func (fakeFlow) Tuple() flow.Tuple { return flow.Tuple{Proto: flow.UDP, Src: client4, Dst: proxy4} }

// Whatever two ends say to each other, nothing opens but between them: for the
// client's own ports from 1024 on, and the far end of the connection. Nothing at
// all opens before the client has spoken, and nothing is left when all has had
// its time.
func FuzzConversation(f *testing.F) {
	invite := request("INVITE", bob.uri, alice, bob, "1", "", sdp("10.0.0.2", "4000"))
	sent := request("INVITE", bob.uri, party{alice.uri, "203.0.113.1:5060", "a1", alice.contact}, bob, "1", "", "")
	back := request("INVITE", "sip:a@203.0.113.1", bob, alice, "9", "", sdp("203.0.113.10", "6000"))
	f.Add(invite, agreed(sent, bob.contact, sdp("203.0.113.10", "6000")), request("BYE", bob.uri, alice, bob, "3", ";tag=b1", ""))
	f.Add(register("<sip:a@10.0.0.2>", "Expires: 600"), agreed(register(""), "<sip:a@203.0.113.1:40001>;expires=60", ""), invite)
	f.Add(request("INVITE", bob.uri, alice, bob, "1", "", ""), agreed(sent, bob.contact, sdp("203.0.113.10", "6000")), request("ACK", bob.uri, alice, bob, "2", ";tag=b1", sdp("10.0.0.2", "4000")))
	f.Add("OPTIONS sip:x SIP/2.0\r\n\r\n", back, agreed(back, alice.contact, sdp("10.0.0.2", "4000", "m=video 4002 RTP/AVP 96")))
	f.Add(invite, agreed(sent, bob.contact, sdp("203.0.113.11", "22", "a=rtcp:5 IN IP4 10.0.0.1")), "POST / HTTP/1.1\r\n\r\n")
	f.Add(request("SUBSCRIBE", bob.uri, alice, bob, "1", "", ""), agreed(strings.ReplaceAll(sent, "INVITE", "SUBSCRIBE"), bob.contact, ""), invite)
	f.Fuzz(func(t *testing.T, first, reply, second string) {
		g := &fakeGateway{t: t, open: map[any]bool{}}
		s := newSession(&filter{log: zap.NewNop(), gateway: g}, g)
		c := newChannel(s, defaults(), client4, false)
		c.conn, c.name, c.peer = fakeFlow{}, netip.MustParseAddrPort("203.0.113.1:5060"), proxy4
		for i, text := range []string{reply, first, reply, second, reply, first, reply} {
			m, err := readDatagram([]byte(text))
			if err != nil || m == nil {
				continue
			}
			out := s.decide(c, i%2 == 1, m)
			for _, sent := range [][]byte{out.forward, out.answer} {
				if m, err := readDatagram(sent); len(sent) > 0 && (err != nil || m == nil) {
					t.Fatalf("%q\nbecomes\n%q: %v", text, sent, err)
				}
			}
			if i == 0 && len(g.open) > 0 {
				t.Fatal("nobody inside has spoken, and something is open")
			}
			s.sweep()
		}
		past := time.Now().Add(-time.Second)
		for _, x := range s.transactions {
			x.until = past
		}
		for _, x := range s.calls {
			x.until = past
		}
		s.sweep()
		for _, x := range s.contacts {
			for use := range x.uses {
				x.uses[use] = past
			}
		}
		s.sweep()
		if len(g.open)+len(s.calls)+len(s.contacts)+len(s.transactions) > 0 || s.held != nil {
			t.Fatalf("left: %d open, %d calls, %d contacts, %d requests", len(g.open), len(s.calls), len(s.contacts), len(s.transactions))
		}
	})
}

// agreed is a 200 to a request as the other side has it.
func agreed(req, contact, body string) string {
	lines := []string{"SIP/2.0 200 OK"}
	for _, name := range []string{"Via: ", "From: ", "To: ", "Call-ID: ", "CSeq: "} {
		_, after, _ := strings.Cut(req, "\r\n"+name)
		value, _, _ := strings.Cut(after, "\r\n")
		lines = append(lines, name+value)
	}
	return msg(body, append(lines, "Contact: "+contact, typeSDP)...)
}
