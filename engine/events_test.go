package engine

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// openProbe is a probe that fails open, with an AttachToSession of its own.
type openProbe struct {
	*probe
	attach func() (filterapi.SessionFilter, filterapi.Events, error)
	mode   filterapi.FailMode
}

func (p *openProbe) FailMode() filterapi.FailMode { return p.mode }

func (p *openProbe) AttachToSession(s filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	if p.attach != nil {
		return p.attach()
	}
	return p.probe.AttachToSession(s)
}

func TestMissedDeadlineFollowsTheFailMode(t *testing.T) {
	for mode, want := range map[filterapi.FailMode]flow.Path{filterapi.FailOpen: flow.Kernel, filterapi.FailClosed: flow.Reject} {
		synctest.Test(t, func(t *testing.T) {
			p := &openProbe{probe: &probe{events: filterapi.Events{Types: filterapi.ConnectTCP}}, mode: mode}
			var late error
			p.handle = func(ev filterapi.Event) error {
				time.Sleep(time.Minute)
				late = ev.(*filterapi.ConnectEvent).Connection.AttachDataFilter(pumpless{}, filterapi.PriorityNAT)
				return nil
			}
			b := newBench(t, p)
			ctx, cancel := context.WithTimeout(context.Background(), 800*time.Millisecond)
			defer cancel()
			if d := b.Decide(ctx, syn(client, control)); d.Path != want || ctx.Err() != nil {
				t.Errorf("mode %d: path %v, want %v, while the decision still counts (%v)", mode, d.Path, want, ctx.Err())
			}
			time.Sleep(time.Hour)
			synctest.Wait()
			wantLate := map[flow.Path]error{flow.Kernel: filterapi.ErrBadContext, flow.Reject: filterapi.ErrTerminating}[want]
			if !errors.Is(late, wantLate) {
				t.Errorf("attach after the deadline: %v", late)
			}
		})
	}
}

func TestFlowsThatWaitForAFailedAttachmentAreRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int32
		p := &openProbe{probe: attaching(&probe{})}
		p.attach = func() (filterapi.SessionFilter, filterapi.Events, error) {
			if asked.Add(1) > 1 {
				return p.probe, p.events, nil
			}
			time.Sleep(time.Second)
			return nil, filterapi.Events{}, errors.New("no memory")
		}
		b := newBench(t, p)
		var flows sync.WaitGroup
		for _, src := range []string{client, "10.0.0.2:40001"} {
			flows.Go(func() {
				if d := b.Decide(context.Background(), syn(src, control)); d.Path != flow.Reject {
					t.Errorf("%s: path %v", src, d.Path)
				}
			})
		}
		flows.Wait()
		if b.decide(t); asked.Load() != 2 {
			t.Errorf("the filter was asked %d times", asked.Load())
		}
	})
}

func TestASlowAttachmentIsUsedOrDetached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &openProbe{probe: &probe{events: filterapi.Events{Types: filterapi.ConnectTCP}, handle: func(filterapi.Event) error { return nil }}}
		p.attach = func() (filterapi.SessionFilter, filterapi.Events, error) {
			time.Sleep(time.Minute)
			return p.probe.AttachToSession(nil)
		}
		b := newBench(t, p)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		b.Decide(ctx, syn(client, control)) // the session ends with this flow
		time.Sleep(time.Hour)
		synctest.Wait()
		if p.attached != 1 || p.detached != 1 {
			t.Errorf("attached %d, detached %d", p.attached, p.detached)
		}
	})
}

func TestEventsOfTheSessionReplaceThoseOfTheFilter(t *testing.T) {
	p := &openProbe{probe: &probe{events: filterapi.Events{Types: filterapi.ConnectTCP}}}
	p.handle = func(filterapi.Event) error { t.Error("an event that the session is not registered for"); return nil }
	p.attach = func() (filterapi.SessionFilter, filterapi.Events, error) {
		return p.probe, filterapi.Events{Types: filterapi.Accepted}, nil
	}
	b := newBench(t, p)
	for _, src := range []string{client, "10.0.0.2:40001"} {
		if d := b.Decide(context.Background(), syn(src, control)); d.Path != flow.Kernel {
			t.Errorf("path %v", d.Path)
		}
	}
}

// TestTerminatingOnce: a filter that heard of a connection hears of its end
// once, also when its handler failed, and a bind's end is one too.
func TestTerminatingOnce(t *testing.T) {
	ends := map[filterapi.Connection]int{}
	var mu sync.Mutex
	var fail error
	p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP | filterapi.BindTCP | filterapi.Listen | filterapi.Terminating, Secondary: true}}
	p.handle = func(ev filterapi.Event) error {
		switch ev := ev.(type) {
		case *filterapi.ConnectEvent:
			if fail == nil {
				return ev.Connection.AttachDataFilter(pumpless{}, filterapi.PriorityNAT)
			}
			return fail
		case *filterapi.ListenEvent:
			if err := ev.Connection.Deny(); !errors.Is(err, filterapi.ErrBadContext) {
				t.Errorf("deny a listen: %v", err)
			}
		case *filterapi.TerminatingEvent:
			mu.Lock()
			ends[ev.Connection]++
			mu.Unlock()
		}
		return nil
	}
	b := newBench(t, p)
	tk := b.decide(t)
	fail = errors.New("out of memory")
	b.Decide(context.Background(), syn("10.0.0.2:40001", control))
	for range 2 {
		bind, err := bindFor(tk, filterapi.OnlyFrom())
		if err != nil {
			t.Fatal(err)
		}
		if len(b.Permissions()) == 1 {
			bind.Kill()
			bind.Kill()
		}
	}
	tk.Ended(flow.Counts{}, flow.Closed, "")
	b.calm()
	if p.detached != 1 || len(ends) != 4 {
		t.Errorf("detached %d; %d connections ended, want 4", p.detached, len(ends))
	}
	for c, n := range ends {
		if n != 1 {
			t.Errorf("%v ended %d times", c.Tuple(), n)
		}
	}
}

func TestKillInTheHandlerRefuses(t *testing.T) {
	p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP}}
	p.handle = func(ev filterapi.Event) error { ev.(*filterapi.ConnectEvent).Connection.Kill(); return nil }
	b := newBench(t, p)
	if d := b.Decide(context.Background(), syn(client, control)); d.Path != flow.Reject || len(b.Flows()) != 0 {
		t.Errorf("path %v, flows %v", d.Path, b.Flows())
	}
}

func TestAFlowThatIsJudgedDuringAReloadIsJudgedAgain(t *testing.T) {
	p := attaching(&probe{})
	b := newBench(t, p)
	attach := p.handle
	deny := testPolicy(t, policy.Deny)
	p.handle = func(ev filterapi.Event) error {
		b.SetPolicy(deny)
		if err := b.Recheck(context.Background(), nil); err != nil {
			t.Error(err)
		}
		return attach(ev)
	}
	if d := b.Decide(context.Background(), syn(client, control)); d.Path != flow.Reject || len(b.Flows()) != 0 {
		t.Errorf("path %v, flows %v", d.Path, b.Flows())
	}
}

func TestAKernelFlowThatIsNotConfirmedYetIsCutAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP}, handle: func(filterapi.Event) error { return nil }}
		b := newBench(t, p)
		b.Decide(context.Background(), syn(client, control))
		b.SetPolicy(testPolicy(t, policy.Deny))
		if err := b.Recheck(context.Background(), nil); err != nil { // the dump had not got it
			t.Error(err)
		}
		time.Sleep(cutAgain + time.Millisecond)
		b.KernelEnded(flow.End{Tuple: syn(client, control).Tuple, Path: flow.Kernel, Result: flow.CutByPolicy})
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(b.kernel.cut) != 2 {
			t.Errorf("cut %d times", len(b.kernel.cut))
		}
	})
}

// TestSessionsUnderLoad: a flow that begins while the last one of its session
// ends is never refused for it.
func TestSessionsUnderLoad(t *testing.T) {
	p := attaching(&probe{})
	b := newBench(t, p)
	var clients sync.WaitGroup
	for i := range 4 {
		clients.Go(func() {
			for range 500 {
				first := syn(client, control)
				first.Src = netipPort(first.Src, uint16(1000+i))
				d := b.Decide(context.Background(), first)
				if d.Path != flow.User {
					t.Errorf("path %v", d.Path)
					return
				}
				d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
			}
		})
	}
	clients.Wait()
	b.calm()
	if p.attached != p.detached || len(b.sessions.byAddr) != 0 {
		t.Errorf("attached %d, detached %d, sessions %d", p.attached, p.detached, len(b.sessions.byAddr))
	}
}
