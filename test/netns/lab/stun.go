package lab

import (
	"errors"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/pion/stun/v3"
)

// STUN is a server for the discovery of NAT behaviour (RFC 5780): two addresses,
// one at srv and one at other, with two ports each. What comes to one of the four
// sockets can be answered from any of them. It ends with the lab.
type STUN struct {
	// Primary is where a client begins; Other differs in address and port.
	Primary, Other netip.AddrPort
	sockets        [2][2]*net.UDPConn // by address, by port
}

// The server's ports. 3478 is the protocol's own (RFC 8489, section 8).
const stunPort, stunOtherPort = 3478, 3479

// The bits of CHANGE-REQUEST (RFC 5780, section 7.2).
const changePort, changeAddr = 0x02, 0x04

// STUN4 starts the server on the IPv4 addresses, STUN6 on those of IPv6.
func (l *Lab) STUN4() *STUN { return l.stun("udp4", Srv4, Other4) }

// STUN6 is STUN4 for IPv6.
func (l *Lab) STUN6() *STUN { return l.stun("udp6", Srv6, Other6) }

func (l *Lab) stun(network string, primary, other netip.Addr) *STUN {
	l.T.Helper()
	s := &STUN{Primary: netip.AddrPortFrom(primary, stunPort), Other: netip.AddrPortFrom(other, stunOtherPort)}
	for a, host := range []*Host{l.Srv, l.Other} {
		for p, port := range []uint16{stunPort, stunOtherPort} {
			s.sockets[a][p] = host.MustListenPacket(network, netip.AddrPortFrom([]netip.Addr{primary, other}[a], port).String())
		}
	}
	for a := range s.sockets {
		for p := range s.sockets[a] {
			go s.serve(a, p)
		}
	}
	return s
}

// serve answers what comes to one of the sockets.
func (s *STUN) serve(a, p int) {
	b := make([]byte, 1500)
	for {
		n, from, err := s.sockets[a][p].ReadFromUDPAddrPort(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error for an answer
		}
		request := &stun.Message{Raw: slices.Clone(b[:n])}
		if request.Decode() != nil || request.Type != stun.BindingRequest {
			continue
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		x, y, code := asked(request, a, p)
		answer, err := s.answer(request, code, from, a, p, x, y)
		if err == nil {
			_, _ = s.sockets[x][y].WriteToUDPAddrPort(answer.Raw, from)
		}
	}
}

// asked gives the socket that is to answer a request to socket a, p, and an error
// code; 0: none.
func asked(m *stun.Message, a, p int) (x, y int, code stun.ErrorCode) {
	x, y = a, p
	for _, attribute := range m.Attributes {
		switch v := attribute.Value; {
		case attribute.Type != stun.AttrChangeRequest && attribute.Type.Required():
			return a, p, stun.CodeUnknownAttribute
		case attribute.Type == stun.AttrChangeRequest && len(v) != 4:
			return a, p, stun.CodeBadRequest
		case attribute.Type == stun.AttrChangeRequest:
			if v[3]&changeAddr != 0 {
				x = 1 - x
			}
			if v[3]&changePort != 0 {
				y = 1 - y
			}
		}
	}
	return x, y, 0
}

// answer builds the answer that socket x, y sends to a request that came to
// socket a, p.
func (s *STUN) answer(request *stun.Message, code stun.ErrorCode, from netip.AddrPort, a, p, x, y int) (*stun.Message, error) {
	if code != 0 {
		setters := []stun.Setter{request, stun.BindingError, code}
		if code == stun.CodeUnknownAttribute {
			var unknown stun.UnknownAttributes
			for _, attribute := range request.Attributes {
				if attribute.Type.Required() && attribute.Type != stun.AttrChangeRequest {
					unknown = append(unknown, attribute.Type)
				}
			}
			setters = append(setters, unknown)
		}
		return stun.Build(setters...)
	}
	origin, other := s.address(x, y), s.address(1-a, 1-p)
	return stun.Build(
		request, stun.BindingSuccess,
		&stun.MappedAddress{IP: from.Addr().AsSlice(), Port: int(from.Port())},
		&stun.XORMappedAddress{IP: from.Addr().AsSlice(), Port: int(from.Port())},
		&stun.ResponseOrigin{IP: origin.Addr().AsSlice(), Port: int(origin.Port())},
		&stun.OtherAddress{IP: other.Addr().AsSlice(), Port: int(other.Port())},
	)
}

func (s *STUN) address(a, p int) netip.AddrPort {
	return netip.AddrPortFrom([]netip.Addr{s.Primary.Addr(), s.Other.Addr()}[a], []uint16{stunPort, stunOtherPort}[p])
}

// behaviour is what pion's client says in the end: "=> NAT mapping behavior:
// endpoint independent".
var behaviour = regexp.MustCompile(`NAT (mapping|filtering) behavior: (.+)`)

// NATBehaviour runs the reference client, pion's stun-nat-behaviour, on this
// host against a server and gives what it says of mapping and filtering. It
// sends each request once, takes silence for a filter after one second, or more
// on a slow machine, and any answer for that to its last request: a Discovery
// is more careful.
func (h *Host) NATBehaviour(server netip.AddrPort) (mapping, filtering, output string) {
	h.lab.T.Helper()
	path, err := stunClient.get()
	if err != nil {
		h.lab.T.Fatal(err)
	}
	wait := int(Patience(time.Second).Seconds())
	output, status, err := h.Try(30*time.Second, path, "-server", server.String(), "-timeout", strconv.Itoa(wait))
	if err != nil || status != 0 {
		h.lab.T.Fatalf("%s: stun-nat-behaviour: status %d, %v\n%s", h.Name, status, err, output)
	}
	found := map[string]string{}
	for _, m := range behaviour.FindAllStringSubmatch(output, -1) {
		found[m[1]] = m[2]
	}
	return found["mapping"], found["filtering"], output
}

// Discovery is a client for the tests of RFC 5780 that are not in the reference
// client: from a port of the test's choice, with every request repeated until it
// is answered, and over IPv6.
type Discovery struct {
	conn *net.UDPConn
	host *Host
}

// Discover opens a client's socket at an address of this host; port 0: any.
func (h *Host) Discover(at netip.AddrPort) *Discovery {
	h.lab.T.Helper()
	network := "udp6"
	if at.Addr().Is4() {
		network = "udp4"
	}
	return &Discovery{h.MustListenPacket(network, at.String()), h}
}

// Ask sends a binding request to a server's socket and gives the external
// address that the answer names, and where the answer came from. change asks for
// an answer from elsewhere. Not ok: no answer came.
func (d *Discovery) Ask(to netip.AddrPort, change uint8) (mapped, origin netip.AddrPort, ok bool) {
	d.host.lab.T.Helper()
	request := stun.MustBuild(stun.TransactionID, stun.BindingRequest)
	if change != 0 {
		request.Add(stun.AttrChangeRequest, []byte{0, 0, 0, change})
	}
	b := make([]byte, 1500)
	for range 3 {
		if _, err := d.conn.WriteToUDPAddrPort(request.Raw, to); err != nil {
			d.host.lab.T.Fatalf("%s: to %s: %v", d.host.Name, to, err)
		}
		if err := d.conn.SetReadDeadline(time.Now().Add(Patience(400 * time.Millisecond))); err != nil {
			d.host.lab.T.Fatal(err)
		}
		for {
			n, from, err := d.conn.ReadFromUDPAddrPort(b)
			if err != nil {
				break // its time is over
			}
			answer := &stun.Message{Raw: b[:n]}
			var mapped stun.XORMappedAddress
			if answer.Decode() != nil || answer.TransactionID != request.TransactionID || mapped.GetFrom(answer) != nil {
				continue
			}
			ip, _ := netip.AddrFromSlice(mapped.IP)
			return netip.AddrPortFrom(ip.Unmap(), uint16(mapped.Port)), netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), true
		}
	}
	return netip.AddrPort{}, netip.AddrPort{}, false
}

// Mapping is RFC 5780's test of section 4.3: the three external addresses that
// the server's sockets see of this client, other address and primary port in the
// middle.
func (d *Discovery) Mapping(s *STUN) (seen [3]netip.AddrPort) {
	d.host.lab.T.Helper()
	for i, to := range []netip.AddrPort{s.Primary, netip.AddrPortFrom(s.Other.Addr(), s.Primary.Port()), s.Other} {
		var ok bool
		if seen[i], _, ok = d.Ask(to, 0); !ok {
			d.host.lab.T.Fatalf("%s: no answer from %s", d.host.Name, to)
		}
	}
	return seen
}

// Filtering is the test of section 4.4: whether the primary socket's answer
// comes, one from another port, and one from another address and port. Use a
// client that has not yet asked anything else.
func (d *Discovery) Filtering(s *STUN) (same, otherPort, otherAddr bool) {
	d.host.lab.T.Helper()
	_, _, same = d.Ask(s.Primary, 0)
	_, _, otherPort = d.Ask(s.Primary, changePort)
	_, _, otherAddr = d.Ask(s.Primary, changeAddr|changePort)
	return same, otherPort, otherAddr
}
