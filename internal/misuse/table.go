package misuse

import (
	"errors"
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// example is one thing that a filter does, and what it is told.
type example struct {
	name string
	want error // nil: it is right
	// during is the event in whose handler it is done; 0: in none.
	during filterapi.EventMask
	call   func(s *scene, c filterapi.Connection) error
}

func table() (out []example) {
	for _, part := range [][]example{negotiatedTable(), futureTable(), redirectTable(), bindTable(), boundTable(), allowTable(), factoryTable(),
		emulateTable(), handlerTable(), sessionTable(), socketTable(), explicitTable()} {
		out = append(out, part...)
	}
	return out
}

// permissionCalls are the calls that take what is negotiated.
func permissionCalls(s *scene, change func(*filterapi.Negotiated)) (errs []error) {
	f, r, b := s.future(), s.redirect(), s.bind(flow.TCP)
	change(&f.Negotiated)
	change(&r.Negotiated)
	change(&b.Negotiated)
	_, err := s.session.AllowFutureConnect(f)
	_, _, err2 := s.session.RedirectConnections(r)
	_, err3 := s.session.BindForClient(b)
	return []error{err, err2, err3}
}

// negotiatedTable is what the permission calls have in common: each of them
// gives the same answer.
func negotiatedTable() (out []example) {
	for _, c := range []struct {
		name   string
		want   error
		change func(*scene, *filterapi.Negotiated)
	}{
		{"all right", nil, func(*scene, *filterapi.Negotiated) {}},
		{"protocol 0", filterapi.ErrInvalidArgument, func(_ *scene, n *filterapi.Negotiated) { n.Proto = 0 }},
		{"ICMP", filterapi.ErrInvalidArgument, func(_ *scene, n *filterapi.Negotiated) { n.Proto = flow.ICMP }},
		{"unknown flag", filterapi.ErrInvalidArgument, func(_ *scene, n *filterapi.Negotiated) { n.Flags = 1 << 15 }},
		{"negative expiry", filterapi.ErrInvalidArgument, func(_ *scene, n *filterapi.Negotiated) {
			n.Flags, n.Expiry = filterapi.Timeout, -time.Second
		}},
		{"neither primary nor protocol", filterapi.ErrInvalidArgument, func(_ *scene, n *filterapi.Negotiated) { n.Primary = nil }},
		{"primary of another session", filterapi.ErrInvalidArgument, func(s *scene, n *filterapi.Negotiated) { n.Primary = s.stranger }},
		{"primary that the gateway did not make", filterapi.ErrInvalidArgument, func(_ *scene, n *filterapi.Negotiated) { n.Primary = foreign{} }},
		{"unknown protocol definition", filterapi.ErrInvalidArgument, func(_ *scene, n *filterapi.Negotiated) { n.Protocol = "no-such-protocol" }},
		{"primary and protocol", nil, func(s *scene, n *filterapi.Negotiated) { n.Protocol = s.protocol }},
		{"notify of somebody else", filterapi.ErrInvalidArgument, func(_ *scene, n *filterapi.Negotiated) { n.Notify = &filter{} }},
		{"notify of itself", nil, func(s *scene, n *filterapi.Negotiated) { n.Notify = s.filter }},
	} {
		for i, call := range []string{"AllowFutureConnect", "RedirectConnections", "BindForClient"} {
			out = append(out, example{call + "/" + c.name, c.want, 0, func(s *scene, _ filterapi.Connection) error {
				return permissionCalls(s, func(n *filterapi.Negotiated) { c.change(s, n) })[i]
			}})
		}
	}
	for i, call := range []string{"AllowFutureConnect", "RedirectConnections", "BindForClient"} {
		out = append(out,
			example{call + "/primary that is over", filterapi.ErrTerminating, 0, func(s *scene, _ filterapi.Connection) error {
				s.End(tcp(client))
				return permissionCalls(s, func(*filterapi.Negotiated) {})[i]
			}},
			example{call + "/session that is over", filterapi.ErrTerminating, 0, func(s *scene, _ filterapi.Connection) error {
				s.Disconnect(client.Addr())
				return permissionCalls(s, func(*filterapi.Negotiated) {})[i]
			}})
	}
	return out
}

func futureTable() (out []example) {
	for _, c := range []struct {
		name   string
		want   error
		change func(*filterapi.FutureConnect)
	}{
		{"no target", filterapi.ErrInvalidArgument, func(f *filterapi.FutureConnect) { f.Target = netip.AddrPort{} }},
		{"port 0", filterapi.ErrInvalidArgument, func(f *filterapi.FutureConnect) { f.Target = netip.AddrPortFrom(server.Addr(), 0) }},
		{"another family", filterapi.ErrInvalidArgument, func(f *filterapi.FutureConnect) { f.Target = netip.MustParseAddrPort("[2001:db8::1]:1") }},
		{"another host", filterapi.ErrPolicyDenied, func(f *filterapi.FutureConnect) { f.Target = netip.MustParseAddrPort("203.0.113.11:5001") }},
		{"a near host", nil, func(f *filterapi.FutureConnect) {
			f.Target, f.Flags = netip.MustParseAddrPort("203.0.113.11:5001"), filterapi.ToSameNet
		}},
		{"a far host", filterapi.ErrPolicyDenied, func(f *filterapi.FutureConnect) {
			f.Target, f.Flags = netip.MustParseAddrPort("198.51.100.1:5001"), filterapi.ToSameNet
		}},
		{"any host", nil, func(f *filterapi.FutureConnect) {
			f.Target, f.Flags = netip.MustParseAddrPort("198.51.100.1:5001"), filterapi.ToAll
		}},
		{"a bind's flag", filterapi.ErrInvalidArgument, func(f *filterapi.FutureConnect) { f.Flags = filterapi.EvenPort }},
		{"bidirectional", filterapi.ErrInvalidArgument, func(f *filterapi.FutureConnect) { f.Proto, f.Flags = flow.UDP, filterapi.Bidirectional }},
		{"all of its flags", nil, func(f *filterapi.FutureConnect) {
			f.Flags = filterapi.AllowMultiple | filterapi.Timeout | filterapi.NoKernelMode | filterapi.AddressBased | filterapi.ToSameNetwork
		}},
		{"from an address of the gateway", nil, func(f *filterapi.FutureConnect) { f.External = netip.AddrPortFrom(outside, 0) }},
		{"from another host's address", filterapi.ErrInvalidArgument, func(f *filterapi.FutureConnect) {
			f.External = netip.MustParseAddrPort("203.0.113.77:0")
		}},
		{"many from one port", filterapi.ErrInvalidArgument, func(f *filterapi.FutureConnect) {
			f.External, f.Flags = netip.AddrPortFrom(outside, 7000), filterapi.AllowMultiple
		}},
	} {
		out = append(out, example{"AllowFutureConnect/" + c.name, c.want, 0, func(s *scene, _ filterapi.Connection) error {
			f := s.future()
			c.change(&f)
			_, err := s.session.AllowFutureConnect(f)
			return err
		}})
	}
	return append(out, example{"AllowFutureConnect/cancelled twice", filterapi.ErrTerminating, 0, func(s *scene, _ filterapi.Connection) error {
		a, err := s.session.AllowFutureConnect(s.future())
		if err := errors.Join(err, a.Cancel()); err != nil {
			return errors.New(err.Error())
		}
		return a.Cancel()
	}})
}

func redirectTable() (out []example) {
	for _, c := range []struct {
		name   string
		want   error
		change func(*filterapi.Redirect)
	}{
		{"no targets", filterapi.ErrInvalidArgument, func(r *filterapi.Redirect) { r.Targets = nil }},
		{"one bad target", filterapi.ErrInvalidArgument, func(r *filterapi.Redirect) { r.Targets = append(r.Targets, netip.AddrPort{}) }},
		{"a target with port 0", filterapi.ErrInvalidArgument, func(r *filterapi.Redirect) { r.Targets[0] = netip.AddrPortFrom(server.Addr(), 0) }},
		{"address based", filterapi.ErrInvalidArgument, func(r *filterapi.Redirect) { r.Flags = filterapi.AddressBased }},
		{"to all", filterapi.ErrInvalidArgument, func(r *filterapi.Redirect) { r.Flags = filterapi.ToAll }},
		{"another host", nil, func(r *filterapi.Redirect) { r.Targets[0] = netip.MustParseAddrPort("203.0.113.11:5001") }},
		{"many from one port", filterapi.ErrInvalidArgument, func(r *filterapi.Redirect) {
			r.External, r.Flags = netip.AddrPortFrom(outside, 7000), filterapi.AllowMultiple
		}},
	} {
		out = append(out, example{"RedirectConnections/" + c.name, c.want, 0, func(s *scene, _ filterapi.Connection) error {
			r := s.redirect()
			c.change(&r)
			_, _, err := s.session.RedirectConnections(r)
			return err
		}})
	}
	return out
}

func bindTable() (out []example) {
	for _, c := range []struct {
		name   string
		want   error
		change func(*filterapi.Bind)
	}{
		{"no clients", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) { b.Clients = nil }},
		{"client port 0", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) { b.Clients[0] = netip.AddrPortFrom(client.Addr(), 0) }},
		{"another family", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) { b.Clients[0] = netip.MustParseAddrPort("[fd00:a::2]:1") }},
		{"a port by its number alone", nil, func(b *filterapi.Bind) { b.External = netip.MustParseAddrPort("0.0.0.0:7000") }},
		{"an odd port as a wish, even wanted", nil, func(b *filterapi.Bind) {
			b.External, b.Flags = netip.AddrPortFrom(outside, 7001), filterapi.EvenPort|filterapi.Preferred
		}},
		{"no address of the client's family", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) { b.External = netip.MustParseAddrPort("[::]:7000") }},
		{"the same source", nil, func(b *filterapi.Bind) { b.Flags = filterapi.SameSource }},
		{"another client", filterapi.ErrPolicyDenied, func(b *filterapi.Bind) { b.Clients[0] = netip.AddrPortFrom(other.Addr(), 1) }},
		{"a near client", nil, func(b *filterapi.Bind) {
			b.Clients[0], b.Flags = netip.AddrPortFrom(other.Addr(), 1), filterapi.ToSameNet
		}},
		{"nobody yet", nil, func(b *filterapi.Bind) { b.Clients[0] = netip.AddrPort{} }},
		{"nobody yet, and somebody", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) { b.Clients = append(b.Clients, netip.AddrPort{}) }},
		{"two clients", nil, func(b *filterapi.Bind) { b.Clients = append(b.Clients, netip.AddrPortFrom(client.Addr(), 6001)) }},
		{"address based", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) { b.Flags = filterapi.AddressBased }},
		{"bidirectional TCP", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) { b.Flags = filterapi.Bidirectional }},
		{"bidirectional UDP", nil, func(b *filterapi.Bind) { b.Proto, b.Flags = flow.UDP, filterapi.Bidirectional }},
		{"IP filter of another family", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) {
			b.IPFilter = filterapi.OnlyFrom(netip.MustParseAddr("2001:db8::1"))
		}},
		{"another host's external address", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) {
			b.External = netip.MustParseAddrPort("203.0.113.77:0")
		}},
		{"the gateway's external address", nil, func(b *filterapi.Bind) { b.External = netip.AddrPortFrom(outside, 0) }},
		{"odd port, even wanted", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) {
			b.External, b.Flags = netip.AddrPortFrom(outside, 7001), filterapi.EvenPort
		}},
	} {
		out = append(out, example{"BindForClient/" + c.name, c.want, 0, func(s *scene, _ filterapi.Connection) error {
			b := s.bind(flow.TCP)
			c.change(&b)
			_, err := s.session.BindForClient(b)
			return err
		}})
	}
	return out
}

// boundTable is about the connection objects of binds, and of flows where the
// call is for binds.
func boundTable() (out []example) {
	for _, c := range []struct {
		name   string
		want   error
		change func(*filterapi.Bind)
		call   func(*scene, filterapi.Connection) error
	}{
		{"as a primary connection", filterapi.ErrInvalidArgument, nil, func(s *scene, c filterapi.Connection) error {
			f := s.future()
			f.Primary = c
			_, err := s.session.AllowFutureConnect(f)
			return err
		}},
		{"SetIPFilter", nil, nil, func(_ *scene, c filterapi.Connection) error { return c.SetIPFilter(filterapi.OnlyFrom(server.Addr())) }},
		{"SetIPFilter, another family", filterapi.ErrInvalidArgument, nil, func(_ *scene, c filterapi.Connection) error {
			return c.SetIPFilter(filterapi.OnlyFrom(netip.MustParseAddr("2001:db8::1")))
		}},
		{"SetIPFilter after Kill", filterapi.ErrTerminating, nil, func(_ *scene, c filterapi.Connection) error {
			c.Kill()
			c.Kill() // may be repeated
			return c.SetIPFilter(nil)
		}},
		{"AttachDataFilter", filterapi.ErrBadContext, nil, func(_ *scene, c filterapi.Connection) error {
			return c.AttachDataFilter(waits{}, filterapi.PriorityNAT)
		}},
		{"ExternalPeer", filterapi.ErrBadContext, nil, func(_ *scene, c filterapi.Connection) error {
			_, err := c.ExternalPeer()
			return err
		}},
		{"SetClientAddress of one that has it", filterapi.ErrInvalidArgument, nil, func(_ *scene, c filterapi.Connection) error {
			return c.SetClientAddress(netip.AddrPortFrom(client.Addr(), 6001))
		}},
		{"SetClientAddress", nil, nobody, func(_ *scene, c filterapi.Connection) error {
			return c.SetClientAddress(netip.AddrPortFrom(client.Addr(), 6001))
		}},
		{"SetClientAddress, another client", filterapi.ErrPolicyDenied, nobody, func(_ *scene, c filterapi.Connection) error {
			return c.SetClientAddress(netip.AddrPortFrom(other.Addr(), 1))
		}},
		{"SetClientAddress after Kill", filterapi.ErrTerminating, nobody, func(_ *scene, c filterapi.Connection) error {
			c.Kill()
			return c.SetClientAddress(netip.AddrPortFrom(client.Addr(), 6001))
		}},
		{"SetClientAddress, port 0", filterapi.ErrInvalidArgument, nobody, func(_ *scene, c filterapi.Connection) error {
			return c.SetClientAddress(netip.AddrPortFrom(client.Addr(), 0))
		}},
		{"SetClientAddress twice", filterapi.ErrInvalidArgument, nobody, func(_ *scene, c filterapi.Connection) error {
			if err := c.SetClientAddress(netip.AddrPortFrom(client.Addr(), 6001)); err != nil {
				return nil // the other case tells
			}
			return c.SetClientAddress(netip.AddrPortFrom(client.Addr(), 6001))
		}},
		{"SetExpiry", nil, nil, func(_ *scene, c filterapi.Connection) error {
			if _, ends := c.Expiry(); ends {
				return errors.New("it ends by itself")
			}
			if err := c.SetExpiry(time.Hour); err != nil {
				return err
			}
			if at, ends := c.Expiry(); !ends || time.Until(at) > time.Hour || time.Until(at) < time.Hour/2 {
				return errors.New("another expiry")
			}
			if err := c.SetIPFilter(filterapi.OnlyFrom(server.Addr())); err != nil {
				return err
			}
			if err := c.SetExpiry(0); err != nil {
				return err
			}
			if _, ends := c.Expiry(); ends {
				return errors.New("it ends still")
			}
			return nil
		}},
		{"another at its port", filterapi.ErrAlreadyExists, nil, func(s *scene, c filterapi.Connection) error {
			_, err := s.another(netip.AddrPortFrom(netip.IPv4Unspecified(), c.Tuple().Dst.Port()), 0)
			return err
		}},
		{"another that wishes for its port", nil, nil, func(s *scene, c filterapi.Connection) error {
			taken := c.Tuple().Dst
			second, err := s.another(netip.AddrPortFrom(netip.IPv4Unspecified(), taken.Port()), filterapi.Preferred)
			if err == nil && second.Tuple().Dst == taken {
				return errors.New("both have the same address")
			}
			return err
		}},
		{"SetExpiry, negative", filterapi.ErrInvalidArgument, nil, func(_ *scene, c filterapi.Connection) error { return c.SetExpiry(-1) }},
		{"SetExpiry after Kill", filterapi.ErrTerminating, nil, func(_ *scene, c filterapi.Connection) error {
			c.Kill()
			return c.SetExpiry(time.Hour)
		}},
		{"Expiry after Kill", nil, nil, func(_ *scene, c filterapi.Connection) error {
			if err := c.SetExpiry(time.Hour); err != nil {
				return err
			}
			c.Kill()
			if _, ends := c.Expiry(); ends {
				return errors.New("it ends still")
			}
			return nil
		}},
		{"SetExpiry of a flow", filterapi.ErrNotSupported, nil, func(s *scene, _ filterapi.Connection) error { return s.tcp.SetExpiry(time.Hour) }},
		{"EmulateConnection", filterapi.ErrNotEmulated, nil, func(_ *scene, c filterapi.Connection) error {
			_, err := c.EmulateConnection(waits{}, server, netip.AddrPort{})
			return err
		}},
		{"SetSocketName", filterapi.ErrNotEmulated, nil, func(_ *scene, c filterapi.Connection) error { return c.SetSocketName(server) }},
		{"IncrementBytesSent", filterapi.ErrNotEmulated, nil, func(_ *scene, c filterapi.Connection) error { return c.IncrementBytesSent(1) }},
	} {
		out = append(out, example{"bind/" + c.name, c.want, 0, func(s *scene, _ filterapi.Connection) error {
			b := s.bind(flow.TCP)
			if c.change != nil {
				c.change(&b)
			}
			bound, err := s.opened(b)
			if err != nil {
				return err
			}
			return c.call(s, bound)
		}})
	}
	return out
}

// another makes a second bind, for another port of the client's.
func (s *scene) another(external netip.AddrPort, f filterapi.Flags) (filterapi.Connection, error) {
	b := s.bind(flow.TCP)
	b.Clients[0], b.External, b.Flags = netip.AddrPortFrom(client.Addr(), 6001), external, f
	all, err := s.session.BindForClient(b)
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

func nobody(b *filterapi.Bind) { b.Clients[0] = netip.AddrPort{} }
