package ftp

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

// known is the filter with the gateway that it was given.
type known struct {
	filterapi.Filter
	fw filterapi.Firewall
}

func (k *known) Init(fw filterapi.Firewall) (filterapi.Events, error) {
	k.fw = fw
	return k.Filter.Init(fw)
}

// A client that asked the gateway for a bind announces its address: the bind is
// allowed for the server alone, before the server hears of it, and the command
// passes as it is. Another address of the gateway's is nobody's.
func TestActiveAtABindOfTheClient(t *testing.T) {
	k := &known{Filter: New()}
	g := filtertest.New(t, k, "")
	client, server := netip.MustParseAddrPort("10.0.0.2:40000"), netip.MustParseAddrPort("203.0.113.10:21")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	remote, err := g.World().Listen(server, nil)
	must(err)
	own, err := k.fw.Listen(netip.AddrPortFrom(g.Inside, 1080), nil)
	must(err)
	near, err := g.World().Dial(t.Context(), flow.TCP, client, netip.AddrPortFrom(g.Inside, 1080))
	must(err)
	conn, err := own.Accept()
	must(err)
	s, err := k.fw.PrivateSession(client.Addr(), "")
	must(err)
	defer s.Close()
	leg, err := s.ConnectForClient(t.Context(), filterapi.Connect{Client: client, Target: server})
	must(err)
	l, err := s.ListenForClient(filterapi.Bind{
		Negotiated: filterapi.Negotiated{Primary: leg.Connection(), Proto: flow.TCP, Flags: filterapi.Discarding},
		Clients:    []netip.AddrPort{client},
	})
	must(err)
	at, err := l.Bind().ExternalName()
	must(err)
	must(leg.Carry(conn))
	far, err := remote.Accept()
	must(err)
	_ = near.SetDeadline(time.Now().Add(10 * time.Second))
	_ = far.SetDeadline(time.Now().Add(10 * time.Second))
	answers, commands := bufio.NewReader(near), bufio.NewReader(far)
	line := func(to io.Writer, text string, from *bufio.Reader, want string) {
		t.Helper()
		_, err := io.WriteString(to, text+"\r\n")
		must(err)
		if got, err := from.ReadString('\n'); err != nil || !strings.HasPrefix(got, want) {
			t.Fatalf("%q became %q, %v; want %q", text, got, err, want)
		}
	}
	line(far, "220 ready", answers, "220 ready")
	line(near, "PORT "+formatPort(netip.AddrPortFrom(at.Addr(), at.Port()+1)), answers, "504 ")
	line(near, "PORT "+formatPort(netip.AddrPortFrom(at.Addr(), 21)), answers, "504 ")
	port := "PORT " + formatPort(at)
	line(near, port, commands, port)
	g.Before(filtertest.Approved, fmt.Sprintf("%v", at), filtertest.ToServer, port)
	line(far, "200 well", answers, "200 well")
	if _, in := g.Arrive(flow.TCP, netip.MustParseAddr("203.0.113.11"), at); in {
		t.Error("another host is let in")
	}
	if _, in := g.Arrive(flow.TCP, server.Addr(), at); !in {
		t.Error("the server is not let in")
	}
}
