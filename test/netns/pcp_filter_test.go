package netns_test

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// enters says whether what a host sends from a port of its own comes in. A
// connect that does not is refused at once, a datagram is lost.
func (s *scene) enters(from *lab.Host, proto string, port int, at netip.AddrPort) bool {
	s.t.Helper()
	c, err := from.DialFrom(s.t.Context(), proto, to(s.any(), port), at.String())
	if proto == "tcp" && errors.Is(err, syscall.ECONNREFUSED) {
		return false
	}
	if err != nil {
		s.t.Fatalf("%s %s from port %d to %v: %v", proto, from.Name, port, at, err)
	}
	defer func() {
		if t, ok := c.(*net.TCPConn); ok {
			_ = t.SetLinger(0) // its port is free at once
		}
		_ = c.Close()
	}()
	if proto == "tcp" {
		echo(s.t, c, "it is let in")
		return true
	}
	mustWrite(s.t, c, "anybody?")
	if err := c.SetReadDeadline(time.Now().Add(silence())); err != nil {
		s.t.Fatal(err)
	}
	_, err = c.Read(make([]byte, 100))
	return err == nil
}

// FILTER with a port (RFC 6887, section 13.3): of the hosts that it names, those
// flows come in that begin at that port; several add up, with and without one;
// the kernel carries what has come in. Length 0 takes them away.
func TestPCPFilterPort(t *testing.T) {
	eachServed(t, "", func(s *scene, c *pcpHost) {
		for name, number := range map[string]byte{"tcp": pcpTCP, "udp": pcpUDP} {
			ask := pcpAsk{lifetime: 600, nonce: "n", proto: number, port: 4000, options: pcpFilter(128, to(s.srv, 5060))}
			a := c.maps(ask)
			check := func(when string, from *lab.Host, port int, want bool) {
				s.t.Helper()
				if s.enters(from, name, port, a.external) != want {
					s.t.Errorf("%s, %s: from port %d of %s, want %v", name, when, port, from.Name, want)
				}
			}
			check("one port", s.Srv, 5061, false)
			check("one port", s.Srv, 5060, true)
			if name == "tcp" {
				s.silent(s.Other, a.external, "no filter names it")
			} else {
				s.mute(s.Other, a.external, "no filter names it")
			}
			ask.options = append(pcpFilter(128, to(s.srv, 5062)), only(s.other)...)
			c.maps(ask)
			check("two ports and a host", s.Srv, 5063, false)
			check("two ports and a host", s.Srv, 5062, true)
			check("two ports and a host", s.Other, 5064, true)
			ask.options = nil
			c.maps(ask) // renewed
			check("renewed", s.Srv, 5065, false)
			ask.options = append(append([]byte{}, pcpClear...), pcpFilter(124, to(s.other, 5066))...)
			c.maps(ask)
			check("all of a network, from one port", s.Other, 5067, false)
			check("all of a network, from one port", s.Srv, 5066, true)
			check("all of a network, from one port", s.Other, 5066, true)
			ask.options = pcpClear
			c.maps(ask)
			check("no filter", s.Srv, 5068, true)
		}
		// What stands goes on, whatever is asked later, and no packet of it is shown to
		// anybody but the kernel.
		ask := pcpAsk{lifetime: 600, nonce: "m", proto: pcpTCP, port: 4001, options: pcpFilter(128, to(s.srv, 5070))}
		a := c.maps(ask)
		held, err := s.Srv.DialFrom(s.t.Context(), "tcp", to(s.srv, 5070), a.external.String())
		if err != nil {
			s.t.Fatal(err)
		}
		defer held.Close()
		echo(s.t, held, "it is let in")
		var flows []struct{ Src, Path string }
		s.g.JSON(&flows, "flows")
		path := ""
		for _, f := range flows {
			if f.Src == to(s.srv, 5070).String() {
				path = f.Path
			}
		}
		if path != "kernel" {
			s.t.Errorf("path %q of %+v", path, flows)
		}
		ask.options = append(append([]byte{}, pcpClear...), pcpFilter(128, to(s.srv, 5071))...)
		c.maps(ask)
		echo(s.t, held, "it goes on")
	})
}
