package engine

import (
	"context"
	"errors"
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// strictKernel is the fake, and something happens before each change.
type strictKernel struct {
	*fakeKernel
	before func(nat.Permission) error
}

func (k strictKernel) Install(ctx context.Context, p nat.Permission) error {
	if err := k.before(p); err != nil {
		return err
	}
	return k.fakeKernel.Install(ctx, p)
}

// TestAFactoryForAnAddressThatIsPermitted: a map of the kernel has one answer
// for each key, so the permission comes to user space before the factory's own.
func TestAFactoryForAnAddressThatIsPermitted(t *testing.T) {
	p := attaching(&probe{})
	b, _ := talkBench(t, p)
	tk := b.decide(t)
	s := tk.flow.session.handle(b.filters[0])
	b.Engine.kernel = strictKernel{b.kernel, func(p nat.Permission) error {
		b.kernel.mu.Lock()
		defer b.kernel.mu.Unlock()
		for _, old := range b.kernel.held {
			if old.ID != p.ID && old.Target == p.Target && old.ToUser != p.ToUser {
				return errors.New("another permission has the same address and port and another destination")
			}
		}
		return nil
	}}
	target := netip.MustParseAddrPort("203.0.113.10:2000")
	n := filterapi.Negotiated{Primary: tk.flow.handle(b.filters[0]), Proto: flow.TCP, Flags: filterapi.AllowMultiple}
	if _, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: target}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.SetDataFilterFactory(making(filterapi.ConnectTCP, target.String(), "data")); err != nil {
		t.Fatal(err)
	}
	if d := b.Decide(t.Context(), syn("10.0.0.2:41000", target.String())); d.Path != flow.User {
		t.Errorf("path %v", d.Path)
	}
}

// TestABindIsNotAllowedByRulesOfYesterday: they change while the kernel opens
// it, and it goes on discarding.
func TestABindIsNotAllowedByRulesOfYesterday(t *testing.T) {
	p := attaching(&probe{})
	b, _ := talkBench(t, p)
	tk := b.decide(t)
	s := tk.flow.session.handle(b.filters[0])
	binds, err := s.BindForClient(filterapi.Bind{
		Negotiated: filterapi.Negotiated{Primary: tk.flow.handle(b.filters[0]), Proto: flow.TCP, Flags: filterapi.Discarding},
		Clients:    []netip.AddrPort{netip.MustParseAddrPort("10.0.0.2:5000")},
	})
	if err != nil {
		t.Fatal(err)
	}
	rules := b.Policy()
	b.Engine.kernel = strictKernel{b.kernel, func(nat.Permission) error {
		if b.Policy() == rules {
			b.SetPolicy(testPolicy(t, policy.Deny))
		}
		return nil
	}}
	_, err = s.RetroactiveAllowBind(filterapi.AllowBind{Proto: flow.TCP, Address: binds[0].Tuple().Dst})
	b.calm()
	if got := b.Permissions(); !errors.Is(err, filterapi.ErrPolicyDenied) || !b.kernel.empty() || len(got) != 1 || got[0].State != "discarding" {
		t.Errorf("%v, kernel %v, %+v", err, b.kernel.held, got)
	}
}

// TestEstablishedBeforeItIsKnownWhichPermissionWasUsed: of two for the same
// target the first is used up, and conntrack's word of the second flow comes
// before that of its packet.
func TestEstablishedBeforeItIsKnownWhichPermissionWasUsed(t *testing.T) {
	b, f := officeBench(t)
	s, _ := f.call(t, b, client, control, outer)
	target := ap("203.0.113.10:2000")
	for _, which := range []string{"first", "second"} {
		n := filterapi.Negotiated{Primary: s.primary, Proto: flow.UDP, Protocol: "sip", Notify: s, Context: which}
		if _, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: target}); err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range []struct{ from, want string }{{"10.0.0.2:41000", "first"}, {"10.0.0.2:41001", "second"}} {
		first := syn(x.from, target.String())
		first.Proto = flow.UDP
		b.KernelEstablished(first.Tuple)
		b.KernelUsed(first)
		if e := s.hear(t); e.Context != x.want || e.Connection.Tuple() != first.Tuple {
			t.Errorf("%v heard of %v", e.Context, e.Connection.Tuple())
		}
	}
	b.calm()
	if len(s.heard) != 0 {
		t.Errorf("%d events more", len(s.heard))
	}
}

// TestFlowsThatStandChangeNothingInTheKernel as long as others may follow.
func TestFlowsThatStandChangeNothingInTheKernel(t *testing.T) {
	b, f := officeBench(t)
	s, _ := f.call(t, b, client, control, outer)
	n := filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP, Flags: filterapi.AllowMultiple, Notify: s}
	target := ap("203.0.113.10:2000")
	if _, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: target}); err != nil {
		t.Fatal(err)
	}
	b.Engine.kernel = strictKernel{b.kernel, func(p nat.Permission) error {
		t.Errorf("installed again: %+v", p)
		return nil
	}}
	for _, stands := range []bool{true, false} {
		first := syn("10.0.0.2:41000", target.String())
		b.KernelUsed(first)
		if stands {
			b.KernelEstablished(first.Tuple)
			s.hear(t)
		}
		b.KernelEnded(flow.End{Tuple: first.Tuple, Path: flow.Kernel, Result: flow.Closed})
		b.calm()
	}
	if b.kernel.watching() != 1 {
		t.Errorf("watched %d times", b.kernel.watching())
	}
}

// TestAnAddressBasedPermissionServesSocketsOfTheAddress, whichever session of
// it they belong to; one that is not serves its own session alone.
func TestAnAddressBasedPermissionServesSocketsOfTheAddress(t *testing.T) {
	p := attaching(&probe{})
	b, _ := talkBench(t, p)
	tk := b.decide(t)
	private, err := p.fw.PrivateSession(netip.MustParseAddr("10.0.0.2"), "")
	if err != nil {
		t.Fatal(err)
	}
	for flags, want := range map[filterapi.Flags]error{0: filterapi.ErrPolicyDenied, filterapi.AddressBased: nil} {
		target := netip.MustParseAddrPort("203.0.113.10:2000")
		a, err := tk.flow.session.handle(b.filters[0]).AllowFutureConnect(filterapi.FutureConnect{
			Negotiated: filterapi.Negotiated{Primary: tk.flow.handle(b.filters[0]), Proto: flow.TCP, Flags: flags}, Target: target})
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []error{want, filterapi.ErrPolicyDenied} {
			if _, err := private.Network().Dial(t.Context(), flow.TCP, netip.AddrPort{}, target); !errors.Is(err, want) {
				t.Errorf("flags %d: %v, want %v", flags, err, want)
			}
		}
		_ = a.Cancel() // perhaps it is used up
	}
}

// TestNothingStaysOfACancelledPermission once user space holds no first packet
// of it any more, though a flow that it let in lives.
func TestNothingStaysOfACancelledPermission(t *testing.T) {
	b, f := officeBench(t)
	s, _ := f.call(t, b, client, control, outer)
	n := filterapi.Negotiated{Primary: s.primary, Proto: flow.TCP, Flags: filterapi.AllowMultiple | filterapi.NoKernelMode}
	target := ap("203.0.113.10:2000")
	a, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: target})
	if err != nil {
		t.Fatal(err)
	}
	d := b.Decide(t.Context(), syn("10.0.0.2:41000", target.String()))
	if d.Path != flow.User {
		t.Fatalf("path %v", d.Path)
	}
	if err := a.Cancel(); err != nil {
		t.Fatal(err)
	}
	d.Takeover.Established()
	b.calm()
	if !b.kernel.empty() {
		t.Errorf("the kernel holds %v", b.kernel.held)
	}
	d.Takeover.Ended(flow.Counts{}, flow.Closed, "")
}
