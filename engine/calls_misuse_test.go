package engine

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// caller is a filter whose sessions a test takes in its own hands. It attaches
// a data filter to every primary connection.
type caller struct {
	*probe
	fw       filterapi.Firewall
	sessions map[netip.Addr]*callerSession
}

// callerSession is its part in one session. Two of them are never equal to
// each other by accident: there is something in it.
type callerSession struct {
	filterapi.Session
	f       *caller
	primary filterapi.Connection
	heard   chan *filterapi.EstablishedEvent
	ended   chan filterapi.Connection
	fails   error
}

func newCaller() *caller {
	return &caller{probe: &probe{events: filterapi.Events{Types: filterapi.ConnectTCP | filterapi.UDPDestination | filterapi.Terminating}}, sessions: map[netip.Addr]*callerSession{}}
}

func (f *caller) Init(fw filterapi.Firewall) (filterapi.Events, error) {
	f.fw = fw
	return f.events, nil
}

func (f *caller) AttachToSession(s filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	x := &callerSession{Session: s, f: f, heard: make(chan *filterapi.EstablishedEvent, 100), ended: make(chan filterapi.Connection, 100)}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sessions[s.ClientAddr()] = x
	return x, f.events, nil
}

func (s *callerSession) HandleEvent(_ context.Context, ev filterapi.Event) error {
	switch e := ev.(type) {
	case *filterapi.ConnectEvent:
		s.primary = e.Connection
		return e.Connection.AttachDataFilter(pumpless{}, filterapi.PriorityNAT)
	case *filterapi.EstablishedEvent:
		s.heard <- e
		if s.fails == errPanics {
			panic("broken")
		}
		return s.fails
	case *filterapi.TerminatingEvent:
		s.ended <- e.Connection
	}
	return nil
}

var errPanics = errors.New("panics")

func (s *callerSession) Detach() {}

// officeRoutes: 10.0.0.0/24 and fd00:a::/64 are inside, 192.168.1.0/24 is a
// routed network, the rest is outside, where the gateway has two addresses.
type officeRoutes struct{}

func (officeRoutes) AddressOf(iface string, is6 bool) (netip.Addr, error) {
	if iface == "wan0" && !is6 {
		return netip.MustParseAddr("203.0.113.1"), nil
	}
	return netip.Addr{}, errors.New("no address")
}

func (officeRoutes) Lookup(dst netip.Addr) (string, netip.Addr, bool, error) {
	for _, own := range []string{"10.0.0.1", "192.168.1.1", "203.0.113.1", "203.0.113.2", "fd00:a::1", "2001:db8:b::1"} {
		if dst == netip.MustParseAddr(own) {
			return "lo", dst, true, nil
		}
	}
	for _, n := range []struct{ net, iface, source string }{
		{"10.0.0.0/24", "lan0", "10.0.0.1"}, {"192.168.1.0/24", "dmz0", "192.168.1.1"}, {"fd00:a::/64", "lan0", "fd00:a::1"},
		{"172.16.0.0/24", "isle0", "172.16.0.1"}, {"0.0.0.0/0", "wan0", "203.0.113.1"}, {"::/0", "wan0", "2001:db8:b::1"},
	} {
		if netip.MustParsePrefix(n.net).Contains(dst) {
			return n.iface, netip.MustParseAddr(n.source), false, nil
		}
	}
	return "", netip.Addr{}, false, errors.New("no route")
}

func officePolicy(t testing.TB) *policy.Policy {
	t.Helper()
	rule := func(name string, a policy.Action, to, protocol string) policy.Rule {
		return policy.Rule{Name: name, Action: a, From: []string{"inside"}, To: []string{to}, Protocols: []string{protocol}}
	}
	talk := rule("talk", policy.Allow, policy.Any, "talk")
	talk.Filters = []policy.FilterUse{{Name: "ftp"}}
	p, err := policy.New(
		[]policy.Network{
			{Name: "inside", Interfaces: []string{"lan0"}}, {Name: "outside", Interfaces: []string{"wan0"}},
			{Name: "dmz", Interfaces: []string{"dmz0"}}, {Name: "island", Interfaces: []string{"isle0"}},
		},
		[]policy.NetworkRule{
			{Name: "internet", From: "inside", To: "outside", Relation: policy.NAT},
			{Name: "servers", From: "inside", To: "dmz", Relation: policy.Route},
		},
		append([]policy.Protocol{{Name: "talk", Filter: "ftp", Matches: []policy.Match{
			{Proto: flow.TCP, Ports: policy.PortRange{Lo: 21, Hi: 21}}, {Proto: flow.UDP, Ports: policy.PortRange{Lo: 5060, Hi: 5060}},
		}}}, policy.Builtin()...),
		[]policy.Rule{talk, rule("voice", policy.Allow, "outside", "sip"), rule("web", policy.Allow, "outside", "http"), rule("lost", policy.Allow, "island", "ssh"), rule("no-telnet", policy.Deny, policy.Any, "telnet")})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func officeBench(t *testing.T) (*bench, *caller) {
	t.Helper()
	f := newCaller()
	core, logs := observer.New(zap.DebugLevel)
	k := &fakeKernel{held: map[uint64]nat.Permission{}}
	ports := nat.NewAllocator(nat.Range{Lo: 61000, Hi: 61007}, func(e nat.Endpoint) bool { return e.Addr.Port() == 22 }, time.Now)
	e, err := New(Config{Policy: officePolicy(t), Filters: []filterapi.Filter{f}, Kernel: k, Routes: officeRoutes{}, Ports: ports,
		KernelPorts: nat.Range{Lo: 10000, Hi: 32767}, Quota: 12, Log: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	return &bench{e, k, logs}, f
}

// call opens a primary connection, with the external address that it gets, and
// gives the filter's part in its session.
func (f *caller) call(t *testing.T, b *bench, from, to, name string) (*callerSession, *Takeover) {
	t.Helper()
	d := b.Decide(context.Background(), syn(from, to))
	if d.Path != flow.User {
		t.Fatalf("%s to %s: %v", from, to, d.Path)
	}
	d.Takeover.Connected(ap(name), ap(to))
	return f.sessions[ap(from).Addr()], d.Takeover
}

const (
	outer  = "203.0.113.1:33000" // what the client's primary connection is translated to
	inner6 = "[fd00:a::2]:40000"
)

// TestMisuseOfPermissionCalls: each has its error, and leaves nothing.
func TestMisuseOfPermissionCalls(t *testing.T) {
	b, f := officeBench(t)
	s, tk := f.call(t, b, client, control, outer)
	other, _ := f.call(t, b, "10.0.0.3:40000", control, "203.0.113.1:33001")
	six, _ := f.call(t, b, inner6, "[2001:db8:b::10]:21", inner6)
	if _, err := s.BindForClient(filterapi.Bind{Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP}, Clients: []netip.AddrPort{ap("10.0.0.2:1")}, External: ap("203.0.113.1:7000")}); err != nil {
		t.Fatal(err)
	}
	_, ending := f.call(t, b, "10.0.0.2:40001", control, "203.0.113.1:33002")
	ended := s.primary
	ending.Ended(flow.Counts{}, flow.Closed, "")
	s.primary = tk.flow.handle(b.filters[0])
	held := len(b.kernel.byID())

	type ask struct {
		filterapi.Negotiated
		at, external string // target, or client
		more         []string
		filter       *filterapi.IPFilter
		on           *callerSession
	}
	const (
		redirect = 1 << iota
		connect
		bind
		outbound = redirect | connect
		all      = outbound | bind
	)
	invalid, denied := filterapi.ErrInvalidArgument, filterapi.ErrPolicyDenied
	for name, c := range map[string]struct {
		calls  int
		change func(*ask)
		want   error
	}{
		"no primary and no protocol":    {all, func(a *ask) { a.Primary = nil }, invalid},
		"another session's primary":     {all, func(a *ask) { a.Primary = other.primary }, invalid},
		"somebody's own connection":     {all, func(a *ask) { a.Primary = stranger{} }, invalid},
		"an ended primary":              {all, func(a *ask) { a.Primary = ended }, filterapi.ErrTerminating},
		"no such protocol":              {all, func(a *ask) { a.Protocol = "no-such" }, invalid},
		"no such protocol, no primary":  {all, func(a *ask) { a.Primary, a.Protocol = nil, "no-such" }, invalid},
		"protocol any":                  {all, func(a *ask) { a.Protocol = policy.AnyProtocol }, invalid},
		"a denied protocol":             {all, func(a *ask) { a.Protocol = "telnet" }, denied},
		"a protocol that no rule has":   {all, func(a *ask) { a.Protocol = "ldap" }, denied},
		"a denied protocol, no primary": {all, func(a *ask) { a.Primary, a.Protocol = nil, "telnet" }, denied},
		"no network rule, no primary":   {bind, func(a *ask) { a.Primary, a.Protocol = nil, "ssh" }, filterapi.ErrNetworkDenied},
		"ICMP":                          {all, func(a *ask) { a.Proto = flow.ICMP }, invalid},
		"a flag that is not there":      {all, func(a *ask) { a.Flags = 1 << 15 }, invalid},
		"a negative expiry":             {all, func(a *ask) { a.Flags, a.Expiry = filterapi.Timeout, -1 }, invalid},
		"bidirectional TCP":             {bind, func(a *ask) { a.Proto, a.Flags = flow.TCP, filterapi.Bidirectional }, invalid},
		"bidirectional outbound":        {outbound, func(a *ask) { a.Proto, a.Flags = flow.UDP, filterapi.Bidirectional }, invalid},
		"a burst in the kernel":         {connect, func(a *ask) { a.Proto, a.Flags = flow.UDP, filterapi.IncreaseReceiveBuffer }, invalid},
		"an even target":                {outbound, func(a *ask) { a.Flags = filterapi.EvenPort }, invalid},
		"a discarding connect":          {outbound, func(a *ask) { a.Flags = filterapi.Discarding }, invalid},
		"an address-based bind":         {redirect | bind, func(a *ask) { a.Flags = filterapi.AddressBased }, invalid},
		"a wider redirect":              {redirect, func(a *ask) { a.Flags = filterapi.ToAll }, invalid},
		"another network, not joined":   {outbound, func(a *ask) { a.at = "172.16.0.9:2000" }, filterapi.ErrNetworkDenied},
		"wider than nothing":            {connect, func(a *ask) { a.Primary, a.Protocol, a.Flags = nil, "talk", filterapi.ToAll }, invalid},
		"port 0":                        {all, func(a *ask) { a.at = "10.0.0.2:0" }, invalid},
		"another family":                {all, func(a *ask) { a.at = "[2001:db8:b::10]:2000" }, invalid},
		"another family, of IPv6":       {all, func(a *ask) { a.on, a.Primary, a.at = six, six.primary, "203.0.113.10:2000" }, invalid},
		"a mapped address":              {all, func(a *ask) { a.at = "[::ffff:203.0.113.10]:2000" }, invalid},
		"a multicast address":           {all, func(a *ask) { a.at = "224.0.0.1:2000" }, invalid},
		"the unspecified address":       {outbound, func(a *ask) { a.at = "0.0.0.0:2000" }, invalid},
		"two unknown clients":           {bind, func(a *ask) { a.at, a.more = "0.0.0.0:0", []string{"0.0.0.0:0"} }, invalid},
		"unknown of the wrong family":   {bind, func(a *ask) { a.at = "[::]:0" }, invalid},
		"no target":                     {redirect | bind, func(a *ask) { a.at = "" }, invalid},
		"another host":                  {connect, func(a *ask) { a.at = "203.0.114.11:2000" }, denied},
		"another net than the same":     {connect, func(a *ask) { a.at, a.Flags = "203.0.114.11:2000", filterapi.ToSameNet }, denied},
		"another network":               {connect, func(a *ask) { a.at, a.Flags = "192.168.1.9:2000", filterapi.ToSameNetwork }, denied},
		"a bind for another client":     {bind, func(a *ask) { a.at = "10.0.0.3:2000" }, denied},
		"one of two for another":        {bind, func(a *ask) { a.more = []string{"10.0.0.3:2000"} }, denied},
		"external, not the gateway's":   {all, func(a *ask) { a.external = "203.0.113.77:0" }, invalid},
		"external, not an address":      {outbound, func(a *ask) { a.external = "0.0.0.0:7100" }, invalid},
		"external of the other family":  {all, func(a *ask) { a.external = "[2001:db8:b::1]:0" }, invalid},
		"many from one port":            {outbound, func(a *ask) { a.external, a.Flags = "203.0.113.1:7100", filterapi.AllowMultiple }, invalid},
		"odd, but even is asked for":    {bind, func(a *ask) { a.external, a.Flags = "203.0.113.1:7101", filterapi.EvenPort }, invalid},
		"a port that a bind has":        {bind, func(a *ask) { a.external = "203.0.113.1:7000" }, filterapi.ErrAlreadyExists},
		"a run that a bind cuts":        {bind, func(a *ask) { a.external, a.more = "203.0.113.1:6999", []string{"10.0.0.2:5001"} }, filterapi.ErrAlreadyExists},
		"a port of the gateway's own":   {bind, func(a *ask) { a.external = "203.0.113.1:22" }, filterapi.ErrNoPorts},
		"the kernel's, by its number":   {bind, func(a *ask) { a.external = "0.0.0.0:20000" }, filterapi.ErrNoPorts},
		"two at one flow's end":         {bind, func(a *ask) { a.external, a.more = outer, []string{"10.0.0.2:5001"} }, invalid},
		"more than all ports": {bind, func(a *ask) {
			a.more = []string{"10.0.0.2:1", "10.0.0.2:2", "10.0.0.2:3", "10.0.0.2:4", "10.0.0.2:5", "10.0.0.2:6", "10.0.0.2:7", "10.0.0.2:8"}
		}, filterapi.ErrNoPorts},
		"more targets than ports": {redirect, func(a *ask) {
			a.more = []string{"1.1.1.1:1", "1.1.1.1:2", "1.1.1.1:3", "1.1.1.1:4", "1.1.1.1:5", "1.1.1.1:6", "1.1.1.1:7", "1.1.1.1:8"}
		}, filterapi.ErrNoPorts},
		"more than the quota": {bind, func(a *ask) {
			a.external = "203.0.113.1:7100"
			a.more = []string{"10.0.0.2:11", "10.0.0.2:12", "10.0.0.2:13", "10.0.0.2:14", "10.0.0.2:1", "10.0.0.2:2", "10.0.0.2:3", "10.0.0.2:4", "10.0.0.2:5", "10.0.0.2:6", "10.0.0.2:7"}
		}, filterapi.ErrQuota},
		"sources of the other family":       {bind, func(a *ask) { a.filter = filterapi.OnlyFrom(netip.MustParseAddr("2001:db8:b::10")) }, invalid},
		"another session's filter":          {all, func(a *ask) { a.Notify = other }, invalid},
		"a filter of nobody":                {all, func(a *ask) { a.Notify = uncomparable{f: func() {}} }, invalid},
		"two targets, the second at port 0": {redirect, func(a *ask) { a.more = []string{"203.0.113.10:0"} }, invalid},
	} {
		for _, call := range []int{redirect, connect, bind} {
			if c.calls&call == 0 {
				continue
			}
			a := ask{Negotiated: filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP}, at: "203.0.113.10:2000", on: s}
			if call == bind {
				a.at = "10.0.0.2:5000"
			}
			c.change(&a)
			var list []netip.AddrPort
			for _, x := range append([]string{a.at}, a.more...) {
				if x != "" {
					list = append(list, ap(x))
				}
			}
			var external netip.AddrPort
			if a.external != "" {
				external = ap(a.external)
			}
			var err error
			switch call {
			case redirect:
				_, _, err = a.on.RedirectConnections(filterapi.Redirect{Negotiated: a.Negotiated, Targets: list, External: external})
			case connect:
				_, err = a.on.AllowFutureConnect(filterapi.FutureConnect{Negotiated: a.Negotiated, Target: list[0], External: external})
			case bind:
				_, err = a.on.BindForClient(filterapi.Bind{Negotiated: a.Negotiated, Clients: list, External: external, IPFilter: a.filter})
			}
			if !errors.Is(err, c.want) {
				t.Errorf("%s (call %d): %v, want %v", name, call, err, c.want)
			}
			if n := len(b.kernel.byID()); n != held {
				t.Fatalf("%s (call %d): the kernel holds %d, before %d", name, call, n, held)
			}
		}
	}
	if n := len(b.Permissions()); n != 1 {
		t.Errorf("left: %+v", b.Permissions())
	}
	tk.Ended(flow.Counts{}, flow.Closed, "")
	b.calm()
	if _, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Protocol: "talk", Proto: flow.TCP}, Target: ap("203.0.113.10:2000")}); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("after the session: %v", err)
	}
}

// stranger is a connection that the gateway did not make.
type stranger struct{ filterapi.Connection }

// uncomparable cannot be compared with anything.
type uncomparable struct{ f func() }

func (uncomparable) HandleEvent(context.Context, filterapi.Event) error { return nil }
func (uncomparable) Detach()                                            {}
