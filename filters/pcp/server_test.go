package pcp

import (
	"encoding/binary"
	"errors"
	"net"
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
	inside  = netip.MustParseAddrPort("10.0.0.1:5351")
	inside6 = netip.MustParseAddrPort("[fd00:a::1]:5351")
)

// scene is a server on a gateway, with the addresses of one interface.
type scene struct {
	t     *testing.T
	g     *filtertest.Gateway
	s     *Server
	addrs []netip.Prefix
}

func usual() Config {
	return Config{
		Networks: []Network{{Name: "in", Interfaces: []string{"lan0"}}}, NATPMP: true, Approve: true,
		Ports: [][2]uint16{{1024, 65535}}, MinLifetime: 2 * time.Minute, MaxLifetime: 24 * time.Hour, Quota: 4,
	}
}

// play runs a test in a bubble with a server that serves.
func play(t *testing.T, c Config, run func(s *scene)) {
	synctest.Test(t, func(t *testing.T) {
		s := &scene{t: t, s: New(), addrs: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24"), netip.MustParsePrefix("fd00:a::1/64")}}
		s.s.interfaces = func(name string) ([]netip.Prefix, error) {
			if name != "lan0" {
				return nil, errors.New("no such interface")
			}
			return s.addrs, nil
		}
		s.g = filtertest.New(t, s.s, "")
		s.s.Configure(c)
		synctest.Wait()
		run(s)
	})
}

// client is a host that asks.
type client struct {
	s    *scene
	conn net.PacketConn
	addr netip.Addr
	at   netip.AddrPort
}

func (s *scene) client(addr string) *client {
	a := netip.MustParseAddr(addr)
	at := inside
	if a.Is6() {
		at = inside6
	}
	conn, err := s.g.World().ListenPacket(netip.AddrPortFrom(a, 4321), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = conn.Close() })
	return &client{s, conn, a, at}
}

// ask gives the answer; nil: none.
func (c *client) ask(b []byte) []byte {
	c.s.t.Helper()
	if _, err := c.conn.WriteTo(b, net.UDPAddrFromAddrPort(c.at)); err != nil {
		c.s.t.Fatal(err)
	}
	_ = c.conn.SetReadDeadline(time.Now().Add(time.Second))
	in := make([]byte, 2000)
	n, _, err := c.conn.ReadFrom(in)
	if err != nil {
		return nil
	}
	return in[:n]
}

// wants is a MAP request.
type wants struct {
	proto    flow.Proto
	port     uint16
	lifetime uint32
	nonce    byte
	options  []byte
}

// maps gives the result and the external address of a MAP request.
func (c *client) maps(w wants) (result, netip.AddrPort) {
	c.s.t.Helper()
	b := make([]byte, headerSize+mapSize)
	b[0], b[1] = version, opMap
	binary.BigEndian.PutUint32(b[4:], w.lifetime)
	putAddress(b[clientAt:], c.addr)
	body := b[headerSize:]
	body[0], body[12] = w.nonce, byte(w.proto)
	binary.BigEndian.PutUint16(body[16:], w.port)
	out := c.ask(append(b, w.options...))
	if len(out) < headerSize+mapSize {
		c.s.t.Fatalf("answer %x", out)
	}
	return result(out[3]), netip.AddrPortFrom(address(out[headerSize+20:]), binary.BigEndian.Uint16(out[headerSize+18:]))
}

func (c *client) must(want result, w wants, why string) netip.AddrPort {
	c.s.t.Helper()
	got, at := c.maps(w)
	if got != want {
		c.s.t.Errorf("%s: result %d, want %d", why, got, want)
	}
	return at
}

// TestRules: who may not is told so, and what was opened ends with the session.
func TestRules(t *testing.T) {
	play(t, usual(), func(s *scene) {
		one, two := s.client("10.0.0.2"), s.client("fd00:a::2")
		s.g.Access = func(a netip.Addr, q filterapi.HostAccess) error {
			if q.Protocol != Name {
				t.Errorf("asked about %+v", q)
			}
			if a == one.addr {
				return filterapi.ErrNetworkDenied
			}
			return nil
		}
		one.must(notAuthorized, wants{flow.TCP, 5000, 600, 1, nil}, "not allowed")
		if a := one.ask([]byte{0, 0}); len(a) != 12 || a[3] != pmpNotAuthorized {
			t.Errorf("the external address: %x", a)
		}
		at := two.must(success, wants{flow.TCP, 5000, 600, 1, nil}, "allowed")
		if at != netip.MustParseAddrPort("[fd00:a::2]:5000") {
			t.Errorf("a pinhole at %v", at)
		}
		s.g.EndSession(two.addr)
		if len(s.g.Open()) != 0 {
			t.Fatalf("open: %v", s.g.Open())
		}
		two.must(success, wants{flow.TCP, 5000, 600, 2, nil}, "another nonce: there is none any more")
		if _, in := s.g.Arrive(flow.TCP, netip.MustParseAddr("2001:db8::9"), at); !in {
			t.Error("nobody comes in")
		}
	})
}

// TestNotAllowedAnyMore: a new configuration, or new rules, end what they do not
// allow, though nobody could come in.
func TestNotAllowedAnyMore(t *testing.T) {
	c := usual()
	c.Approve = false
	play(t, c, func(s *scene) {
		one := s.client("10.0.0.2")
		left := func(want int, why string) {
			t.Helper()
			synctest.Wait()
			s.s.Configure(c)
			synctest.Wait()
			if n := s.s.Counters().Mappings; n != uint64(want) {
				t.Errorf("%s: %d mappings are left, want %d", why, n, want)
			}
		}
		one.must(success, wants{flow.TCP, 5000, 600, 1, nil}, "one port")
		one.must(success, wants{flow.TCP, 6000, 600, 1, nil}, "another one")
		left(2, "nothing is new")
		c.Ports = [][2]uint16{{6000, 6999}}
		left(1, "other ports")
		s.g.Access = func(netip.Addr, filterapi.HostAccess) error { return filterapi.ErrPolicyDenied }
		left(0, "other rules")
	})
}

// TestNarrowed: a bind that discards is allowed by another filter, for some;
// what the client asks for later does not let in more.
func TestNarrowed(t *testing.T) {
	c := usual()
	c.Approve = false
	play(t, c, func(s *scene) {
		one := s.client("10.0.0.2")
		ask := wants{flow.TCP, 5000, 600, 1, nil}
		at := one.must(success, ask, "it discards")
		good, bad := netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("203.0.113.11")
		arrives := func(a netip.Addr) bool {
			_, in := s.g.Arrive(flow.TCP, a, at)
			return in
		}
		if arrives(good) {
			t.Error("somebody comes in before it is allowed")
		}
		var bind filterapi.Connection
		s.s.binds.Range(func(k, _ any) bool { bind = k.(filterapi.Connection); return true })
		if _, err := bind.Session().RetroactiveAllowBind(filterapi.AllowBind{Proto: flow.TCP, Address: at, IPFilter: filterapi.OnlyFrom(good)}); err != nil {
			t.Fatal(err)
		}
		for _, more := range [][]byte{nil, filterOf(bad), append(filterOf(netip.Addr{}), filterOf(good)...)} {
			ask.options = more
			one.must(success, ask, "renewed")
			if wanted := more == nil || len(more) > optionSize+filterSize; arrives(good) != wanted || arrives(bad) {
				t.Errorf("with options %x: open %v", more, s.g.Open())
			}
		}
		time.Sleep(11 * time.Minute) // longer than the lifetime that the client was told
		synctest.Wait()
		if len(s.g.Open()) != 0 {
			t.Errorf("open: %v", s.g.Open())
		}
	})
}

// filterOf is a FILTER option for one host; without one it takes all away.
func filterOf(a netip.Addr) []byte {
	b := make([]byte, optionSize+filterSize)
	b[0], b[3] = optFilter, filterSize
	if a.IsValid() {
		b[5] = 128
		putAddress(b[8:], a)
	}
	return b
}

// TestClaims: MAP and PEER share a mapping, each for its own time.
func TestClaims(t *testing.T) {
	play(t, usual(), func(s *scene) {
		one := s.client("10.0.0.2")
		peer := netip.MustParseAddrPort("203.0.113.10:5060")
		at := one.must(success, wants{flow.UDP, 5000, 300, 1, nil}, "MAP")
		b := make([]byte, headerSize+peerSize)
		b[0], b[1] = version, opPeer
		binary.BigEndian.PutUint32(b[4:], 900)
		putAddress(b[clientAt:], one.addr)
		body := b[headerSize:]
		body[0], body[12] = 2, byte(flow.UDP)
		binary.BigEndian.PutUint16(body[16:], 5000)
		binary.BigEndian.PutUint16(body[36:], peer.Port())
		putAddress(body[40:], peer.Addr())
		if out := one.ask(b); out[3] != byte(success) || netip.AddrPortFrom(address(out[headerSize+20:]), binary.BigEndian.Uint16(out[headerSize+18:])) != at {
			t.Fatalf("PEER: %x, MAP had %v", out, at)
		}
		comes := func(a string) bool {
			_, in := s.g.Arrive(flow.UDP, netip.MustParseAddr(a), at)
			return in
		}
		if !comes("203.0.113.10") || !comes("198.51.100.1") {
			t.Errorf("open: %v", s.g.Open())
		}
		time.Sleep(5*time.Minute + 2*lookEvery)
		synctest.Wait()
		if !comes("203.0.113.10") || comes("198.51.100.1") {
			t.Errorf("the mapping's time is over, that of the peer is not: %v", s.g.Open())
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if len(s.g.Open()) != 0 {
			t.Errorf("open: %v", s.g.Open())
		}
	})
}

// TestAddresses: sockets follow the interface and the configuration, and the
// hosts hear of the first and of a new state ten times.
func TestAddresses(t *testing.T) {
	play(t, usual(), func(s *scene) {
		news, err := s.g.World().ListenPacket(netip.MustParseAddrPort("224.0.0.1:5350"), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer news.Close()
		one := s.client("10.0.0.2")
		one.must(success, wants{flow.TCP, 5000, 600, 1, nil}, "served")
		change := func(what func()) { // while nobody looks
			synctest.Wait()
			what()
			s.s.Configure(usual())
			synctest.Wait()
		}
		change(func() { s.addrs = []netip.Prefix{netip.MustParsePrefix("10.0.0.9/24")} })
		if out := one.ask(announcement(0)[:headerSize]); out != nil {
			t.Errorf("the old address answers %x", out)
		}
		one.at = netip.MustParseAddrPort("10.0.0.9:5351")
		change(func() { s.g.Own = append(s.g.Own, one.at.Addr()) })
		one.must(success, wants{flow.TCP, 5000, 600, 1, nil}, "the new address answers")
		// Another external address: what was is over.
		time.Sleep(5 * time.Minute)
		drain(news)
		change(func() { s.g.External = netip.MustParseAddr("203.0.113.7") })
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		told := drain(news)
		pmp := slices.DeleteFunc(slices.Clone(told), func(b string) bool { return b[0] != natpmpVersion })
		if len(told) != 2*announcements || len(pmp) != announcements || pmp[0][8:] != "\xcb\x00\x71\x07" {
			t.Errorf("told: %q", told)
		}
		if epoch := binary.BigEndian.Uint32([]byte(told[0][8:])); epoch > 2 && told[0][0] == version {
			t.Errorf("epoch %d", epoch)
		}
		if len(s.g.Open()) != 0 {
			t.Errorf("open: %v", s.g.Open())
		}
		s.s.Configure(Config{})
		synctest.Wait()
		if out := one.ask([]byte{0, 0}); out != nil {
			t.Errorf("nobody is served, and gets %x", out)
		}
	})
}

// drain reads what has come.
func drain(c net.PacketConn) (all []string) {
	for {
		_ = c.SetReadDeadline(time.Now().Add(time.Millisecond))
		b := make([]byte, 2000)
		n, _, err := c.ReadFrom(b)
		if err != nil {
			return all
		}
		all = append(all, string(b[:n]))
	}
}

// TestOnlyServed: who is in no network that is served gets no answer, even if it
// comes through.
func TestOnlyServed(t *testing.T) {
	c := usual()
	c.Networks[0].Prefixes = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/28")}
	play(t, c, func(s *scene) {
		in, out := s.client("10.0.0.2"), s.client("10.0.0.77")
		in.must(success, wants{flow.TCP, 5000, 600, 1, nil}, "served")
		if a := out.ask([]byte{0, 0}); a != nil {
			t.Errorf("answered: %x", a)
		}
		if log := s.g.Journal(); !slices.ContainsFunc(log, func(e filtertest.Entry) bool { return strings.Contains(e.String(), "opened udp 10.0.0.1:5351") }) ||
			slices.ContainsFunc(log, func(e filtertest.Entry) bool { return strings.Contains(e.String(), "fd00:a::1") }) {
			t.Errorf("journal: %v", log)
		}
	})
}
