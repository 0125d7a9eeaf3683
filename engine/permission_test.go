package engine

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

func TestAllowFutureConnect(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	s, primary := tk.Conn().Session(), tk.Conn()
	ask := func(target string, f filterapi.Flags) (filterapi.Action, error) {
		return s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Primary: primary, Proto: flow.TCP, Flags: f}, Target: netip.MustParseAddrPort(target)})
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
		_, err := tk.Conn().Session().AllowFutureConnect(filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Primary: tk.Conn(), Proto: flow.TCP}, Target: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.10"), uint16(2000+i))})
		if (i < 3) != (err == nil) || i == 3 && !errors.Is(err, filterapi.ErrQuota) {
			t.Fatalf("permission %d: %v", i, err)
		}
	}
	tk.Ended(flow.Counts{}, flow.Closed, "")
	b.calm()
	if !b.kernel.empty() || len(b.Permissions()) != 0 {
		t.Fatalf("after the session: kernel %v, engine %v", b.kernel.held, b.Permissions())
	}
}

func TestBindIsReservedThenArmedThenUsedOnce(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	peer := netip.MustParseAddr("203.0.113.10")
	binds, err := tk.Conn().Session().BindForClient(filterapi.Bind{Negotiated: filterapi.Negotiated{Primary: tk.Conn(), Proto: flow.TCP, Flags: filterapi.Timeout}, Clients: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:5000")},
		IPFilter: filterapi.OnlyFrom()})
	if err != nil {
		t.Fatal(err)
	}
	bind := binds[0]
	name, err := bind.ExternalName()
	if err != nil || name.Addr().String() != "203.0.113.1" || name.Port() < 61000 || name.Port() > 61003 {
		t.Fatalf("external name %v %v", name, err)
	}
	if !b.kernel.empty() {
		t.Fatal("a reserved bind is in the kernel")
	}
	in := flow.Packet{Tuple: flow.Tuple{Proto: flow.TCP, Src: netip.AddrPortFrom(peer, 20), Dst: name}, InIface: "wan0"}
	if p := b.usePermission(in.Tuple, false); p != nil {
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
	b.calm()
	b.kernel.only(t) // the translation stays while the flow lives
	b.KernelEnded(flow.End{Tuple: in.Tuple, Path: flow.Kernel, Result: flow.Closed})
	b.calm()
	if !b.kernel.empty() {
		t.Fatal("the translation outlived its flow")
	}
}

func TestFailedInstallLeavesNothing(t *testing.T) {
	b := newBench(t, attaching(&probe{}))
	tk := b.decide(t)
	b.kernel.fail = errors.New("kernel says no")
	for range 10 { // more than the quota
		_, err := tk.Conn().Session().AllowFutureConnect(filterapi.FutureConnect{Negotiated: filterapi.Negotiated{Primary: tk.Conn(), Proto: flow.TCP}, Target: netip.MustParseAddrPort("203.0.113.10:2000")})
		if !errors.Is(err, b.kernel.fail) {
			t.Fatalf("got %v", err)
		}
	}
	if got := b.Permissions(); len(got) != 0 {
		t.Fatalf("left %v", got)
	}
}
