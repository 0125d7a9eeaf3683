package netns_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// SOCKS is served to the networks that the file names, and to nobody else.
func TestSocksIsForTheInside(t *testing.T) {
	eachSocks(t, socksConfig(openly), func(s *scene) {
		s.Srv.Run("ip", "route", "replace", s.inside.String(), "via", s.outside.String())
		for _, at := range []netip.Addr{s.outside, s.inside} {
			if err := briefly(s.Srv, to(at, 1080)); err == nil {
				c := s.Srv.MustDial("tcp", to(at, 1080).String(), 3*time.Second)
				deadline(s.t, c, 5*time.Second)
				mustWrite(s.t, c, "\x05\x01\x00")
				if n, err := c.Read(make([]byte, 2)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
					s.t.Errorf("the outside is served at %v: %d bytes, %v", at, n, err)
				}
			}
		}
		s.must5(s.Client, "", socksConnect, to(s.srv, 7))
		s.g.Reload(socksConfig("")) // off
		s.rejectedOrSilent(s.Client, s.socksAt())
		s.g.Reload(socksConfig("socks: {networks: lan, port: 1081}\n"))
		connectsTo(s.t, s.Client, to(s.inside, 1081))
	})
}

// Addresses of the gateway that come and go are served while they are there.
func TestSocksFollowsAddresses(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Gateway(socksConfig(openly))
	for _, at := range []string{"10.0.0.77", "fd00:a::77"} {
		prefix := at + map[bool]string{true: "/24", false: "/64"}[strings.Contains(at, ".")]
		l.GW.Run("ip", "addr", "add", prefix, "dev", "lan0")
		where := to(netip.MustParseAddr(at), 1080)
		// It may be looked for twice for a while (RFC 4862, 5.4).
		lab.Eventually(t, 10*time.Second, at+" is served", func() bool { return connect(l.Client, where, time.Second) == nil })
		l.GW.Run("ip", "addr", "del", prefix, "dev", "lan0")
		lab.Eventually(t, 10*time.Second, fmt.Sprintf("%v is served no more", where), func() bool {
			return !strings.Contains(l.GW.Run("ss", "-Hnltp"), where.String()+" ")
		})
	}
}

// connectsTo wants a connection within a moment.
func connectsTo(t *testing.T, from *lab.Host, at netip.AddrPort) {
	t.Helper()
	lab.Eventually(t, 5*time.Second, fmt.Sprintf("%v is served", at), func() bool { return connect(from, at, time.Second) == nil })
}

func (s *scene) rejectedOrSilent(from *lab.Host, at netip.AddrPort) {
	s.t.Helper()
	if err := briefly(from, at); err == nil {
		s.t.Errorf("%v is served still", at)
	}
}
