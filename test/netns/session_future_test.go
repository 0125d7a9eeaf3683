package netns_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/test/netns/lab"
)

// B18: AllowFutureConnect opens one exact address, once.
func TestB18AllowFutureConnect(t *testing.T) {
	t.Parallel()
	for _, proto := range []string{"tcp", "udp"} {
		t.Run(proto, func(t *testing.T) {
			eachScene(t, func(s *scene) {
				at := to(s.srv, 2100)
				e := s.connect()
				dropped, open := s.silent, s.dial
				if proto == "udp" {
					dropped, open = s.mute, s.talk
				}
				dropped(s.Client, at, "before the call")
				s.must("future", e, lab.ProbeArgs{Proto: proto, Targets: []string{at.String()}})
				dropped(s.Client2, at, "another client")
				dropped(s.Client, to(s.srv, 2101), "another port")
				dropped(s.Client, to(s.other, 2100), "another address")
				c := open(s.Client, at)
				inKernel(s.t, s.Lab, s.g, proto, s.client, at)
				dropped(s.Client, at, "the second time")
				echo(s.t, c, "still up")
			})
		})
	}
}

// B9: a permission of a private session is of no use to the client's own flows
// unless it is for the address.
func TestB09AddressBased(t *testing.T) {
	eachScene(t, func(s *scene) {
		private := s.p.Must("private-session", lab.ProbeArgs{Local: s.client.String(), User: "mary"}).Session
		at := to(s.srv, 2100)
		ask := lab.ProbeArgs{Session: private, Protocol: "probed", Proto: "tcp", Targets: []string{at.String()}}
		own := s.p.Must("future", ask).Actions[0]
		s.silent(s.Client, at, "it is the private session's")
		s.p.Must("cancel", lab.ProbeArgs{Action: own}) // it was not used up
		ask.Flags = []string{"AddressBased"}
		s.p.Must("future", ask)
		s.silent(s.Client2, at, "of another address")
		s.dial(s.Client, at)
	})
}

// B9 for data filters to come.
func TestB09FactoryAddressBased(t *testing.T) {
	eachScene(t, func(s *scene) {
		private := s.p.Must("private-session", lab.ProbeArgs{Local: s.client.String()}).Session
		reads := func(want string) {
			s.t.Helper()
			c := s.Client.MustDial("tcp", to(s.srv, 7).String(), 5*time.Second)
			mustWrite(s.t, c, "shout")
			s.reads(c, want)
		}
		ask := lab.ProbeArgs{Session: private, Kind: "ConnectTCP", External: to(s.srv, 7).String(), Mode: "upper"}
		s.p.Must("factory", ask)
		reads("shout")
		ask.Flags = []string{"AddressBased"}
		s.p.Must("factory", ask)
		reads("SHOUT")
	})
}

// B19: the target is the primary's peer; flags widen that to its net, its
// network, or all.
func TestB19AllowedAddresses(t *testing.T) {
	eachScene(t, func(s *scene) {
		// Beyond srv, another net of the same network.
		family := map[bool]string{true: "-4", false: "-6"}[s.client.Is4()]
		s.GW.Run("ip", family, "route", "add", s.remote.String(), "via", s.srv.String())
		s.Srv.Run("ip", "address", "add", s.remote.String(), "dev", "lo")
		e := s.connect()
		for _, row := range []struct {
			target netip.Addr
			flag   string
			want   string
		}{
			{s.srv, "", ""},
			{s.other, "", "PolicyDenied"}, {s.other, "ToSameNet", ""}, {s.other, "ToSameNetwork", ""}, {s.other, "ToAll", ""},
			{s.remote, "", "PolicyDenied"}, {s.remote, "ToSameNet", "PolicyDenied"}, {s.remote, "ToSameNetwork", ""}, {s.remote, "ToAll", ""},
		} {
			ask := lab.ProbeArgs{Proto: "tcp", Targets: []string{to(row.target, 2100).String()}}
			if row.flag != "" {
				ask.Flags = []string{row.flag}
			}
			if r := s.p.Ask("future", with(e, ask)); r.Error != row.want {
				s.t.Errorf("%s %s: error %q, want %q", row.target, row.flag, r.Error, row.want)
			}
			if row.want == "" {
				s.dial(s.Client, to(row.target, 2100))
			} else {
				s.silent(s.Client, to(row.target, 2100), row.flag)
			}
		}
	})
}

// with names the primary connection in an order.
func with(e primary, a lab.ProbeArgs) lab.ProbeArgs {
	a.Session, a.Conn = e.Session, e.id
	return a
}

// The calls ask the access rules, and check what they are given.
func TestB18Refusals(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		c := probed()
		c.Protocols += "  never: {tcp: 2100}\n"
		s := play(t, l, f, c)
		e := s.connect()
		good := func(change func(*lab.ProbeArgs)) lab.ProbeArgs {
			a := with(e, lab.ProbeArgs{Proto: "tcp", Targets: []string{to(f.srv, 2100).String()}})
			change(&a)
			return a
		}
		for _, op := range []string{"future", "redirect"} {
			for want, asks := range map[string][]lab.ProbeArgs{
				"InvalidArgument": {
					good(func(a *lab.ProbeArgs) { a.Targets[0] = to(f.srv, 0).String() }),
					good(func(a *lab.ProbeArgs) { a.Proto = "icmp" }),
					good(func(a *lab.ProbeArgs) { a.Proto = "" }),
					good(func(a *lab.ProbeArgs) { a.Flags = []string{"Unknown"} }),
					good(func(a *lab.ProbeArgs) { a.Flags = []string{"Bidirectional"} }),
					good(func(a *lab.ProbeArgs) { a.Protocol = "no-such-protocol" }),
				},
				"PolicyDenied": {good(func(a *lab.ProbeArgs) { a.Protocol = "never" })},
			} {
				for i, a := range asks {
					if r := s.p.Ask(op, a); r.Error != want {
						t.Errorf("%s %d: error %q, want %q", op, i, r.Error, want)
					}
				}
			}
		}
		if open := openPermissions(s.g); len(open) != 0 {
			t.Errorf("open: %+v", open)
		}
	})
}

// B16: a filter that asks for secondary connections is told of them, with their
// real targets; one that does not is not.
func TestB16SecondaryEvents(t *testing.T) {
	eachFamily(t, func(t *testing.T, l *lab.Lab, f family) {
		echoes(l)
		l.SetupProbe("probe2", anywhere())
		s := play(t, l, f, probed())
		second := l.ProbeNamed("probe2")
		e := s.connect()
		if _, ok := told(second, to(f.srv, 7)); !ok {
			t.Error("the primary connection is not told to both")
		}
		// A redirection is told at the call, by its target.
		at, _ := s.redirect(e, lab.ProbeArgs{})
		if x, ok := told(second, to(f.srv, 2100)); !ok || !x.Secondary || x.Protocol != "probed" {
			t.Errorf("the redirection: %v, %+v", ok, x)
		}
		s.dial(l.Client, at)
		s.must("future", e, lab.ProbeArgs{Proto: "tcp", Targets: []string{to(f.srv, 2101).String()}})
		s.dial(l.Client, to(f.srv, 2101))
		if x, ok := told(second, to(f.srv, 2101)); !ok || !x.Secondary {
			t.Errorf("the connection: %v, %+v", ok, x)
		}
		if n := s.count(s.p, "ConnectTCP"); n != 1 {
			t.Errorf("the filter for primary connections got %d events, want 1", n)
		}
		second.Must("on", lab.ProbeArgs{Kind: "ConnectTCP", Do: "deny"})
		s.refused("PolicyDenied", "redirect", e, lab.ProbeArgs{Proto: "tcp", Targets: []string{to(f.srv, 2102).String()}})
	})
}

// told gives the connect event about a target, of those so far.
func told(p *lab.Probe, target netip.AddrPort) (lab.ProbeEvent, bool) {
	found := heard(p, kindTo("ConnectTCP", target.String()))
	if len(found) == 0 {
		return lab.ProbeEvent{}, false
	}
	return found[0], true
}

// B17: one event when the connection stands, with its context, to the session
// filter that asked for it.
func TestB17Established(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string][]string{"kernel": nil, "user": {"NoKernelMode"}} {
		t.Run(name, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, l *lab.Lab, f family) { established(t, l, f, flags) })
		})
	}
}

func established(t *testing.T, l *lab.Lab, f family, flags []string) {
	echoes(l)
	l.Client.EchoTCP(4000)
	l.Client.EchoUDP(4000)
	l.SetupProbe("probe2", anywhere())
	s := play(t, l, f, probed())
	second := l.ProbeNamed("probe2")
	e := s.connect()
	ask := func(name, proto string) lab.ProbeArgs {
		return lab.ProbeArgs{
			Proto: proto, Flags: flags, Notify: name != "", Context: name,
			Targets: []string{to(f.srv, 2100).String()}, Clients: []string{to(f.client, 4000).String()},
		}
	}
	open := func(from *lab.Host, proto string, at netip.AddrPort) net.Conn {
		t.Helper()
		if proto == "udp" {
			return s.talk(from, at)
		}
		return s.dial(from, at)
	}
	standing := func(name string) []lab.ProbeEvent {
		return heard(s.p, func(x lab.ProbeEvent) bool { return x.Kind == "Established" && x.Context == name })
	}
	for _, proto := range []string{"tcp", "udp"} {
		at, _ := s.redirect(e, ask("redirect "+proto, proto))
		if n := len(standing("redirect " + proto)); n != 0 {
			t.Errorf("%d events before the connection", n)
		}
		open(l.Client, proto, at)
		s.must("future", e, ask("future "+proto, proto))
		c := open(l.Client, proto, to(f.srv, 2100))
		echo(t, c, "again")
	}
	for _, proto := range []string{"tcp", "udp"} {
		a := ask("bind "+proto, proto)
		if proto == "udp" {
			a.Flags = append([]string{"Bidirectional"}, flags...)
		}
		at, _ := s.bind(e, a)
		open(l.Srv, proto, at)
	}
	all := []string{"redirect tcp", "redirect udp", "future tcp", "future udp", "bind tcp", "bind udp"}
	for _, name := range all {
		lab.Eventually(t, 3*time.Second, "an Established event for "+name, func() bool { return len(standing(name)) > 0 })
		if all := standing(name); len(all) != 1 || all[0].Session != e.Session || all[0].Proto != name[len(name)-3:] {
			t.Errorf("%s: %+v", name, all)
		}
	}
	s.must("future", e, ask("", "tcp"))
	s.dial(l.Client, to(f.srv, 2100))
	if n := s.count(s.p, "Established"); n != len(all) {
		t.Errorf("%d Established events, want %d: nobody asked for one of the last connection", n, len(all))
	}
	if n := s.count(second, "Established"); n != 0 {
		t.Errorf("another filter got %d Established events", n)
	}
}
