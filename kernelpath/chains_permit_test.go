package kernelpath

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// published is a permission from any source to the client's port 80, once.
func (e ends) published(id uint64, p flow.Proto) nat.Permission {
	return nat.Permission{ID: id, Direction: nat.Inbound, Proto: p, Client: e.at(e.client, 80),
		External: e.at(e.extra, 8080), AnySource: true, Timeout: time.Minute}
}

// wantFrom asks from an address and says what the far end must see.
func wantFrom(t *testing.T, s space, from netip.Addr, to netip.AddrPort, seenAs netip.Addr) net.Conn {
	t.Helper()
	seen, c, err := ask(t, s, "tcp", from.String(), to.String())
	if err != nil || !strings.HasPrefix(seen, net.JoinHostPort(seenAs.String(), "")) {
		t.Errorf("tcp %s > %s: the far end saw %q, %v; want %s", from, to, seen, err, seenAs)
	}
	return c
}

// A gateway address stands for the client, in IPv6 as well.
func TestPermitInboundTranslated(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, j journey, table *Table, e ends) {
		p := e.published(1, flow.TCP)
		serve(t, j.client, p.Client.String())
		to := p.External.String()
		wantSilence(t, j.server, "", to)
		install(t, table, p)
		wantFrom(t, j.server, e.server, p.External, e.server)
		wantSilence(t, j.server, "", to)
		revoke(t, table, p)

		p.Multiple = true
		install(t, table, p)
		for range 2 {
			wantFrom(t, j.server, e.server, p.External, e.server)
		}
		revoke(t, table, p)
		wantSilence(t, j.server, "", to)
		if got := listed(t, table); len(got) != 0 {
			t.Errorf("the kernel still holds %q", got)
		}
	})
}

// What comes to the endpoint that a living flow is translated to, from another
// port of its server, goes to the client (RFC 1350, section 4).
func TestPermitAnswerFromAnotherPort(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, j journey, table *Table, e ends) {
		request := e.at(e.server, 53)
		first := made(j.server, func() (net.PacketConn, error) { return net.ListenPacket("udp", request.String()) })
		other := made(j.server, func() (net.PacketConn, error) { return net.ListenPacket("udp", e.at(e.server, 0).String()) })
		client := made(j.client, func() (net.PacketConn, error) { return net.ListenPacket("udp", e.at(e.client, 0).String()) })
		for _, c := range []net.PacketConn{first, other, client} {
			t.Cleanup(func() { c.Close() })
		}
		send(t, client, request, "request")
		seen := wantDatagram(t, first, "request")

		send(t, other, seen, "nobody let me in")
		wantNoDatagram(t, client)
		clientAt := netip.MustParseAddrPort(client.LocalAddr().String())
		install(t, table, nat.Permission{ID: 1, Direction: nat.Inbound, Proto: flow.UDP, Client: clientAt, External: seen,
			Sources: []netip.Prefix{netip.PrefixFrom(e.server, e.server.BitLen())}, Timeout: time.Minute})
		send(t, other, seen, "answer")
		from := wantDatagram(t, client, "answer")
		send(t, client, from, "acknowledgement")
		if back := wantDatagram(t, other, "acknowledgement"); back != seen {
			t.Errorf("the client is %s to the other port, and was %s to the first one", back, seen)
		}
		send(t, first, seen, "the first port answers, too")
		wantDatagram(t, client, "the first port answers, too")
		kernels := made(j.gw, func() ([]KernelFlow, error) { return Dump(t.Context(), testMarks(t), flow.Kernel) })
		if len(kernels) != 2 {
			t.Errorf("kernel flows: %+v", kernels)
		}
	})
}

func send(t *testing.T, c net.PacketConn, to netip.AddrPort, text string) {
	t.Helper()
	if _, err := c.WriteTo([]byte(text), net.UDPAddrFromAddrPort(to)); err != nil {
		t.Fatalf("send %q to %s: %v", text, to, err)
	}
}

// wantDatagram gives the sender.
func wantDatagram(t *testing.T, c net.PacketConn, text string) netip.AddrPort {
	t.Helper()
	buf := make([]byte, 100)
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, from, err := c.ReadFrom(buf)
	if err != nil || string(buf[:n]) != text {
		t.Fatalf("%s got %q, %v; want %q", c.LocalAddr(), buf[:n], err, text)
	}
	return netip.MustParseAddrPort(from.String())
}

func wantNoDatagram(t *testing.T, c net.PacketConn) {
	t.Helper()
	buf := make([]byte, 100)
	c.SetReadDeadline(time.Now().Add(short))
	var late net.Error
	if n, from, err := c.ReadFrom(buf); !errors.As(err, &late) || !late.Timeout() {
		t.Errorf("%s got %q from %v, %v; want nothing", c.LocalAddr(), buf[:n], from, err)
	}
}

// The flows of a permission leave from the address that was asked for, others
// do not.
func TestPermitSource(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, j journey, table *Table, e ends) {
		serve(t, j.server, e.at(e.server, 2000).String())
		serve(t, j.server, e.at(e.server, 80).String())
		direct := nat.Permission{ID: 1, Direction: nat.Outbound, Proto: flow.TCP, Client: e.at(e.client, 0), Target: e.at(e.server, 2000)}
		redirect := e.redirect(2, flow.TCP)
		for _, p := range []nat.Permission{direct, redirect} {
			to := p.Target
			if p.Via.IsValid() {
				to = p.Via
			}
			p.Source = e.at(e.extra, 0)
			install(t, table, p)
			seen, _, err := ask(t, j.client, "tcp", e.client.String(), to.String())
			peer, _ := netip.ParseAddrPort(seen)
			if err != nil || peer.Addr() != e.extra || peer.Port() < 20000 || peer.Port() > 29999 {
				t.Errorf("%s: the server saw %q, %v", to, seen, err)
			}
			p.Source = e.at(e.extra, 40000+uint16(p.ID))
			install(t, table, p)
			if seen, _, err := ask(t, j.client, "tcp", e.client.String(), to.String()); err != nil || seen != p.Source.String() {
				t.Errorf("%s: the server saw %q, %v; want %s", to, seen, err, p.Source)
			}
			wantSeen(t, j.client, "tcp", e.at(e.server, 80).String(), net.JoinHostPort(e.hidden.String(), ""))
			revoke(t, table, p)
		}
	})
}

// Sources may be ranges; single use counts over all of them.
func TestPermitRangesOfSources(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, j journey, table *Table, e ends) {
		p := e.published(1, flow.TCP)
		serve(t, j.client, p.Client.String())
		j.server.sh("ip addr add 203.0.113.130/24 dev eth0; ip -6 addr add 2001:db8:b:0:8000::10/64 dev eth0 nodad preferred_lft 0")
		upper := map[string]string{"IPv4": "203.0.113.130", "IPv6": "2001:db8:b:0:8000::10"}[e.name]
		half := map[string]string{"IPv4": "203.0.113.0/25", "IPv6": "2001:db8:b::/65"}[e.name]
		inner := map[string]string{"IPv4": "203.0.113.8/29", "IPv6": "2001:db8:b::/80"}[e.name]
		p.AnySource = false
		p.Sources = []netip.Prefix{netip.MustParsePrefix(half), netip.MustParsePrefix(inner), netip.PrefixFrom(e.client, e.client.BitLen())}
		for _, multiple := range []bool{true, false} {
			p.Multiple = multiple
			install(t, table, p)
			wantSilence(t, j.server, upper, p.External.String())
			wantFrom(t, j.server, e.server, p.External, e.server)
			if multiple {
				wantFrom(t, j.server, e.server, p.External, e.server)
			} else {
				wantSilence(t, j.server, e.server.String(), p.External.String())
			}
		}
		install(t, table, p)
		want := []string{
			fmt.Sprintf("bind tcp invalid IP > %s = %s", p.External, p.Client),
			fmt.Sprintf("listed tcp %s > %s", half, p.External),
			fmt.Sprintf("listed tcp %s > %s", e.client, p.External),
			fmt.Sprintf("ranges tcp invalid IP > %s", p.External),
			fmt.Sprintf("token tcp invalid IP > %s", p.External),
		}
		slices.Sort(want)
		if got := listed(t, table); !slices.Equal(got, want) {
			t.Errorf("the kernel holds\n%q, want\n%q", got, want)
		}
		// A range of all there is.
		p.Sources = []netip.Prefix{netip.PrefixFrom(e.any.Addr(), 0)}
		install(t, table, p)
		wantFrom(t, j.server, netip.MustParseAddr(upper), p.External, netip.MustParseAddr(upper))
		revoke(t, table, p)
		wantSilence(t, j.server, e.server.String(), p.External.String())
		if got := listed(t, table); len(got) != 0 {
			t.Errorf("the kernel still holds %q", got)
		}
	})
}

// What comes in goes to the client, what the client answers goes nowhere; and
// such a flow is a kernel flow in a dump, at its end and for a cut.
func TestPermitOneWay(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, j journey, table *Table, e ends) {
		j.gw.sh(conntrackOn)
		ended := make(chan KernelFlow, 10)
		w := made(j.gw, func() (*Watch, error) {
			return NewWatch(testMarks(t), func(f KernelFlow) { ended <- f }, func() { t.Error("events were lost") })
		})
		await(t, w.Run)
		cutter := made(j.gw, func() (*Cutter, error) {
			return NewCutter(CutConfig{Marks: testMarks(t), Logger: zaptest.NewLogger(t)})
		})
		t.Cleanup(func() { cutter.Close() })
		await(t, cutter.Run)

		p := e.published(1, flow.UDP)
		p.OneWay = true
		client := made(j.client, func() (net.PacketConn, error) { return net.ListenPacket("udp", p.Client.String()) })
		server := made(j.server, func() (net.PacketConn, error) { return net.ListenPacket("udp", e.at(e.server, 0).String()) })
		stranger := made(j.server, func() (net.PacketConn, error) { return net.ListenPacket("udp", e.at(e.server, 0).String()) })
		for _, c := range []net.PacketConn{client, server, stranger} {
			t.Cleanup(func() { c.Close() })
		}
		install(t, table, p)
		for range 2 {
			send(t, server, p.External, "in")
			from := wantDatagram(t, client, "in")
			send(t, client, from, "out")
			wantNoDatagram(t, server)
		}
		send(t, stranger, p.External, "it was for one flow")
		wantNoDatagram(t, client)

		tuple := flow.Tuple{Proto: flow.UDP, Src: netip.MustParseAddrPort(server.LocalAddr().String()), Dst: p.External}
		living := made(j.gw, func() ([]KernelFlow, error) { return Dump(t.Context(), testMarks(t), flow.Kernel) })
		if len(living) != 1 || living[0].Tuple != tuple || testMarks(t).IsCut(living[0].Mark) {
			t.Errorf("dump: %+v, want %v", living, tuple)
		}
		if err := cutter.Cut(t.Context(), tuple); err != nil {
			t.Fatal(err)
		}
		send(t, server, p.External, "after the cut")
		wantNoDatagram(t, client)
		if f := next(t, "end", ended); f.Tuple != tuple || !testMarks(t).IsCut(f.Mark) || testMarks(t).Path(f.Mark) != flow.Kernel {
			t.Errorf("the end: %+v", f)
		}
	})
}

// From any source, several times, and from a range: the answers never pass.
func TestPermitOneWayForms(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, j journey, table *Table, e ends) {
		client := made(j.client, func() (net.PacketConn, error) { return net.ListenPacket("udp", e.at(e.client, 80).String()) })
		t.Cleanup(func() { client.Close() })
		host := netip.PrefixFrom(e.server, e.server.BitLen())
		for name, p := range map[string]nat.Permission{
			"any source": {AnySource: true, Multiple: true}, "one source": {Sources: []netip.Prefix{host}},
			"one source, many flows": {Sources: []netip.Prefix{host}, Multiple: true}, "a range": {Sources: []netip.Prefix{e.any}},
		} {
			p.ID, p.Direction, p.Proto, p.OneWay = 7, nat.Inbound, flow.UDP, true
			p.Client, p.External = e.at(e.client, 80), e.at(e.extra, 8080)
			install(t, table, p)
			for n := range 2 {
				server := made(j.server, func() (net.PacketConn, error) { return net.ListenPacket("udp", e.at(e.server, 0).String()) })
				t.Cleanup(func() { server.Close() })
				send(t, server, p.External, name)
				if n == 1 && !p.Multiple {
					wantNoDatagram(t, client)
					break
				}
				send(t, client, wantDatagram(t, client, name), "answer")
				wantNoDatagram(t, server)
			}
		}
	})
}

// A socket of the gateway hears those whom a permission names, whatever the
// rules for the gateway say.
func TestPermitLocal(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, j journey, table *Table, e ends) {
		p := nat.Permission{ID: 1, Direction: nat.Local, Proto: flow.TCP, External: e.at(e.extra, 4000), Multiple: true,
			Sources: []netip.Prefix{netip.PrefixFrom(e.server, e.server.BitLen())}}
		serve(t, j.gw, p.External.String())
		serveUDP(t, j.gw, p.External.String())
		wantSilence(t, j.server, "", p.External.String())
		install(t, table, p)
		for range 2 {
			wantFrom(t, j.server, e.server, p.External, e.server)
		}
		if seen, _, err := askFor(t, short, j.server, "udp", "", p.External.String()); err == nil {
			t.Errorf("udp passed: %q", seen)
		}
		wantSilence(t, j.client, e.client.String(), p.External.String())
		if list := j.gw.sh("conntrack -L -p tcp; conntrack -f ipv6 -L -p tcp"); !strings.Contains(list, fmt.Sprintf("mark=%d", 7<<24)) {
			t.Errorf("no flow of the gateway's own in\n%s", list)
		}
		p.Sources = []netip.Prefix{e.any}
		install(t, table, p)
		wantFrom(t, j.server, e.server, p.External, e.server)

		p.Sources, p.AnySource, p.Multiple = nil, true, false
		install(t, table, p)
		wantFrom(t, j.client, e.client, p.External, e.client)
		wantSilence(t, j.server, "", p.External.String())

		p.Proto, p.Multiple = flow.UDP, true
		install(t, table, p)
		wantSeen(t, j.client, "udp", p.External.String(), net.JoinHostPort(e.client.String(), ""))
		revoke(t, table, p)
		wantSilence(t, j.server, "", p.External.String())
	})
}
