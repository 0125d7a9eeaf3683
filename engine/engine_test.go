package engine

import (
	"context"
	"errors"
	"net/netip"
	"runtime"
	"slices"
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
	// peers are those of mappings.
	peers map[nat.Peer]bool
	// living is conntrack's table, as far as a test fills it.
	living []LivingFlow
	// slow keeps those who ask for later until answer.
	slow    bool
	waiting []func()
	// watched is how often the reports of established flows are asked for.
	watched int
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

func (k *fakeKernel) InstallLater(p nat.Permission, done func(error)) {
	k.mu.Lock()
	slow := k.slow
	if slow {
		k.waiting = append(k.waiting, func() { done(k.Install(context.Background(), p)) })
	}
	k.mu.Unlock()
	if !slow {
		done(k.Install(context.Background(), p))
	}
}

// answer gives those that wait the kernel's word.
func (k *fakeKernel) answer() {
	k.mu.Lock()
	waiting := k.waiting
	k.waiting = nil
	k.mu.Unlock()
	for _, f := range waiting {
		f()
	}
}

func (k *fakeKernel) Remove(_ context.Context, p nat.Permission) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.held, p.ID)
	return nil
}

func (k *fakeKernel) Peers(_ context.Context, come, gone []nat.Peer) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.peers == nil {
		k.peers = map[nat.Peer]bool{}
	}
	for _, p := range gone {
		delete(k.peers, p)
	}
	for _, p := range come {
		k.peers[p] = true
	}
	return nil
}

func (k *fakeKernel) Living(_ context.Context, take func(LivingFlow)) error {
	k.mu.Lock()
	living := slices.Clone(k.living)
	k.mu.Unlock()
	for _, f := range living {
		take(f)
	}
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

// fakeRoutes: 10.0.0.0/24 is on lan0, the gateway has .1 there, and
// 203.0.113.1 on wan0, behind which the rest is.
type fakeRoutes struct{}

func (fakeRoutes) AddressOf(string, bool) (netip.Addr, error) {
	return netip.MustParseAddr("203.0.113.1"), nil
}

func (fakeRoutes) Lookup(dst netip.Addr) (string, netip.Addr, bool, error) {
	if dst == netip.MustParseAddr("10.0.0.1") || dst == netip.MustParseAddr("203.0.113.1") {
		return "lo", dst, true, nil
	}
	if netip.MustParsePrefix("10.0.0.0/24").Contains(dst) {
		return "lan0", netip.MustParseAddr("10.0.0.1"), false, nil
	}
	return "wan0", netip.MustParseAddr("203.0.113.1"), false, nil
}

// Known implements CachedRoutes: all of it is.
func (r fakeRoutes) Known(dst netip.Addr) (string, bool, bool) {
	iface, _, local, err := r.Lookup(dst)
	return iface, local, err == nil
}

// probe is a filter whose handler a test writes.
type probe struct {
	fw       filterapi.Firewall
	events   filterapi.Events
	handle   func(filterapi.Event) error
	attached int
	detached int
	mu       sync.Mutex
}

func (p *probe) Name() string { return "ftp" }
func (p *probe) Init(fw filterapi.Firewall) (filterapi.Events, error) {
	p.fw = fw
	return p.events, nil
}
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

// calm waits until the engine has done what it does in the background.
func (b *bench) calm() { b.tasks.wait() }

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
		{"ended its goroutine", func(*filterapi.ConnectEvent) error { runtime.Goexit(); return nil }, flow.Reject, flow.Failed},
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
	if err := <-late; !errors.Is(err, filterapi.ErrTerminating) {
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
	b.calm()
	if p.detached != 1 || len(b.Flows()) != 0 || b.logs.FilterMessage("flow").Len() != 2 {
		t.Fatalf("detached %d, flows %v, log %d", p.detached, b.Flows(), b.logs.FilterMessage("flow").Len())
	}
}

func TestRecheckCutsWhatIsNowDenied(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	kernel := syn("10.0.0.3:1234", control).Tuple
	if err := b.Recheck(context.Background(), []KernelFlow{{Tuple: kernel}}); err != nil || len(b.kernel.cut) != 0 {
		t.Fatalf("cut %v under the same policy, %v", b.kernel.cut, err)
	}
	b.SetPolicy(testPolicy(t, policy.Deny))
	if err := b.Recheck(context.Background(), []KernelFlow{{Tuple: kernel}}); err != nil {
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

// WatchEstablished counts, and never below zero.
func (k *fakeKernel) WatchEstablished(on bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case on && k.fail != nil:
		return k.fail
	case on:
		k.watched++
	case k.watched == 0:
		return errors.New("nobody watches")
	default:
		k.watched--
	}
	return nil
}

func (k *fakeKernel) watching() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.watched
}
