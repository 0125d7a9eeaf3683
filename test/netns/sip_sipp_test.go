package netns_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// sipConfig has one rule, for SIP with its filter; options are the filter's.
func sipConfig(options string) lab.Config {
	return lab.Config{Rules: "  - {name: telephones, action: allow, from: lan, to: wan, protocols: [sip], filters: {sip: {" + options + "}}}\n"}
}

// sipp is a run of the SIP tester.
type sipp struct {
	*lab.Process
	host     *lab.Host
	messages string
}

// sippPorts are ports that no run had before.
var sippPorts atomic.Uint32

// startSipp starts sipp with a scenario at an address of a host, for one call.
// What waits for a call does so at port 5060. So does what calls over UDP, but
// not over TCP: a connection has a port of its own.
func startSipp(t testing.TB, l *lab.Lab, h *lab.Host, at netip.Addr, scenario, transport string, args ...string) *sipp {
	t.Helper()
	name := fmt.Sprintf("%s-%s-%d", h.Name, scenario, time.Now().UnixNano())
	s := &sipp{host: h, messages: filepath.Join(l.Dir(), name+".messages")}
	path, err := filepath.Abs(filepath.Join("testdata", "sip", scenario+".xml"))
	if err != nil {
		t.Fatal(err)
	}
	fresh := 6000 + 8*(sippPorts.Add(1)%1000)
	port, media := "5060", strconv.Itoa(int(fresh))
	if len(args) > 0 && transport == "t1" && !strings.HasPrefix(args[len(args)-1], "-") && strings.Contains(args[len(args)-1], ":") {
		port = strconv.Itoa(int(fresh) + 4)
	}
	all := append([]string{
		"-sf", path, "-t", transport, "-i", at.String(), "-p", port, "-key", "contact", "5060", "-mi", at.String(), "-mp", media,
		"-m", "1", "-nostdin", "-timeout", strconv.Itoa(int(lab.Patience(20 * time.Second).Seconds())), "-timeout_error",
		"-trace_msg", "-message_file", s.messages, "-trace_err", "-error_file", filepath.Join(l.Dir(), name+".errors"),
	}, args...)
	if s.Process, err = h.Start(nil, "sipp", all...); err != nil {
		t.Fatal(err)
	}
	return s
}

// done waits for the end of the call, and fails the test if it went wrong.
func (s *sipp) done(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), lab.Patience(30*time.Second))
	defer cancel()
	status, err := s.Wait(ctx)
	if err != nil || status != 0 {
		text, _ := os.ReadFile(s.messages)
		t.Fatalf("sipp on %s: status %d, %v\n%s", s.host.Name, status, err, text)
	}
}

// listens waits until sipp has its socket.
func (s *sipp) listens(t testing.TB, transport string) {
	t.Helper()
	kind := map[string]string{"u1": "-Hun", "t1": "-Htn"}[transport]
	lab.Eventually(t, 5*time.Second, "sipp listens", func() bool {
		return s.host.Run("ss", kind+"l", "sport = :5060") != ""
	})
}

// sipWays are the transports and families that a test goes through.
func sipWays(t *testing.T, run func(t *testing.T, transport string, srv, client netip.Addr)) {
	for _, transport := range []string{"u1", "t1"} {
		for srv, client := range map[netip.Addr]netip.Addr{lab.Srv4: lab.Client4, lab.Srv6: lab.Client6} {
			family := "v4"
			if srv.Is6() {
				family = "v6"
			}
			t.Run(map[string]string{"u1": "UDP", "t1": "TCP"}[transport]+"-"+family, func(t *testing.T) { run(t, transport, srv, client) })
		}
	}
}

// rtp counts the RTP packets between two ends in a capture, up to the call's
// BYE: on a slow machine sipp goes on sending after it.
func rtp(seen []lab.Seen, from, to netip.Addr) int {
	if bye := slices.IndexFunc(seen, func(s lab.Seen) bool { return strings.HasPrefix(string(s.Payload), "BYE ") }); bye >= 0 {
		seen = seen[:bye]
	}
	return len(lab.Select(seen, func(s lab.Seen) bool {
		return s.Proto == "udp" && s.Src.Addr() == from && s.Dst.Addr() == to && len(s.Payload) > 12 && s.Payload[0] == 0x80
	}))
}

// A real client calls a real server: the media goes both ways, and nothing is
// open after the call.
func TestSIPSippCall(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(sipConfig(""))
	sipWays(t, func(t *testing.T, transport string, srv, client netip.Addr) {
		inside, outside := l.Client.Capture(), l.Srv.Capture()
		far := startSipp(t, l, l.Srv, srv, "uas", transport, "-rtp_echo")
		far.listens(t, transport)
		near := startSipp(t, l, l.Client, client, "uac", transport, netip.AddrPortFrom(srv, 5060).String())
		near.done(t)
		far.done(t)
		seen := inside.Stop()
		sent, echoed := rtp(seen, client, srv), rtp(seen, srv, client)
		if sent < 20 || echoed < sent*9/10 {
			t.Errorf("the client sent %d RTP packets and got %d back", sent, echoed)
		}
		from := client
		if client.Is4() {
			from = lab.Outside4
		}
		seen = outside.Stop()
		if got, back := rtp(seen, from, srv), rtp(seen, srv, from); got < sent*9/10 || back < got*9/10 {
			t.Errorf("the server got %d of %d RTP packets, and sent %d back", got, sent, back)
		}
		noPermissions(t, g)
	})
}

// contactOf waits for the external address that stands for a client's port
// 5060, for one that is allowed to come.
func contactOf(t testing.TB, g *lab.Gateway, client netip.Addr) netip.AddrPort {
	t.Helper()
	var at netip.AddrPort
	lab.Eventually(t, 5*time.Second, "the registered address is open", func() bool {
		for _, p := range openPermissions(g) {
			if p.Client == netip.AddrPortFrom(client, 5060).String() {
				at = netip.MustParseAddrPort(p.External)
			}
		}
		return at.IsValid()
	})
	return at
}

// register has the client register at the server for so many seconds.
func register(t *testing.T, l *lab.Lab, transport string, srv, client netip.Addr, expires string) {
	t.Helper()
	far := startSipp(t, l, l.Srv, srv, "registrar", transport, "-key", "expires", expires)
	far.listens(t, transport)
	near := startSipp(t, l, l.Client, client, "register", transport, "-key", "expires", expires, netip.AddrPortFrom(srv, 5060).String())
	near.done(t)
	far.done(t)
}

// A client that has registered is called: the signalling comes in at the
// address that the registrar was told, and the media goes both ways.
func TestSIPSippRegisterAndCallIn(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(sipConfig(""))
	sipWays(t, func(t *testing.T, transport string, srv, client netip.Addr) {
		register(t, l, transport, srv, client, "600")
		at := contactOf(t, g, client)
		want := client
		if client.Is4() {
			want = lab.Outside4
		}
		if at.Addr() != want {
			t.Errorf("the client is known as %s, want %s", at, want)
		}
		inside, outside := l.Client.Capture(), l.Srv.Capture()
		near := startSipp(t, l, l.Client, client, "uas", transport, "-rtp_echo")
		near.listens(t, transport)
		far := startSipp(t, l, l.Srv, srv, "uac", transport, at.String())
		far.done(t)
		near.done(t)
		seen := outside.Stop()
		if sent, back := rtp(seen, srv, want), rtp(seen, want, srv); sent < 20 || back < sent*9/10 {
			t.Errorf("the server sent %d RTP packets and got %d back", sent, back)
		}
		if got := rtp(inside.Stop(), srv, client); got < 20 {
			t.Errorf("the client got %d RTP packets", got)
		}
		// Only the registration is left, and it goes when the client says so.
		if list := openPermissions(g); len(list) != 1 {
			t.Errorf("after the call there are %d permissions: %+v", len(list), list)
		}
		register(t, l, transport, srv, client, "0")
		noPermissions(t, g)
	})
}

// A second offer in a call moves the media; the former ports are closed.
func TestSIPSippReinvite(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(sipConfig(""))
	sipWays(t, func(t *testing.T, transport string, srv, client netip.Addr) {
		outside := l.Srv.Capture()
		far := startSipp(t, l, l.Srv, srv, "reinvited", transport, "-rtp_echo")
		far.listens(t, transport)
		near := startSipp(t, l, l.Client, client, "reinvite", transport, netip.AddrPortFrom(srv, 5060).String())
		near.done(t)
		far.done(t)
		ports := map[string]bool{}
		for _, s := range outside.Stop() {
			if !s.Out && len(s.Payload) > 0 {
				for line := range strings.Lines(string(s.Payload)) {
					if strings.HasPrefix(line, "m=audio") {
						ports[strings.Fields(line)[1]] = true
					}
				}
			}
		}
		if len(ports) != 2 {
			t.Errorf("the server was told the ports %v, want two", ports)
		}
		noPermissions(t, g)
	})
}

// A call that is given up while it rings leaves nothing open.
func TestSIPSippCancel(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	g := l.Gateway(sipConfig(""))
	sipWays(t, func(t *testing.T, transport string, srv, client netip.Addr) {
		far := startSipp(t, l, l.Srv, srv, "cancelled", transport)
		far.listens(t, transport)
		near := startSipp(t, l, l.Client, client, "cancel", transport, netip.AddrPortFrom(srv, 5060).String())
		near.done(t)
		far.done(t)
		noPermissions(t, g)
	})
}
