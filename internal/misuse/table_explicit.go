package misuse

import (
	"context"
	"errors"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// explicitTable is about what a filter asks for in the name of a client that
// has asked it.
func explicitTable() (out []example) {
	in := func(name string, want error, call func(s *scene, own filterapi.Session) error) {
		out = append(out, example{name, want, 0, func(s *scene, _ filterapi.Connection) error {
			own, err := s.fw.PrivateSession(client.Addr(), "")
			if err != nil {
				return err
			}
			defer own.Close()
			return call(s, own)
		}})
	}
	connect := func(change func(*filterapi.Connect)) func(*scene, filterapi.Session) error {
		return func(_ *scene, own filterapi.Session) error {
			x := filterapi.Connect{Client: client, Target: server}
			change(&x)
			_, err := own.ConnectForClient(context.Background(), x)
			return err
		}
	}
	for _, c := range []struct {
		name   string
		change func(*filterapi.Connect)
	}{
		{"another client", func(x *filterapi.Connect) { x.Client = other }},
		{"no port of the client's", func(x *filterapi.Connect) { x.Client = netip.AddrPortFrom(client.Addr(), 0) }},
		{"no port", func(x *filterapi.Connect) { x.Target = netip.AddrPortFrom(server.Addr(), 0) }},
		{"nobody", func(x *filterapi.Connect) { x.Target = netip.AddrPort{} }},
		{"loopback", func(x *filterapi.Connect) { x.Target = netip.MustParseAddrPort("127.0.0.1:21") }},
		{"the other family", func(x *filterapi.Connect) { x.Target = netip.MustParseAddrPort("[2001:db8::1]:21") }},
	} {
		in("ConnectForClient/"+c.name, filterapi.ErrInvalidArgument, connect(c.change))
	}
	in("ConnectForClient/the gateway", filterapi.ErrPolicyDenied, connect(func(x *filterapi.Connect) { x.Target = netip.AddrPortFrom(outside, 21) }))
	in("ConnectForClient/in a session of the client's own", filterapi.ErrNotSupported, func(s *scene, _ filterapi.Session) error {
		_, err := s.session.ConnectForClient(context.Background(), filterapi.Connect{Client: client, Target: server})
		return err
	})
	in("ConnectForClient/in a session that is over", filterapi.ErrTerminating, func(_ *scene, own filterapi.Session) error {
		own.Close()
		_, err := own.ConnectForClient(context.Background(), filterapi.Connect{Client: client, Target: server})
		return err
	})

	bind := filterapi.Bind{Negotiated: filterapi.Negotiated{Proto: flow.TCP, Flags: filterapi.Discarding}, Clients: []netip.AddrPort{client}}
	listen := func(change func(*filterapi.Bind), then func(filterapi.ClientListener) error) func(*scene, filterapi.Session) error {
		return func(_ *scene, own filterapi.Session) error {
			b := bind
			b.External = netip.AddrPortFrom(outside, 0)
			change(&b)
			l, err := own.ListenForClient(b)
			if err != nil {
				return err
			}
			defer func() { _ = l.Close() }()
			return then(l)
		}
	}
	nothing := func(filterapi.ClientListener) error { return nil }
	for _, c := range []struct {
		name   string
		want   error
		change func(*filterapi.Bind)
	}{
		{"all right", nil, func(*filterapi.Bind) {}},
		{"nobody's", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) { b.Clients = nil }},
		{"an even port", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) { b.Flags |= filterapi.EvenPort }},
		{"bidirectional TCP", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) { b.Flags |= filterapi.Bidirectional }},
		{"open, of no protocol", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) { b.Flags = 0 }},
		{"sources of the other family", filterapi.ErrInvalidArgument, func(b *filterapi.Bind) { b.IPFilter = filterapi.OnlyFrom(netip.MustParseAddr("::1")) }},
	} {
		in("ListenForClient/"+c.name, c.want, listen(c.change, nothing))
	}
	in("ListenForClient/in a session of the client's own", filterapi.ErrNotSupported, func(s *scene, _ filterapi.Session) error {
		_, err := s.session.ListenForClient(bind)
		return err
	})
	in("ListenForClient/datagrams by TCP", filterapi.ErrNotSupported, listen(func(*filterapi.Bind) {}, func(l filterapi.ClientListener) error {
		_, _, err := l.Recv(nil)
		return errors.Join(err, l.Send(nil, phone))
	}))
	in("ListenForClient/accept by UDP", filterapi.ErrNotSupported, listen(func(b *filterapi.Bind) { b.Proto = flow.UDP }, func(l filterapi.ClientListener) error {
		_, err := l.Accept(context.Background())
		return err
	}))
	in("ListenForClient/accept when it is closed", filterapi.ErrTerminating, listen(func(*filterapi.Bind) {}, func(l filterapi.ClientListener) error {
		_ = l.Close()
		_, err := l.Accept(context.Background())
		return err
	}))
	return out
}
