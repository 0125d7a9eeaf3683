package netns_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// family has the topology's addresses of one address family. spare is a gateway
// address outside that nothing is translated to unless somebody asks for it.
type family struct {
	name                                                               string
	client, second, inside, outside, spare, srv, other, nobody, remote netip.Addr
}

var families = []family{
	{
		"IPv4", lab.Client4, lab.Second4, lab.Inside4, lab.Outside4, lab.Outside4b, lab.Srv4, lab.Other4, lab.Nobody4,
		netip.MustParseAddr("198.51.100.1"),
	},
	{
		"IPv6", lab.Client6, lab.Second6, lab.Inside6, lab.Outside6, lab.Outside6, lab.Srv6, lab.Other6, lab.Nobody6,
		netip.MustParseAddr("2001:db8:c::1"),
	},
}

// seen is the address that an outside host sees of the client: IPv4 is
// translated, IPv6 routed.
func (f family) seen() netip.Addr {
	if f.client.Is4() {
		return f.outside
	}
	return f.client
}

// network is udp4, tcp6 and so on.
func (f family) network(proto string) string {
	if f.client.Is4() {
		return proto + "4"
	}
	return proto + "6"
}

// any is the family's unspecified address.
func (f family) any() netip.Addr {
	if f.client.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

func to(a netip.Addr, port int) netip.AddrPort { return netip.AddrPortFrom(a, uint16(port)) }

// eachFamily runs a test for each address family, in a lab of its own.
func eachFamily(t *testing.T, run func(t *testing.T, l *lab.Lab, f family)) {
	t.Parallel()
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			run(t, lab.New(t), f)
		})
	}
}

// scene is a lab whose gateway runs, with the first probe filter at hand.
type scene struct {
	*lab.Lab
	family
	t *testing.T
	g *lab.Gateway
	p *lab.Probe
}

func play(t *testing.T, l *lab.Lab, f family, c lab.Config) *scene {
	t.Helper()
	return &scene{l, f, t, l.Gateway(c), l.Probe()}
}

// eachScene is eachFamily with servers that echo at srv's ports 7 and 2100 to
// 2102 and other's 2100, and a gateway with the configuration probed.
func eachScene(t *testing.T, run func(s *scene)) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		run(play(t, l, f, probed()))
	})
}

func echoes(l *lab.Lab) {
	for _, port := range []int{7, 2100, 2101, 2102} {
		l.Srv.EchoTCP(port)
		l.Srv.EchoUDP(port)
	}
	l.Other.EchoTCP(2100)
	l.Other.EchoUDP(2100)
}

// primary is a connection of the client that the probe was asked about.
type primary struct {
	net.Conn
	lab.ProbeEvent
	id uint64 // of the connection, for the probe
}

// connect opens one to srv's port 7.
func (s *scene) connect() primary {
	s.t.Helper()
	var c net.Conn
	var err error
	for tries := 3; ; tries-- {
		ctx, cancel := context.WithTimeout(s.t.Context(), lab.Patience(5*time.Second))
		c, err = s.Client.Dial(ctx, "tcp", to(s.srv, 7).String())
		cancel()
		// A machine that is emulated may miss a filter's deadline, and then the
		// flow is refused.
		if tries == 0 || !slow() || !errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
	}
	if err != nil {
		s.t.Fatalf("the primary connection: %v", err)
	}
	s.OnClose(func() { _ = c.Close() })
	echo(s.t, c, "primary")
	e := s.asked("ConnectTCP", c)
	return primary{c, e, e.Conn}
}

// slow says that this machine is emulated.
func slow() bool { return lab.Patience(time.Second) > time.Second }

// dial connects and lets a line go to and fro.
func (s *scene) dial(from *lab.Host, at netip.AddrPort) net.Conn {
	s.t.Helper()
	c := from.MustDial("tcp", at.String(), 5*time.Second)
	echo(s.t, c, "to "+at.String())
	return c
}

// talk is dial for UDP: a socket of its own and a datagram to and fro.
func (s *scene) talk(from *lab.Host, at netip.AddrPort) net.Conn {
	s.t.Helper()
	c := from.MustDial("udp", at.String(), 5*time.Second)
	line := "datagram to " + at.String()
	if slow() {
		// One datagram may wait too long for its judgement; a second one finds
		// the filter at hand.
		mustWrite(s.t, c, line)
		if err := c.SetReadDeadline(time.Now().Add(lab.Patience(time.Second))); err != nil {
			s.t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 100)); !timedOut(err) {
			return c
		}
	}
	echo(s.t, c, line)
	return c
}

// asked waits for the event of a kind about the client's connection.
func (s *scene) asked(kind string, c net.Conn) lab.ProbeEvent {
	s.t.Helper()
	src := c.LocalAddr().String()
	of := func(e lab.ProbeEvent) bool { return e.Kind == kind && e.Src == src }
	s.p.Await(3*time.Second, of)
	all := s.p.Events(of) // an attempt before may have had the same port
	return all[len(all)-1]
}

// must gives an order about a primary connection and its session.
func (s *scene) must(op string, e primary, a lab.ProbeArgs) lab.ProbeReply {
	s.t.Helper()
	a.Session, a.Conn = e.Session, e.id
	return s.p.Must(op, a)
}

// refused gives such an order and wants this error.
func (s *scene) refused(want, op string, e primary, a lab.ProbeArgs) {
	s.t.Helper()
	a.Session, a.Conn = e.Session, e.id
	s.answers(want, op, a)
}

// answers gives an order and wants this error; empty: none.
func (s *scene) answers(want, op string, a lab.ProbeArgs) {
	s.t.Helper()
	if r := s.p.Ask(op, a); r.Error != want {
		s.t.Errorf("%s: error %q, want %q", op, r.Error, want)
	}
}

// on sets what events of a kind get.
func (s *scene) on(kind, do string) { s.p.Must("on", lab.ProbeArgs{Kind: kind, Do: do}) }

// count is how many events of a kind the probe got.
func (s *scene) count(p *lab.Probe, kind string) int {
	s.t.Helper()
	return p.Must("count", lab.ProbeArgs{Kind: kind}).Count
}

// silent wants no answer at all to a connect.
func (s *scene) silent(from *lab.Host, at netip.AddrPort, why string) {
	s.t.Helper()
	if err := briefly(from, at); !timedOut(err) {
		s.t.Errorf("%s to %s, %s: %v, want silence", from.Name, at, why, err)
	}
}

// rejected wants a connect to be refused at once.
func (s *scene) rejected(from *lab.Host, at netip.AddrPort, why string) {
	s.t.Helper()
	start := time.Now()
	err := connect(from, at, 5*time.Second)
	if !errors.Is(err, syscall.ECONNREFUSED) || time.Since(start) > lab.Patience(900*time.Millisecond) {
		s.t.Errorf("%s to %s, %s: %v after %v, want a reset at once", from.Name, at, why, err, time.Since(start))
	}
}

// mute wants no answer to a datagram, not even an error.
func (s *scene) mute(from *lab.Host, at netip.AddrPort, why string) {
	s.t.Helper()
	c := from.MustDial("udp", at.String(), time.Second)
	mustWrite(s.t, c, "anybody?")
	if err := c.SetReadDeadline(time.Now().Add(silence())); err != nil {
		s.t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 100)); !timedOut(err) {
		s.t.Errorf("a datagram of %s to %s, %s: %d bytes came back, %v", from.Name, at, why, n, err)
	}
}

// reads wants exactly this text from a connection.
func (s *scene) reads(c net.Conn, want string) {
	s.t.Helper()
	deadline(s.t, c, 5*time.Second)
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != want {
		s.t.Errorf("read %q, %v; want %q", got[:n], err, want)
	}
}

// isReset wants an idle connection to end by a reset soon.
func (s *scene) isReset(c net.Conn, what string) {
	s.t.Helper()
	deadline(s.t, c, 3*time.Second)
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		s.t.Errorf("%s reads %v, want a reset", what, err)
	}
}

// heard are the events of a probe that satisfy ok, all until now.
func heard(p *lab.Probe, ok func(lab.ProbeEvent) bool) []lab.ProbeEvent {
	p.Must("count", lab.ProbeArgs{}) // answered: the events before it are here
	return p.Events(ok)
}

// filtered is what the data filters on a connection saw of one side.
func filtered(p *lab.Probe, conn uint64, side string) string {
	var b bytes.Buffer
	for _, e := range p.Events(func(e lab.ProbeEvent) bool { return e.Kind == "Bytes" && e.Conn == conn && e.FromSide == side }) {
		b.Write(e.Data)
	}
	return b.String()
}

// probed is a protocol that the probe filter understands, under a rule that
// names it; plain is the same kind of protocol without a filter.
func probed() lab.Config {
	return lab.Config{
		Protocols: "  probed: {tcp: 7, udp: 7, filter: probe}\n  plain: {tcp: 8, udp: 8}\n",
		Rules: "  - {name: probed, action: allow, from: lan, to: wan, protocols: [probed], filters: {probe: {}}}\n" +
			"  - {name: plain, action: allow, from: lan, to: wan, protocols: [plain]}\n",
	}
}

func kindTo(kind, dst string) func(lab.ProbeEvent) bool {
	return func(e lab.ProbeEvent) bool { return e.Kind == kind && e.Dst == dst }
}

// watching is a probe that hears of everything, secondary connections too.
func watching() lab.ProbeSetup {
	all := lab.ProbeEvents{Types: lab.AllEvents(), Secondary: true}
	return lab.ProbeSetup{Init: all, Session: all}
}

// anywhere is a probe that hears of the flows that another one brings to user
// space, secondary ones too.
func anywhere() lab.ProbeSetup {
	all := lab.ProbeEvents{Types: lab.AllEvents(), Secondary: true, Any: true}
	return lab.ProbeSetup{Init: all, Session: all}
}
