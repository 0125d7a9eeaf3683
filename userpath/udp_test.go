package userpath

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// udpPath is one way for a client to reach the servers.
type udpPath struct {
	name, client string
	servers      [3]string
	source       string // "": the route's choice
	seen         string // the address that the servers see; port 0: any, but one
}

func udpPaths() []udpPath {
	four := [3]string{"203.0.113.10:7", "203.0.113.11:7", "203.0.113.12:8"}
	six := [3]string{"[2001:db8:b::10]:7", "[2001:db8:b::11]:7", "[2001:db8:b::12]:8"}
	return []udpPath{
		{"translated4", "10.0.0.2:4000", four, "203.0.113.1:0", "203.0.113.1:0"},
		{"preferred4", "10.0.0.2:4001", four, "", "203.0.113.1:0"},
		{"routed4", "10.0.0.2:4002", four, "10.0.0.2:4002", "10.0.0.2:4002"},
		{"routed6", "[fd00:a::2]:4003", six, "[fd00:a::2]:4003", "[fd00:a::2]:4003"},
		{"preferred6", "[fd00:a::2]:4004", six, "", "[2001:db8:b::1]:0"},
	}
}

func TestUDPOneSocketThreePeers(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		seen := map[string]<-chan udpSeen{}
		for _, p := range udpPaths() {
			c := l.client.listen(p.client)
			want := netip.MustParseAddrPort(p.seen)
			var port uint16
			var flows []*udpFake
			for i, s := range p.servers {
				if seen[s] == nil {
					seen[s] = l.server.echo(s)
				}
				f := l.take(p.client, s, p.source)
				flows = append(flows, f)
				for n := range 3 {
					l.ask(c, s, fmt.Appendf(nil, "%s %d", p.name, n))
					from := l.saw(seen[s]).from
					if from.Addr() != want.Addr() || want.Port() != 0 && from.Port() != want.Port() {
						t.Errorf("%s: the server saw %s, want %s", p.name, from, want)
					}
					if i+n == 0 {
						port = from.Port()
					}
					if from.Port() != port {
						t.Errorf("%s: port %d towards %s, %d towards the first", p.name, from.Port(), s, port)
					}
				}
				if f.connected != 1 || f.name != netip.AddrPortFrom(want.Addr(), port) || f.peer.String() != s {
					t.Errorf("%s: connected %d times, %s to %s", p.name, f.connected, f.name, f.peer)
				}
			}
			for _, f := range flows {
				close(f.kill)
				e := f.end()
				size := uint64(3 * len(p.name+" 0"))
				if want := (flow.Counts{OutBytes: size, InBytes: size, OutPackets: 3, InPackets: 3}); e.counts != want || e.result != flow.CutByPolicy {
					t.Errorf("%s: ended %+v", p.name, e)
				}
			}
		}
		if s := l.u.Stats(); s.Flows != 0 || s.SendLost+s.NoFlow+s.UnknownPeer+s.Refused != 0 {
			t.Errorf("stats %+v", s)
		}
	})
}

func TestUDPSizes(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		seen := map[string]<-chan udpSeen{}
		for _, p := range udpPaths() {
			c, s := l.client.listen(p.client), p.servers[0]
			if seen[s] == nil {
				seen[s] = l.server.echo(s)
			}
			f := l.take(p.client, s, p.source)
			for _, size := range []int{0, 1, 2, 511, 1400, 1472, 1473, 4096, 4097, 5000, 9000, 32768, 60000, 65400} {
				l.ask(c, s, udpPattern(size))
				l.saw(seen[s])
			}
			close(f.kill)
			if e := f.end(); e.counts.InPackets != 14 || e.counts.OutBytes != e.counts.InBytes {
				t.Errorf("%s: ended %+v", p.name, e)
			}
		}
	})
}

func udpPattern(size int) []byte {
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i * 7)
	}
	return data
}

func TestUDPClosedPortIsRefused(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		for _, p := range udpPaths() {
			to := p.servers[0][:len(p.servers[0])-1] + "99"
			f := l.take(p.client, to, p.source)
			c := l.client.dial(p.client, to)
			if _, err := c.Write([]byte("anybody?")); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Now().Add(udpWaitLong))
			if _, err := c.Read(make([]byte, 10)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: read: %v, want ECONNREFUSED", p.name, err)
			}
			l.forget(p.client, to)
			if e := f.end(); e.result != flow.Refused || e.counts.OutPackets != 1 {
				t.Errorf("%s: ended %+v", p.name, e)
			}
		}
	})
}

func TestUDPNoRouteIsUnreachable(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		for _, x := range []struct{ client, to, source string }{
			{"10.0.0.2:4000", "198.51.100.1:7", "203.0.113.1:0"},
			{"[fd00:a::2]:4000", "[2001:db8:c::1]:7", "[2001:db8:b::1]:0"},
		} {
			l.take(x.client, x.to, x.source)
			c := l.client.dial(x.client, x.to)
			l.hearErrors(c)
			if _, err := c.Write([]byte("anybody?")); err != nil {
				t.Fatal(err)
			}
			_ = c.SetReadDeadline(time.Now().Add(udpWaitLong))
			if _, err := c.Read(make([]byte, 10)); !errors.Is(err, syscall.ENETUNREACH) && !errors.Is(err, syscall.EHOSTUNREACH) {
				t.Errorf("%s: read: %v, want unreachable", x.to, err)
			}
		}
	})
}

func TestUDPInboundFlow(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		for _, x := range []struct{ initiator, external, client, source string }{
			// A pinhole: the client sees the external initiator itself.
			{"203.0.113.10:5000", "10.0.0.2:6000", "10.0.0.2:6000", "203.0.113.10:5000"},
			{"[2001:db8:b::10]:5000", "[fd00:a::2]:6000", "[fd00:a::2]:6000", "[2001:db8:b::10]:5000"},
			// A bind: the external address is the gateway's.
			{"203.0.113.10:5001", "203.0.113.1:7000", "10.0.0.2:6001", "203.0.113.10:5001"},
		} {
			seen := l.client.echo(x.client)
			c := l.server.listen(x.initiator)
			f := l.request(udpRequest{
				tuple:    flow.Tuple{Proto: flow.UDP, Src: netip.MustParseAddrPort(x.initiator), Dst: netip.MustParseAddrPort(x.external)},
				dial:     engine.Dial{Proto: flow.UDP, Target: netip.MustParseAddrPort(x.client), Source: netip.MustParseAddrPort(x.source), Transparent: true},
				external: true,
			})
			for range 3 {
				l.ask(c, x.external, []byte("knock"))
				if s := l.saw(seen); s.from.String() != x.source {
					t.Errorf("the client saw %s, want %s", s.from, x.source)
				}
			}
			close(f.kill)
			if e := f.end(); e.counts.InBytes != 15 || e.counts.OutPackets != 3 {
				t.Errorf("ended %+v", e)
			}
		}
	})
}

// A client's port that is the initiator of one flow and the peer of another.
func TestUDPSameAddressOnBothSides(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		const client, peer = "10.0.0.2:5060", "203.0.113.10:5060"
		seen := l.server.echo(peer)
		c := l.client.listen(client)
		l.take(client, peer, client)
		l.ask(c, peer, []byte("out"))
		l.saw(seen)
		other := l.server.listen("203.0.113.11:5060")
		l.request(udpRequest{
			tuple:    flow.Tuple{Proto: flow.UDP, Src: netip.MustParseAddrPort("203.0.113.11:5060"), Dst: netip.MustParseAddrPort(client)},
			dial:     engine.Dial{Proto: flow.UDP, Target: netip.MustParseAddrPort(client), Source: netip.MustParseAddrPort("203.0.113.11:5060"), Transparent: true},
			external: true,
		})
		for n := range 5 {
			if _, err := other.WriteToUDPAddrPort([]byte("in"), netip.MustParseAddrPort(client)); err != nil {
				t.Fatal(err)
			}
			if data, from := l.read(c); string(data) != "in" || from.String() != "203.0.113.11:5060" {
				t.Fatalf("round %d: got %q from %s", n, data, from)
			}
			if _, err := c.WriteToUDPAddrPort([]byte("back"), netip.MustParseAddrPort("203.0.113.11:5060")); err != nil {
				t.Fatal(err)
			}
			if data, from := l.read(other); string(data) != "back" || from.String() != client {
				t.Fatalf("round %d: got %q from %s", n, data, from)
			}
			l.ask(c, peer, []byte("out"))
			l.saw(seen)
		}
	})
}
