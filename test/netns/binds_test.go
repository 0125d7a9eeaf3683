package netns_test

import (
	"bufio"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// listedBind is one line of `gateway binds --json`.
type listedBind struct {
	ID                                                 uint64
	State, Proto, External, Client, By, Rule, Protocol string
	Owner, User                                        string
	Sources                                            []string
	Multiple, Socket                                   bool
	OneWay                                             bool `json:"one_way"`
	SameSource                                         bool `json:"same_source"`
	Session                                            uint64
	Flows                                              int
	Expires                                            *time.Time
}

// binds lists them.
func (s *scene) binds() (all []listedBind) {
	s.t.Helper()
	s.g.JSON(&all, "binds")
	return all
}

// open are those that have not ended; one that has is listed while its flows
// live.
func (s *scene) open() []listedBind {
	s.t.Helper()
	return slices.DeleteFunc(s.binds(), func(b listedBind) bool { return b.State == "used" })
}

// A bind is one kind of object, whoever asked for it. Each kind below makes one
// for the client that discards what comes.
type bindKind struct {
	name, proto string
	by          string // as `gateway binds` has it
	source      string // of its events; empty: it raises none
	// make gives its external address, and has the client send back what comes.
	// The error is the refusal that the client was told.
	make func(s *scene) (netip.AddrPort, error)
	// protocol is the definition that the approval names; empty: the bind's own.
	protocol string
	only4    bool
	once     bool // it ends with its first connection
	mapped   bool // the network rule maps endpoints
}

var bindKinds = []bindKind{
	{name: "filter", proto: "tcp", by: "probe", source: "transparent", make: filterBind("tcp")},
	{name: "filter", proto: "udp", by: "probe", source: "transparent", make: filterBind("udp")},
	{name: "PCP", proto: "tcp", by: "pcp", source: "explicit", make: pcpBind("tcp")},
	{name: "PCP", proto: "udp", by: "pcp", source: "explicit", make: pcpBind("udp")},
	{name: "PCP of a mapping", proto: "udp", by: "pcp", source: "explicit", make: pcpBind("udp"), only4: true, mapped: true},
	{name: "mapping", proto: "tcp", by: "network rule out", source: "transparent", make: mappingTCP, only4: true, mapped: true},
	{name: "mapping", proto: "udp", by: "network rule out", source: "transparent", make: mappingUDP, only4: true, mapped: true},
	{name: "SOCKS BIND", proto: "tcp", by: "socks", source: "explicit", protocol: "plain", make: socksBindOf, once: true},
	{name: "SOCKS UDP ASSOCIATE", proto: "udp", by: "socks", source: "explicit", protocol: "plain", make: socksAssociation},
}

// filterBind has the probe filter bind for the client.
func filterBind(proto string) func(*scene) (netip.AddrPort, error) {
	return func(s *scene) (netip.AddrPort, error) {
		s.serve(proto)
		e := s.connect()
		ask := many("Discarding")
		ask.Proto, ask.Clients, ask.Session, ask.Conn = proto, []string{to(s.client, 4000).String()}, e.Session, e.id
		r := s.p.Ask("bind", ask)
		if r.Error != "" {
			return netip.AddrPort{}, refusal(r.Error)
		}
		return mustAddrPort(r.Addr), nil
	}
}

// refusal is what a client was told.
type refusal string

func (r refusal) Error() string { return string(r) }

// serve has the client send back what comes to its port 4000.
func (s *scene) serve(proto string) {
	if proto == "udp" {
		s.Client.EchoUDP(4000)
	} else {
		s.Client.EchoTCP(4000)
	}
}

func pcpBind(proto string) func(*scene) (netip.AddrPort, error) {
	return func(s *scene) (netip.AddrPort, error) {
		s.serve(proto)
		number := map[string]byte{"tcp": pcpTCP, "udp": pcpUDP}[proto]
		c := s.pcp(s.Client)
		a := c.says(pcpAsk{lifetime: 600, nonce: "n", proto: number, port: 4000}.encode(pcpMap, c.addr))
		if a.result != pcpSuccess {
			return netip.AddrPort{}, refusal(map[int]string{pcpNotAuthorized: "PolicyDenied"}[a.result])
		}
		return a.external, nil
	}
}

// socksCode is what a refusal of SOCKS 5 says.
func socksCode(code byte) error {
	if code == 2 {
		return refusal("PolicyDenied")
	}
	return refusal("code " + string('0'+rune(code)))
}

func socksBindOf(s *scene) (netip.AddrPort, error) {
	k, err := s.ask5(s.Client, "", socksBind, socksAddress(to(s.any(), 0)))
	if err != nil {
		s.t.Fatal(err)
	}
	if k.code != 0 {
		return netip.AddrPort{}, socksCode(k.code)
	}
	at := k.at
	go func() { // the second answer says who has come; then it is the peer's
		if k.answer() == nil && k.code == 0 {
			_, _ = io.Copy(k.Conn, k.Conn)
		}
		_ = k.Close()
	}()
	return at, nil
}

// socksAssociation sends back, head and all, what the gateway brings from peers.
func socksAssociation(s *scene) (netip.AddrPort, error) {
	c := s.Client.MustListenPacket(s.network("udp"), to(s.client, 4000).String())
	k, err := s.ask5(s.Client, "", socksAssociate, socksAddress(to(s.client, 4000)))
	if err != nil {
		s.t.Fatal(err)
	}
	if k.code != 0 {
		return netip.AddrPort{}, socksCode(k.code)
	}
	go func() {
		b := make([]byte, 2000)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = c.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	all := s.open()
	if len(all) != 1 {
		s.t.Fatalf("binds %+v", all)
	}
	return mustAddrPort(all[0].External), nil
}

// mappingUDP has the client send to srv, and send back what comes.
func mappingUDP(s *scene) (netip.AddrPort, error) {
	own, srv := socket(s.Client, to(s.client, 4000)), socket(s.Srv, to(s.srv, 2100))
	at, ok := hears(s.t, srv, sends(s.t, own, addrPort(srv)), lab.Patience(3*time.Second))
	if !ok {
		return at, refusal("PolicyDenied") // the datagram is lost
	}
	if err := own.SetReadDeadline(time.Time{}); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		b := make([]byte, 2000)
		for {
			n, from, err := own.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = own.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	return at, nil
}

// mappingTCP has the client connect to srv from the port that it listens at.
func mappingTCP(s *scene) (netip.AddrPort, error) {
	mirrorTCP(s.Srv, 2101)
	c, err := dialFrom(s.t, s.Lab, s.Client, to(s.client, 4000), to(s.srv, 2101))
	if err != nil {
		return netip.AddrPort{}, refusal("PolicyDenied") // it is reset
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		s.t.Fatal(err)
	}
	s.serve("tcp")
	return mustAddrPort(strings.TrimSpace(line)), nil
}

// config is that of a gateway that gives binds of all kinds.
func (k bindKind) config() lab.Config {
	c := probed()
	if k.mapped {
		c.NetworkRules = mode{independent, byAddressPort}.config("").NetworkRules
	}
	c.Protocols = "  probed: {tcp: [7, 2100, 2101], udp: [7, 2100], filter: probe}\n  plain: {tcp: 8, udp: 8}\n  never: {tcp: 9, udp: 9}\n"
	c.Rules += "  - {name: maps, action: allow, from: lan, to: wan, protocols: pcp}\n"
	c.Extra = "pcp: {networks: lan, approve: false}\nsocks: {networks: lan, bind_timeout: 60}\n"
	return c
}

// eachKind runs a test for each kind and family, with a probe that hears of
// binds, of those that connections negotiate, too.
func eachKind(t *testing.T, run func(s *scene, k bindKind)) {
	t.Parallel()
	for _, k := range bindKinds {
		t.Run(k.name+"/"+k.proto, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
				if k.only4 && f.client.Is6() {
					return // IPv6 is routed: there is nothing of the kind
				}
				heard := lab.ProbeEvents{Types: []string{"ConnectTCP", "BindTCP", "BindUDP", "Terminating"}, Any: true, Secondary: true}
				l.SetupProbe("probe", lab.ProbeSetup{Init: heard, Session: heard})
				l.Srv.EchoTCP(7)
				run(play(t, l, f, k.config()), k)
			})
		})
	}
}

// bound makes a bind, and gives its line and the session that may approve of it.
func (k bindKind) bound(s *scene) (netip.AddrPort, listedBind) {
	s.t.Helper()
	at, err := k.make(s)
	if err != nil {
		s.t.Fatalf("refused: %v", err)
	}
	for _, b := range s.open() {
		if b.External == at.String() && b.Proto == k.proto && b.By == k.by {
			return at, b
		}
	}
	s.t.Fatalf("no bind at %v: %+v", at, s.binds())
	return at, listedBind{}
}

// approve is the order to allow a bind, with changes.
func (k bindKind) approve(b listedBind, change func(*lab.ProbeArgs)) lab.ProbeArgs {
	a := lab.ProbeArgs{Session: b.Session, Proto: k.proto, External: b.External, Protocol: k.protocol}
	if k.proto == "udp" {
		a.Flags = []string{"Bidirectional"}
	}
	if change != nil {
		change(&a)
	}
	return a
}

// shut wants nobody to get in.
func (k bindKind) shut(s *scene, from *lab.Host, at netip.AddrPort, why string) {
	s.t.Helper()
	if k.proto == "udp" {
		s.mute(from, at, why)
	} else {
		s.silent(from, at, why)
	}
}

// enters wants somebody to get in, and an answer of the client's.
func (k bindKind) enters(s *scene, from *lab.Host, at netip.AddrPort) net.Conn {
	s.t.Helper()
	if k.proto == "udp" {
		return s.talk(from, at)
	}
	return s.dial(from, at)
}

// B23, B24: a bind of every kind discards until it is allowed, without a word;
// then the SYN that is sent again passes, and datagrams that come from then on.
func TestB24BindsOfEveryKind(t *testing.T) {
	eachKind(t, func(s *scene, k bindKind) {
		at, b := k.bound(s)
		if b.State != "discarding" || b.By != k.by || b.Owner != s.client.String() || b.Session == 0 {
			s.t.Errorf("listed as %+v", b)
		}
		outside := s.Srv.Capture()
		k.shut(s, s.Other, at, "nobody has allowed it")
		if k.proto == "udp" {
			early := s.Srv.MustListenPacket(s.network("udp"), ":0")
			send(s.t, early, at, "early")
			nothing(s.t, early, "before the approval")
			s.p.Must("allow-bind", k.approve(b, nil))
			nothing(s.t, early, "what was discarded")
			if from, text := ask(s.t, early, at, "late"); from != at || text != "late" {
				s.t.Errorf("%q from %s", text, from)
			}
			k.enters(s, s.Other, at)
		} else {
			waiting := dialling(s, s.Srv, at)
			lab.Eventually(s.t, 5*time.Second, "srv's SYN", func() bool { return len(lab.Select(outside.Peek(), lab.SYN(at))) > 0 })
			s.p.Must("allow-bind", k.approve(b, nil))
			c, ok := <-waiting
			if !ok {
				s.t.Fatal("the connection is not made")
			}
			defer c.Close()
			echo(s.t, c, "at last")
		}
		if n := len(lab.Select(outside.Stop(), func(p lab.Seen) bool {
			return !p.Out && strings.HasPrefix(p.Proto, "icmp") && p.ICMPType != 0 && p.ICMPType < 5
		})); n != 0 {
			s.t.Errorf("srv was sent %d errors", n)
		}
		if now := s.binds(); !slices.ContainsFunc(now, func(x listedBind) bool {
			return x.ID == b.ID && (x.State == "allowed" || k.once && x.State == "used") && x.Flows > 0
		}) && !k.once {
			s.t.Errorf("listed as %+v", now)
		}
	})
}

// B25: what RetroactiveAllowBind answers about a bind of every kind.
func TestB25BindsOfEveryKind(t *testing.T) {
	eachKind(t, func(s *scene, k bindKind) {
		at, b := k.bound(s)
		for i, row := range []struct {
			want   string
			change func(*lab.ProbeArgs)
		}{
			{"InvalidArgument", func(a *lab.ProbeArgs) { a.External = to(at.Addr(), 0).String() }},
			{"InvalidArgument", func(a *lab.ProbeArgs) { a.Proto = "icmp" }},
			{"InvalidArgument", func(a *lab.ProbeArgs) { a.Proto, a.Flags = "tcp", []string{"Bidirectional"} }},
			{"InvalidArgument", func(a *lab.ProbeArgs) { a.Flags = []string{"Unknown"} }},
			{"InvalidArgument", func(a *lab.ProbeArgs) { a.Protocol = "no-such-protocol" }},
			{"NotFound", func(a *lab.ProbeArgs) { a.External = next(at, 1).String() }},
			{"PolicyDenied", func(a *lab.ProbeArgs) { a.Protocol = "never" }},
		} {
			if r := s.p.Ask("allow-bind", k.approve(b, row.change)); r.Error != row.want {
				s.t.Errorf("%d: error %q, want %q", i, r.Error, row.want)
			}
		}
		k.shut(s, s.Srv, at, "none of it has allowed it")
		anywhere := k.approve(b, func(a *lab.ProbeArgs) { a.External = to(s.any(), int(at.Port())).String() })
		if r := s.p.Must("allow-bind", anywhere); r.Already {
			s.t.Error("it was not allowed before")
		}
		if r := s.p.Must("allow-bind", anywhere); !r.Already {
			s.t.Error("it was allowed before")
		}
		k.enters(s, s.Srv, at)
	})
}

// B26: the IP filter of the approval.
func TestB26BindsOfEveryKind(t *testing.T) {
	eachKind(t, func(s *scene, k bindKind) {
		at, b := k.bound(s)
		s.p.Must("allow-bind", k.approve(b, func(a *lab.ProbeArgs) { a.Sources = []string{s.srv.String()} }))
		k.shut(s, s.Other, at, "it is not in the IP filter")
		k.enters(s, s.Srv, at)
	})
}

// B27: without Bidirectional the client's answers are lost.
func TestB27BindsOfEveryKind(t *testing.T) {
	eachKind(t, func(s *scene, k bindKind) {
		if k.proto != "udp" {
			return // TCP has no such choice: B25
		}
		at, b := k.bound(s)
		s.p.Must("allow-bind", k.approve(b, func(a *lab.ProbeArgs) { a.Flags = nil }))
		inside := s.Client.Capture()
		s.mute(s.Srv, at, "answers are lost")
		if n := len(lab.Select(inside.Stop(), func(p lab.Seen) bool { return p.Proto == "udp" && !p.Out })); n == 0 {
			s.t.Error("the client has got nothing")
		}
	})
}

// B30: a filter that denies a bind has its client refused in the words of its
// protocol, and nothing is open.
func TestB30BindsOfEveryKind(t *testing.T) {
	eachKind(t, func(s *scene, k bindKind) {
		if k.source == "" {
			return
		}
		s.on("BindTCP", "deny")
		s.on("BindUDP", "deny")
		at, err := k.make(s)
		if err == nil || err.Error() != "PolicyDenied" {
			s.t.Errorf("bound to %v, %v", at, err)
		}
		// A mapping that was made for it goes when nothing flows.
		lab.Eventually(s.t, 10*time.Second, "nothing is held", func() bool { return len(s.open()) == 0 })
	})
}

// B50: what a filter sees of a bind and its session.
func TestB50BindsOfEveryKind(t *testing.T) {
	eachKind(t, func(s *scene, k bindKind) {
		at, b := k.bound(s)
		if k.source == "" {
			return
		}
		kind := map[string]string{"tcp": "BindTCP", "udp": "BindUDP"}[k.proto]
		e := s.p.Await(5*time.Second, kindTo(kind, at.String()))
		if e.Session != b.Session || e.Client != s.client.String() || !strings.EqualFold(e.Source, k.source) || e.Name != at.String() || e.Protocol != b.Protocol || e.Rule != b.Rule {
			s.t.Errorf("event %+v of bind %+v", e, b)
		}
		for _, x := range s.p.Must("sessions", lab.ProbeArgs{}).Sessions {
			if x.ID == b.Session && (x.Client != s.client.String() || slices.Contains(x.Flags, "Private") != (k.source == "explicit")) {
				s.t.Errorf("session %+v", x)
			}
		}
		s.p.Must("kill", lab.ProbeArgs{Conn: e.Conn})
		s.p.Await(5*time.Second, func(x lab.ProbeEvent) bool { return x.Kind == "Terminating" && x.Conn == e.Conn })
		if all := s.open(); slices.ContainsFunc(all, func(x listedBind) bool { return x.ID == b.ID }) {
			s.t.Errorf("binds %+v", all)
		}
	})
}
