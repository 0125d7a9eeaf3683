package engine

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// fakeKernel holds permissions as the kernel does, and can refuse.
type fakeKernel struct {
	mu   sync.Mutex
	held map[uint64]nat.Permission
	cut  []flow.Tuple
	fail error
}

func (k *fakeKernel) Install(_ context.Context, p nat.Permission) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return k.fail
	}
	k.held[p.ID] = p
	return nil
}

func (k *fakeKernel) Remove(_ context.Context, p nat.Permission) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.held, p.ID)
	return nil
}

func (k *fakeKernel) Cut(_ context.Context, t ...flow.Tuple) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.cut = append(k.cut, t...)
	return nil
}

// only is the one permission that the kernel holds.
func (k *fakeKernel) only(t *testing.T) nat.Permission {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.held) != 1 {
		t.Fatalf("the kernel holds %v, want one permission", k.held)
	}
	for _, p := range k.held {
		return p
	}
	panic("unreachable")
}

func (k *fakeKernel) empty() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.held) == 0
}

// fakeRoutes: 10.0.0.0/24 is on lan0, the gateway has .1 there, the rest is
// behind wan0.
type fakeRoutes struct{}

func (fakeRoutes) Lookup(dst netip.Addr) (string, netip.Addr, bool, error) {
	if dst == netip.MustParseAddr("10.0.0.1") {
		return "lo", dst, true, nil
	}
	if netip.MustParsePrefix("10.0.0.0/24").Contains(dst) {
		return "lan0", netip.MustParseAddr("10.0.0.1"), false, nil
	}
	return "wan0", netip.MustParseAddr("203.0.113.1"), false, nil
}

// probe is a filter whose handler a test writes.
type probe struct {
	events   filterapi.Events
	handle   func(filterapi.Event) error
	attached int
	detached int
	mu       sync.Mutex
}

func (p *probe) Name() string                                            { return "ftp" }
func (p *probe) Init(filterapi.Firewall) (filterapi.Events, error)       { return p.events, nil }
func (p *probe) Shutdown()                                               {}
func (p *probe) HandleEvent(_ context.Context, ev filterapi.Event) error { return p.handle(ev) }
func (p *probe) AttachToSession(filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.attached++
	return p, p.events, nil
}
func (p *probe) Detach() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.detached++
}

type pumpless struct{}

func (pumpless) Pump(context.Context, filterapi.Connection, filterapi.Socket, filterapi.Socket) error {
	return nil
}

func testPolicy(t *testing.T, action policy.Action) *policy.Policy {
	t.Helper()
	uses := []policy.FilterUse{{Name: "ftp", Options: "opts"}}
	if action == policy.Deny {
		uses = nil
	}
	p, err := policy.New(
		[]policy.Network{{Name: "inside", Interfaces: []string{"lan0"}}, {Name: "outside", Interfaces: []string{"wan0"}}},
		[]policy.NetworkRule{{Name: "internet", From: "inside", To: "outside", Relation: policy.NAT}},
		policy.Builtin(),
		[]policy.Rule{{Name: "ftp", Action: action, From: []string{"inside"}, To: []string{"outside"},
			Protocols: []string{"ftp"}, Filters: uses}},
	)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

type bench struct {
	*Engine
	kernel *fakeKernel
	logs   *observer.ObservedLogs
}

func newBench(t *testing.T, f filterapi.Filter) *bench {
	t.Helper()
	core, logs := observer.New(zapcore.InfoLevel)
	k := &fakeKernel{held: map[uint64]nat.Permission{}}
	ports := nat.NewAllocator(nat.Range{Lo: 61000, Hi: 61003}, func(nat.Endpoint) bool { return false }, time.Now)
	e, err := New(Config{Policy: testPolicy(t, policy.Allow), Filters: []filterapi.Filter{f}, Kernel: k, Routes: fakeRoutes{}, Ports: ports, Quota: 3, Log: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	return &bench{e, k, logs}
}

func syn(src, dst string) flow.Packet {
	return flow.Packet{Tuple: flow.Tuple{Proto: flow.TCP, Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)}, InIface: "lan0"}
}

const (
	client  = "10.0.0.2:40000"
	control = "203.0.113.10:21"
)

// decide opens a control connection whose handler attaches a data filter.
func (b *bench) decide(t *testing.T) *Takeover {
	t.Helper()
	d := b.Decide(context.Background(), syn(client, control))
	if d.Path != flow.User || d.Takeover == nil {
		t.Fatalf("decision %+v, want user", d)
	}
	d.Takeover.Connected(netip.MustParseAddrPort("203.0.113.1:33000"), netip.MustParseAddrPort(control))
	return d.Takeover
}

func attaching(p *probe) *probe {
	p.events.Types |= filterapi.ConnectTCP | filterapi.Terminating
	p.handle = func(ev filterapi.Event) error {
		if c, ok := ev.(*filterapi.ConnectEvent); ok {
			return c.Connection.AttachDataFilter(pumpless{}, filterapi.PriorityNAT)
		}
		return nil
	}
	return p
}

func TestPathFollowsWhatFiltersDo(t *testing.T) {
	type c struct {
		name   string
		handle func(*filterapi.ConnectEvent) error
		want   flow.Path
		result flow.Result
	}
	for _, c := range []c{
		{"left alone", func(*filterapi.ConnectEvent) error { return nil }, flow.Kernel, ""},
		{"not for me", func(*filterapi.ConnectEvent) error { return filterapi.ErrNotSupported }, flow.Kernel, ""},
		{"attached", func(e *filterapi.ConnectEvent) error {
			return e.Connection.AttachDataFilter(pumpless{}, filterapi.PriorityMiddle)
		}, flow.User, ""},
		{"denied", func(e *filterapi.ConnectEvent) error { return e.Connection.Deny() }, flow.Reject, flow.Denied},
		{"failed", func(*filterapi.ConnectEvent) error { return errors.New("broken") }, flow.Reject, flow.Failed},
		{"panicked", func(*filterapi.ConnectEvent) error { panic("broken") }, flow.Reject, flow.Failed},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP}}
			p.handle = func(ev filterapi.Event) error {
				ce := ev.(*filterapi.ConnectEvent)
				if ce.Options != "opts" || ce.Rule != "ftp" || ce.Protocol != "ftp" || ce.Secondary {
					t.Errorf("event %+v", ce)
				}
				return c.handle(ce)
			}
			b := newBench(t, p)
			if d := b.Decide(context.Background(), syn(client, control)); d.Path != c.want {
				t.Fatalf("path %v, want %v", d.Path, c.want)
			}
			flows := b.logs.FilterMessage("flow").All()
			if c.result == "" && len(flows) != 0 || c.result != "" && (len(flows) != 1 || flows[0].ContextMap()["result"] != string(c.result)) {
				t.Fatalf("log %v", flows)
			}
		})
	}
}

func TestRuleDeniedNeverReachesAFilter(t *testing.T) {
	p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP, AnyProtocol: true}}
	p.handle = func(filterapi.Event) error { t.Error("event for a denied flow"); return nil }
	b := newBench(t, p)
	b.SetPolicy(testPolicy(t, policy.Deny))
	if d := b.Decide(context.Background(), syn(client, control)); d.Path != flow.Reject {
		t.Fatalf("path %v", d.Path)
	}
}

func TestLateHandlerIsRefusedAndCannotAttach(t *testing.T) {
	gate, late := make(chan struct{}), make(chan error)
	ctx, cancel := context.WithCancel(context.Background())
	p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP}}
	p.handle = func(ev filterapi.Event) error {
		cancel()
		<-gate
		late <- ev.(*filterapi.ConnectEvent).Connection.AttachDataFilter(pumpless{}, filterapi.PriorityNAT)
		return nil
	}
	b := newBench(t, p)
	if d := b.Decide(ctx, syn(client, control)); d.Path != flow.Reject {
		t.Fatalf("path %v", d.Path)
	}
	close(gate)
	if err := <-late; !errors.Is(err, filterapi.ErrBadContext) {
		t.Fatalf("attach after the deadline: %v", err)
	}
}

func TestSessionEndsWithItsLastFlow(t *testing.T) {
	p := attaching(&probe{})
	b := newBench(t, p)
	first := b.decide(t)
	d := b.Decide(context.Background(), syn("10.0.0.2:40001", control))
	first.Ended(flow.Counts{}, flow.Closed, "")
	if p.attached != 1 || p.detached != 0 {
		t.Fatalf("attached %d, detached %d", p.attached, p.detached)
	}
	d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
	d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
	if p.detached != 1 || len(b.Flows()) != 0 || b.logs.FilterMessage("flow").Len() != 2 {
		t.Fatalf("detached %d, flows %v, log %d", p.detached, b.Flows(), b.logs.FilterMessage("flow").Len())
	}
}

func TestAllowFutureConnect(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	s, primary := tk.Conn().Session(), tk.Conn()
	ask := func(target string, f filterapi.Flags) (filterapi.Action, error) {
		return s.AllowFutureConnect(filterapi.FutureConnect{Primary: primary, Target: netip.MustParseAddrPort(target), Proto: flow.TCP, Flags: f})
	}
	if _, err := ask("203.0.113.11:2000", 0); !errors.Is(err, filterapi.ErrPolicyDenied) {
		t.Errorf("another host: %v", err)
	}
	if _, err := ask("203.0.113.10:0", 0); !errors.Is(err, filterapi.ErrInvalidArgument) {
		t.Errorf("port 0: %v", err)
	}
	if _, err := ask("203.0.113.10:2000", 1<<15); !errors.Is(err, filterapi.ErrInvalidArgument) {
		t.Errorf("flag that is not there: %v", err)
	}
	act, err := ask("203.0.113.10:2000", filterapi.Timeout)
	if err != nil {
		t.Fatal(err)
	}
	if got := b.kernel.only(t); got.Timeout != filterapi.DefaultTimeout || got.Target.Port() != 2000 || got.ToUser {
		t.Errorf("kernel holds %+v", got)
	}
	data := syn("10.0.0.2:40005", "203.0.113.10:2000")
	b.KernelUsed(data)
	if err := act.Cancel(); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("cancel after use: %v", err)
	}
	b.KernelEnded(flow.End{Tuple: data.Tuple, Path: flow.Kernel, Result: flow.Closed})
	rec := b.logs.FilterMessage("flow").All()
	if len(rec) != 1 || rec[0].ContextMap()["rule"] != "ftp" || rec[0].ContextMap()["secondary"] != true {
		t.Errorf("log of the data connection: %v", rec)
	}
	act, err = ask("203.0.113.10:2001", 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := act.Cancel(); err != nil {
		t.Error(err)
	}
	if err := act.Cancel(); !errors.Is(err, filterapi.ErrTerminating) {
		t.Errorf("second cancel: %v", err)
	}
}

func TestQuotaAndSessionEnd(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	for i := range 4 {
		_, err := tk.Conn().Session().AllowFutureConnect(filterapi.FutureConnect{
			Primary: tk.Conn(), Proto: flow.TCP,
			Target: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.10"), uint16(2000+i)),
		})
		if (i < 3) != (err == nil) || i == 3 && !errors.Is(err, filterapi.ErrQuota) {
			t.Fatalf("permission %d: %v", i, err)
		}
	}
	tk.Ended(flow.Counts{}, flow.Closed, "")
	if !b.kernel.empty() || len(b.Permissions()) != 0 {
		t.Fatalf("after the session: kernel %v, engine %v", b.kernel.held, b.Permissions())
	}
}

func TestBindIsReservedThenArmedThenUsedOnce(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	peer := netip.MustParseAddr("203.0.113.10")
	bind, err := tk.Conn().Session().BindForClient(filterapi.Bind{
		Primary: tk.Conn(), Client: netip.MustParseAddrPort("10.0.0.2:5000"), Proto: flow.TCP,
		Flags: filterapi.Timeout, IPFilter: filterapi.OnlyFrom(),
	})
	if err != nil {
		t.Fatal(err)
	}
	name, err := bind.ExternalName()
	if err != nil || name.Addr().String() != "203.0.113.1" || name.Port() < 61000 || name.Port() > 61003 {
		t.Fatalf("external name %v %v", name, err)
	}
	if !b.kernel.empty() {
		t.Fatal("a reserved bind is in the kernel")
	}
	in := flow.Packet{Tuple: flow.Tuple{Proto: flow.TCP, Src: netip.AddrPortFrom(peer, 20), Dst: name}, InIface: "wan0"}
	if p := b.usePermission(in.Tuple); p != nil {
		t.Fatal("a reserved bind let a flow in")
	}
	if err := bind.SetIPFilter(filterapi.OnlyFrom(peer)); err != nil {
		t.Fatal(err)
	}
	if got := b.kernel.only(t); len(got.Sources) != 1 || got.External != name || got.Client.Port() != 5000 {
		t.Fatalf("kernel holds %+v", got)
	}
	b.KernelUsed(in)
	if err := bind.SetIPFilter(nil); !errors.Is(err, filterapi.ErrTerminating) {
		t.Fatalf("rearm after use: %v", err)
	}
	b.kernel.only(t) // the translation stays while the flow lives
	b.KernelEnded(flow.End{Tuple: in.Tuple, Path: flow.Kernel, Result: flow.Closed})
	if !b.kernel.empty() {
		t.Fatal("the translation outlived its flow")
	}
}

func TestFailedInstallLeavesNothing(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	b.kernel.fail = errors.New("kernel says no")
	for range 10 { // more than the quota
		_, err := tk.Conn().Session().AllowFutureConnect(filterapi.FutureConnect{
			Primary: tk.Conn(), Proto: flow.TCP, Target: netip.MustParseAddrPort("203.0.113.10:2000")})
		if !errors.Is(err, b.kernel.fail) {
			t.Fatalf("got %v", err)
		}
	}
	if got := b.Permissions(); len(got) != 0 {
		t.Fatalf("left %v", got)
	}
}

func TestRecheckCutsWhatIsNowDenied(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	kernel := syn("10.0.0.3:1234", control).Tuple
	if err := b.Recheck(context.Background(), []flow.Tuple{kernel}); err != nil || len(b.kernel.cut) != 0 {
		t.Fatalf("cut %v under the same policy, %v", b.kernel.cut, err)
	}
	b.SetPolicy(testPolicy(t, policy.Deny))
	if err := b.Recheck(context.Background(), []flow.Tuple{kernel}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-tk.Killed():
	default:
		t.Error("the flow in user space lives")
	}
	if len(b.kernel.cut) != 1 || b.kernel.cut[0] != kernel {
		t.Errorf("cut %v", b.kernel.cut)
	}
}

func TestTupleUsedAnewEndsTheFormerFlowOnce(t *testing.T) {
	p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP}, handle: func(filterapi.Event) error { return nil }}
	b := newBench(t, p)
	now := time.Unix(1000, 0)
	b.now = func() time.Time { return now }
	b.Decide(context.Background(), syn(client, control))
	now = now.Add(time.Minute)
	b.Decide(context.Background(), syn(client, control))
	b.KernelEnded(flow.End{Tuple: syn(client, control).Tuple, Path: flow.Kernel, Start: time.Unix(1000, 0), Result: flow.Closed})
	if n := b.logs.FilterMessage("flow").Len(); n != 1 || len(b.Flows()) != 1 {
		t.Fatalf("after the report of the former flow: %d records, %d living", n, len(b.Flows()))
	}
	b.KernelEnded(flow.End{Tuple: syn(client, control).Tuple, Path: flow.Kernel, Start: now, Result: flow.Closed})
	if n := b.logs.FilterMessage("flow").Len(); n != 2 || len(b.Flows()) != 0 {
		t.Fatalf("after its own: %d records, %d living", n, len(b.Flows()))
	}
}
