package kernelpath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// ends are the addresses of a journey in one family.
type ends struct {
	name                      string
	client, neighbour, inside netip.Addr
	server                    netip.Addr
	hidden                    netip.Addr // what the server sees of the client
	extra                     netip.Addr // a second address of the gateway's outside
	any                       netip.Prefix
}

var bothFamilies = []ends{
	{
		name: "IPv4", client: netip.MustParseAddr("10.0.0.2"), neighbour: netip.MustParseAddr("10.0.0.3"), inside: netip.MustParseAddr("10.0.0.1"),
		server: netip.MustParseAddr("203.0.113.10"), hidden: netip.MustParseAddr("203.0.113.1"), extra: netip.MustParseAddr("203.0.113.2"),
		any: netip.MustParsePrefix("203.0.113.0/24"),
	},
	{
		name: "IPv6", client: netip.MustParseAddr("fd00:a::2"), neighbour: netip.MustParseAddr("fd00:a::3"), inside: netip.MustParseAddr("fd00:a::1"),
		server: netip.MustParseAddr("2001:db8:b::10"), hidden: netip.MustParseAddr("fd00:a::2"), extra: netip.MustParseAddr("2001:db8:b::2"),
		any: netip.MustParsePrefix("2001:db8:b::/64"),
	},
}

// inBothFamilies runs a test on a gateway of its own for each family, with the
// neighbour's and the extra address there.
func inBothFamilies(t *testing.T, test func(t *testing.T, j journey, table *Table, e ends)) {
	t.Helper()
	for _, e := range bothFamilies {
		t.Run(e.name, func(t *testing.T) {
			j, table := newGateway(t)
			j.client.sh("ip addr add 10.0.0.3/24 dev eth0; ip -6 addr add fd00:a::3/64 dev eth0 nodad preferred_lft 0")
			j.gw.sh("ip addr add 203.0.113.2/24 dev wan0; ip -6 addr add 2001:db8:b::2/64 dev wan0 nodad preferred_lft 0")
			test(t, j, table, e)
		})
	}
}

func (e ends) at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// wantRefused: the answer is "no".
func wantRefused(t *testing.T, s space, from netip.Addr, to netip.AddrPort) {
	t.Helper()
	if seen, _, err := ask(t, s, "tcp", from.String(), to.String()); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("tcp %s > %s: %q, %v; want a reset", from, to, seen, err)
	}
}

// wantRefusedUDP is the same for a datagram: ICMP "administratively
// prohibited" is EHOSTUNREACH for IPv4 and EACCES for IPv6.
func wantRefusedUDP(t *testing.T, s space, to netip.AddrPort) {
	t.Helper()
	seen, _, err := ask(t, s, "udp", "", to.String())
	if !errors.Is(err, unix.EHOSTUNREACH) && !errors.Is(err, unix.EACCES) {
		t.Errorf("udp %s: %q, %v; want an ICMP error", to, seen, err)
	}
}

func (e ends) redirect(id uint64, proto flow.Proto) nat.Permission {
	return nat.Permission{ID: id, Direction: nat.Outbound, Proto: proto, Client: e.at(e.client, 0),
		Via: e.at(e.inside, 3000), Target: e.at(e.server, 2000), Timeout: time.Minute}
}

func revoke(t testing.TB, table *Table, p nat.Permission) {
	t.Helper()
	if err := table.Remove(context.Background(), p); err != nil {
		t.Error(err)
	}
}

func listed(t testing.TB, table *Table) []string {
	t.Helper()
	all, err := table.Permissions()
	if err != nil {
		t.Fatal(err)
	}
	return heldNames(all)
}

// The client goes to the gateway and reaches the target, once; everybody else,
// and the client after that, is told no at once.
func TestRedirectOnce(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, j journey, table *Table, e ends) {
		target := e.at(e.server, 2000)
		serve(t, j.server, target.String())
		p := e.redirect(1, flow.TCP)
		install(t, table, p)
		wantRefused(t, j.client, e.neighbour, p.Via)
		seen, c, err := ask(t, j.client, "tcp", e.client.String(), p.Via.String())
		if err != nil || !strings.HasPrefix(seen, net.JoinHostPort(e.hidden.String(), "")) {
			t.Fatalf("through the gateway: %q, %v", seen, err)
		}
		wantRefused(t, j.client, e.client, p.Via)
		wantRefused(t, j.client, e.neighbour, p.Via)
		want := []string{
			fmt.Sprintf("bind tcp invalid IP > %s = %s", p.Via, target),
			fmt.Sprintf("refuse tcp invalid IP > %s", p.Via),
		}
		if got := listed(t, table); !slices.Equal(got, want) {
			t.Errorf("after its use the kernel holds %q", got)
		}
		revoke(t, table, p)
		if got := listed(t, table); !slices.Equal(got, want[1:]) {
			t.Errorf("after it was removed the kernel holds %q", got)
		}
		wantRefused(t, j.client, e.client, p.Via)
		if _, err := c.Write([]byte("still there")); err != nil {
			t.Error(err)
		}
		if list := j.gw.sh("conntrack -L -p tcp; conntrack -f ipv6 -L -p tcp"); !strings.Contains(list, fmt.Sprintf("mark=%d", 5<<24)) {
			t.Errorf("no kernel flow in\n%s", list)
		}
		// Another address of the gateway is as silent as before.
		wantSilence(t, j.client, e.client.String(), e.at(e.inside, 3001).String())
		wantSilence(t, j.server, "", e.at(e.extra, 3000).String())
	})
}

func TestRedirectManyDatagrams(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, j journey, table *Table, e ends) {
		serveUDP(t, j.server, e.at(e.server, 2000).String())
		p := e.redirect(1, flow.UDP)
		p.Multiple = true
		install(t, table, p)
		for range 3 {
			wantSeen(t, j.client, "udp", p.Via.String(), net.JoinHostPort(e.hidden.String(), ""))
		}
		revoke(t, table, p)
		wantRefusedUDP(t, j.client, p.Via)
	})
}

// What stays of a redirect goes when its time has come, and comes back with
// the address's next redirect.
func TestRedirectRefusesForAWhile(t *testing.T) {
	_, table := newGateway(t)
	p := bothFamilies[0].redirect(1, flow.TCP)
	install(t, table, p)
	all, err := table.Permissions()
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range all {
		if x.Use == "refuse" && (x.Expires <= nat.Quarantine || x.Expires > nat.Quarantine+p.Timeout) {
			t.Errorf("while it is installed it refuses for %s", x.Expires)
		}
	}
	revoke(t, table, p)
	refuses := func() (d time.Duration) {
		all, err := table.Permissions()
		if err != nil || len(all) != 1 || all[0].Use != "refuse" {
			t.Fatalf("%+v, %v", all, err)
		}
		return all[0].Expires
	}
	if d := refuses(); d > nat.Quarantine || d < nat.Quarantine-5*time.Second {
		t.Errorf("after the end it refuses for %s", d)
	}
	// The record follows the kernel's clock.
	later := time.Now().Add(nat.Quarantine + 2*time.Second)
	if err := table.do(context.Background(), func() error {
		table.holders.sweep(later)
		if n := len(table.holders.slots) + len(table.holders.lingering); n != 0 {
			t.Errorf("%d slots are still on record", n)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	p.ID, p.Timeout = 2, 0
	install(t, table, p)
	if got := listed(t, table); len(got) != 3 {
		t.Errorf("the next redirect: %q", got)
	}
	revoke(t, table, p)
	if d := refuses(); d > nat.Quarantine {
		t.Errorf("after the end of the next one it refuses for %s", d)
	}
}

// A redirect to user space goes to the queue, which nobody listens to here;
// the address is not refused meanwhile.
func TestRedirectToUser(t *testing.T) {
	inBothFamilies(t, func(t *testing.T, j journey, table *Table, e ends) {
		serve(t, j.server, e.at(e.server, 2000).String())
		p := e.redirect(1, flow.TCP)
		p.ToUser = true
		install(t, table, p)
		wantSilence(t, j.client, e.client.String(), p.Via.String())
		wantRefused(t, j.client, e.neighbour, p.Via)
		if list := j.gw.sh("nft list counter inet sluice queued"); strings.Contains(list, "packets 0 ") {
			t.Errorf("nothing was queued: %s", list)
		}
	})
}

// Without a client only the translation is held: it lets nobody in.
func TestRedirectTranslationAlone(t *testing.T) {
	j, table := newGateway(t)
	e := bothFamilies[0]
	serve(t, j.server, e.at(e.server, 2000).String())
	p := e.redirect(1, flow.TCP)
	p.Client = netip.AddrPort{}
	install(t, table, p)
	wantRefused(t, j.client, e.client, p.Via)
}
