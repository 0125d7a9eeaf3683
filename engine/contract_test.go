package engine

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/internal/misuse"
)

// machine has the misuse table run against the engine.
type machine struct {
	t     *testing.T
	b     *bench
	flows map[flow.Tuple]*Takeover
}

func (m *machine) Begin(t flow.Tuple) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	d := m.b.Decide(ctx, flow.Packet{Tuple: t, InIface: "lan0"})
	if m.flows[t] = d.Takeover; d.Takeover != nil {
		d.Takeover.Connected(netip.MustParseAddrPort("203.0.113.1:33000"), t.Dst)
	}
}

func (m *machine) End(t flow.Tuple) {
	m.flows[t].Ended(flow.Counts{}, flow.Closed, "")
	m.b.calm()
}

func (m *machine) Disconnect(client netip.Addr) {
	for _, s := range m.b.Sessions() {
		if s.Client != client || s.Private {
			continue
		}
		if err := m.b.Disconnect(m.t.Context(), s.ID, nil); err != nil {
			m.t.Error(err)
		}
	}
}

// TestContract: misuse is answered as the contract says, here as elsewhere.
func TestContract(t *testing.T) {
	misuse.Run(t, "talk", func(t *testing.T, f filterapi.Filter) misuse.Machine {
		b, _ := talkBench(t, f)
		return &machine{t, b, map[flow.Tuple]*Takeover{}}
	})
}
