package kernelpath

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// leaving is a permission that lets nobody in, and gives what the client sends
// from a port an external one.
func leaving(id uint64, p flow.Proto, client, external string) nat.Permission {
	return nat.Permission{ID: id, Direction: nat.Inbound, Proto: p, Client: netip.MustParseAddrPort(client),
		External: netip.MustParseAddrPort(external), Multiple: true, Leaves: "out"}
}

// What an inside endpoint sends leaves from the same external endpoint wherever
// it goes, and what comes there reaches it when it is let in.
func TestLeavesFromOneEndpoint(t *testing.T) {
	e := bothFamilies[0]
	j, table := newGateway(t)
	j.gw.sh("ip addr add 203.0.113.2/24 dev wan0")
	j.server.sh("ip addr add 203.0.113.11/24 dev eth0")
	client := made(j.client, func() (net.PacketConn, error) { return net.ListenPacket("udp4", "10.0.0.2:5000") })
	one := made(j.server, func() (net.PacketConn, error) { return net.ListenPacket("udp4", "203.0.113.10:53") })
	two := made(j.server, func() (net.PacketConn, error) { return net.ListenPacket("udp4", "203.0.113.11:53") })
	for _, c := range []net.PacketConn{client, one, two} {
		t.Cleanup(func() { c.Close() })
	}
	p := leaving(1, flow.UDP, "10.0.0.2:5000", "203.0.113.2:41000")
	install(t, table, p)
	for _, server := range []net.PacketConn{one, two} {
		send(t, client, netip.MustParseAddrPort(server.LocalAddr().String()), "question")
		if from := wantDatagram(t, server, "question"); from != p.External {
			t.Errorf("%s saw %s", server.LocalAddr(), from)
		}
		send(t, server, p.External, "answer")
		wantDatagram(t, client, "answer")
	}
	stranger := made(j.server, func() (net.PacketConn, error) { return net.ListenPacket("udp4", "203.0.113.11:999") })
	t.Cleanup(func() { stranger.Close() })
	send(t, stranger, p.External, "nobody let me in")
	wantNoDatagram(t, client)
	p.AnySource = true
	install(t, table, p)
	send(t, stranger, p.External, "everybody may come")
	send(t, client, wantDatagram(t, client, "everybody may come"), "welcome")
	if from := wantDatagram(t, stranger, "welcome"); from != p.External {
		t.Errorf("the stranger saw %s", from)
	}

	// Another port of the client is the kernel's own business.
	serveUDP(t, j.server, e.at(e.server, 54).String())
	install(t, table, nat.Permission{ID: 9, Direction: nat.Outbound, Proto: flow.UDP, Client: e.at(e.client, 0), Target: e.at(e.server, 54)})
	wantSeen(t, j.client, "udp", e.at(e.server, 54).String(), "203.0.113.1:")
	want := []string{"bind udp invalid IP > 203.0.113.2:41000 = 10.0.0.2:5000", "leaves udp invalid IP > 10.0.0.2:5000 = 203.0.113.2:41000", "many udp invalid IP > 203.0.113.2:41000"}
	if got := listed(t, table); !slices.Equal(got, want) {
		t.Errorf("the kernel holds %q", got)
	}
	revoke(t, table, p)
	if got := listed(t, table); len(got) != 0 {
		t.Errorf("the kernel still holds %q", got)
	}
}

// Both ends of a flow between two inside hosts see the other's external
// endpoint.
func TestLeavesHairpin(t *testing.T) {
	for _, network := range []string{"tcp", "udp"} {
		j, table := newGateway(t)
		j.client.sh("ip addr add 10.0.0.3/24 dev eth0")
		j.gw.sh("ip addr add 203.0.113.2/24 dev wan0")
		proto := map[string]flow.Proto{"tcp": flow.TCP, "udp": flow.UDP}[network]
		host := leaving(1, proto, "10.0.0.3:7000", "203.0.113.2:41000")
		host.AnySource = true
		guest := leaving(2, proto, "10.0.0.2:6000", "203.0.113.2:41001")
		install(t, table, host)
		install(t, table, guest)
		serve(t, j.client, "10.0.0.3:7000")
		serveUDP(t, j.client, "10.0.0.3:7000")
		d := net.Dialer{Timeout: patient, LocalAddr: net.TCPAddrFromAddrPort(guest.Client)}
		if network == "udp" {
			d.LocalAddr = net.UDPAddrFromAddrPort(guest.Client)
		}
		c := made(j.client, func() (net.Conn, error) { return d.Dial(network, host.External.String()) })
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(patient))
		fmt.Fprintln(c, "who am I?")
		if seen, err := bufio.NewReader(c).ReadString('\n'); strings.TrimSpace(seen) != guest.External.String() {
			t.Errorf("%s: the host saw %q, %v", network, seen, err)
		}
	}
}

// The identifier of a query is its endpoint.
func TestLeavesQueries(t *testing.T) {
	j, table := newGateway(t)
	in := flowPolicy()
	in.Compiled.Forward[0].Stages = twoZones().Compiled.Forward[0].Stages
	o := testOptions(t)
	o.Native = false
	mustLoad(t, table, mustBuild(t, in, o))
	p := leaving(1, flow.ICMP, "10.0.0.2:77", "203.0.113.1:41000")
	install(t, table, p)
	j.client.sh("ping -e 77 -c 1 -W 5 203.0.113.10")
	if list := j.gw.sh("conntrack -L -p icmp"); !strings.Contains(list, "id=77") || !strings.Contains(list, "id=41000") {
		t.Errorf("the query has another identifier:\n%s", list)
	}
	if list := j.gw.sh("nft list map inet sluice " + mapOut("out")); !strings.Contains(list, "10.0.0.2 . icmp . 77 : 203.0.113.1 . 41000") {
		t.Errorf("nft lists\n%s", list)
	}
	p.AnySource = true
	if err := table.Install(context.Background(), p); !errors.Is(err, ErrPermission) {
		t.Errorf("queries from outside: %v", err)
	}
}

// The map of a network rule goes with the rule; what was in it is not put back,
// and goes nowhere else.
func TestLeavesGoesWithItsRule(t *testing.T) {
	s, table := loadedTable(t)
	p := leaving(1, flow.UDP, "10.0.0.2:5000", "203.0.113.1:41000")
	p.AnySource = true
	unknown := p
	unknown.ID, unknown.Leaves = 2, "mars"
	if err := table.Install(context.Background(), unknown); !errors.Is(err, nat.ErrNoRule) {
		t.Errorf("a network rule that is not there: %v", err)
	}
	install(t, table, p)
	full := listed(t, table)
	o := testOptions(t)
	o.Native = false
	in := twoZones()
	mustLoad(t, table, mustBuild(t, in, o))
	if got := listed(t, table); len(got) != 3 || !slices.Equal(got, full) {
		t.Errorf("after a reload: %q, before %q", got, full)
	}
	s.sh("nft delete table inet sluice")
	mustLoad(t, table, mustBuild(t, in, o))
	if got := listed(t, table); !slices.Equal(got, full) {
		t.Errorf("after somebody deleted the table: %q, before %q", got, full)
	}

	in.NetworkRules[0].Name = "another"
	mustLoad(t, table, mustBuild(t, in, o))
	left := []string{"bind udp invalid IP > 203.0.113.1:41000 = 10.0.0.2:5000", "many udp invalid IP > 203.0.113.1:41000"}
	if got := listed(t, table); !slices.Equal(got, left) {
		t.Errorf("without the rule: %q", got)
	}
	if err := table.Install(context.Background(), p); !errors.Is(err, nat.ErrNoRule) {
		t.Errorf("a network rule that has gone: %v", err)
	}
	p.Leaves = "another"
	install(t, table, p)
	revoke(t, table, p)
	if got := listed(t, table); len(got) != 0 {
		t.Errorf("the kernel still holds %q", got)
	}

	in.NetworkRules = append(in.NetworkRules, in.NetworkRules[0])
	if _, err := Build(in, o); err == nil {
		t.Error("two rules have one map")
	}
}

// A mapping may share its addresses with a permission, before and after which it
// is what it was; its elements come back with a table that somebody deleted.
func TestMappingShares(t *testing.T) {
	s, table := loadedTable(t)
	m := leaving(1, flow.UDP, "10.0.0.2:5000", "203.0.113.1:41000")
	m.Mapped, m.AnySource = true, true
	other := leaving(2, flow.UDP, "10.0.0.3:5000", "203.0.113.1:41001")
	other.Mapped = true
	shut := []string{
		"bind udp invalid IP > 203.0.113.1:41000 = 10.0.0.2:5000", "bind udp invalid IP > 203.0.113.1:41001 = 10.0.0.3:5000",
		"leaves udp invalid IP > 10.0.0.2:5000 = 203.0.113.1:41000", "leaves udp invalid IP > 10.0.0.3:5000 = 203.0.113.1:41001",
	}
	with := func(more ...string) []string {
		all := append(slices.Clone(shut), more...)
		slices.Sort(all)
		return all
	}
	is := func(what string, want []string) {
		t.Helper()
		if got := listed(t, table); !slices.Equal(got, want) {
			t.Errorf("%s: the kernel holds\n%q, want\n%q", what, got, want)
		}
	}
	install(t, table, m)
	install(t, table, other)
	is("two mappings", with("mapped udp invalid IP > 203.0.113.1:41000"))
	m.PeersOnly = true
	install(t, table, m)
	is("another filtering", with("mapped peers udp invalid IP > 203.0.113.1:41000"))

	// A bind that sends its flows elsewhere is in the way of nobody.
	bind := nat.Permission{ID: 3, Direction: nat.Inbound, Proto: flow.UDP, Client: m.Client, External: m.External, AnySource: true, Multiple: true}
	m.Shared, m.AnySource, m.PeersOnly = true, false, false
	install(t, table, m)
	is("a mapping that yields", shut)
	install(t, table, bind)
	is("and a bind", with("many udp invalid IP > 203.0.113.1:41000"))
	wrong := bind
	wrong.ID, wrong.Client = 4, netip.MustParseAddrPort("10.0.0.9:1")
	if err := table.Install(context.Background(), wrong); !errors.Is(err, nat.ErrConflict) {
		t.Errorf("a bind to another client: %v", err)
	}
	is("after a conflict", with("many udp invalid IP > 203.0.113.1:41000"))

	s.sh("nft delete table inet sluice")
	o := testOptions(t)
	o.Native = false
	mustLoad(t, table, mustBuild(t, twoZones(), o))
	is("after somebody deleted the table", with("many udp invalid IP > 203.0.113.1:41000"))
	revoke(t, table, bind)
	is("after the bind", shut)
	for range 2 {
		revoke(t, table, m)
		revoke(t, table, other)
	}
	is("after all", []string{})

	unknown := other
	unknown.Leaves = "mars"
	for range 2 {
		if err := table.Install(context.Background(), unknown); !errors.Is(err, nat.ErrNoRule) {
			t.Errorf("a network rule that is not there: %v", err)
		}
		revoke(t, table, unknown)
	}
	install(t, table, other)
	if err := table.FlushPermissions(); err != nil {
		t.Fatal(err)
	}
	is("after a flush", []string{})
	install(t, table, other)
	revoke(t, table, other)
	is("at the end", []string{})
}
