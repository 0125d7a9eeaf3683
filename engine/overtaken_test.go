package engine

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// TestTheEndIsHeardBeforeTheBeginning of a short kernel flow: its record says
// which permission let it in, and nothing of it stays.
func TestTheEndIsHeardBeforeTheBeginning(t *testing.T) {
	for name, x := range map[string]struct {
		flags     filterapi.Flags
		cancelled bool // before either report
		started   bool // conntrack knows when
	}{
		"for one flow": {}, "for many": {flags: filterapi.AllowMultiple, started: true},
		"cancelled a moment ago": {flags: filterapi.AllowMultiple, cancelled: true, started: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, attaching(&probe{}))
				tk := b.decide(t)
				n := filterapi.Negotiated{Primary: tk.Conn(), Proto: flow.TCP, Flags: x.flags}
				a, err := tk.Conn().Session().AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: ap("203.0.113.10:2000")})
				if err != nil {
					t.Fatal(err)
				}
				id, data := b.kernel.only(t).ID, syn("10.0.0.2:40005", "203.0.113.10:2000")
				end := flow.End{Tuple: data.Tuple, Path: flow.Kernel, Stop: b.Engine.now(), Result: flow.Closed}
				if x.started {
					end.Start = end.Stop
				}
				time.Sleep(time.Millisecond)
				if x.cancelled {
					if err := a.Cancel(); err != nil {
						t.Fatal(err)
					}
				}
				b.KernelEnded(end)
				time.Sleep(lateReports / 2)
				b.KernelUsed(data)
				b.calm()
				rec := b.logs.FilterMessage("flow").All()
				if len(rec) != 1 {
					t.Fatalf("log %v", rec)
				}
				if m := rec[0].ContextMap(); m["rule"] != "ftp" || m["session"] != tk.Conn().Session().ID() || m["permission"] != id || m["duration"] != time.Duration(0) {
					t.Errorf("record %v", m)
				}
				if got := b.Flows(); len(got) != 1 {
					t.Errorf("living: %v, want the control connection alone", got)
				}
				tk.Ended(flow.Counts{}, flow.Closed, "")
				time.Sleep(2 * lateReports)
				b.calm()
				if left := len(b.Permissions()) + len(b.sessions.all()) + b.overtaken.waiting; left != 0 || !b.kernel.empty() || b.logs.FilterMessage("flow").Len() != 2 {
					t.Errorf("left: permissions %v, %d sessions, %d ends, kernel %v, %d records", b.Permissions(), len(b.sessions.all()),
						b.overtaken.waiting, b.kernel.held, b.logs.FilterMessage("flow").Len())
				}
			})
		})
	}
}

// TestAnEndThatNoPermissionExplains is of a flow that the rules let in, and is
// recorded so: at once if it began before the permission, and else when no
// word of it has come, or the gateway stops.
func TestAnEndThatNoPermissionExplains(t *testing.T) {
	for name, x := range map[string]struct {
		before, stop bool
	}{"began before": {before: true}, "never heard of": {}, "the gateway stops": {stop: true}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t, attaching(&probe{}))
				tk := b.decide(t)
				end := flow.End{Tuple: syn("10.0.0.2:40005", "203.0.113.10:2000").Tuple, Path: flow.Kernel, Start: b.Engine.now(), Result: flow.Closed}
				time.Sleep(time.Millisecond)
				n := filterapi.Negotiated{Primary: tk.Conn(), Proto: flow.TCP}
				if _, err := tk.Conn().Session().AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: end.Dst}); err != nil {
					t.Fatal(err)
				}
				if !x.before {
					end.Start = b.Engine.now()
				}
				b.KernelEnded(end)
				records := func() int { return b.logs.FilterMessage("flow").Len() }
				if (records() == 1) != x.before {
					t.Errorf("%d records at once", records())
				}
				if x.stop {
					b.Stop()
				}
				time.Sleep(lateReports)
				synctest.Wait()
				if records() != 1 {
					t.Errorf("%d records in the end", records())
				}
				if m := b.logs.FilterMessage("flow").All()[0].ContextMap(); m["permission"] != nil || m["duration"] != time.Duration(0) && m["duration"] != time.Millisecond {
					t.Errorf("record %v", m)
				}
			})
		})
	}
}

// TestManyEndsWait, and not without bound.
func TestManyEndsWait(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	n := filterapi.Negotiated{Primary: tk.Conn(), Proto: flow.TCP, Flags: filterapi.AllowMultiple}
	if _, err := tk.Conn().Session().AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: ap("203.0.113.10:2000")}); err != nil {
		t.Fatal(err)
	}
	for i := range maxOvertaken + 10 {
		b.KernelEnded(flow.End{Tuple: flow.Tuple{Proto: flow.TCP, Src: netipPort(ap(client), uint16(1024+i)), Dst: ap("203.0.113.10:2000")}, Path: flow.Kernel, Result: flow.Closed})
	}
	if got := b.logs.FilterMessage("flow").Len(); got != 10 || b.overtaken.waiting != maxOvertaken {
		t.Errorf("%d records, %d wait", got, b.overtaken.waiting)
	}
	b.Stop()
	if got := b.logs.FilterMessage("flow").Len(); got != 10+maxOvertaken || b.overtaken.waiting != 0 {
		t.Errorf("after the stop %d records, %d wait", got, b.overtaken.waiting)
	}
}
