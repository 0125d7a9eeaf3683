package main

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/nat"
)

// allocator makes the one allocator of external ports.
func (g *gateway) allocator() *nat.Allocator {
	p := g.cfg.Ports
	return nat.NewAllocatorWith(nat.AllocatorConfig{
		Leases: p.Leases, WellKnown: p.WellKnown,
		Quota: int(p.Quota), Quarantine: time.Duration(p.Quarantine) * time.Second,
		Block: int(p.Block), OnBlock: g.logBlock,
		Busy: g.portTaken, Now: time.Now,
	})
}

// logBlock is the one record of a block (RFC 6888 REQ-14, RFC 7422).
func (g *gateway) logBlock(e nat.BlockEvent) {
	what := "port block allocated"
	if e.Returned {
		what = "port block returned"
	}
	client := "gateway"
	if e.Holder.IsValid() {
		client = e.Holder.String()
	}
	g.log.Info(what, zap.String("client", client), zap.Stringer("external", e.External), zap.Stringer("ports", e.Ports))
}

// sweepEvery is how late the record of a block's return may be.
const sweepEvery = time.Second

// sweepPorts ends quarantines while nobody asks for ports.
func (g *gateway) sweepPorts(ctx context.Context) error {
	t := time.NewTicker(sweepEvery)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			g.ports.Sweep()
		case <-ctx.Done():
			return nil
		}
	}
}
