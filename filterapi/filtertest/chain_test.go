package filtertest_test

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
)

// passing is a data filter that passes both directions.
type passing struct{ tag string }

func (d passing) Pump(_ context.Context, _ filterapi.Connection, internal, external filterapi.Socket) error {
	done := make(chan error)
	carry := func(from, to filterapi.Socket) {
		for {
			buf, err := from.Recv()
			if err != nil {
				_ = to.Shutdown(false)
				done <- nil
				return
			}
			buf.Data = append(buf.Data, d.tag...)
			if to.Send(buf) != nil {
				_ = from.Close(true)
			}
		}
	}
	go carry(internal, external)
	go carry(external, internal)
	<-done
	<-done
	return nil
}

// Data filters are chained by their priority, also those of factories, binds
// and destinations.
func TestChain(t *testing.T) {
	p, g := watching(t, func(ev filterapi.Event) error {
		switch ev := ev.(type) {
		case *filterapi.ConnectEvent:
			return errors.Join(
				ev.Connection.AttachDataFilter(passing{"3"}, filterapi.PriorityExternal),
				ev.Connection.AttachDataFilter(passing{"1"}, filterapi.PriorityNAT),
				ev.Connection.AttachDataFilter(passing{"2"}, filterapi.PriorityMiddle))
		case *filterapi.BindEvent:
			return ev.Connection.AttachDataFilter(passing{"1"}, filterapi.PriorityNAT)
		case *filterapi.UDPDestinationEvent:
			return ev.Connection.AttachDataFilterWithDestination(passing{"3"}, filterapi.PriorityExternal, server)
		}
		return nil
	})
	fl := g.Connect(client, server)
	fl.Client.Send("out")
	fl.Server.Expect("out123")
	fl.Server.Send("in")
	fl.Client.Expect("in321")
	if g.Sent(filtertest.ToServer) != "out123" || g.Sent(filtertest.ToClient) != "in321" {
		t.Errorf("the journal has %q and %q", g.Sent(filtertest.ToServer), g.Sent(filtertest.ToClient))
	}
	fl.Client.CloseWrite()
	fl.Server.ExpectEOF()
	fl.Server.Send("late")
	fl.Client.Expect("late321")
	fl.Server.CloseWrite()
	fl.Client.ExpectEOF()
	if err := fl.Wait(); err != nil {
		t.Errorf("Pump: %v", err)
	}
	fl.End()
	if n := len(seen[*filterapi.TerminatingEvent](p)); n != 1 {
		t.Errorf("%d terminating events", n)
	}

	fl = g.Connect(port(2), server)
	b := bind(p)
	b.Primary, b.Proto, b.Flags = fl.Conn, flow.UDP, filterapi.Bidirectional|filterapi.AllowMultiple
	binds, err := p.BindForClient(b)
	if err != nil {
		t.Fatal(err)
	}
	act, err := p.SetDataFilterFactory(filterapi.DataFilterFactory{
		Event: filterapi.BindUDP, Address: name(t, binds[0]), Priority: filterapi.PriorityMiddle,
		New: func(filterapi.Connection) (filterapi.DataFilter, error) { return passing{"2"}, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	peer := func(from netip.AddrPort, want string) {
		t.Helper()
		in, err := g.Inbound(flow.UDP, from, name(t, binds[0]))
		if err != nil {
			t.Fatal(err)
		}
		in.Server.Send("a")
		in.Client.Expect("a" + want)
	}
	peer(server, "321")
	peer(netip.MustParseAddrPort("203.0.113.11:9"), "21") // no peer of the destination filter
	peer(server, "321")                                   // the peer comes back: one data filter, not two
	if err := errors.Join(act.Cancel()); err != nil {
		t.Error(err)
	}
	if err := act.Cancel(); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("cancelled twice: %v", err)
	}
	peer(server, "31")
}

func TestFactory(t *testing.T) {
	for text, c := range map[string]struct {
		at   string
		made func(filterapi.Connection) (filterapi.DataFilter, error)
		want string
		err  bool
	}{
		"the address":       {"203.0.113.10:21", nil, "a!", false},
		"any port":          {"203.0.113.10:0", nil, "a!", false},
		"any address":       {"0.0.0.0:0", nil, "a!", false},
		"another address":   {"203.0.113.11:21", nil, "a", false},
		"none this time":    {"0.0.0.0:0", func(filterapi.Connection) (filterapi.DataFilter, error) { return nil, nil }, "a", false},
		"denied":            {"0.0.0.0:0", func(c filterapi.Connection) (filterapi.DataFilter, error) { return nil, c.Deny() }, "", true},
		"an error":          {"0.0.0.0:0", func(filterapi.Connection) (filterapi.DataFilter, error) { return nil, errors.New("no") }, "", true},
		"a panic, like one": {"0.0.0.0:0", func(filterapi.Connection) (filterapi.DataFilter, error) { panic("no") }, "", true},
	} {
		p := &puppet{handle: func(filterapi.Connection) error { return nil }}
		g := filtertest.New(t, p, "")
		g.Connect(port(1), server)
		if c.made == nil {
			c.made = func(filterapi.Connection) (filterapi.DataFilter, error) { return passing{"!"}, nil }
		}
		if _, err := p.SetDataFilterFactory(filterapi.DataFilterFactory{
			Event: filterapi.ConnectTCP, Address: netip.MustParseAddrPort(c.at), Priority: filterapi.PriorityMiddle, New: c.made,
		}); err != nil {
			t.Fatal(err)
		}
		fl, err := g.Offer(client, server)
		if (err != nil) != c.err {
			t.Errorf("%s: %v", text, err)
		}
		if err == nil {
			fl.Client.Send("a")
			fl.Server.Expect(c.want)
		}
	}
}
