package netns_test

import (
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// MAP: hosts outside reach the mapped port, as long as it is mapped, and see the
// same address in what the host sends by itself.
func TestPCPMap(t *testing.T) {
	eachServed(t, "", func(s *scene, c *pcpHost) {
		ask := pcpAsk{lifetime: 600, nonce: "mine", proto: pcpTCP, port: 4000}
		a := c.maps(ask)
		if a.external.Addr() != s.seen() || a.lifetime != 600 || a.epoch > 60 {
			s.t.Errorf("mapped to %v for %d s, epoch %d", a.external, a.lifetime, a.epoch)
		}
		s.dial(s.Srv, a.external)
		held := s.dial(s.Other, a.external)
		if again := c.maps(ask); again.external != a.external {
			s.t.Errorf("asked again: %v, before %v", again.external, a.external)
		}
		ask.lifetime = 0
		if gone := c.gets(pcpSuccess, pcpMap, ask, "give back"); gone.lifetime != 0 {
			s.t.Errorf("given back, for %d s", gone.lifetime)
		}
		s.silent(s.Srv, a.external, "the mapping was given back")
		echo(s.t, held, "what stands goes on")

		u := c.maps(pcpAsk{lifetime: 600, nonce: "mine", proto: pcpUDP, port: 4001})
		s.talk(s.Srv, u.external)
		s.talk(s.Other, u.external)
	})
}

// What the host sends from a mapped port leaves from the external one, to
// whomever, and whoever carries it.
func TestPCPSameSource(t *testing.T) {
	t.Parallel()
	t.Run("kernel", func(t *testing.T) { sameSource(t, served("")) })
	t.Run("user", func(t *testing.T) {
		c := served("")
		c.Rules = "  - {name: maps, action: allow, from: lan, to: wan, protocols: pcp}\n" +
			"  - {name: watched, action: allow, from: lan, to: wan, protocols: plain, no_kernel_mode: true}\n"
		sameSource(t, c)
	})
}

func sameSource(t *testing.T, config lab.Config) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		s := play(t, l, f, config)
		c := s.pcp(l.Client)
		peers := map[string][]*lab.Peers{"udp": {l.Srv.EchoUDP(2100), l.Other.EchoUDP(2100)}, "tcp": {l.Srv.EchoTCP(2100), l.Other.EchoTCP(2100)}}
		for proto, number := range map[string]byte{"udp": pcpUDP, "tcp": pcpTCP} {
			a := c.maps(pcpAsk{lifetime: 600, nonce: "n", proto: number, port: 4002})
			for i, at := range []netip.Addr{s.srv, s.other} {
				out, err := l.Client.DialFrom(t.Context(), proto, to(s.client, 4002), to(at, 2100).String())
				if err != nil {
					t.Fatal(err)
				}
				l.OnClose(func() { _ = out.Close() })
				echo(t, out, "from the mapped port")
				if got := peers[proto][i].Addrs(); len(got) != 1 || got[0] != a.external {
					t.Errorf("%s %s saw %v, mapped was %v", proto, at, got, a.external)
				}
			}
		}
	})
}

// Lifetimes: bounded on both sides, renewed by the same host alone, and over
// when they are over.
func TestPCPLifetime(t *testing.T) {
	eachServed(t, "  min_lifetime: 3\n  max_lifetime: 900\n", func(s *scene, c *pcpHost) {
		ask := pcpAsk{lifetime: 1, nonce: "n", proto: pcpTCP, port: 4000}
		a := c.maps(ask)
		start := time.Now()
		if a.lifetime != 3 {
			s.t.Errorf("asked for 1 s, got %d", a.lifetime)
		}
		s.dial(s.Srv, a.external)
		other := ask
		other.nonce, other.lifetime = "another", 900
		c.gets(pcpNotAuthorized, pcpMap, other, "another nonce")
		other.lifetime = 0
		if r := c.gets(pcpNotAuthorized, pcpMap, other, "another nonce gives back"); r.lifetime != pcpLong {
			s.t.Errorf("the error holds for %d s", r.lifetime)
		}
		lab.Eventually(s.t, 10*time.Second, "it is over", func() bool { return len(s.open()) == 0 })
		if took := time.Since(start); took < 2*time.Second {
			s.t.Errorf("it was over after %v", took)
		}
		s.silent(s.Srv, a.external, "its lifetime is over")
		ask.lifetime = 1 << 31
		if a = c.maps(ask); a.lifetime != 900 {
			s.t.Errorf("asked for 68 years, got %d s", a.lifetime)
		}
		b := s.open()
		if len(b) != 1 || b[0].By != "pcp" || b[0].State != "allowed" || b[0].External != a.external.String() ||
			b[0].Client != to(s.client, 4000).String() || b[0].Expires == nil || time.Until(*b[0].Expires) < 850*time.Second {
			s.t.Errorf("binds %+v", b)
		}
	})
}

// FILTER: only who is in it comes in; filters add up, and are taken away by
// length 0.
func TestPCPFilter(t *testing.T) {
	eachServed(t, "", func(s *scene, c *pcpHost) {
		ask := pcpAsk{lifetime: 600, nonce: "n", proto: pcpTCP, port: 4000, options: only(s.srv)}
		a := c.maps(ask)
		if got := string(a.text[60:]); got != string(ask.options) {
			s.t.Errorf("options of the answer: %x", got)
		}
		s.dial(s.Srv, a.external)
		s.silent(s.Other, a.external, "it is not in the filter")
		ask.options = nil
		c.maps(ask) // renewed: the filter stays
		s.silent(s.Other, a.external, "it is not in the filter")
		ask.options = only(s.other)
		c.maps(ask)
		s.dial(s.Other, a.external)
		s.dial(s.Srv, a.external)
		ask.options = append(append([]byte{}, pcpClear...), only(s.other)...)
		c.maps(ask)
		s.silent(s.Srv, a.external, "its filter was taken away")
		s.dial(s.Other, a.external)
		ask.options = pcpClear
		c.maps(ask)
		s.dial(s.Srv, a.external)

		near := 124
		ask = pcpAsk{lifetime: 600, nonce: "n", proto: pcpUDP, port: 4000, options: pcpFilter(near, to(s.other, 0))}
		u := c.maps(ask)
		s.talk(s.Srv, u.external)
		s.talk(s.Other, u.external)

		ask = pcpAsk{lifetime: 600, nonce: "n", proto: pcpUDP, port: 4001}
		for i := range 17 {
			ask.options = append(ask.options, pcpFilter(128-i, to(s.srv, 0))...)
		}
		c.gets(pcpExcessivePeers, pcpMap, ask, "17 filters")
		if n := len(s.open()); n != 2 {
			s.t.Errorf("%d binds, want 2", n)
		}
	})
}

// PEER: the address of that peer alone comes in, and what the host sends to it
// leaves from there; MAP of the same port has the same external one.
func TestPCPPeer(t *testing.T) {
	eachServed(t, "", func(s *scene, c *pcpHost) {
		ask := pcpAsk{lifetime: 600, nonce: "peer", proto: pcpUDP, port: 4000, remote: to(s.srv, 2100)}
		a := c.gets(pcpSuccess, pcpPeer, ask, "PEER")
		s.talk(s.Srv, a.external)
		s.mute(s.Other, a.external, "it is not the peer")
		other := ask
		other.nonce = "stranger"
		c.gets(pcpNotAuthorized, pcpPeer, other, "another nonce")
		m := c.maps(pcpAsk{lifetime: 600, nonce: "map", proto: pcpUDP, port: 4000})
		if m.external != a.external {
			s.t.Errorf("PEER %v, MAP %v", a.external, m.external)
		}
		s.talk(s.Other, a.external)
		c.gets(pcpSuccess, pcpMap, pcpAsk{nonce: "map", proto: pcpUDP, port: 4000}, "MAP is given back")
		s.mute(s.Other, a.external, "the peer's remains")
		s.talk(s.Srv, a.external)
		ask.lifetime = 0
		c.gets(pcpSuccess, pcpPeer, ask, "PEER is given back")
		s.mute(s.Srv, a.external, "nothing remains")
		ask.lifetime, ask.remote = 600, netip.AddrPortFrom(s.srv, 0)
		c.gets(pcpMalformedRequest, pcpPeer, ask, "no port of the peer")
	})
}

// Suggestions, and what cannot be had.
func TestPCPSuggested(t *testing.T) {
	eachServed(t, "  ports: [4000-4999]\n  quota: 3\n", func(s *scene, c *pcpHost) {
		translated := s.client.Is4()
		wish := 50123
		ask := pcpAsk{lifetime: 600, nonce: "n", proto: pcpTCP, port: 4000, suggested: to(s.any(), wish)}
		a := c.maps(ask)
		if got := int(a.external.Port()); translated && got != wish || !translated && got != 4000 {
			s.t.Errorf("suggested %d, got %d", wish, got)
		}
		// Somebody else has it now.
		second := s.pcp(s.Client2)
		ask.options, ask.proto = pcpPreferFailure, pcpTCP
		if translated {
			second.gets(pcpCannotProvide, pcpMap, ask, "that port or none")
			ask.options = nil
			if b := second.maps(ask); b.external == a.external {
				s.t.Errorf("two hosts have %v", b.external)
			}
		} else {
			ask.suggested = to(s.outside, 4001)
			second.gets(pcpCannotProvide, pcpMap, ask, "that address or none")
		}
		// A port for services, and one of the kernel's own.
		for _, port := range []int{22, 10001} {
			ask := pcpAsk{lifetime: 600, nonce: "n", proto: pcpUDP, port: 4001, suggested: to(s.any(), port), options: pcpPreferFailure}
			c.gets(pcpCannotProvide, pcpMap, ask, "a port that is not to be had")
		}
		exact := pcpAsk{lifetime: 600, nonce: "n", proto: pcpUDP, port: 4001, suggested: to(s.seen(), 4001), options: pcpPreferFailure}
		if b := c.maps(exact); b.external != to(s.seen(), 4001) {
			s.t.Errorf("mapped to %v", b.external)
		}
		c.gets(pcpNotAuthorized, pcpMap, pcpAsk{lifetime: 600, nonce: "n", proto: pcpTCP, port: 22}, "a port that may not be mapped")
		c.maps(pcpAsk{lifetime: 600, nonce: "n", proto: pcpTCP, port: 4002})
		if r := c.gets(pcpUserExQuota, pcpMap, pcpAsk{lifetime: 600, nonce: "n", proto: pcpTCP, port: 4003}, "one too many"); r.lifetime != pcpShort {
			s.t.Errorf("the error holds for %d s", r.lifetime)
		}
		c.maps(ask2(ask, 4002)) // what there is may be renewed
		// All that have the nonce.
		c.gets(pcpSuccess, pcpMap, pcpAsk{nonce: "n"}, "all are given back")
		lab.Eventually(s.t, 3*time.Second, "they are gone", func() bool {
			for _, b := range s.open() {
				if b.Owner == s.client.String() {
					return false
				}
			}
			return true
		})
	})
}

// ask2 is a request for another port, without options.
func ask2(a pcpAsk, port int) pcpAsk {
	a.port, a.options, a.suggested = port, nil, netip.AddrPort{}
	return a
}

// Requests that are refused as the RFC says, and open nothing.
func TestPCPErrors(t *testing.T) {
	eachServed(t, "", func(s *scene, c *pcpHost) {
		good := pcpAsk{lifetime: 600, nonce: "n", proto: pcpTCP, port: 4000}
		with := func(change func(*pcpAsk)) []byte {
			a := good
			change(&a)
			return a.encode(pcpMap, c.addr)
		}
		for _, x := range []struct {
			why    string
			text   []byte
			result int
		}{
			{"another version", append([]byte{3}, good.encode(pcpMap, c.addr)[1:]...), pcpUnsuppVersion},
			{"an opcode that nobody knows", good.encode(99, c.addr), pcpUnsuppOpcode},
			{"too short", good.encode(pcpMap, c.addr)[:56], pcpMalformedRequest},
			{"no whole words", good.encode(pcpMap, c.addr)[:59], pcpMalformedRequest},
			{"too long", with(func(a *pcpAsk) { a.options = make([]byte, 1200) }), pcpMalformedRequest},
			{"another host's address", with(func(a *pcpAsk) { a.client = s.second }), pcpAddressMismatch},
			{"for a third party", with(func(a *pcpAsk) { a.options = pcpOption(1, wide(s.second)) }), pcpUnsuppOption},
			{"an option that must be understood", with(func(a *pcpAsk) { a.options = pcpOption(77, nil) }), pcpUnsuppOption},
			{"an option that is cut", with(func(a *pcpAsk) { a.options = []byte{3, 0, 0, 20, 0, 0, 0, 0} }), pcpMalformedOption},
			{"PREFER_FAILURE twice", with(func(a *pcpAsk) { a.options = append(pcpOption(2, nil), pcpOption(2, nil)...) }), pcpMalformedOption},
			{"a filter of the other family", with(func(a *pcpAsk) { a.options = only(otherFamily(s.srv)) }), pcpMalformedOption},
			{"a filter of 129 bits", with(func(a *pcpAsk) { a.options = pcpFilter(129, to(s.srv, 0)) }), pcpMalformedOption},
			{"all protocols", with(func(a *pcpAsk) { a.proto, a.port = 0, 0 }), pcpUnsuppProtocol},
			{"all ports", with(func(a *pcpAsk) { a.port = 0 }), pcpUnsuppProtocol},
			{"all protocols of a port", with(func(a *pcpAsk) { a.proto = 0 }), pcpMalformedRequest},
			{"SCTP", with(func(a *pcpAsk) { a.proto = 132 }), pcpUnsuppProtocol},
		} {
			a := c.says(x.text)
			if a.result != x.result || len(a.text)%4 != 0 || len(a.text) > 1100 || a.lifetime != pcpLong {
				s.t.Errorf("%s: result %d for %d s in %d octets, want %d", x.why, a.result, a.lifetime, len(a.text), x.result)
			}
		}
		for why, text := range map[string][]byte{"a response": append([]byte{2, 0x81}, make([]byte, 58)...), "one octet": {2}} {
			if a, ok := c.try(text, silence()); ok {
				s.t.Errorf("%s is answered: %v", why, a)
			}
		}
		if b := s.open(); len(b) != 0 {
			s.t.Errorf("binds %+v", b)
		}
		good.options = pcpOption(200, []byte{1, 2, 3}) // may be ignored
		if a := c.maps(good); len(a.text) != 60 {
			s.t.Errorf("an option that was ignored is in the answer: %v", a)
		}
	})
}

func otherFamily(a netip.Addr) netip.Addr {
	if a.Is4() {
		return lab.Srv6
	}
	return lab.Srv4
}
