package engine

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// TestAFilterThatKeepsAConnectionIsNamed, and one that forgets it is not.
func TestAFilterThatKeepsAConnectionIsNamed(t *testing.T) {
	for _, keeps := range []bool{true, false} {
		core, logs := observer.New(zapcore.WarnLevel)
		var kept []filterapi.Connection
		p := attaching(&probe{})
		handle := p.handle
		p.handle = func(ev filterapi.Event) error {
			if e, ok := ev.(*filterapi.ConnectEvent); ok && keeps {
				kept = append(kept, e.Connection)
			}
			return handle(ev)
		}
		e, err := New(Config{
			Policy: talkPolicy(t), Filters: []filterapi.Filter{p}, Kernel: &fakeKernel{held: map[uint64]nat.Permission{}}, Routes: fakeRoutes{},
			Ports: nat.NewAllocator(nat.Range{Lo: 61000, Hi: 61003}, func(nat.Endpoint) bool { return false }, time.Now),
			Log:   zap.New(core), LeakDelay: 10 * time.Millisecond,
		})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			d := e.Decide(context.Background(), syn(client, control))
			_ = d.Takeover.Conn().Session()
			d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
			e.tasks.wait()
		}
		watched := func() bool {
			e.leaks.mu.Lock()
			defer e.leaks.mu.Unlock()
			return e.leaks.sweeps
		}
		for end := time.Now().Add(20 * time.Second); watched(); time.Sleep(time.Millisecond) {
			runtime.GC()
			if time.Now().After(end) {
				t.Fatal("the handles are watched for ever")
			}
		}
		named := logs.FilterMessage("the filter holds connections that are over")
		if keeps != (named.Len() > 0) || keeps && named.All()[0].LoggerName != "ftp" {
			t.Errorf("keeps %v: log %v", keeps, named.All())
		}
		runtime.KeepAlive(kept)
	}
}

// TestCallsOnWhatIsOverAreNamedOnce at a level that is read.
func TestCallsOnWhatIsOverAreNamedOnce(t *testing.T) {
	var kept filterapi.Connection
	p := attaching(&probe{})
	handle := p.handle
	p.handle = func(ev filterapi.Event) error {
		if e, ok := ev.(*filterapi.ConnectEvent); ok {
			kept = e.Connection
		}
		return handle(ev)
	}
	b, _ := talkBench(t, p)
	tk := b.decide(t)
	if err := kept.SetBufferSize(1); !errors.Is(err, filterapi.ErrBadContext) {
		t.Error(err)
	}
	tk.Ended(flow.Counts{}, flow.Closed, "")
	b.calm()
	for range 3 {
		if err := kept.AttachDataFilter(pumpless{}, filterapi.PriorityNAT); !errors.Is(err, filterapi.ErrTerminating) {
			t.Error(err)
		}
	}
	kept.Kill() // may be repeated
	if err := kept.Session().AttachFilter("ftp"); !errors.Is(err, filterapi.ErrTerminating) {
		t.Error(err)
	}
	levels := map[zapcore.Level]int{}
	for _, x := range b.logs.FilterMessage("the filter uses what is over").All() {
		levels[x.Level]++
	}
	if levels[zapcore.WarnLevel] != 1 || levels[zapcore.DebugLevel] != 3 {
		t.Errorf("log %v", levels)
	}
}

// TestLateFiltersAreNamed when they are late, when they answer, and if they do
// not for long.
func TestLateFiltersAreNamed(t *testing.T) {
	for name, x := range map[string]struct {
		takes time.Duration
		want  []string
	}{
		"in time":       {time.Millisecond, nil},
		"a little late": {2 * time.Second, []string{"missed", "answered"}},
		"very late":     {time.Hour, []string{"missed", "still runs", "answered"}},
	} {
		synctest.Test(t, func(t *testing.T) {
			p := &probe{events: filterapi.Events{Types: filterapi.ConnectTCP}}
			p.handle = func(filterapi.Event) error { time.Sleep(x.takes); return nil }
			b := newBench(t, p)
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			b.Decide(ctx, syn(client, control))
			cancel()
			time.Sleep(2 * time.Hour)
			synctest.Wait()
			var got []string
			for _, r := range b.logs.FilterLevelExact(zapcore.InfoLevel + 1).All() {
				got = append(got, r.Message)
			}
			for _, r := range b.logs.FilterLevelExact(zapcore.ErrorLevel).All() {
				got = append(got, r.Message)
			}
			if len(got) != len(x.want) {
				t.Fatalf("%s: log %q, want %q", name, got, x.want)
			}
			for _, w := range x.want {
				if !strings.Contains(strings.Join(got, "\n"), w) {
					t.Errorf("%s: log %q, want %q", name, got, w)
				}
			}
			for _, r := range b.logs.FilterField(zap.String("in", "ConnectEvent")).All() {
				if r.LoggerName != "ftp" || r.ContextMap()["flow"] != syn(client, control).Tuple.String() {
					t.Errorf("%s: %+v", name, r)
				}
			}
		})
	}
}
