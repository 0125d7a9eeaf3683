package netns_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
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

// sippMedia are ports for media that no run had before.
var sippMedia atomic.Uint32

// startSipp starts sipp with a scenario at an address of a host, for one call,
// at port 5060.
func startSipp(t testing.TB, l *lab.Lab, h *lab.Host, at netip.Addr, scenario, transport string, args ...string) *sipp {
	t.Helper()
	name := fmt.Sprintf("%s-%s-%d", h.Name, scenario, time.Now().UnixNano())
	s := &sipp{host: h, messages: filepath.Join(l.Dir(), name+".messages")}
	path, err := filepath.Abs(filepath.Join("testdata", "sip", scenario+".xml"))
	if err != nil {
		t.Fatal(err)
	}
	media := 6000 + 8*(sippMedia.Add(1)%1000)
	all := append([]string{
		"-sf", path, "-t", transport, "-i", at.String(), "-p", "5060", "-mi", at.String(), "-mp", strconv.Itoa(int(media)),
		"-m", "1", "-nostdin", "-timeout", strconv.Itoa(int(lab.Patience(20*time.Second).Seconds())), "-timeout_error",
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

// rtp counts the RTP packets between two ends in a capture.
func rtp(seen []lab.Seen, from, to netip.Addr) int {
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
		if sent < 50 || echoed < sent*9/10 {
			t.Errorf("the client sent %d RTP packets and got %d back", sent, echoed)
		}
		from := client
		if client.Is4() {
			from = lab.Outside4
		}
		seen = outside.Stop()
		if got, back := rtp(seen, from, srv), rtp(seen, srv, from); got < sent || back < got*9/10 {
			t.Errorf("the server got %d of %d RTP packets, and sent %d back", got, sent, back)
		}
		noPermissions(t, g)
	})
}
