package misuse

import (
	"errors"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// foreign is a connection that no gateway has made.
type foreign struct{ filterapi.Connection }

func (foreign) Tuple() flow.Tuple { return tcp(client) }

// allowTable is about RetroactiveAllowBind of a bind that discards.
func allowTable() (out []example) {
	for _, c := range []struct {
		name   string
		want   error
		change func(*filterapi.AllowBind)
	}{
		{"a bind that discards", nil, func(*filterapi.AllowBind) {}},
		{"at any address", nil, func(a *filterapi.AllowBind) {
			a.Address = netip.AddrPortFrom(netip.IPv4Unspecified(), a.Address.Port())
		}},
		{"port 0", filterapi.ErrInvalidArgument, func(a *filterapi.AllowBind) { a.Address = netip.AddrPortFrom(a.Address.Addr(), 0) }},
		{"no address", filterapi.ErrInvalidArgument, func(a *filterapi.AllowBind) { a.Address = netip.AddrPort{} }},
		{"bad protocol", filterapi.ErrInvalidArgument, func(a *filterapi.AllowBind) { a.Proto = flow.ICMP }},
		{"bidirectional TCP", filterapi.ErrInvalidArgument, func(a *filterapi.AllowBind) { a.Flags = filterapi.Bidirectional }},
		{"the other family", filterapi.ErrInvalidArgument, func(a *filterapi.AllowBind) { a.Address = netip.MustParseAddrPort("[2001:db8::1]:1") }},
		{"unknown flag", filterapi.ErrInvalidArgument, func(a *filterapi.AllowBind) { a.Flags = filterapi.AllowMultiple }},
		{"unknown port", filterapi.ErrNotFound, func(a *filterapi.AllowBind) { a.Address = netip.AddrPortFrom(outside, 1) }},
		{"the other protocol", filterapi.ErrNotFound, func(a *filterapi.AllowBind) { a.Proto = flow.UDP }},
	} {
		out = append(out, example{"RetroactiveAllowBind/" + c.name, c.want, 0, func(s *scene, _ filterapi.Connection) error {
			a, err := s.discarding()
			if err != nil {
				return err
			}
			c.change(&a)
			already, err := s.session.RetroactiveAllowBind(a)
			if already {
				return errors.New("said to be allowed already")
			}
			return err
		}})
	}
	return append(out,
		example{"RetroactiveAllowBind/twice", nil, 0, func(s *scene, _ filterapi.Connection) error {
			a, err := s.discarding()
			if err != nil {
				return err
			}
			for _, want := range []bool{false, true} {
				already, err := s.session.RetroactiveAllowBind(a)
				if err != nil || already != want {
					return errors.Join(err, errors.New("not told whether it was allowed"))
				}
			}
			return nil
		}},
		example{"RetroactiveAllowBind/session that is over", filterapi.ErrTerminating, 0, func(s *scene, _ filterapi.Connection) error {
			a, err := s.discarding()
			if err != nil {
				return err
			}
			s.Disconnect(client.Addr())
			_, err = s.session.RetroactiveAllowBind(a)
			return err
		}})
}

// discarding makes a bind that discards, and how it is allowed.
func (s *scene) discarding() (filterapi.AllowBind, error) {
	b := s.bind(flow.TCP)
	b.Flags = filterapi.Discarding
	c, err := s.opened(b)
	if err != nil {
		return filterapi.AllowBind{}, err
	}
	return filterapi.AllowBind{Proto: flow.TCP, Address: c.Tuple().Dst}, nil
}

func factoryTable() (out []example) {
	for _, c := range []struct {
		name   string
		want   error
		change func(*filterapi.DataFilterFactory)
	}{
		{"all right", nil, func(*filterapi.DataFilterFactory) {}},
		{"any address and port", nil, func(f *filterapi.DataFilterFactory) { f.Address = netip.AddrPortFrom(netip.IPv4Unspecified(), 0) }},
		{"no New", filterapi.ErrInvalidArgument, func(f *filterapi.DataFilterFactory) { f.New = nil }},
		{"no event", filterapi.ErrInvalidArgument, func(f *filterapi.DataFilterFactory) { f.Event = 0 }},
		{"an event without data", filterapi.ErrInvalidArgument, func(f *filterapi.DataFilterFactory) { f.Event = filterapi.BindTCP }},
		{"two events", filterapi.ErrInvalidArgument, func(f *filterapi.DataFilterFactory) { f.Event |= filterapi.UDPDestination }},
		{"no address", filterapi.ErrInvalidArgument, func(f *filterapi.DataFilterFactory) { f.Address = netip.AddrPort{} }},
		{"no priority", filterapi.ErrInvalidArgument, func(f *filterapi.DataFilterFactory) { f.Priority = 0 }},
		{"another call's flag", filterapi.ErrInvalidArgument, func(f *filterapi.DataFilterFactory) { f.Flags = filterapi.Timeout }},
		{"address based", nil, func(f *filterapi.DataFilterFactory) { f.Flags = filterapi.AddressBased }},
	} {
		out = append(out, example{"SetDataFilterFactory/" + c.name, c.want, 0, func(s *scene, _ filterapi.Connection) error {
			f := s.factory()
			c.change(&f)
			_, err := s.session.SetDataFilterFactory(f)
			return err
		}})
	}
	return append(out,
		example{"SetDataFilterFactory/cancelled twice", filterapi.ErrTerminating, 0, func(s *scene, _ filterapi.Connection) error {
			a, err := s.session.SetDataFilterFactory(s.factory())
			if err := errors.Join(err, a.Cancel()); err != nil {
				return errors.New(err.Error())
			}
			return a.Cancel()
		}},
		example{"SetDataFilterFactory/session that is over", filterapi.ErrTerminating, 0, func(s *scene, _ filterapi.Connection) error {
			s.Disconnect(client.Addr())
			_, err := s.session.SetDataFilterFactory(s.factory())
			return err
		}})
}

func emulateTable() (out []example) {
	for _, c := range []struct {
		name   string
		want   error
		change func(*filterapi.EmulatedBind)
	}{
		{"all right", nil, func(*filterapi.EmulatedBind) {}},
		{"no client", filterapi.ErrInvalidArgument, func(b *filterapi.EmulatedBind) { b.Client = netip.AddrPort{} }},
		{"client port 0", filterapi.ErrInvalidArgument, func(b *filterapi.EmulatedBind) { b.Client = netip.AddrPortFrom(client.Addr(), 0) }},
		{"bad protocol", filterapi.ErrInvalidArgument, func(b *filterapi.EmulatedBind) { b.Proto = 0 }},
		{"unknown protocol definition", filterapi.ErrInvalidArgument, func(b *filterapi.EmulatedBind) { b.Protocol = "no-such-protocol" }},
	} {
		out = append(out, example{"EmulateClientBind/" + c.name, c.want, 0, func(s *scene, _ filterapi.Connection) error {
			b := s.emulated()
			c.change(&b)
			_, err := s.session.EmulateClientBind(b)
			return err
		}})
	}
	for _, c := range []struct {
		name string
		want error
		call func(*scene, filterapi.Connection) error
	}{
		{"EmulateConnection, no filter", filterapi.ErrInvalidArgument, func(_ *scene, c filterapi.Connection) error {
			_, err := c.EmulateConnection(nil, server, netip.AddrPort{})
			return err
		}},
		{"EmulateConnection, no remote", filterapi.ErrInvalidArgument, func(_ *scene, c filterapi.Connection) error {
			_, err := c.EmulateConnection(waits{}, netip.AddrPort{}, netip.AddrPort{})
			return err
		}},
		{"EmulateConnection after Kill", filterapi.ErrTerminating, func(_ *scene, c filterapi.Connection) error {
			c.Kill()
			_, err := c.EmulateConnection(waits{}, server, netip.AddrPort{})
			return err
		}},
		{"SetSocketName", nil, func(_ *scene, c filterapi.Connection) error { return c.SetSocketName(netip.AddrPortFrom(outside, 25)) }},
		{"SetSocketName, port 0", filterapi.ErrInvalidArgument, func(_ *scene, c filterapi.Connection) error {
			return c.SetSocketName(netip.AddrPortFrom(outside, 0))
		}},
		{"SetSocketName twice", filterapi.ErrAlreadyExists, func(_ *scene, c filterapi.Connection) error {
			if err := c.SetSocketName(netip.AddrPortFrom(outside, 25)); err != nil {
				return nil // the other case tells
			}
			return c.SetSocketName(netip.AddrPortFrom(outside, 26))
		}},
		{"SetIPFilter", filterapi.ErrNotSupported, func(_ *scene, c filterapi.Connection) error { return c.SetIPFilter(nil) }},
		{"SetClientAddress", filterapi.ErrInvalidArgument, func(_ *scene, c filterapi.Connection) error {
			return c.SetClientAddress(netip.AddrPortFrom(client.Addr(), 6001))
		}},
	} {
		out = append(out, example{"emulated bind/" + c.name, c.want, 0, func(s *scene, _ filterapi.Connection) error {
			b, err := s.session.EmulateClientBind(s.emulated())
			if err != nil {
				return errors.New("bind: " + err.Error())
			}
			return c.call(s, b)
		}})
	}
	return out
}
