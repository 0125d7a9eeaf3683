package engine

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

func netipPort(a netip.AddrPort, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr(), port)
}

// bindFor opens a single-use bind for the client of a control connection.
func bindFor(tk *Takeover, f *filterapi.IPFilter) (filterapi.Connection, error) {
	binds, err := tk.Conn().Session().BindForClient(filterapi.Bind{Negotiated: filterapi.Negotiated{Primary: tk.Conn(), Proto: flow.TCP}, Clients: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:5000")}, IPFilter: f})
	if err != nil {
		return nil, err
	}
	return binds[0], nil
}

// TestOneRecordAFlow: however a flow ends, and whoever reports it twice, the
// log has it once, with its result.
func TestOneRecordAFlow(t *testing.T) {
	ctx := context.Background()
	kernelEnd := func(b *bench) {
		b.KernelEnded(flow.End{Tuple: syn(client, control).Tuple, Path: flow.Kernel, Start: b.Engine.now(), Result: flow.Closed})
	}
	left := func(p *probe) *probe {
		p.handle = func(filterapi.Event) error { return nil }
		p.events.Types = filterapi.ConnectTCP
		return p
	}
	for _, c := range []struct {
		name   string
		probe  *probe
		run    func(*bench)
		result flow.Result
		rule   any
	}{
		{"denied by a rule", left(&probe{}), func(b *bench) {
			b.SetPolicy(testPolicy(t, policy.Deny))
			b.Decide(ctx, syn(client, control))
		}, flow.Denied, "ftp"},
		{"denied in the kernel", left(&probe{}), func(b *bench) {
			b.KernelDenied(syn(client, "203.0.113.10:9999"))
		}, flow.Denied, nil},
		{"failed dial", attaching(&probe{}), func(b *bench) {
			d := b.Decide(ctx, syn(client, control))
			d.Takeover.Ended(flow.Counts{}, flow.Refused, "connection refused")
			d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
		}, flow.Refused, "ftp"},
		{"kernel", left(&probe{}), func(b *bench) {
			b.Decide(ctx, syn(client, control))
			kernelEnd(b)
		}, flow.Closed, "ftp"},
		{"kernel, never seen before", left(&probe{}), func(b *bench) {
			kernelEnd(b)
		}, flow.Closed, "ftp"},
		{"kernel, first packet lost", left(&probe{}), func(b *bench) {
			b.Decide(ctx, syn(client, control))
			b.Resync(map[flow.Tuple]bool{}, b.Engine.now()) // too young to be missed
			b.Resync(map[flow.Tuple]bool{}, b.Engine.now().Add(2*unconfirmed))
			b.Resync(map[flow.Tuple]bool{}, b.Engine.now().Add(3*unconfirmed))
		}, flow.Closed, "ftp"},
		{"user, cut", attaching(&probe{}), func(b *bench) {
			tk := b.decide(t)
			tk.Conn().Kill()
			tk.Conn().Kill()
			<-tk.Killed()
			tk.Ended(flow.Counts{}, flow.CutByPolicy, "")
			tk.Conn().Kill()
		}, flow.CutByPolicy, "ftp"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, c.probe)
			c.run(b)
			b.calm()
			rec := b.logs.FilterMessage("flow").All()
			if len(rec) != 1 || rec[0].ContextMap()["result"] != string(c.result) || rec[0].ContextMap()["rule"] != c.rule {
				t.Errorf("log %v, want one record: %s, rule %v", rec, c.result, c.rule)
			}
			if len(b.Flows()) != 0 || len(b.sessions.byAddr) != 0 {
				t.Errorf("left: flows %v, sessions %d", b.Flows(), len(b.sessions.byAddr))
			}
		})
	}
}

// TestReportsThatComeLate: the kernel let a flow in, and before its report
// came the filter cancelled, or the whole session ended.
func TestReportsThatComeLate(t *testing.T) {
	for _, sessionToo := range []bool{false, true} {
		b := newBench(t, attaching(&probe{}))
		tk := b.decide(t)
		peer := netip.MustParseAddr("203.0.113.10")
		bind, err := bindFor(tk, filterapi.OnlyFrom(peer))
		if err != nil {
			t.Fatal(err)
		}
		bind.Kill()
		if sessionToo {
			tk.Ended(flow.Counts{}, flow.Closed, "")
			b.calm()
		}
		in := flow.Tuple{Proto: flow.TCP, Src: netip.AddrPortFrom(peer, 20), Dst: bind.Tuple().Dst}
		b.KernelUsed(flow.Packet{Tuple: in, InIface: "wan0"})
		if got := b.Describe(in, time.Now()); got.Rule != "ftp" || !got.Secondary {
			t.Errorf("late report: %+v", got)
		}
		if err := b.Recheck(context.Background(), []KernelFlow{{Tuple: in}}); err != nil || len(b.kernel.cut) != 0 {
			t.Errorf("a reload cut %v, %v", b.kernel.cut, err)
		}
		b.KernelEnded(flow.End{Tuple: in, Path: flow.Kernel, Result: flow.Closed})
		b.calm()
		if rec := b.logs.FilterMessage("flow").FilterField(zap.Bool("secondary", true)).All(); len(rec) != 1 {
			t.Errorf("records %v", rec)
		}
		if d := b.Decide(context.Background(), flow.Packet{Tuple: in, InIface: "wan0"}); d.Path.Carries() {
			t.Errorf("a new flow by a void permission: %v", d.Path)
		}
	}
}

// TestTwoPermissionsOfOneAddress: both count, and neither outlives the session.
func TestTwoPermissionsOfOneAddress(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	for range 2 {
		_, err := tk.Conn().Session().AllowFutureConnect(filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Primary: tk.Conn(), Proto: flow.TCP}, Target: netip.MustParseAddrPort("203.0.113.10:2000")})
		if err != nil {
			t.Fatal(err)
		}
	}
	first := syn("10.0.0.2:40005", "203.0.113.10:2000")
	b.KernelUsed(first)
	b.calm()
	b.kernel.only(t)
	b.KernelEnded(flow.End{Tuple: first.Tuple, Path: flow.Kernel, Result: flow.Closed})
	tk.Ended(flow.Counts{}, flow.Closed, "")
	b.calm()
	if !b.kernel.empty() || len(b.Permissions()) != 0 || len(b.perms.byClient) != 0 {
		t.Errorf("after the session: kernel %v, engine %v", b.kernel.held, b.Permissions())
	}
}

// TestStopVoidsPermissions: the kernel's flows go on, nothing new comes in.
func TestStopVoidsPermissions(t *testing.T) {
	p := attaching(&probe{})
	b := newBench(t, p)
	tk := b.decide(t)
	if _, err := bindFor(tk, nil); err != nil {
		t.Fatal(err)
	}
	b.Stop()
	if !b.kernel.empty() || p.detached != 1 || len(b.kernel.cut) != 0 {
		t.Errorf("kernel %v, detached %d, cut %v", b.kernel.held, p.detached, b.kernel.cut)
	}
	if _, err := bindFor(tk, nil); err == nil || !b.kernel.empty() {
		t.Errorf("a bind after the stop: %v, kernel %v", err, b.kernel.held)
	}
}
