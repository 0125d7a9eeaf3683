package filtertest_test

import (
	"net/netip"
	"testing"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filterapi/filtertest"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/internal/misuse"
)

// machine has the misuse table run against filtertest.
type machine struct {
	t     *testing.T
	g     *filtertest.Gateway
	flows map[flow.Tuple]*filtertest.Flow
}

func (m *machine) Begin(t flow.Tuple) {
	if t.Proto == flow.UDP {
		m.flows[t], _ = m.g.Associate(t.Src, t.Dst) // a case may refuse it
	} else {
		m.flows[t], _ = m.g.Offer(t.Src, t.Dst)
	}
}

func (m *machine) End(t flow.Tuple) {
	m.flows[t].Cut()
	m.flows[t].End()
}

func (m *machine) Disconnect(client netip.Addr) { m.g.EndSession(client) }

// Misuse is answered as the gateway answers it.
func TestMisuse(t *testing.T) {
	misuse.Run(t, misuse.Name, func(t *testing.T, f filterapi.Filter) misuse.Machine {
		g := filtertest.New(t, f, "")
		g.Access = func(_ netip.Addr, q filterapi.HostAccess) error {
			switch {
			case q.Protocol == misuse.Name, q.Protocol == "" && q.Proto == flow.TCP && q.Target.Port() == 21:
				return nil
			case q.Protocol != "":
				return filterapi.ErrInvalidArgument
			}
			return filterapi.ErrPolicyDenied
		}
		return &machine{t, g, map[flow.Tuple]*filtertest.Flow{}}
	})
}
