package netns_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// RFC 4787, REQ-14: datagrams in fragments pass in both directions, as first
// packet of a flow and later, in order and out of order.
func TestNUDP14Fragments(t *testing.T) {
	for _, m := range []mode{cone, {byAddressPort, byAddressPort}} {
		t.Run(m.String(), func(t *testing.T) {
			t.Parallel()
			l := lab.New(t)
			l.Gateway(m.config(""))
			server, client := socket(l.Srv, to(lab.Srv4, 9000)), socket(l.Client, clientAt)
			arrives := func(what, text string) netip.AddrPort {
				t.Helper()
				from, ok := hears(t, server, text, lab.Patience(3*time.Second))
				if !ok {
					t.Fatalf("%s did not arrive", what)
				}
				return from
			}
			text := long("the first")
			if _, err := client.WriteToUDPAddrPort([]byte(text), addrPort(server)); err != nil {
				t.Fatal(err)
			}
			at := arrives("the first packet of a flow", text)
			for i, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 2, 0}} {
				text := long(fmt.Sprint("out", order))
				inFragments(t, l.Client, clientAt, addrPort(server), text, order, uint16(100+i))
				if from := arrives(fmt.Sprintf("a datagram in fragments %v", order), text); from != at {
					t.Errorf("fragments %v came from %v, want %v", order, from, at)
				}
				text = long(fmt.Sprint("in", order))
				inFragments(t, l.Srv, addrPort(server), at, text, order, uint16(200+i))
				if from, ok := hears(t, client, text, lab.Patience(3*time.Second)); !ok || from != addrPort(server) {
					t.Errorf("inbound fragments %v: arrived %v, from %v", order, ok, from)
				}
			}
			// Out of order, and the first packet of its endpoint.
			fresh := netip.AddrPortFrom(lab.Client4, 5002)
			text = long("out of order and new")
			inFragments(t, l.Client, fresh, addrPort(server), text, []int{2, 0, 1}, 300)
			arrives("the first packet of an endpoint, in fragments out of order", text)
		})
	}
}

// long is a text that needs three fragments.
func long(begin string) string { return begin + strings.Repeat(".", 3000) }

// inFragments sends a UDP datagram as three IPv4 fragments in the order that is
// said (RFC 791), through a raw socket.
func inFragments(t testing.TB, h *lab.Host, from, to netip.AddrPort, text string, order []int, id uint16) {
	t.Helper()
	const piece = 1200 // a multiple of 8
	udp := binary.BigEndian.AppendUint16(nil, from.Port())
	udp = binary.BigEndian.AppendUint16(udp, to.Port())
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(text)))
	udp = append(append(udp, 0, 0), text...) // no checksum
	pieces := slices.Collect(slices.Chunk(udp, piece))
	err := h.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return fmt.Errorf("raw socket: %w", err)
		}
		defer unix.Close(fd)
		for _, i := range order {
			offset := uint16(i * piece / 8)
			if i < len(pieces)-1 {
				offset |= 0x2000 // more fragments
			}
			// The kernel fills in length and checksum, raw(7).
			packet := []byte{0x45, 0, 0, 0, byte(id >> 8), byte(id), byte(offset >> 8), byte(offset), 64, unix.IPPROTO_UDP, 0, 0}
			packet = append(append(packet, from.Addr().AsSlice()...), to.Addr().AsSlice()...)
			if err := unix.Sendto(fd, append(packet, pieces[i]...), 0, &unix.SockaddrInet4{Addr: to.Addr().As4()}); err != nil {
				return fmt.Errorf("send fragment %d: %w", i, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatalf("%s: %v", h.Name, err)
	}
}
