package netns_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// mapped is a scene whose clients are mapped endpoint-independently, with a
// socket of the client that has sent to srv's port 7, of which the probe was
// asked; at is its external address.
func mapped(t *testing.T, m mode) (s *scene, own *net.UDPConn, at netip.AddrPort, e primary) {
	t.Helper()
	l := lab.New(t)
	c := probed()
	c.NetworkRules = m.config("").NetworkRules
	s = play(t, l, families[0], c)
	own = socket(l.Client, to(s.client, 4000))
	at = seenBy(t, socket(l.Srv, to(s.srv, 7)), own)
	ev := s.asked("UDPDestination", own)
	return s, own, at, primary{nil, ev, ev.Conn}
}

// A filter opens a client's mapping to others after the fact.
func TestB24AllowMapping(t *testing.T) {
	t.Parallel()
	for _, m := range modes[1:3] {
		t.Run(m.filtering, func(t *testing.T) {
			t.Parallel()
			s, own, at, e := mapped(t, m)
			other := socket(s.Other, to(s.other, 3000))
			lost(t, other, at, own) // B23
			if r := s.must("allow-bind", e, lab.ProbeArgs{Proto: "udp", External: at.String(), Flags: []string{"Bidirectional"}}); r.Already {
				t.Error("it was allowed before")
			}
			reaches(t, other, at, own)
			if from := reaches(t, own, to(s.other, 3000), other); from != at {
				t.Errorf("the answer comes from %s, want %s", from, at)
			}
			if r := s.must("allow-bind", e, lab.ProbeArgs{Proto: "udp", External: at.String()}); !r.Already {
				t.Error("it is allowed")
			}
		})
	}
}

// B25: what the call answers for a mapping.
func TestB25AllowMappingResults(t *testing.T) {
	t.Parallel()
	s, own, at, e := mapped(t, modes[2])
	for i, row := range []struct {
		want string
		args lab.ProbeArgs
	}{
		{"NotFound", lab.ProbeArgs{Proto: "udp", External: next(at, 1).String()}},
		{"NotFound", lab.ProbeArgs{Proto: "tcp", External: at.String()}},
		{"InvalidArgument", lab.ProbeArgs{Proto: "udp", External: to(at.Addr(), 0).String()}},
		{"InvalidArgument", lab.ProbeArgs{Proto: "udp", External: at.String(), Protocol: "no-such-protocol"}},
		{"PolicyDenied", lab.ProbeArgs{Proto: "udp", External: at.String(), Protocol: "ssh"}},
	} {
		if s.refused(row.want, "allow-bind", e, row.args); t.Failed() {
			t.Fatalf("row %d", i)
		}
	}
	other := socket(s.Other, to(s.other, 3000))
	lost(t, other, at, own)
	s.must("allow-bind", e, lab.ProbeArgs{Proto: "udp", External: to(netip.IPv4Unspecified(), int(at.Port())).String()})
	reaches(t, other, at, own)
}

// B26: its IP filter, and B33: another one that is set on the bind.
func TestB26AllowMappingFilter(t *testing.T) {
	t.Parallel()
	s, own, at, e := mapped(t, modes[2])
	srv, other := socket(s.Srv, to(s.srv, 3000)), socket(s.Other, to(s.other, 3000))
	s.must("allow-bind", e, lab.ProbeArgs{Proto: "udp", External: at.String(), Sources: []string{s.other.String()}})
	reaches(t, other, at, own)
	lost(t, srv, at, own)
}

// B27: without Bidirectional what the client answers on an inbound flow is
// dropped, though it may send to others.
func TestB27MappingOneWay(t *testing.T) {
	t.Parallel()
	s, own, at, e := mapped(t, modes[2])
	other := socket(s.Other, to(s.other, 7))
	s.must("allow-bind", e, lab.ProbeArgs{Proto: "udp", External: at.String()})
	reaches(t, other, at, own)
	lost(t, own, to(s.other, 7), other)
	second := socket(s.Srv, to(s.srv, 3001))
	reaches(t, second, at, own)
}

// B30: the bind event of a mapping, with its external address; who denies it
// refuses the flow.
func TestB30DenyMapping(t *testing.T) {
	t.Parallel()
	s, _, at, _ := mapped(t, modes[2])
	bound := func(e lab.ProbeEvent) bool { return e.Kind == "BindUDP" }
	s.p.Await(3*time.Second, bound)
	if got := s.p.Events(bound); len(got) != 1 || got[0].Dst != at.String() {
		t.Errorf("events %+v, want one of %s", got, at)
	}
	s.on("BindUDP", "deny")
	other := socket(s.Other, to(s.other, 7))
	refused := socket(s.Client, to(s.client, 4001))
	lost(t, refused, to(s.other, 7), other)
}

// A bind for a client that has a mapping already is at the mapping's address,
// and the mapping outlives it.
func TestNUDP01BindAtMapping(t *testing.T) {
	t.Parallel()
	for _, m := range modes[:3] {
		t.Run(m.filtering, func(t *testing.T) {
			t.Parallel()
			s, own, at, e := mapped(t, m)
			other := socket(s.Other, to(s.other, 3000))
			r := s.must("bind", e, lab.ProbeArgs{Proto: "udp", Clients: []string{to(s.client, 4000).String()}, Flags: []string{"AllowMultiple", "SameSource", "Bidirectional"}})
			if r.Addr != at.String() {
				t.Fatalf("bound to %s, the mapping is %s", r.Addr, at)
			}
			reaches(t, other, at, own)
			if from := reaches(t, own, to(s.other, 3000), other); from != at {
				t.Errorf("the answer comes from %s, want %s", from, at)
			}
			s.p.Must("kill", lab.ProbeArgs{Conn: r.Conn})
			fresh := socket(s.Other, to(s.other, 8))
			if m.filtering == independent {
				reaches(t, fresh, at, own)
			} else {
				lost(t, fresh, at, own)
			}
			if from := seenBy(t, fresh, own); from != at {
				t.Errorf("after the bind the next flow has %s, want %s", from, at)
			}
		})
	}
}

// What a client sends from a bind's endpoint leaves from the bind, also where
// endpoints are mapped.
func TestNUDP01MappingAfterBind(t *testing.T) {
	t.Parallel()
	s, _, _, e := mapped(t, modes[2])
	r := s.must("bind", e, lab.ProbeArgs{Proto: "udp", Clients: []string{to(s.client, 4001).String()}, Flags: []string{"AllowMultiple", "SameSource", "Bidirectional"}})
	second := socket(s.Client, to(s.client, 4001))
	s.on("UDPDestination", "attach")
	leaves := func(when string, port int) {
		t.Helper()
		if from := seenBy(t, socket(s.Other, to(s.other, port)), second); from.String() != r.Addr {
			t.Errorf("%s: the server saw %s, the bind is %s", when, from, r.Addr)
		}
	}
	c := probed()
	c.NetworkRules = modes[2].config("").NetworkRules
	c.Protocols += "  more: {udp: 9}\n"
	c.Rules += "  - {name: more, action: allow, from: lan, to: wan, protocols: more}\n"
	s.g.Reload(c)
	leaves("in user space", 7)
	leaves("by the kernel", 8)
	s.g.Reload(c)
	leaves("after a reload", 9)
}
