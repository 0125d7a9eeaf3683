package flow_test

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/sluicegw/sluice/flow"
)

func packet(t testing.TB, ls ...gopacket.SerializableLayer) []byte {
	t.Helper()
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true}, ls...); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func ip4(p layers.IPProtocol) *layers.IPv4 {
	return &layers.IPv4{Version: 4, IHL: 5, TTL: 64, Protocol: p, SrcIP: []byte{10, 0, 0, 1}, DstIP: []byte{192, 0, 2, 9}}
}

func ip6(next layers.IPProtocol) *layers.IPv6 {
	return &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: next,
		SrcIP: netip.MustParseAddr("2001:db8::1").AsSlice(), DstIP: netip.MustParseAddr("2001:db8:1::9").AsSlice()}
}

// chain6 puts extension headers between a fixed header and UDP 5000 > 53.
func chain6(t testing.TB, first uint8, exts ...[]byte) []byte {
	t.Helper()
	body := gopacket.Payload{}
	for _, e := range exts {
		body = append(body, e...)
	}
	body = append(body, 0x13, 0x88, 0, 53, 0, 8, 0, 0)
	return packet(t, ip6(layers.IPProtocol(first)), body)
}

func ext(next, words uint8, rest ...byte) []byte {
	b := append([]byte{next, words}, rest...)
	return append(b, make([]byte, (int(words)+1)*8-len(b))...)
}

func TestParsePacket(t *testing.T) {
	tcp := &layers.TCP{SrcPort: 4000, DstPort: 80, SYN: true, ACK: true, Window: 1}
	options := ip4(layers.IPProtocolTCP)
	options.Options = []layers.IPv4Option{{OptionType: 1}, {OptionType: 1}, {OptionType: 1}, {OptionType: 0}}
	later := ip4(layers.IPProtocolUDP)
	later.FragOffset = 100
	udp := &layers.UDP{SrcPort: 5000, DstPort: 53}
	echo := &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(8, 0), Id: 77, Seq: 3}
	gone := &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(3, 1), Id: 77}
	mapped := ip6(layers.IPProtocolUDP)
	mapped.SrcIP = netip.MustParseAddr("::ffff:10.0.0.1").AsSlice()
	lying := packet(t, ip4(layers.IPProtocolUDP), udp)
	binary.BigEndian.PutUint16(lying[2:], 24)

	for _, c := range []struct {
		name  string
		raw   []byte
		want  string // empty: not ok
		flags uint8
	}{
		{"tcp", packet(t, ip4(layers.IPProtocolTCP), tcp), "tcp 10.0.0.1:4000 > 192.0.2.9:80", flow.FlagSYN | flow.FlagACK},
		{"options", packet(t, options, tcp), "tcp 10.0.0.1:4000 > 192.0.2.9:80", flow.FlagSYN | flow.FlagACK},
		{"udp, payload not copied", packet(t, ip4(layers.IPProtocolUDP), udp, gopacket.Payload(make([]byte, 900)))[:28], "udp 10.0.0.1:5000 > 192.0.2.9:53", 0},
		{"echo", packet(t, ip4(layers.IPProtocolICMPv4), echo), "icmp 10.0.0.1:77 > 192.0.2.9:8", 0},
		{"icmp error", packet(t, ip4(layers.IPProtocolICMPv4), gone), "icmp 10.0.0.1:0 > 192.0.2.9:3", 0},
		{"gre", packet(t, ip4(layers.IPProtocolGRE), gopacket.Payload{0, 0, 8, 0}), "47 10.0.0.1:0 > 192.0.2.9:0", 0},
		{"tcp6", packet(t, ip6(layers.IPProtocolTCP), tcp), "tcp [2001:db8::1]:4000 > [2001:db8:1::9]:80", flow.FlagSYN | flow.FlagACK},
		{"echo6", packet(t, ip6(layers.IPProtocolICMPv6), gopacket.Payload{128, 0, 0, 0, 0, 77, 0, 1}), "icmpv6 [2001:db8::1]:77 > [2001:db8:1::9]:128", 0},
		{"all extension headers", chain6(t, 0, ext(60, 1), ext(43, 2), ext(44, 0), []byte{51, 0, 0, 1, 0, 0, 0, 0}, []byte{17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}),
			"udp [2001:db8::1]:5000 > [2001:db8:1::9]:53", 0},
		{"first fragment", chain6(t, 44, ext(17, 0, 0, 1)), "udp [2001:db8::1]:5000 > [2001:db8:1::9]:53", 0},
		{"later fragment6", chain6(t, 44, ext(17, 0, 0, 8)), "", 0},
		{"extension beyond the end", chain6(t, 60, []byte{17, 200, 0, 0, 0, 0, 0, 0}), "", 0},
		{"no next header", chain6(t, 59), "", 0},
		{"mapped address", packet(t, mapped, udp), "", 0},
		{"later fragment", packet(t, later, udp), "", 0},
		{"transport beyond the total length", lying, "", 0},
		{"icmpv6 over ipv4", packet(t, ip4(layers.IPProtocolICMPv6), echo), "", 0},
		{"cut tcp", packet(t, ip4(layers.IPProtocolTCP), tcp)[:33], "", 0},
		{"version 5", []byte{0x55, 0}, "", 0},
		{"empty", nil, "", 0},
	} {
		got, flags, ok := flow.ParsePacket(c.raw)
		switch {
		case ok != (c.want != ""):
			t.Errorf("%s: ok = %v with %v", c.name, ok, got)
		case !ok && (got != flow.Tuple{} || flags != 0):
			t.Errorf("%s: not ok, yet %v %x", c.name, got, flags)
		case ok && (got.String() != c.want || flags != c.flags):
			t.Errorf("%s: %v flags %x, want %s flags %x", c.name, got, flags, c.want, c.flags)
		}
	}
}

func TestParsePacketAllocatesNothing(t *testing.T) {
	raw := chain6(t, 0, ext(60, 1), ext(17, 2))
	if n := testing.AllocsPerRun(100, func() { flow.ParsePacket(raw) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzParsePacket compares with gopacket wherever both understand a packet.
func FuzzParsePacket(f *testing.F) {
	f.Add(packet(f, ip4(layers.IPProtocolTCP), &layers.TCP{SrcPort: 1, DstPort: 2}))
	f.Add(packet(f, ip6(layers.IPProtocolUDP), &layers.UDP{SrcPort: 1, DstPort: 2}))
	f.Add(chain6(f, 0, ext(60, 1), ext(44, 2), ext(17, 0)))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, flags, ok := flow.ParsePacket(b)
		if !ok {
			if got != (flow.Tuple{}) || flags != 0 {
				t.Fatalf("not ok, yet %v %x", got, flags)
			}
			return
		}
		if got.Src.Addr().Is4In6() || got.Dst.Addr().Is4In6() || got.Src.Addr().Is4() != got.Dst.Addr().Is4() {
			t.Fatalf("addresses of %v", got)
		}
		if got.Proto != flow.TCP && flags != 0 {
			t.Fatalf("flags %x of %v", flags, got)
		}
		first := gopacket.LayerType(layers.LayerTypeIPv4)
		if b[0]>>4 == 6 {
			first = layers.LayerTypeIPv6
		}
		p := gopacket.NewPacket(b, first, gopacket.DecodeOptions{NoCopy: true})
		if p.ErrorLayer() != nil || p.Metadata().Truncated {
			return
		}
		if tcp, is := p.TransportLayer().(*layers.TCP); is && got.Proto == flow.TCP {
			if uint16(tcp.SrcPort) != got.Src.Port() || uint16(tcp.DstPort) != got.Dst.Port() || tcp.SYN != (flags&flow.FlagSYN != 0) {
				t.Fatalf("%v flags %x, gopacket says %v", got, flags, tcp)
			}
		}
		if udp, is := p.TransportLayer().(*layers.UDP); is && got.Proto == flow.UDP {
			if uint16(udp.SrcPort) != got.Src.Port() || uint16(udp.DstPort) != got.Dst.Port() {
				t.Fatalf("%v, gopacket says %v", got, udp)
			}
		}
	})
}
