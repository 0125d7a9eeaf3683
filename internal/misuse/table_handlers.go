package misuse

import (
	"context"
	"errors"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// flowCalls are the calls that belong into a handler, with what they say
// outside of one.
func flowCalls() []example {
	do := func(name string, want error, call func(filterapi.Connection) error) example {
		return example{name, want, 0, func(_ *scene, c filterapi.Connection) error { return call(c) }}
	}
	return []example{
		do("AttachDataFilter", filterapi.ErrBadContext, func(c filterapi.Connection) error {
			return c.AttachDataFilter(waits{}, filterapi.PriorityNAT)
		}),
		do("AttachDataFilter nil", filterapi.ErrInvalidArgument, func(c filterapi.Connection) error {
			return c.AttachDataFilter(nil, filterapi.PriorityNAT)
		}),
		do("AttachDataFilter class 0", filterapi.ErrInvalidArgument, func(c filterapi.Connection) error { return c.AttachDataFilter(waits{}, 0) }),
		do("AttachDataFilter class 99", filterapi.ErrInvalidArgument, func(c filterapi.Connection) error { return c.AttachDataFilter(waits{}, 99) }),
		do("Deny", filterapi.ErrBadContext, func(c filterapi.Connection) error { return c.Deny() }),
		do("SetBufferSize", filterapi.ErrBadContext, func(c filterapi.Connection) error { return c.SetBufferSize(100) }),
		do("SetBufferSize 0", filterapi.ErrInvalidArgument, func(c filterapi.Connection) error { return c.SetBufferSize(0) }),
		do("EmulateForConnect", filterapi.ErrBadContext, func(c filterapi.Connection) error { return c.EmulateForConnect(waits{}) }),
		do("EmulateForConnect nil", filterapi.ErrInvalidArgument, func(c filterapi.Connection) error { return c.EmulateForConnect(nil) }),
		do("EmulateForBind", filterapi.ErrBadContext, func(c filterapi.Connection) error { return c.EmulateForBind() }),
		do("EmulateConnection", filterapi.ErrNotEmulated, func(c filterapi.Connection) error {
			_, err := c.EmulateConnection(waits{}, server, netip.AddrPort{})
			return err
		}),
		do("IncrementBytesSent", filterapi.ErrNotEmulated, func(c filterapi.Connection) error { return c.IncrementBytesSent(1) }),
		do("SetSocketName", filterapi.ErrNotEmulated, func(c filterapi.Connection) error { return c.SetSocketName(server) }),
		do("SetIPFilter", filterapi.ErrNotSupported, func(c filterapi.Connection) error { return c.SetIPFilter(nil) }),
		do("SetClientAddress", filterapi.ErrInvalidArgument, func(c filterapi.Connection) error { return c.SetClientAddress(client) }),
	}
}

// handlerTable is what depends on the handler that runs.
func handlerTable() (out []example) {
	for _, x := range flowCalls() {
		out = append(out, example{"flow/" + x.name, x.want, 0, func(s *scene, _ filterapi.Connection) error { return x.call(s, s.tcp) }})
	}
	in := func(kind filterapi.EventMask, name string, want error, call func(filterapi.Connection) error) {
		names := map[filterapi.EventMask]string{filterapi.ConnectTCP: "connect", filterapi.UDPDestination: "destination",
			filterapi.BindTCP: "TCP bind", filterapi.BindUDP: "UDP bind", filterapi.Listen: "listen"}
		out = append(out, example{"in " + names[kind] + "/" + name, want, kind, func(_ *scene, c filterapi.Connection) error { return call(c) }})
	}
	attach := func(c filterapi.Connection) error { return c.AttachDataFilter(waits{}, filterapi.PriorityNAT) }
	deny := func(c filterapi.Connection) error { return c.Deny() }
	size := func(c filterapi.Connection) error { return c.SetBufferSize(8192) }
	forConnect := func(c filterapi.Connection) error { return c.EmulateForConnect(waits{}) }
	forBind := func(c filterapi.Connection) error { return c.EmulateForBind() }
	toPeer := func(c filterapi.Connection) error {
		return c.AttachDataFilterWithDestination(waits{}, filterapi.PriorityNAT, phone)
	}
	tooEarly := func(c filterapi.Connection) error {
		_ = c.EmulateForBind()
		_, err := c.EmulateConnection(waits{}, server, netip.AddrPort{})
		return err
	}
	named := func(c filterapi.Connection) error { _, err := c.ExternalName(); return err }
	twice := func(call func(filterapi.Connection) error) func(filterapi.Connection) error {
		return func(c filterapi.Connection) error { _ = call(c); return call(c) }
	}
	bad, emulated := filterapi.ErrBadContext, filterapi.ErrAlreadyEmulated
	for _, x := range []struct {
		name                                           string
		call                                           func(filterapi.Connection) error
		connect, destination, bindTCP, bindUDP, listen error
	}{
		{"AttachDataFilter", attach, nil, nil, bad, nil, bad},
		{"Deny", deny, nil, nil, nil, nil, bad},
		{"SetBufferSize", size, nil, nil, nil, nil, nil},
		{"SetBufferSize beyond bounds", func(c filterapi.Connection) error { return c.SetBufferSize(1 << 30) },
			filterapi.ErrInvalidArgument, filterapi.ErrInvalidArgument, filterapi.ErrInvalidArgument, filterapi.ErrInvalidArgument, filterapi.ErrInvalidArgument},
		{"EmulateForConnect", forConnect, nil, nil, bad, bad, bad},
		{"EmulateForConnect twice", twice(forConnect), emulated, emulated, bad, bad, bad},
		{"EmulateForBind", forBind, bad, bad, nil, nil, bad},
		{"EmulateForBind twice", twice(forBind), bad, bad, emulated, emulated, bad},
		{"EmulateConnection before the bind is allowed", tooEarly, filterapi.ErrNotEmulated, filterapi.ErrNotEmulated, bad, bad, filterapi.ErrNotEmulated},
		{"a destination", toPeer, filterapi.ErrInvalidArgument, nil, filterapi.ErrInvalidArgument, nil, filterapi.ErrInvalidArgument},
		{"ExternalName", named, bad, bad, nil, nil, nil},
		{"emulating data filter", func(c filterapi.Connection) error {
			_ = c.EmulateForConnect(waits{})
			return c.AttachDataFilter(waits{}, filterapi.PriorityEmulation)
		}, emulated, emulated, bad, nil, bad},
	} {
		in(filterapi.ConnectTCP, x.name, x.connect, x.call)
		in(filterapi.UDPDestination, x.name, x.destination, x.call)
		in(filterapi.BindTCP, x.name, x.bindTCP, x.call)
		in(filterapi.BindUDP, x.name, x.bindUDP, x.call)
		in(filterapi.Listen, x.name, x.listen, x.call)
	}
	return append(out,
		example{"flow/AttachDataFilter after the end", filterapi.ErrTerminating, 0, func(s *scene, _ filterapi.Connection) error {
			s.End(tcp(client))
			return attach(s.tcp)
		}},
		example{"flow/Kill twice", nil, 0, func(s *scene, _ filterapi.Connection) error {
			s.tcp.Kill()
			s.tcp.Kill()
			return nil
		}})
}

func sessionTable() []example {
	do := func(name string, want error, call func(*scene) error) example {
		return example{"session/" + name, want, 0, func(s *scene, _ filterapi.Connection) error { return call(s) }}
	}
	ask := func(q filterapi.HostAccess) func(*scene) error {
		return func(s *scene) error {
			if q.Protocol == "its own" {
				q.Protocol = s.protocol
			}
			return s.session.HostAccessCheck(q)
		}
	}
	client6 := netip.MustParseAddr("ff02::1")
	bad := filterapi.ErrInvalidArgument
	clients := func(call func(s *scene, a netip.Addr) (filterapi.Session, error)) func(*scene) error {
		return func(s *scene) error {
			for _, a := range []netip.Addr{{}, netip.IPv4Unspecified(), client6, netip.MustParseAddr("224.0.0.1"), netip.MustParseAddr("10.0.0.1")} {
				if _, err := call(s, a); !errors.Is(err, bad) {
					return errors.Join(err, errors.New(a.String()+" is a client"))
				}
			}
			return bad
		}
	}
	return []example{
		do("HostAccessCheck", nil, ask(filterapi.HostAccess{Protocol: "its own", Target: server})),
		do("HostAccessCheck by port", nil, ask(filterapi.HostAccess{Proto: flow.TCP, Target: server})),
		do("HostAccessCheck, not allowed", filterapi.ErrPolicyDenied, ask(filterapi.HostAccess{Proto: flow.TCP, Target: netip.AddrPortFrom(server.Addr(), 9)})),
		do("HostAccessCheck, unknown protocol", bad, ask(filterapi.HostAccess{Protocol: "no-such-protocol", Target: server})),
		do("ExternalAddr", nil, func(s *scene) error {
			a, err := s.session.ExternalAddr(s.protocol)
			if err == nil && a != outside {
				return errors.New("another address: " + a.String())
			}
			return err
		}),
		do("ExternalAddr, unknown protocol", bad, func(s *scene) error {
			_, err := s.session.ExternalAddr("no-such-protocol")
			return err
		}),
		do("ExternalAddr, no protocol", bad, func(s *scene) error {
			_, err := s.session.ExternalAddr("")
			return err
		}),
		do("ExternalAddr of a session that is over", filterapi.ErrTerminating, func(s *scene) error {
			s.Disconnect(client.Addr())
			_, err := s.session.ExternalAddr(s.protocol)
			return err
		}),
		do("HostAccessCheck, at all", nil, ask(filterapi.HostAccess{Protocol: "its own", Target: netip.MustParseAddrPort("0.0.0.0:0")})),
		do("HostAccessCheck, anywhere by port", bad, ask(filterapi.HostAccess{Proto: flow.TCP, Target: netip.MustParseAddrPort("0.0.0.0:80")})),
		do("HostAccessCheck, no target", bad, ask(filterapi.HostAccess{Protocol: "its own"})),
		do("HostAccessCheck, neither protocol", bad, ask(filterapi.HostAccess{Target: server})),
		do("AttachFilter, itself", nil, func(s *scene) error { return s.session.AttachFilter(Name) }),
		do("AttachFilter, unknown", filterapi.ErrNotFound, func(s *scene) error { return s.session.AttachFilter("no-such-filter") }),
		do("AttachFilter, over", filterapi.ErrTerminating, func(s *scene) error {
			s.Disconnect(client.Addr())
			return s.session.AttachFilter(Name)
		}),
		do("Close of one that was not asked for", nil, func(s *scene) error {
			s.session.Close()
			s.session.Close()
			return s.session.AttachFilter(Name)
		}),
		do("ClientSession of no client", bad, clients(func(s *scene, a netip.Addr) (filterapi.Session, error) { return s.fw.ClientSession(a) })),
		do("PrivateSession of no client", bad, clients(func(s *scene, a netip.Addr) (filterapi.Session, error) {
			return s.fw.PrivateSession(a, "")
		})),
		do("private, closed twice and used", filterapi.ErrTerminating, func(s *scene) error {
			p, err := s.fw.PrivateSession(client.Addr(), "me")
			if err != nil {
				return errors.New(err.Error())
			}
			if p.User() != "me" || p.Flags() != filterapi.SessionPrivate|filterapi.SessionAuthenticated {
				return errors.New("not what was asked for")
			}
			p.Close()
			p.Close()
			if p.Flags()&filterapi.SessionTerminated == 0 {
				return errors.New("not marked as over")
			}
			f := s.factory()
			_, err = p.SetDataFilterFactory(f)
			return err
		}),
		do("private, primary of another session", bad, func(s *scene) error {
			p, err := s.fw.PrivateSession(client.Addr(), "")
			if err != nil {
				return errors.New(err.Error())
			}
			defer p.Close()
			_, err = p.AllowFutureConnect(s.future())
			return err
		}),
		do("flags when over", nil, func(s *scene) error {
			if s.session.Flags() != filterapi.SessionNAT {
				return errors.New("not a transparent session")
			}
			s.Disconnect(client.Addr())
			if s.session.Flags() != filterapi.SessionNAT|filterapi.SessionTerminated {
				return errors.New("not marked as over")
			}
			return nil
		}),
	}
}

func socketTable() []example {
	do := func(name string, want error, call func(*scene) error) example {
		return example{"sockets/" + name, want, 0, func(s *scene, _ filterapi.Connection) error { return call(s) }}
	}
	bad := filterapi.ErrInvalidArgument
	dial := func(p flow.Proto, from, to netip.AddrPort) func(*scene) error {
		return func(s *scene) error {
			_, err := s.fw.Dial(context.Background(), p, from, to)
			return err
		}
	}
	return []example{
		do("dial no protocol", bad, dial(0, netip.AddrPort{}, server)),
		do("dial nowhere", bad, dial(flow.TCP, netip.AddrPort{}, netip.AddrPort{})),
		do("dial port 0", bad, dial(flow.TCP, netip.AddrPort{}, netip.AddrPortFrom(server.Addr(), 0))),
		do("dial from another host", bad, dial(flow.TCP, netip.MustParseAddrPort("203.0.113.77:0"), server)),
		do("listen at no address", bad, func(s *scene) error { _, err := s.fw.Listen(netip.AddrPort{}, nil); return err }),
		do("listen everywhere", bad, func(s *scene) error {
			_, err := s.fw.Listen(netip.AddrPortFrom(netip.IPv4Unspecified(), 0), nil)
			return err
		}),
		do("listen for datagrams at another host", bad, func(s *scene) error {
			_, err := s.fw.ListenPacket(netip.MustParseAddrPort("203.0.113.77:0"), nil)
			return err
		}),
		do("dial what the rules refuse, in a session", filterapi.ErrPolicyDenied, func(s *scene) error {
			_, err := s.session.Network().Dial(context.Background(), flow.TCP, netip.AddrPort{}, netip.AddrPortFrom(server.Addr(), 9))
			return err
		}),
	}
}
