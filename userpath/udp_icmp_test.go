package userpath

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
)

// What is built can be read back, with right checksums.
func TestUDPErrorPacket(t *testing.T) {
	for _, x := range []struct {
		src, dst, from string
		typ, code      uint8
		info           uint32
		size, want     int
	}{
		{"10.0.0.2:4000", "203.0.113.10:7", "203.0.113.10", icmp4Unreachable, icmp4Port, 0, 5, 5},
		{"10.0.0.2:4000", "203.0.113.10:7", "198.51.100.1", icmp4Unreachable, icmp4FragNeeded, 1300, 65507, icmp4MaxLen - 56},
		{"[fd00:a::2]:4000", "[2001:db8:b::10]:7", "2001:db8:b::10", icmp6Unreachable, icmp6Port, 0, 0, 0},
		{"[fd00:a::2]:4000", "[2001:db8:b::10]:7", "2001:db8::1", icmp6PacketTooBig, 0, 1280, 60001, icmp6MaxLen - 96},
	} {
		key := udpKey{netip.MustParseAddrPort(x.src), netip.MustParseAddrPort(x.dst)}
		e := udpError{typ: x.typ, code: x.code, info: x.info, from: netip.MustParseAddr(x.from)}
		packet := udpErrorPacket(key, e, udpPattern(x.size))
		is6 := key.src.Addr().Is6()
		message, pseudo := packet[ip4HeaderLen:], []byte(nil)
		if is6 {
			message = packet[ip6HeaderLen:]
			pseudo = append(append(append(pseudo, packet[8:40]...), 0, 0, byte(len(message)>>8), byte(len(message))), 0, 0, 0, unix.IPPROTO_ICMPV6)
		} else if udpChecksum(nil, packet[:ip4HeaderLen]) != 0 || udpChecksum(nil, message[icmpLen:icmpLen+ip4HeaderLen]) != 0 {
			t.Errorf("%s: wrong checksum of an IP header", x.src)
		}
		if udpChecksum(pseudo, message) != 0 {
			t.Errorf("%s: wrong ICMP checksum", x.src)
		}
		q, ok := udpQuoted(message, is6)
		q.err.from = e.from
		if !ok || q.key != key || q.err != e || len(q.payload) != x.want {
			t.Errorf("%s: read back %+v with %d bytes", x.src, q, len(q.payload))
		}
	}
}

func FuzzUDPQuoted(f *testing.F) {
	key := udpKey{netip.MustParseAddrPort("10.0.0.2:4000"), netip.MustParseAddrPort("203.0.113.10:7")}
	packet := udpErrorPacket(key, udpError{typ: 3, code: 3, from: key.dst.Addr()}, []byte("abc"))
	f.Add(packet, false)
	f.Add(packet[ip4HeaderLen:], true)
	f.Fuzz(func(t *testing.T, b []byte, is6 bool) {
		_, message := udpICMPTarget(b, nil, is6)
		for _, m := range [][]byte{b, message} {
			if q, ok := udpQuoted(m, is6); ok && q.key.src.Addr().Is6() != is6 {
				t.Errorf("%+v", q)
			}
		}
	})
}

// inject sends an ICMP error of the server about a datagram of key.
func (l *udpLab) inject(key udpKey, e udpError) {
	l.Helper()
	l.server.do(func() {
		family := unix.AF_INET
		if key.src.Addr().Is6() {
			family = unix.AF_INET6
		}
		s, err := udpRaw(family, 0)
		if err != nil {
			l.Error(err)
			return
		}
		defer s.close()
		_ = s.raw.Control(func(fd uintptr) {
			err = unix.Sendto(int(fd), udpErrorPacket(key, e, udpPattern(1000)), 0, udpUnixAddr(netip.AddrPortFrom(key.src.Addr(), 0)))
		})
		if err != nil {
			l.Errorf("inject an ICMP error: %v", err)
		}
	})
}

// A router behind the gateway has a smaller MTU: the client learns it.
func TestUDPPathMTU(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		seen := map[string]<-chan udpSeen{}
		for _, p := range udpPaths() {
			s := p.servers[0]
			if seen[s] == nil {
				seen[s] = l.server.echo(s)
			}
			l.take(p.client, s, p.source)
			c := l.client.dial(p.client, s)
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			from := l.saw(seen[s]).from
			key := udpKey{from, netip.MustParseAddrPort(s)}
			e := udpError{typ: icmp4Unreachable, code: icmp4FragNeeded, info: 1300, from: key.dst.Addr()}
			level, name := unix.SOL_IP, unix.IP_MTU
			if key.src.Addr().Is6() {
				e.typ, e.code = icmp6PacketTooBig, 0
				level, name = unix.SOL_IPV6, unix.IPV6_MTU
			}
			l.inject(key, e)
			for end := time.Now().Add(udpWaitLong); ; {
				if mtu := udpSockopt(l, c, level, name); mtu == 1300 {
					break
				} else if time.Now().After(end) {
					t.Fatalf("%s: the client's path MTU is %d, want 1300; %+v", p.name, mtu, l.u.Stats())
				}
				time.Sleep(10 * time.Millisecond)
			}
			l.client.sh("ip route flush cache; ip -6 route flush cache")
			udpShell(l, "sh", "-ec", "ip route flush cache; ip -6 route flush cache")
		}
	})
}

func udpSockopt(l *udpLab, c *net.UDPConn, level, name int) (value int) {
	l.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		l.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), level, name) })
	if err != nil {
		l.Fatal(err)
	}
	return value
}

// A client that has closed its port: the server learns it.
func TestUDPClientClosedPort(t *testing.T) {
	udpInLab(t, func(l *udpLab) {
		l.start(UDPConfig{})
		for _, p := range udpPaths() {
			to := p.servers[0][:len(p.servers[0])-1] + "17"
			s := l.server.listen(to)
			f := l.take(p.client, to, p.source)
			c := l.client.listen(p.client)
			if _, err := c.WriteToUDPAddrPort([]byte("bye"), netip.MustParseAddrPort(to)); err != nil {
				t.Fatal(err)
			}
			_, from := l.read(s)
			c.Close()
			s.Close()
			connected := l.server.dial(to, from.String())
			if _, err := connected.Write([]byte("wait")); err != nil {
				t.Fatal(err)
			}
			_ = connected.SetReadDeadline(time.Now().Add(udpWaitLong))
			if _, err := connected.Read(make([]byte, 10)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: read: %v, want ECONNREFUSED", p.name, err)
			}
			connected.Close()
			close(f.kill)
			if e := f.end(); e.result != flow.CutByPolicy {
				t.Errorf("%s: ended %+v", p.name, e)
			}
		}
	})
}
