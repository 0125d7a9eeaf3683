package kernelpath

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// newMapped is a gateway whose network rule maps endpoints, and lets UDP to port
// 53 out.
func newMapped(t *testing.T, f policy.Filtering) (journey, *Table) {
	t.Helper()
	j, table := newGateway(t)
	in := twoZones()
	in.NetworkRules[0].Mapping, in.NetworkRules[0].Filtering = policy.MapEndpointIndependent, f
	in.Compiled.Forward[0].Stages = []policy.Stage{ports4(
		box("10.0.0.0/24", "0.0.0.0/0", flow.UDP, flow.UDP, 53, 53, policy.ClassMap), box("10.0.0.0/24", "0.0.0.0/0", flow.UDP, flow.UDP, 54, 54, policy.ClassKernel))}
	o := testOptions(t)
	o.Native = false
	mustLoad(t, table, mustBuild(t, in, o))
	j.client.sh("ip addr add 10.0.0.3/24 dev eth0")
	j.server.sh("ip addr add 203.0.113.11/24 dev eth0")
	return j, table
}

// openUDP opens a socket for the length of a test.
func openUDP(t *testing.T, s space, at string) net.PacketConn {
	t.Helper()
	c := made(s, func() (net.PacketConn, error) { return net.ListenPacket("udp4", at) })
	t.Cleanup(func() { c.Close() })
	return c
}

// mappingOf is what the kernel holds of an endpoint for everybody, or for whom it
// has sent to.
func mappingOf(peersOnly bool) nat.Permission {
	p := leaving(1, flow.UDP, "10.0.0.2:5000", "203.0.113.1:41000")
	p.Mapped, p.AnySource, p.PeersOnly = true, true, peersOnly
	return p
}

// Flows of a known endpoint pass; those of others wait for user space, which is
// not there. Everybody of the outside may come in.
func TestMappedKnownEndpoint(t *testing.T) {
	j, table := newMapped(t, policy.FilterEndpointIndependent)
	client, other := openUDP(t, j.client, "10.0.0.2:5000"), openUDP(t, j.client, "10.0.0.3:5000")
	server, stranger := openUDP(t, j.server, "203.0.113.10:53"), openUDP(t, j.server, "203.0.113.11:999")
	to := netip.MustParseAddrPort("203.0.113.10:53")
	send(t, client, to, "unknown")
	wantNoDatagram(t, server)
	p := mappingOf(false)
	install(t, table, p)
	send(t, client, to, "known")
	if from := wantDatagram(t, server, "known"); from != p.External {
		t.Errorf("the server saw %s", from)
	}
	send(t, stranger, p.External, "everybody may come")
	wantDatagram(t, client, "everybody may come")
	send(t, other, to, "another one")
	wantNoDatagram(t, server)
	// A host of the inside is asked about.
	send(t, other, p.External, "from the inside")
	wantNoDatagram(t, client)
	if list := j.gw.sh("nft list chain inet sluice use_mapped"); !strings.Contains(list, "jump around") {
		t.Errorf("nft lists %s", list)
	}
}

// The addresses that an endpoint has sent to may come in, from any port, from
// the next packet on, as long as they are known.
func TestMappedPeers(t *testing.T) {
	j, table := newMapped(t, policy.FilterAddress)
	client, server := openUDP(t, j.client, "10.0.0.2:5000"), openUDP(t, j.server, "203.0.113.10:53")
	p := mappingOf(true)
	install(t, table, p)
	from := func(port string) net.PacketConn { return openUDP(t, j.server, net.JoinHostPort("203.0.113.10", port)) }
	send(t, from("1000"), p.External, "too early")
	wantNoDatagram(t, client)
	send(t, client, netip.MustParseAddrPort("203.0.113.10:53"), "question")
	wantDatagram(t, server, "question")
	peer := from("1001")
	send(t, peer, p.External, "from another port")
	send(t, client, wantDatagram(t, client, "from another port"), "answer")
	if seen := wantDatagram(t, peer, "answer"); seen != p.External {
		t.Errorf("the peer saw %s", seen)
	}
	stranger := openUDP(t, j.server, "203.0.113.11:53")
	send(t, stranger, p.External, "of another host")
	wantNoDatagram(t, client)
	for _, f := range made(j.gw, func() ([]KernelFlow, error) { return Dump(context.Background(), testMarks(t), flow.Kernel) }) {
		if f.Mark != testMarks(t).Value(flow.Kernel) {
			t.Errorf("%s keeps the mark %#x", f.Tuple, f.Mark)
		}
	}

	known := []nat.Peer{{Proto: flow.UDP, Inside: p.Client, Addr: netip.MustParseAddr("203.0.113.10")}}
	unknown := []nat.Peer{{Proto: flow.UDP, Inside: p.Client, Addr: netip.MustParseAddr("203.0.113.77")}}
	for range 2 {
		if err := table.Peers(t.Context(), nil, append(known, unknown...)); err != nil {
			t.Fatal(err)
		}
	}
	send(t, from("1002"), p.External, "not known any more")
	wantNoDatagram(t, client)
	for range 2 {
		if err := table.Peers(t.Context(), known, nil); err != nil {
			t.Fatal(err)
		}
	}
	send(t, from("1003"), p.External, "known again")
	wantDatagram(t, client, "known again")
}

// Conntrack tells of flows that begin, as long as somebody wants that, where
// filtering goes by whom an endpoint has sent to; of other flows of a known endpoint
// it tells the end alone.
func TestWatchFirsts(t *testing.T) {
	for filtering, told := range map[policy.Filtering]bool{policy.FilterAddress: true, policy.FilterAddressAndPort: false} {
		t.Run(map[bool]string{true: "told", false: "untold"}[told], func(t *testing.T) { watchFirsts(t, filtering, told) })
	}
}

func watchFirsts(t *testing.T, filtering policy.Filtering, told bool) {
	j, table := newMapped(t, filtering)
	j.gw.sh(conntrackOn)
	begun, ended := make(chan KernelFlow, 10), make(chan KernelFlow, 10)
	w := made(j.gw, func() (*Watch, error) {
		return NewWatch(testMarks(t), func(f KernelFlow) { ended <- f }, func() { t.Error("events were lost") })
	})
	w.OnFirst(func(f KernelFlow) { begun <- f })
	await(t, w.Run)
	p := mappingOf(told)
	p.AnySource = told
	install(t, table, p)
	client, server := openUDP(t, j.client, "10.0.0.2:5000"), openUDP(t, j.server, "203.0.113.10:53")
	other := openUDP(t, j.server, "203.0.113.11:53")
	to := func(c net.PacketConn) netip.AddrPort { return netip.MustParseAddrPort(c.LocalAddr().String()) }
	send(t, client, to(server), "nobody listens")
	wantDatagram(t, server, "nobody listens")
	for range 2 {
		if err := w.Firsts(true); err != nil {
			t.Fatal(err)
		}
	}
	plain := openUDP(t, j.server, "203.0.113.10:54")
	send(t, client, to(plain), "a flow that no mapping has to do with")
	wantDatagram(t, plain, "a flow that no mapping has to do with")
	send(t, client, to(other), "somebody does")
	wantDatagram(t, other, "somebody does")
	check := func(f KernelFlow, at net.PacketConn) {
		t.Helper()
		if f.Dst != to(at) || f.Src != p.Client || at == other && f.Translation.Src != p.External {
			t.Errorf("told: %+v", f)
		}
	}
	if told {
		check(next(t, "beginning", begun), other)
	}
	j.gw.sh("conntrack -D -p udp --orig-port-dst 54")
	check(next(t, "end", ended), plain)
	j.gw.sh("conntrack -D -p udp --orig-dst 203.0.113.11")
	check(next(t, "end", ended), other)
	if err := w.Firsts(false); err != nil {
		t.Fatal(err)
	}
	if len(begun) > 0 {
		t.Errorf("told as well: %+v", <-begun)
	}
	if all, err := table.Leaving("out"); err != nil || len(all) != 1 || all[0].To != p.Client || all[0].Becomes != p.External {
		t.Errorf("leaving: %+v, %v", all, err)
	}
}
