package netns_test

import (
	"encoding/binary"
	"encoding/hex"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// What RFC 6887 calls things, sections 7.4, 11.1 and 13.
const (
	pcpAnnounce, pcpMap, pcpPeer = 0, 1, 2
	pcpTCP, pcpUDP               = 6, 17

	pcpSuccess, pcpUnsuppVersion, pcpNotAuthorized, pcpMalformedRequest     = 0, 1, 2, 3
	pcpUnsuppOpcode, pcpUnsuppOption, pcpMalformedOption, pcpNetworkFailure = 4, 5, 6, 7
	pcpNoResources, pcpUnsuppProtocol, pcpUserExQuota, pcpCannotProvide     = 8, 9, 10, 11
	pcpAddressMismatch, pcpExcessivePeers                                   = 12, 13

	pcpShort, pcpLong = 30, 1800 // lifetimes of errors
)

// pcpAsk is a MAP or PEER request, as section 11.1 draws it.
type pcpAsk struct {
	client    netip.Addr // that it names; zero: its own
	lifetime  uint32
	nonce     string // its first octets
	proto     byte
	port      int
	suggested netip.AddrPort
	remote    netip.AddrPort // of PEER
	options   []byte
}

// pcpAnswer is a response.
type pcpAnswer struct {
	text            []byte
	opcode          byte
	result          int
	lifetime, epoch uint32
	external        netip.AddrPort // of MAP and PEER
}

func (a pcpAnswer) String() string { return hex.EncodeToString(a.text) }

func wide(a netip.Addr) []byte {
	if !a.IsValid() {
		a = netip.IPv6Unspecified()
	}
	b := a.As16()
	return b[:]
}

func pcpHeader(opcode byte, lifetime uint32, client netip.Addr) []byte {
	b := binary.BigEndian.AppendUint32([]byte{2, opcode, 0, 0}, lifetime)
	return append(b, wide(client)...)
}

// encode writes a request of a client.
func (a pcpAsk) encode(opcode byte, from netip.Addr) []byte {
	if a.client.IsValid() {
		from = a.client
	}
	b := pcpHeader(opcode, a.lifetime, from)
	b = append(b, append([]byte(a.nonce), make([]byte, 12)...)[:12]...)
	b = append(b, a.proto, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(a.port))
	b = binary.BigEndian.AppendUint16(b, a.suggested.Port())
	b = append(b, wide(a.suggested.Addr())...)
	if opcode == pcpPeer {
		b = binary.BigEndian.AppendUint16(b, a.remote.Port())
		b = append(append(b, 0, 0), wide(a.remote.Addr())...)
	}
	return append(b, a.options...)
}

// pcpOption is an option with its padding, section 7.3.
func pcpOption(code byte, data []byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{code, 0}, uint16(len(data)))
	b = append(b, data...)
	return append(b, make([]byte, (4-len(data)%4)%4)...)
}

// pcpFilter is a FILTER option; its length counts the bits of the mapped form.
func pcpFilter(bits int, a netip.AddrPort) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, byte(bits)}, a.Port())
	return pcpOption(3, append(b, wide(a.Addr())...))
}

// only is a FILTER for one host.
func only(a netip.Addr) []byte { return pcpFilter(128, netip.AddrPortFrom(a, 0)) }

var (
	pcpPreferFailure = pcpOption(2, nil)
	pcpClear         = pcpFilter(0, netip.AddrPort{})
)

// pcpHost asks the gateway's server.
type pcpHost struct {
	t    testing.TB
	conn net.Conn
	addr netip.Addr
}

// pcp is a client on a host, and waits until the server answers.
func (s *scene) pcp(h *lab.Host) *pcpHost {
	s.t.Helper()
	c := &pcpHost{s.t, h.MustDial("udp", to(s.inside, 5351).String(), 5*time.Second), addrOf(h, s.client)}
	lab.Eventually(s.t, 10*time.Second, "the server answers", func() bool {
		_, ok := c.try(pcpHeader(pcpAnnounce, 0, c.addr), silence())
		return ok
	})
	return c
}

// try sends a datagram and waits for the answer. One that comes late, to another
// opcode, is passed over.
func (c *pcpHost) try(b []byte, d time.Duration) (pcpAnswer, bool) {
	c.t.Helper()
	mustWrite(c.t, c.conn, string(b))
	if err := c.conn.SetReadDeadline(time.Now().Add(d)); err != nil {
		c.t.Fatal(err)
	}
	for {
		in := make([]byte, 2000)
		n, err := c.conn.Read(in)
		if err != nil {
			return pcpAnswer{}, false
		}
		if a := decodePCP(in[:n]); len(b) < 2 || len(a.text) < 24 || a.opcode == b[1]&0x7f {
			return a, true
		}
	}
}

func decodePCP(b []byte) (a pcpAnswer) {
	a.text = b
	if len(b) < 24 || b[1] < 0x80 {
		return a
	}
	a.opcode, a.result = b[1]&0x7f, int(b[3])
	a.lifetime, a.epoch = binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])
	if len(b) >= 60 {
		ip, _ := netip.AddrFromSlice(b[44:60])
		a.external = netip.AddrPortFrom(ip.Unmap(), binary.BigEndian.Uint16(b[42:]))
	}
	return a
}

// says wants an answer.
func (c *pcpHost) says(b []byte) pcpAnswer {
	c.t.Helper()
	a, ok := c.try(b, lab.Patience(5*time.Second))
	if !ok || len(a.text) < 24 || a.text[0] != 2 || a.text[1]&0x80 == 0 || a.text[2] != 0 {
		c.t.Fatalf("asked %x: answer %v", b, a)
	}
	return a
}

// gets asks and wants this result.
func (c *pcpHost) gets(want int, opcode byte, ask pcpAsk, why string) pcpAnswer {
	c.t.Helper()
	a := c.says(ask.encode(opcode, c.addr))
	if a.result != want || a.opcode != opcode {
		c.t.Errorf("%s: result %d, opcode %d; want %d, %d: %v", why, a.result, a.opcode, want, opcode, a)
	}
	return a
}

// maps asks for a mapping and wants it.
func (c *pcpHost) maps(ask pcpAsk) pcpAnswer {
	c.t.Helper()
	a := c.gets(pcpSuccess, pcpMap, ask, "MAP")
	if a.external.Port() == 0 || a.external.Addr().IsUnspecified() {
		c.t.Fatalf("mapped to %v", a.external)
	}
	return a
}

// served is a configuration with the server on; more adds to its section.
func served(more string) lab.Config {
	return lab.Config{
		Rules:     "  - {name: maps, action: allow, from: lan, to: wan, protocols: [pcp, plain]}\n",
		Protocols: "  plain: {tcp: [7, 2100-2102], udp: [7, 2100-2102]}\n",
		Extra:     "pcp:\n  networks: lan\n" + more,
	}
}

// eachServed is eachFamily with echo servers on both sides, and the server on.
func eachServed(t *testing.T, more string, run func(s *scene, c *pcpHost)) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		for _, port := range []int{4000, 4001} {
			l.Client.EchoTCP(port)
			l.Client.EchoUDP(port)
		}
		s := play(t, l, f, served(more))
		run(s, s.pcp(l.Client))
	})
}
