package netns_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	natpmp "github.com/jackpal/go-nat-pmp"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// NAT-PMP, as two clients of others speak it.
func TestNATPMP(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	f := families[0]
	echoes(l)
	l.Client.EchoTCP(4000)
	l.Client.EchoUDP(4000)
	s := play(t, l, f, served(""))
	s.pcp(l.Client) // it is there
	t.Run("natpmpc", func(t *testing.T) {
		out := l.Client.Run("natpmpc", "-g", f.inside.String(), "-a", "50321", "4000", "tcp", "600")
		if !strings.Contains(out, "Public IP address : "+f.outside.String()) || !strings.Contains(out, "Mapped public port 50321 protocol TCP to local port 4000") {
			t.Errorf("natpmpc says %s", out)
		}
		s.dial(l.Srv, to(f.outside, 50321))
		l.Client.Run("natpmpc", "-g", f.inside.String(), "-a", "0", "4000", "tcp", "0")
		s.silent(l.Srv, to(f.outside, 50321), "it was given back")
	})
	t.Run("go-nat-pmp", func(t *testing.T) {
		c := natpmp.NewClientWithTimeout(net.IP(f.inside.AsSlice()), 5*time.Second)
		if err := l.Client.Do(func() error { return throughLibrary(s, c) }); err != nil {
			t.Error(err)
		}
	})
	if b := s.open(); len(b) != 0 {
		t.Errorf("binds %+v", b)
	}
}

// throughLibrary asks for everything that the library can ask for.
func throughLibrary(s *scene, c *natpmp.Client) error {
	external, err := c.GetExternalAddress()
	if err != nil {
		return err
	}
	if got := netip.AddrFrom4(external.ExternalIPAddress); got != s.outside {
		return fmt.Errorf("the external address is %v", got)
	}
	at := map[string]netip.AddrPort{}
	for _, proto := range []string{"tcp", "udp"} {
		m, err := c.AddPortMapping(proto, 4000, 0, 600)
		if err != nil {
			return err
		}
		again, err := c.AddPortMapping(proto, 4000, 1234, 900)
		if err != nil || again.MappedExternalPort != m.MappedExternalPort || m.PortMappingLifetimeInSeconds != 600 || again.PortMappingLifetimeInSeconds != 900 {
			return fmt.Errorf("mapped %+v, again %+v, %w", m, again, err)
		}
		at[proto] = to(s.outside, int(m.MappedExternalPort))
	}
	s.dial(s.Srv, at["tcp"])
	s.talk(s.Other, at["udp"])
	for _, proto := range []string{"tcp", "udp"} {
		if _, err := c.AddPortMapping(proto, 0, 0, 0); err != nil { // all of the protocol
			return err
		}
	}
	s.silent(s.Srv, at["tcp"], "all were given back")
	s.mute(s.Srv, at["udp"], "all were given back")
	if _, err := c.AddPortMapping("tcp", 80, 80, 600); err == nil {
		return errors.New("a port of services was mapped")
	}
	return nil
}

// Without NAT-PMP its requests are told the version that is spoken.
func TestNATPMPOff(t *testing.T) {
	eachServed(t, "  natpmp: false\n", func(s *scene, c *pcpHost) {
		a := c.says([]byte{0, 0})
		if a.result != pcpUnsuppVersion {
			s.t.Errorf("answer %v", a)
		}
	})
}

// Nobody outside is served, whichever address is asked; nor is the server at the
// gateway's addresses outside.
func TestPCPOutside(t *testing.T) {
	eachServed(t, "", func(s *scene, _ *pcpHost) {
		s.Srv.Run("ip", "route", "replace", prefixOf(s.inside), "via", s.outside.String())
		for _, at := range []netip.Addr{s.inside, s.outside} {
			c := &pcpHost{s.t, s.Srv.MustDial("udp", to(at, 5351).String(), time.Second), s.srv}
			if a, ok := c.try(pcpHeader(pcpAnnounce, 0, s.srv), silence()); ok {
				s.t.Errorf("%s answers a host outside: %v", at, a)
			}
		}
		c := &pcpHost{s.t, s.Client.MustDial("udp", to(s.outside, 5351).String(), time.Second), s.client}
		if a, ok := c.try(pcpHeader(pcpAnnounce, 0, s.client), silence()); ok {
			s.t.Errorf("the outside address answers: %v", a)
		}
	})
}

// prefixOf is the inside network.
func prefixOf(a netip.Addr) string {
	p, _ := a.Prefix(map[bool]int{true: 24, false: 64}[a.Is4()])
	return p.String()
}

// The rules say who may have mappings; what they let go is taken away.
func TestPCPRules(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.Client.EchoTCP(4000)
		c := served("")
		c.Networks = "  one: {interfaces: [lan0], prefixes: " + `["` + f.client.String() + `"]` + "}\n"
		c.NetworkRules = "  - {name: out, from: lan, to: wan, relation: nat}\n"
		c.Rules = "  - {name: maps, action: allow, from: one, to: wan, protocols: pcp}\n"
		s := play(t, l, f, c)
		one, two := s.pcp(l.Client), s.pcp(l.Client2)
		ask := pcpAsk{lifetime: 600, nonce: "n", proto: pcpTCP, port: 4000}
		if r := two.gets(pcpNotAuthorized, pcpMap, ask, "no rule allows it"); r.lifetime != pcpLong {
			t.Errorf("the error holds for %d s", r.lifetime)
		}
		a := one.maps(ask)
		s.dial(l.Srv, a.external)

		id := s.open()[0].Session
		if text, status := s.g.Command("sessions", "disconnect", fmt.Sprint(id)); status != 0 {
			t.Fatal(text)
		}
		s.silent(l.Srv, a.external, "the session was ended")
		a = one.maps(ask)
		s.dial(l.Srv, a.external)

		c.Rules = "  - {name: maps, action: deny, from: one, to: any, protocols: pcp}\n"
		s.g.Reload(c)
		s.silent(l.Srv, a.external, "it is not allowed any more")
		one.gets(pcpNotAuthorized, pcpMap, ask, "it is not allowed any more")
		c.Extra = ""
		s.g.Reload(c)
		lab.Eventually(t, 5*time.Second, "the server is off", func() bool {
			_, ok := one.try(pcpHeader(pcpAnnounce, 0, one.addr), silence())
			return !ok
		})
	})
}

// No port is left: that is said, and nobody loses one.
func TestPCPExhausted(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Client.EchoTCP(4000)
	c := served("")
	c.Extra += "ports: {leases: 61000-61001}\n"
	s := play(t, l, families[0], c)
	one, two := s.pcp(l.Client), s.pcp(l.Client2)
	ask := pcpAsk{lifetime: 600, nonce: "n", proto: pcpTCP, port: 4000}
	a := one.maps(ask)
	one.maps(ask2(ask, 4001))
	if r := two.gets(pcpNoResources, pcpMap, ask, "no port is left"); r.lifetime != pcpShort {
		t.Errorf("the error holds for %d s", r.lifetime)
	}
	if again := one.maps(ask); again.external != a.external {
		t.Errorf("mapped to %v, before %v", again.external, a.external)
	}
	s.dial(l.Srv, a.external)
	var counters map[string]uint64
	s.g.JSON(&counters, "counters")
	if counters["pcp.exhausted"] != 1 || counters["pcp.mappings"] != 2 || counters["pcp.granted"] != 3 {
		t.Errorf("counters %v", counters)
	}
}

// A restart of the gateway loses the mappings: hosts are told by multicast, the
// epoch begins anew, and they get what they had.
func TestPCPRestart(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		l.Client.EchoTCP(4000)
		news := l.Client.MustListenPacket(f.network("udp"), ":5350")
		s := play(t, l, f, served(""))
		c := s.pcp(l.Client)
		awaitNews := func(why string) {
			t.Helper()
			lab.Eventually(t, 10*time.Second, why, func() bool {
				b := make([]byte, 100)
				if err := news.SetReadDeadline(time.Now().Add(lab.Patience(5 * time.Second))); err != nil {
					t.Fatal(err)
				}
				n, from, err := news.ReadFromUDPAddrPort(b)
				if err != nil {
					return false
				}
				a := decodePCP(b[:n])
				return n == 24 && b[0] == 2 && b[1] == 0x80 && a.result == 0 && a.epoch < 5 && from.Addr().Unmap().WithZone("") == f.inside && from.Port() == 5351
			})
		}
		awaitNews("news of the start")
		ask := pcpAsk{lifetime: 600, nonce: "n", proto: pcpTCP, port: 4000}
		a := c.maps(ask)
		held := s.dial(l.Srv, a.external)
		lab.Eventually(t, 10*time.Second, "the epoch goes on", func() bool { return c.says(pcpHeader(pcpAnnounce, 0, c.addr)).epoch >= 3 })

		s.g.Stop()
		for { // what was told before the end
			if err := news.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			if _, _, err := news.ReadFromUDPAddrPort(make([]byte, 100)); err != nil {
				break
			}
		}
		s.g = l.Gateway(served(""))
		awaitNews("news of the second start")
		s.silent(l.Srv, a.external, "the mapping was lost")
		ask.suggested = a.external
		if again := c.maps(ask); again.external != a.external || again.epoch > 10 {
			t.Errorf("mapped to %v, before to %v; epoch %d", again.external, a.external, again.epoch)
		}
		s.dial(l.Srv, a.external)
		echo(t, held, "what stood before stands")
	})
}
