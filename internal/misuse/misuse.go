// Package misuse holds implementations of filterapi to the same answers: a
// table of what filters do wrong, and of what is only just right, run against
// any machine that stands behind the contract.
package misuse

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// Machine is an implementation under test. The network 10.0.0.0/24 is inside,
// with the gateway at .1, and hidden behind 203.0.113.1; everybody else is
// outside. The filter is bound to a protocol that has TCP port 21 and UDP port
// 5060, which inside may speak to outside; nothing else is allowed.
type Machine interface {
	// Begin brings the first packet of a flow, and connects a flow that data
	// filters hold.
	Begin(flow.Tuple)
	// End ends a living flow as its ends do.
	End(flow.Tuple)
	// Disconnect ends the session of a client, and returns when calls fail.
	Disconnect(client netip.Addr)
}

// Name is the filter's, Protocol that of the protocol that it is bound to.
const Name = "ftp"

// Run runs the table. Each case has a machine of its own, made for the filter;
// protocol is the name of the filter's protocol there.
func Run(t *testing.T, protocol string, build func(*testing.T, filterapi.Filter) Machine) {
	for _, c := range table() {
		t.Run(c.name, func(t *testing.T) {
			f := &filter{sessions: map[netip.Addr]filterapi.Session{}, conns: map[flow.Tuple]filterapi.Connection{}}
			s := &scene{protocol: protocol, filter: f}
			s.Machine = build(t, f)
			if err := s.set(c); !errors.Is(err, c.want) || c.want == nil && err != nil {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

// The ends of the flows in a scene.
var (
	client  = netip.MustParseAddrPort("10.0.0.2:40000")
	other   = netip.MustParseAddrPort("10.0.0.3:40000")
	server  = netip.MustParseAddrPort("203.0.113.10:21")
	phone   = netip.MustParseAddrPort("203.0.113.10:5060")
	outside = netip.MustParseAddr("203.0.113.1")
)

func tcp(from netip.AddrPort) flow.Tuple { return flow.Tuple{Proto: flow.TCP, Src: from, Dst: server} }
func udp(from netip.AddrPort) flow.Tuple { return flow.Tuple{Proto: flow.UDP, Src: from, Dst: phone} }

// scene is what a case plays in: flows of one client, held by data filters, and
// one of another.
type scene struct {
	Machine
	filter             *filter
	protocol           string
	fw                 filterapi.Firewall
	session            filterapi.Session
	tcp, udp, stranger filterapi.Connection
}

// set opens the flows and plays a case in them.
func (s *scene) set(c example) error {
	for _, t := range []flow.Tuple{tcp(client), udp(client), tcp(other)} {
		s.Begin(t)
	}
	f := s.filter
	s.fw, s.session = f.fw, f.sessions[client.Addr()]
	s.tcp, s.udp, s.stranger = f.conns[tcp(client)], f.conns[udp(client)], f.conns[tcp(other)]
	if s.session == nil || s.tcp == nil || s.udp == nil || s.stranger == nil {
		return errors.New("the machine did not raise the events of the flows")
	}
	if c.during == 0 {
		return c.call(s, nil)
	}
	result := errors.New("no such event was raised")
	f.meanwhile(c.during, func(conn filterapi.Connection, _ filterapi.Event) { result = c.call(s, conn) })
	switch from := netip.AddrPortFrom(client.Addr(), 40001); c.during {
	case filterapi.ConnectTCP:
		s.Begin(tcp(from))
	case filterapi.UDPDestination:
		s.Begin(udp(from))
	case filterapi.BindUDP:
		_, _ = s.session.BindForClient(s.bind(flow.UDP)) // the case may deny it
	default:
		_, _ = s.session.BindForClient(s.bind(flow.TCP))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return result
}

func (s *scene) negotiated(p flow.Proto) filterapi.Negotiated {
	return filterapi.Negotiated{Primary: s.tcp, Proto: p}
}

func (s *scene) future() filterapi.FutureConnect {
	return filterapi.FutureConnect{Negotiated: s.negotiated(flow.TCP), Target: netip.AddrPortFrom(server.Addr(), 5001)}
}

func (s *scene) bind(p flow.Proto) filterapi.Bind {
	return filterapi.Bind{Negotiated: s.negotiated(p), Clients: []netip.AddrPort{netip.AddrPortFrom(client.Addr(), 6000)}}
}

func (s *scene) redirect() filterapi.Redirect {
	return filterapi.Redirect{Negotiated: s.negotiated(flow.TCP), Targets: []netip.AddrPort{netip.AddrPortFrom(server.Addr(), 5001)}}
}

func (s *scene) emulated() filterapi.EmulatedBind {
	return filterapi.EmulatedBind{
		Client: netip.AddrPortFrom(client.Addr(), 6000), External: netip.AddrPortFrom(outside, 25),
		Proto: flow.TCP, Protocol: s.protocol,
	}
}

func (s *scene) factory() filterapi.DataFilterFactory {
	return filterapi.DataFilterFactory{
		Event: filterapi.ConnectTCP, Address: netip.AddrPortFrom(server.Addr(), 5001), Priority: filterapi.PriorityMiddle,
		New: func(filterapi.Connection) (filterapi.DataFilter, error) { return waits{}, nil },
	}
}

// opened is a bind that was made.
func (s *scene) opened(b filterapi.Bind) (filterapi.Connection, error) {
	all, err := s.session.BindForClient(b)
	if err != nil {
		return nil, errors.New("bind: " + err.Error())
	}
	return all[0], nil
}

// waits is a data filter that holds its flow until that is over.
type waits struct{}

func (waits) Pump(ctx context.Context, _ filterapi.Connection, _, _ filterapi.Socket) error {
	<-ctx.Done()
	return nil
}

// filter keeps what it is given and lets a case act in its handler.
type filter struct {
	fw filterapi.Firewall

	mu       sync.Mutex
	sessions map[netip.Addr]filterapi.Session
	conns    map[flow.Tuple]filterapi.Connection
	during   filterapi.EventMask
	act      func(filterapi.Connection, filterapi.Event)
}

func (f *filter) meanwhile(kind filterapi.EventMask, act func(filterapi.Connection, filterapi.Event)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.during, f.act = kind, act
}

const all = filterapi.ConnectTCP | filterapi.UDPDestination | filterapi.BindTCP | filterapi.BindUDP |
	filterapi.Listen | filterapi.Accepted | filterapi.Terminating

func (f *filter) Name() string { return Name }
func (f *filter) Shutdown()    {}
func (f *filter) Detach()      {}
func (f *filter) Init(fw filterapi.Firewall) (filterapi.Events, error) {
	f.fw = fw
	return filterapi.Events{Types: all &^ filterapi.Terminating, Secondary: true}, nil
}
func (f *filter) AttachToSession(s filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sessions[s.ClientAddr()] = s
	return f, filterapi.Events{Types: all, Secondary: true}, nil
}

// HandleEvent puts a data filter on every flow, unless a case acts instead.
func (f *filter) HandleEvent(_ context.Context, ev filterapi.Event) error {
	c := connectionOf(ev)
	f.mu.Lock()
	act := f.act
	if ev.Kind()&f.during == 0 {
		act = nil
	}
	if ev.Kind() != filterapi.Terminating {
		f.conns[c.Tuple()] = c
	}
	f.mu.Unlock()
	switch {
	case act != nil:
		act(c, ev)
	case ev.Kind()&(filterapi.ConnectTCP|filterapi.UDPDestination|filterapi.Accepted) != 0:
		return c.AttachDataFilter(waits{}, filterapi.PriorityMiddle)
	}
	return nil
}

func connectionOf(ev filterapi.Event) filterapi.Connection {
	switch ev := ev.(type) {
	case *filterapi.ConnectEvent:
		return ev.Connection
	case *filterapi.UDPDestinationEvent:
		return ev.Connection
	case *filterapi.BindEvent:
		return ev.Connection
	case *filterapi.ListenEvent:
		return ev.Connection
	case *filterapi.AcceptEvent:
		return ev.Connection
	case *filterapi.TerminatingEvent:
		return ev.Connection
	}
	return nil
}
