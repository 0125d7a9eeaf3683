package engine

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// flakyKernel holds permissions as the kernel does, lets packets use them up,
// and refuses changes at random: then it holds nothing of a permission, or
// still what it held before.
type flakyKernel struct {
	mu    sync.Mutex
	rand  *rand.Rand
	calm  bool
	fails int
	held  map[uint64]nat.Permission
	used  map[uint64]bool
	// watched is how often the reports of established flows are asked for.
	watched int
}

var errFlaky = errors.New("no buffer space")

func (k *flakyKernel) Install(_ context.Context, p nat.Permission) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.refuses() {
		delete(k.held, p.ID)
		return errFlaky
	}
	k.held[p.ID] = p
	delete(k.used, p.ID)
	return nil
}

func (k *flakyKernel) InstallLater(p nat.Permission, done func(error)) {
	done(k.Install(context.Background(), p))
}

// WatchEstablished may refuse to begin, and to end.
func (k *flakyKernel) WatchEstablished(on bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.refuses() {
		return errFlaky
	}
	if k.watched++; !on {
		k.watched -= 2
	}
	return nil
}

func (k *flakyKernel) Remove(_ context.Context, p nat.Permission) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.refuses() {
		return errFlaky
	}
	delete(k.held, p.ID)
	return nil
}

func (k *flakyKernel) Living(context.Context, func(LivingFlow)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.refuses() {
		return errFlaky
	}
	return nil
}

func (k *flakyKernel) Peers(context.Context, []nat.Peer, []nat.Peer) error { return nil }

func (k *flakyKernel) Cut(context.Context, ...flow.Tuple) error { return nil }

func (k *flakyKernel) refuses() bool {
	if !k.calm && k.rand.IntN(6) == 0 {
		k.fails++
		return true
	}
	return false
}

// arrive is a first packet: does a permission let it in? A single use is
// over with it.
func (k *flakyKernel) arrive(t flow.Tuple) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for id, p := range k.held {
		if !opens(p, t) || p.ToUser || k.used[id] {
			continue
		}
		k.used[id] = !p.Multiple
		return true
	}
	return false
}

func opens(p nat.Permission, t flow.Tuple) bool {
	if p.Direction == nat.Outbound {
		to := p.Target
		if p.Via.IsValid() {
			to = p.Via
		}
		return t.Dst == to && t.Src.Addr() == p.Client.Addr()
	}
	return t.Dst == p.External && (p.AnySource || slices.ContainsFunc(p.Sources, func(x netip.Prefix) bool { return x.Contains(t.Src.Addr()) }))
}

// settle ends the refusals.
func (k *flakyKernel) settle() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.calm = true
}

// world is the slow plain model of what clients and filters did: it knows
// which calls have returned, and nothing of how the engine works.
type world struct {
	t       *testing.T
	e       *Engine
	kernel  *flakyKernel
	rand    *rand.Rand
	clients []*modelClient
	port    uint16
	living  []flow.Tuple            // kernel flows that a permission let in
	owed    map[flow.Tuple]bool     // a filter must hear of them
	closed  map[netip.AddrPort]bool // binds that wait for somebody's call
	mu      sync.Mutex
	heard   map[flow.Tuple]int // under mu
}

type modelClient struct {
	addr    netip.Addr
	control *Takeover
	open    []modelPermission
}

type modelPermission struct {
	tuple   flow.Tuple // of a flow that it lets in
	action  filterapi.Action
	bind    filterapi.Connection
	notify  bool
	waiting bool
	discard bool
}

const modelServer = "203.0.113.10"

// step does one random thing.
func (w *world) step() {
	c := w.clients[w.rand.IntN(len(w.clients))]
	switch n := w.rand.IntN(14); {
	case c.control == nil:
		w.port++
		d := w.e.Decide(context.Background(), syn(fmt.Sprintf("%s:%d", c.addr, w.port), modelServer+":21"))
		if d.Path != flow.User {
			w.t.Fatalf("control connection: %v", d.Path)
		}
		c.control = d.Takeover
		c.control.Connected(netip.MustParseAddrPort("203.0.113.1:33000"), netip.MustParseAddrPort(modelServer+":21"))
	case n < 2:
		w.connect(c)
	case n >= 12:
		w.redirect(c)
	case n < 5:
		w.bind(c)
	case n < 9 && len(c.open) > 0:
		i := w.rand.IntN(len(c.open))
		w.touch(c, c.open[i], n)
	case n < 11 && len(w.living) > 0:
		i := w.rand.IntN(len(w.living))
		w.e.KernelEnded(flow.End{Tuple: w.living[i], Path: flow.Kernel, Result: flow.Closed})
		w.living = slices.Delete(w.living, i, i+1)
	case n == 11 && w.rand.IntN(3) == 0:
		c.control.Ended(flow.Counts{}, flow.Closed, "")
		c.control, c.open = nil, nil
	}
}

func (w *world) flags() filterapi.Flags {
	return []filterapi.Flags{0, filterapi.Timeout, filterapi.AllowMultiple, filterapi.AllowMultiple | filterapi.Timeout, filterapi.NoKernelMode}[w.rand.IntN(5)]
}

// negotiated is what the calls have in common. The filter's own handles are
// used, so that it may name itself.
func (w *world) negotiated(c *modelClient) (filterapi.Session, filterapi.Negotiated) {
	r := w.e.filters[0]
	n := filterapi.Negotiated{Primary: c.control.flow.handle(r), Proto: flow.TCP, Flags: w.flags(), Expiry: time.Duration(1+w.rand.IntN(20)) * time.Millisecond}
	if w.rand.IntN(2) == 0 {
		n.Notify = c.control.flow.session.attachedTo(r).filter
	}
	return c.control.flow.session.handle(r), n
}

func (w *world) connect(c *modelClient) {
	target := netip.AddrPortFrom(netip.MustParseAddr(modelServer), uint16(2000+w.rand.IntN(3)))
	s, n := w.negotiated(c)
	a, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: target})
	if w.may(err) {
		// Others of the same target may be used instead of this one.
		c.open = append(c.open, modelPermission{action: a, tuple: flow.Tuple{Proto: flow.TCP, Dst: target}})
	}
}

func (w *world) redirect(c *modelClient) {
	targets := []netip.AddrPort{netip.MustParseAddrPort(modelServer + ":80"), netip.MustParseAddrPort("198.51.100.1:443")}[:1+w.rand.IntN(2)]
	s, n := w.negotiated(c)
	inside, actions, err := s.RedirectConnections(filterapi.Redirect{Negotiated: n, Targets: targets})
	if !w.may(err) {
		return
	}
	for i, a := range actions {
		c.open = append(c.open, modelPermission{action: a, notify: n.Notify != nil, tuple: flow.Tuple{Proto: flow.TCP, Dst: netip.AddrPortFrom(inside.Addr(), inside.Port()+uint16(i))}})
	}
}

func (w *world) bind(c *modelClient) {
	filters := []*filterapi.IPFilter{nil, filterapi.OnlyFrom(), filterapi.OnlyFrom(netip.MustParseAddr(modelServer))}
	s, n := w.negotiated(c)
	clients := []netip.AddrPort{netip.AddrPortFrom(c.addr, 5000), netip.AddrPortFrom(c.addr, 5001), netip.AddrPortFrom(c.addr, 5002)}[:1+w.rand.IntN(3)]
	var waiting bool
	switch w.rand.IntN(5) {
	case 0:
		clients, waiting = []netip.AddrPort{{}}, true
	case 1:
		n.Flags |= filterapi.Discarding
	}
	n.Flags |= []filterapi.Flags{0, filterapi.EvenPort}[w.rand.IntN(2)]
	binds, err := s.BindForClient(filterapi.Bind{Negotiated: n, Clients: clients, IPFilter: filters[w.rand.IntN(3)]})
	if !w.may(err) {
		return
	}
	for i, b := range binds {
		if low := binds[0].Tuple().Dst.Port(); b.Tuple().Dst.Port() != low+uint16(i) || n.Flags&filterapi.EvenPort != 0 && low%2 != 0 {
			w.t.Fatalf("bind %d of %d: %v, the first %v", i, len(binds), b.Tuple(), low)
		}
		w.closed[b.Tuple().Dst] = waiting || n.Flags&filterapi.Discarding != 0
		c.open = append(c.open, modelPermission{bind: b, tuple: b.Tuple(), notify: n.Notify != nil, waiting: waiting, discard: n.Flags&filterapi.Discarding != 0})
	}
}

// may checks that a call fails only as it may.
func (w *world) may(err error) bool {
	for _, ok := range []error{nil, errFlaky, filterapi.ErrQuota, filterapi.ErrNoPorts, filterapi.ErrTerminating} {
		if errors.Is(err, ok) {
			return err == nil
		}
	}
	w.t.Fatal(err)
	return false
}

// touch uses a permission, or changes it at the same moment, or both.
func (w *world) touch(c *modelClient, p modelPermission, n int) {
	var change sync.WaitGroup
	if n != 5 {
		change.Go(func() { w.change(p, n) })
	}
	if n != 6 {
		w.port++
		t := p.tuple
		t.Src = netip.AddrPortFrom(c.addr, w.port)
		if p.bind != nil {
			t.Src = netip.AddrPortFrom(netip.MustParseAddr(modelServer), w.port)
		}
		if w.kernel.arrive(t) {
			early := w.rand.IntN(2) == 0
			if early {
				w.established(t)
			}
			short := w.rand.IntN(5) == 0 // and its end is heard first
			if short {
				w.e.KernelEnded(flow.End{Tuple: t, Path: flow.Kernel, Result: flow.Closed})
			}
			w.e.KernelUsed(flow.Packet{Tuple: t})
			if short {
				if w.e.flows.find(t) != nil || w.e.overtaken.take(t, nil) != nil {
					w.t.Errorf("%v is over, and lives or waits", t)
				}
				change.Wait()
				return
			}
			w.living = append(w.living, t)
			if !early && w.rand.IntN(4) > 0 {
				early = true
				w.established(t)
			}
			w.owed[t] = p.notify && early && c.control != nil
		}
	}
	change.Wait()
}

// opens notes that a call may open a bind.
func (w *world) opens(p modelPermission) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed[p.tuple.Dst] = false
}

// mustBeClosed is a permission that the kernel holds, and that nobody has
// opened yet; 0: there is none.
func (w *world) mustBeClosed() uint64 {
	w.kernel.mu.Lock()
	defer w.kernel.mu.Unlock()
	for id, p := range w.kernel.held {
		if p.Direction == nat.Inbound && w.closed[p.External] {
			return id
		}
	}
	return 0
}

// established is conntrack's word, which comes only while somebody watches.
func (w *world) established(t flow.Tuple) {
	w.kernel.mu.Lock()
	watched := w.kernel.watched > 0
	w.kernel.mu.Unlock()
	if watched {
		w.e.KernelEstablished(t)
	}
}

func (w *world) change(p modelPermission, n int) {
	switch {
	case p.action != nil:
		_ = p.action.Cancel() // any answer is right here
	case n == 7:
		p.bind.Kill()
	case p.waiting && n == 8:
		w.opens(p)
		_ = p.bind.SetClientAddress(netip.AddrPortFrom(p.bind.Session().ClientAddr(), 5000))
	case p.discard && n == 8:
		w.opens(p)
		_, _ = p.bind.Session().RetroactiveAllowBind(filterapi.AllowBind{Proto: flow.TCP, Address: p.tuple.Dst})
	default:
		_ = p.bind.SetIPFilter(filterapi.OnlyFrom(netip.MustParseAddr(modelServer))) // the same
	}
}

// TestRandomLivesOfPermissions: whatever happens in whatever order, a flow
// that the kernel let in is known and attributed, and when all is over nothing
// is left: no opening, no port, no quota, no session, and one record a flow.
func TestRandomLivesOfPermissions(t *testing.T) {
	for seed := range uint64(40) {
		synctest.Test(t, func(t *testing.T) { randomLives(t, seed) })
	}
}

func randomLives(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	k := &flakyKernel{rand: rand.New(rand.NewPCG(seed, 2)), held: map[uint64]nat.Permission{}, used: map[uint64]bool{}}
	ports := nat.NewAllocator(nat.Range{Lo: 61000, Hi: 61200}, func(nat.Endpoint) bool { return false }, time.Now)
	w := &world{t: t, kernel: k, rand: r, port: 1024, owed: map[flow.Tuple]bool{}, closed: map[netip.AddrPort]bool{}, heard: map[flow.Tuple]int{}}
	p := attaching(&probe{})
	p.events.Types |= filterapi.BindTCP | filterapi.Listen
	attach := p.handle
	p.handle = func(ev filterapi.Event) error {
		if e, ok := ev.(*filterapi.EstablishedEvent); ok {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.heard[e.Connection.Tuple()]++
		}
		return attach(ev)
	}
	e, err := New(Config{Policy: testPolicy(t, policy.Allow), Filters: []filterapi.Filter{p}, Kernel: k, Routes: fakeRoutes{}, Ports: ports, Quota: 8, Log: zap.NewNop()})
	if err != nil {
		t.Error(err)
		return
	}
	w.e = e
	for i := range 4 {
		w.clients = append(w.clients, &modelClient{addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(2 + i)})})
	}
	for range 300 {
		w.step()
		if r.IntN(8) == 0 {
			time.Sleep(time.Duration(r.IntN(30)) * time.Millisecond) // permissions expire
		}
		if id := w.mustBeClosed(); id != 0 {
			t.Errorf("seed %d: permission %d is open, and nobody has opened it", seed, id)
			return
		}
		for _, tuple := range w.living {
			if c := e.flows.find(tuple); c == nil || c.perm == nil {
				t.Errorf("seed %d: %v was let in and is not known", seed, tuple)
				return
			}
		}
	}
	for _, tuple := range w.living {
		e.KernelEnded(flow.End{Tuple: tuple, Path: flow.Kernel, Result: flow.Closed})
	}
	for _, c := range w.clients {
		if c.control != nil {
			c.control.Ended(flow.Counts{}, flow.Closed, "")
		}
	}
	k.settle()
	time.Sleep(lateReports + 2*enforceAgain) // in the test's own time
	synctest.Wait()
	for tuple, n := range w.heard {
		if n != 1 {
			t.Errorf("seed %d: %v was told to stand %d times", seed, tuple, n)
		}
	}
	for tuple, owed := range w.owed {
		if owed && w.heard[tuple] == 0 {
			t.Errorf("seed %d: nobody heard that %v stands", seed, tuple)
		}
	}
	if left := w.left(); left != "" {
		t.Errorf("seed %d: at the end there is left: %s (the kernel refused %d times)", seed, left, k.fails)
	}
}

func (w *world) left() string {
	e := w.e
	w.kernel.mu.Lock()
	held, watched := len(w.kernel.held), w.kernel.watched
	w.kernel.mu.Unlock()
	e.perms.mu.Lock()
	listed, waiting := len(e.perms.byKey.first)+len(e.perms.byKey.later)+len(e.deadlines.heap), len(e.perms.byClient)
	e.perms.mu.Unlock()
	e.sessions.mu.Lock()
	sessions := len(e.sessions.byID)
	e.sessions.mu.Unlock()
	leased := e.ports.Leased()
	if watched != 0 {
		return fmt.Sprintf("watched %d times", watched)
	}
	if held+listed+waiting+sessions+leased+len(e.Flows()) == 0 {
		return ""
	}
	return fmt.Sprintf("kernel %d, listed %d, quota %d, sessions %d, ports %d, flows %d", held, listed, waiting, sessions, leased, len(e.Flows()))
}
