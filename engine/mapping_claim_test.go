package engine

import (
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// mappedOffice is an office whose network rule to the outside maps endpoints.
func mappedOffice(t *testing.T, filtering policy.Filtering) (*bench, *callerSession) {
	t.Helper()
	b, f := officeBench(t)
	p := officePolicy(t)
	rules := p.NetworkRules()
	rules[0].Mapping, rules[0].Filtering = policy.MapEndpointIndependent, filtering
	mapped, err := policy.New(p.Networks(), rules, p.Protocols(), p.Rules())
	if err != nil {
		t.Fatal(err)
	}
	b.SetPolicy(mapped)
	s, _ := f.call(t, b, client, control, outer)
	return b, s
}

// claimed makes a bind that has the client leave from it.
func claimed(s *callerSession, more filterapi.Flags, external string) (filterapi.Connection, error) {
	ask := filterapi.Bind{
		Negotiated: filterapi.Negotiated{Protocol: "talk", Proto: flow.UDP, Flags: filterapi.SameSource | filterapi.AllowMultiple | filterapi.Bidirectional | more},
		Clients:    []netip.AddrPort{ap("10.0.0.2:5000")},
	}
	if external != "" {
		ask.External = ap(external)
	}
	binds, err := s.BindForClient(ask)
	if err != nil {
		return nil, err
	}
	return binds[0], nil
}

// openings are the permissions that the kernel holds of UDP, and how many of
// them let everybody in.
func (k *fakeKernel) openings() (all, open int, external netip.AddrPort) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, p := range k.held {
		if p.Proto != flow.UDP {
			continue
		}
		all++
		external = p.External
		if p.AnySource {
			open++
		}
	}
	return all, open, external
}

// TestABindIsAtTheMapping: both have one external address, one of them says who
// comes in, and what the network rule says holds again after the bind's end.
func TestABindIsAtTheMapping(t *testing.T) {
	for filtering, open := range map[policy.Filtering]int{policy.FilterEndpointIndependent: 1, policy.FilterAddressAndPort: 0} {
		synctest.Test(t, func(t *testing.T) {
			b, s := mappedOffice(t, filtering)
			before := b.ports.Leased()
			bind, err := claimed(s, filterapi.Discarding, "0.0.0.0:7000")
			if err != nil {
				t.Fatal(err)
			}
			all, opened, at := b.kernel.openings()
			if all != 1 || opened != open || at != ap("203.0.113.1:7000") || bind.Tuple().Dst != at || b.ports.Leased() != before+1 {
				t.Errorf("the kernel holds %d, %d of them open, at %v; the bind is at %v", all, opened, at, bind.Tuple().Dst)
			}
			if _, err := s.RetroactiveAllowBind(filterapi.AllowBind{Proto: flow.UDP, Address: at, Flags: filterapi.Bidirectional}); err != nil {
				t.Fatal(err)
			}
			if all, opened, _ := b.kernel.openings(); all != 2 || opened != 1 {
				t.Errorf("allowed, the kernel holds %d, %d of them open", all, opened)
			}
			if _, err := claimed(s, filterapi.Preferred, ""); !errors.Is(err, filterapi.ErrAlreadyExists) {
				t.Errorf("another one for the same endpoint: %v", err)
			}
			time.Sleep(time.Minute) // nothing flows
			synctest.Wait()
			if all, opened, _ := b.kernel.openings(); all != 2 || opened != 1 {
				t.Errorf("a minute later the kernel holds %d, %d of them open", all, opened)
			}
			bind.Kill()
			if _, err := claimed(s, 0, "0.0.0.0:7100"); !errors.Is(err, filterapi.ErrNoPorts) {
				t.Errorf("another one at another port: %v", err)
			}
			if bind, err = claimed(s, filterapi.Preferred, "0.0.0.0:7100"); err != nil || bind.Tuple().Dst != at {
				t.Fatalf("another one after it: %v", err)
			}
			time.Sleep(time.Minute)
			if all, opened, _ := b.kernel.openings(); all != 2 || opened != 1 {
				t.Errorf("again, the kernel holds %d, %d of them open", all, opened)
			}
			bind.Kill()
			if all, opened, _ := b.kernel.openings(); all != 1 || opened != open {
				t.Errorf("closed, the kernel holds %d, %d of them open", all, opened)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			if all, _, _ := b.kernel.openings(); all != 0 || b.ports.Leased() != before {
				t.Errorf("in the end the kernel holds %d, and %d ports are leased, before %d", all, b.ports.Leased(), before)
			}
		})
	}
}

// TestTwoBindsForOneEndpoint: one that the kernel refuses takes nothing from the
// one that is there, by which the client's flows leave also in user space; and of
// two calls at a time one gets the mapping.
func TestTwoBindsForOneEndpoint(t *testing.T) {
	t.Run("the kernel refuses", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b, f := officeBench(t)
			s, _ := f.call(t, b, client, control, outer)
			bind, err := claimed(s, 0, "")
			if err != nil {
				t.Fatal(err)
			}
			rule := b.Policy().NetworkRules()[0].Name
			leaves := func() netip.AddrPort {
				return b.perms.leavesFrom(rule, flow.Tuple{Proto: flow.UDP, Src: ap("10.0.0.2:5000"), Dst: ap(phone)})
			}
			if at := leaves(); at != bind.Tuple().Dst {
				t.Fatalf("leaves from %v, the bind is at %v", at, bind.Tuple().Dst)
			}
			b.kernel.fail = nat.ErrConflict
			if _, err := claimed(s, 0, ""); !errors.Is(err, filterapi.ErrAlreadyExists) {
				t.Errorf("another one: %v", err)
			}
			b.kernel.fail = nil
			for range 2 {
				if at := leaves(); at != bind.Tuple().Dst {
					t.Errorf("leaves from %v, the bind is at %v", at, bind.Tuple().Dst)
				}
				time.Sleep(time.Minute)
				synctest.Wait()
			}
			bind.Kill()
			time.Sleep(time.Minute)
			synctest.Wait()
			if at := leaves(); at.IsValid() || len(b.perms.leaving) != 0 {
				t.Errorf("it has ended, and %v is left, %d in the list", at, len(b.perms.leaving))
			}
		})
	})
	t.Run("at a time", func(t *testing.T) {
		b, s := mappedOffice(t, policy.FilterAddressAndPort)
		own := b.sessions.all()[0]
		ask := filterapi.Bind{
			Negotiated: filterapi.Negotiated{Protocol: "talk", Proto: flow.UDP, Flags: filterapi.SameSource | filterapi.AllowMultiple},
			Clients:    []netip.AddrPort{ap("10.0.0.2:5000")},
		}
		terms, err := own.checkCall(ask.Negotiated, bindFlags, netip.AddrPort{})
		if err != nil {
			t.Fatal(err)
		}
		at, err := own.findPlace(ask, terms) // a call that is slow
		if err != nil {
			t.Fatal(err)
		}
		if _, err := claimed(s, 0, ""); err != nil {
			t.Fatal(err)
		}
		late := own.newBind(ground{direction: nat.Inbound}, ask, terms, at, 0, ask.Clients[0])
		if err := b.openBinds([]*permission{late}); !errors.Is(err, filterapi.ErrAlreadyExists) {
			t.Errorf("the slow call: %v", err)
		}
		b.abandon(late)
	})
}

// TestABindThatTheKernelRefuses leaves no mapping.
func TestABindThatTheKernelRefuses(t *testing.T) {
	b, s := mappedOffice(t, policy.FilterAddressAndPort)
	before := b.ports.Leased()
	b.kernel.fail = errors.New("no")
	if _, err := claimed(s, 0, ""); err == nil {
		t.Error("no error")
	}
	b.kernel.fail = nil
	if n := len(b.mappings.byExternal) + len(b.mappings.byInside); n != 2 || b.ports.Leased() != before {
		t.Errorf("%d mappings, and %d ports are leased, before %d", n, b.ports.Leased(), before)
	}
}

// What a client's neighbour sends to the external address of a bind that lets
// nobody in is for the gateway, if the rules say so: it is not led to the client.
func TestBindIsNotForNeighbours(t *testing.T) {
	p := mappingPolicy(t, nil)
	rules := append(p.Rules(), policy.Rule{
		Name: "gateway", Action: policy.Allow, From: []string{"inside"}, To: []string{policy.Gateway}, Protocols: []string{policy.AnyProtocol},
	})
	p, err := policy.New(p.Networks(), p.NetworkRules(), p.Protocols(), rules)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := mappingBench(t, p)
	for _, first := range []flow.Packet{udpPacket("10.0.0.3:5000", "203.0.113.1:61000"), syn("10.0.0.3:5000", "203.0.113.1:61000")} {
		if d := b.Decide(t.Context(), first); d.Path != flow.Plain {
			t.Errorf("%s: %v, want plain", first.Tuple, d.Path)
		}
	}
}
