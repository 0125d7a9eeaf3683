package netns_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// The users of these tests, each with his own name for a password, backwards.
const socksUsers = `
users:
  alice: "$2a$08$NugRtR308pn3C8V10J.a3uFIRkfMrUz9xXhwUQqcu.uvvhh5rj9aq"
  bob: "$2a$08$s7/825bepN8O9KDiJjH6eOOXdaGZNIcHKaF51OJeosRM6pS1paV7a"
`

// byPassword has SOCKS served to those who say who they are, openly to all.
const (
	byPassword = socksUsers + "socks: {networks: lan, authentication: password}\n"
	openly     = "socks: {networks: lan, connect_timeout: 5, resolvers: [203.0.113.10]}\n"
)

// socksConfig is a configuration with SOCKS: the probe hears of TCP and UDP port 7
// and 21, also of secondary connections.
func socksConfig(extra string) lab.Config {
	c := probed()
	c.Protocols = "  probed: {tcp: [7, 2100-2102], udp: 7, filter: probe}\n  plain: {tcp: [8, 9, 80], udp: 8}\n"
	c.Extra = extra
	return c
}

// socksAt is where the gateway serves the client's family.
func (s *scene) socksAt() netip.AddrPort { return to(s.inside, 1080) }

// The commands of SOCKS.
const (
	socksConnect   = 1
	socksBind      = 2
	socksAssociate = 3
)

// socksAddress is an address as SOCKS 5 has it.
func socksAddress(a netip.AddrPort) []byte {
	kind := byte(1)
	if a.Addr().Is6() {
		kind = 4
	}
	return binary.BigEndian.AppendUint16(append([]byte{kind}, a.Addr().AsSlice()...), a.Port())
}

// socks is a connection to the gateway's port with what came of a request.
type socks struct {
	net.Conn
	code byte
	at   netip.AddrPort
}

// ask5 asks by SOCKS 5; user may be empty.
func (s *scene) ask5(from *lab.Host, user string, command byte, target []byte) (socks, error) {
	c := from.MustDial("tcp", s.socksAt().String(), 5*time.Second)
	k := socks{Conn: c}
	if err := c.SetDeadline(time.Now().Add(lab.Patience(15 * time.Second))); err != nil {
		return k, err
	}
	method := byte(0)
	if user != "" {
		method = 2
	}
	if err := socksSay(c, []byte{5, 1, method}, []byte{5, method}); err != nil {
		return k, fmt.Errorf("method: %w", err)
	}
	if user != "" {
		secret := backwards(user)
		proof := append([]byte{1, byte(len(user))}, user...)
		proof = append(append(proof, byte(len(secret))), secret...)
		if err := socksSay(c, proof, []byte{1, 0}); err != nil {
			return k, fmt.Errorf("password: %w", err)
		}
	}
	if _, err := c.Write(append([]byte{5, command, 0}, target...)); err != nil {
		return k, err
	}
	err := k.answer()
	return k, err
}

func backwards(s string) string {
	b := []byte(s)
	for i, j := 0, len(b)-1; i < j; i, j = i+1, j-1 {
		b[i], b[j] = b[j], b[i]
	}
	return string(b)
}

func socksSay(c io.ReadWriter, what, want []byte) error {
	if _, err := c.Write(what); err != nil {
		return err
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("answer % x, want % x", got, want)
	}
	return nil
}

// answer reads a reply of SOCKS 5.
func (k *socks) answer() error {
	head := make([]byte, 4)
	if _, err := io.ReadFull(k.Conn, head); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	n := map[byte]int{1: 4, 4: 16}[head[3]]
	if head[0] != 5 || head[2] != 0 || n == 0 {
		return fmt.Errorf("answer begins % x", head)
	}
	rest := make([]byte, n+2)
	if _, err := io.ReadFull(k.Conn, rest); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	addr, _ := netip.AddrFromSlice(rest[:n])
	k.code, k.at = head[1], netip.AddrPortFrom(addr, binary.BigEndian.Uint16(rest[n:]))
	return nil
}

// must5 is ask5 that must be granted.
func (s *scene) must5(from *lab.Host, user string, command byte, target netip.AddrPort) socks {
	s.t.Helper()
	k, err := s.ask5(from, user, command, socksAddress(target))
	if err != nil || k.code != 0 {
		s.t.Fatalf("SOCKS command %d for %v: code %d, %v", command, target, k.code, err)
	}
	return k
}

// code5 asks and wants this answer, and the end of the connection.
func (s *scene) code5(want byte, user string, command byte, target []byte) {
	s.t.Helper()
	k, err := s.ask5(s.Client, user, command, target)
	if err != nil || k.code != want {
		s.t.Errorf("SOCKS command %d for % x: code %d, %v; want %d", command, target, k.code, err, want)
		return
	}
	if n, err := k.Read(make([]byte, 1)); want != 0 && !errors.Is(err, io.EOF) {
		s.t.Errorf("after the refusal: %d bytes, %v", n, err)
	}
}

// everybody is an address of the outside's link at which the gateway hears, too:
// the broadcast address, or in IPv6 that of the link's routers.
func (s *scene) everybody() netip.Addr {
	if s.srv.Is6() {
		return netip.MustParseAddr("2001:db8:b::")
	}
	return netip.MustParseAddr("203.0.113.255")
}

// url is an http address of srv's.
func (s *scene) url(port, bytes int) string {
	return fmt.Sprintf("http://%v/%d", to(s.srv, port), bytes)
}

// bracketed is an address as a URL has it.
func bracketed(a netip.Addr) string {
	if a.Is6() {
		return "[" + a.String() + "]"
	}
	return a.String()
}

// eachSocks is eachFamily with echoing servers and a gateway that serves SOCKS.
func eachSocks(t *testing.T, c lab.Config, run func(s *scene)) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		run(play(t, l, f, c))
	})
}

// flowRecord waits for the one record of a flow to a destination.
func (s *scene) flowRecord(dst netip.AddrPort, ok func(lab.Record) bool) lab.Record {
	s.t.Helper()
	return s.g.AwaitRecord("flow", 10*time.Second, func(r lab.Record) bool { return r.Text("dst") == dst.String() && ok(r) })
}

func resultIs(want string) func(lab.Record) bool {
	return func(r lab.Record) bool { return strings.EqualFold(r.Text("result"), want) }
}

// names serves the name srv.test at srv, and says of others that nobody has
// them.
func (s *scene) names() {
	s.t.Helper()
	c := s.Srv.MustListenPacket("udp4", "0.0.0.0:53")
	go func() {
		b := make([]byte, 1500)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return // closed
			}
			if answer, err := nameAnswer(b[:n]); err == nil {
				_, _ = c.WriteToUDPAddrPort(answer, from)
			}
		}
	}()
}

// nameAnswer is the answer to a question of the DNS.
func nameAnswer(question []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(question); err != nil || len(m.Questions) != 1 {
		return nil, fmt.Errorf("no question: %w", err)
	}
	q := m.Questions[0]
	m.Response, m.Authoritative, m.Additionals = true, true, nil
	h := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 60}
	switch {
	case q.Name.String() != "srv.test.":
		m.RCode = dnsmessage.RCodeNameError
	case q.Type == dnsmessage.TypeA:
		m.Answers = []dnsmessage.Resource{{Header: h, Body: &dnsmessage.AResource{A: lab.Srv4.As4()}}}
	case q.Type == dnsmessage.TypeAAAA:
		m.Answers = []dnsmessage.Resource{{Header: h, Body: &dnsmessage.AAAAResource{AAAA: lab.Srv6.As16()}}}
	}
	return m.Pack()
}
