package socks

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
)

// The versions.
const (
	version4 = 4
	version5 = 5
)

// The commands (RFC 1928, 4). SOCKS 4 has the first two.
const (
	cmdConnect   = 1
	cmdBind      = 2
	cmdAssociate = 3
)

// The address types (RFC 1928, 5).
const (
	addr4    = 1
	addrName = 3
	addr6    = 4
)

// The methods (RFC 1928, 3).
const (
	methodNone     = 0
	methodPassword = 2
	methodRefused  = 0xff
)

// code is the answer to a request in the words of SOCKS 5 (RFC 1928, 6).
type code byte

const (
	granted code = iota
	failed
	notAllowed
	netUnreachable
	hostUnreachable
	refused
	expired
	badCommand
	badAddress
)

// The two answers of SOCKS 4 that are in use.
const (
	granted4  = 90
	rejected4 = 91
)

var (
	// errNotSOCKS: what a client says is not the protocol.
	errNotSOCKS = errors.New("not SOCKS")
	// errAddressType: of a type that nobody knows.
	errAddressType = errors.New("unknown type of address")
)

// target is where a client wants to go: an address, or a name.
type target struct {
	addr netip.Addr // invalid: there is a name
	name string
	port uint16
}

func (t target) String() string {
	if t.addr.IsValid() {
		return netip.AddrPortFrom(t.addr, t.port).String()
	}
	return fmt.Sprintf("%q port %d", t.name, t.port)
}

// request is what a client asks for.
type request struct {
	version byte
	command byte
	target  target
}

// read reads exactly n bytes: what is behind a request belongs to somebody else.
func read(r io.Reader, n int) ([]byte, error) {
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	return b, err
}

// The longest texts: SOCKS 4 does not say how long a user or a name may be, a
// name of the DNS is not longer (RFC 1035, 2.3.4).
const (
	maxUser4 = 255
	maxName  = 255
)

// readText reads up to a zero byte.
func readText(r io.Reader, most int) (string, error) {
	var text []byte
	for {
		b, err := read(r, 1)
		if err != nil {
			return "", err
		}
		if b[0] == 0 {
			return string(text), nil
		}
		if len(text) == most {
			return "", fmt.Errorf("%w: a text of more than %d bytes", errNotSOCKS, most)
		}
		text = append(text, b[0])
	}
}

// readRequest4 reads a request of SOCKS 4 or 4a behind its version. The user
// that it names has proved nothing.
func readRequest4(r io.Reader) (request, error) {
	q := request{version: version4}
	b, err := read(r, 7)
	if err != nil {
		return q, err
	}
	q.command, q.target.port = b[0], binary.BigEndian.Uint16(b[1:])
	ip := [4]byte(b[3:])
	if _, err := readText(r, maxUser4); err != nil {
		return q, err
	}
	// 4a: 0.0.0.x stands for a name behind the user.
	if ip[0] == 0 && ip[1] == 0 && ip[2] == 0 && ip[3] != 0 {
		if q.target.name, err = readText(r, maxName); err != nil {
			return q, err
		}
		return q, nameError(q.target.name)
	}
	q.target.addr = netip.AddrFrom4(ip)
	return q, nil
}

// readMethods reads what a client of SOCKS 5 can prove itself by, behind the
// version.
func readMethods(r io.Reader) ([]byte, error) {
	b, err := read(r, 1)
	if err != nil {
		return nil, err
	}
	return read(r, int(b[0]))
}

// readPassword reads a user and his password (RFC 1929, 2).
func readPassword(r io.Reader) (user, password string, err error) {
	b, err := read(r, 2)
	if err != nil {
		return "", "", err
	}
	if b[0] != 1 {
		return "", "", fmt.Errorf("%w: version %d of a password", errNotSOCKS, b[0])
	}
	u, err := read(r, int(b[1]))
	if err != nil {
		return "", "", err
	}
	if b, err = read(r, 1); err != nil {
		return "", "", err
	}
	p, err := read(r, int(b[0]))
	return string(u), string(p), err
}

// readRequest5 reads a request of SOCKS 5. The reserved byte says nothing.
func readRequest5(r io.Reader) (request, error) {
	q := request{version: version5}
	b, err := read(r, 3)
	if err != nil {
		return q, err
	}
	if b[0] != version5 {
		return q, fmt.Errorf("%w: version %d of a request", errNotSOCKS, b[0])
	}
	q.command = b[1]
	q.target, err = readTarget(r)
	return q, err
}

// readTarget reads an address with its type before it (RFC 1928, 5).
func readTarget(r io.Reader) (target, error) {
	var t target
	b, err := read(r, 1)
	if err != nil {
		return t, err
	}
	n := 0
	switch kind := b[0]; kind {
	case addr4:
		n = 4
	case addr6:
		n = 16
	case addrName:
		if b, err = read(r, 1); err != nil {
			return t, err
		}
		if n = int(b[0]); n == 0 {
			return t, fmt.Errorf("%w: a name without a letter", errNotSOCKS)
		}
		t.name = " " // so that n bytes are a name
	default:
		return t, fmt.Errorf("%w: %d", errAddressType, kind)
	}
	if b, err = read(r, n+2); err != nil {
		return t, err
	}
	t.port = binary.BigEndian.Uint16(b[n:])
	if t.name != "" {
		t.name = string(b[:n])
		return t.literal(), nameError(t.name)
	}
	addr, _ := netip.AddrFromSlice(b[:n]) // 4 or 16 bytes
	t.addr = addr.Unmap()
	return t, nil
}

// literal is the target with an address where its name is one.
func (t target) literal() target {
	if a, err := netip.ParseAddr(t.name); err == nil && a.Zone() == "" {
		return target{addr: a.Unmap(), port: t.port}
	}
	return t
}

// nameError says what speaks against a name before anybody is asked for it.
func nameError(name string) error {
	if name == "" || bytes.ContainsAny([]byte(name), "\x00 %/") {
		return fmt.Errorf("%w: the name %q", errNotSOCKS, name)
	}
	return nil
}

// appendAddress appends an address with its type. An invalid one is 0.0.0.0:0:
// there is none to tell.
func appendAddress(b []byte, a netip.AddrPort) []byte {
	addr := a.Addr().Unmap()
	switch {
	case !addr.IsValid():
		return append(b, addr4, 0, 0, 0, 0, 0, 0)
	case addr.Is4():
		b = append(b, addr4)
	default:
		b = append(b, addr6)
	}
	b = append(b, addr.AsSlice()...)
	return binary.BigEndian.AppendUint16(b, a.Port())
}

// answer is a reply, with the address that is bound, or the peer's.
func (q request) answer(c code, a netip.AddrPort) []byte {
	if q.version == version5 {
		return appendAddress([]byte{version5, byte(c), 0}, a)
	}
	b := []byte{0, rejected4}
	if c == granted {
		b[1] = granted4
	}
	addr := a.Addr().Unmap()
	if !addr.Is4() { // SOCKS 4 has no word for it
		return append(b, 0, 0, 0, 0, 0, 0)
	}
	b = binary.BigEndian.AppendUint16(b, a.Port())
	return append(b, addr.AsSlice()...)
}

// datagramHead is what stands before a datagram (RFC 1928, 7).
type datagramHead struct {
	fragment byte
	target   target
}

// cutDatagram takes the head off a client's datagram.
func cutDatagram(b []byte) (h datagramHead, payload []byte, err error) {
	r := bytes.NewReader(b)
	head, err := read(r, 3)
	if err != nil {
		return h, nil, err
	}
	h.fragment = head[2]
	if h.target, err = readTarget(r); err != nil {
		return h, nil, err
	}
	return h, b[len(b)-r.Len():], nil
}

// maxHead is the longest head of a datagram to a client.
const maxHead = 3 + 1 + 16 + 2

// appendHead appends the head of a datagram that came from a peer.
func appendHead(b []byte, peer netip.AddrPort) []byte {
	return appendAddress(append(b, 0, 0, 0), peer)
}
