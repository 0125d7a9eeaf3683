package engine

import (
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// waiter is a packet that waits.
type waiter struct {
	paths []flow.Path
	over  bool
}

func (w *waiter) Answer(p flow.Path) bool {
	w.paths = append(w.paths, p)
	return !w.over
}

// knownRoutes have been asked about everything.
type knownRoutes struct{ fakeRoutes }

func (r knownRoutes) Known(dst netip.Addr) (string, bool, bool) {
	iface, _, local, err := r.Lookup(dst)
	return iface, local, err == nil
}

// laterBench is a mappingBench whose kernel takes its time.
func laterBench(t *testing.T, change func(*policy.NetworkRule)) *bench {
	b, _ := mappingBench(t, mappingPolicy(t, change))
	b.cached, b.kernel.slow = knownRoutes{}, true
	return b
}

// A new endpoint's packet goes when the kernel holds the mapping, and nobody waits
// meanwhile. What needs more is Decide's.
func TestDecideLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := laterBench(t, nil)
		first := udpPacket("10.0.0.2:5000", "203.0.113.10:1000")
		w := &waiter{}
		if !b.DecideLater(first, w) || len(w.paths) != 0 || !b.kernel.empty() {
			t.Fatalf("answered %v; the kernel holds %v", w.paths, b.kernel.held)
		}
		other := &waiter{}
		if b.DecideLater(udpPacket("10.0.0.2:5000", "203.0.113.11:1000"), other) || b.DecideLater(syn("10.0.0.3:5000", "203.0.113.10:21"), other) ||
			b.DecideLater(udpPacket("10.0.0.3:5000", "203.0.113.1:1000"), other) || len(other.paths) != 0 {
			t.Errorf("answered %v", other.paths)
		}
		b.kernel.answer()
		if p := b.kernel.only(t); len(w.paths) != 1 || w.paths[0] != flow.Kernel || p.Client != first.Src {
			t.Errorf("answered %v; the kernel holds %+v", w.paths, p)
		}
		b.carries(t, udpPacket("10.0.0.2:5000", "203.0.113.11:1000"))
		time.Sleep(time.Minute) // no flow came of it
		synctest.Wait()
		if !b.kernel.empty() || len(b.mappings.byInside)+len(b.mappings.byExternal)+len(b.mappings.idle) != 0 {
			t.Errorf("left: %v", b.kernel.held)
		}
	})
}

// What cannot be is told, and leaves nothing.
func TestDecideLaterFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := laterBench(t, nil)
		p := udpPacket("10.0.0.2:5000", "203.0.113.10:1000")
		refused := func(what string, want flow.Path, lines int, w *waiter) {
			t.Helper()
			synctest.Wait()
			if len(w.paths) != 1 || w.paths[0] != want || b.ports.Stats().Leased != 0 || len(b.mappings.byInside)+len(b.mappings.byExternal) != 0 || b.logs.FilterMessage("flow").Len() != lines {
				t.Errorf("%s: answered %v, %d ports are out; log %v", what, w.paths, b.ports.Stats().Leased, b.logs.All())
			}
		}
		w := &waiter{}
		b.DecideLater(p, w)
		b.kernel.fail = errors.New("no")
		b.kernel.answer()
		refused("the kernel did not take it", flow.Drop, 1, w)
		b.kernel.fail = nil

		w = &waiter{}
		b.DecideLater(p, w)
		denied, err := policy.New(b.Policy().Networks(), b.Policy().NetworkRules(), policy.Builtin(), nil)
		if err != nil {
			t.Fatal(err)
		}
		allowed := b.Policy()
		b.SetPolicy(denied)
		b.kernel.answer()
		synctest.Wait()
		if len(w.paths) != 1 || w.paths[0] != flow.Drop {
			t.Errorf("denied meanwhile: answered %v", w.paths)
		}
		b.SetPolicy(allowed)
		time.Sleep(time.Minute)
		refused("denied meanwhile", flow.Drop, 2, w)

		w = &waiter{over: true}
		b.DecideLater(p, w)
		b.kernel.answer()
		time.Sleep(time.Minute)
		refused("too late", flow.Kernel, 3, w)

		b.ports.Reconfigure(nil, nat.Range{}, 1000)
		w = &waiter{}
		b.DecideLater(p, w)
		refused("no port is left", flow.Exhausted, 4, w)
	})
}
