package main

import (
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/sluicegw/sluice/filters/pcp"
)

// Counters implements control.Gateway.
func (g *gateway) Counters() map[string]uint64 {
	q, t, u, w := g.queues.Stats(), g.tcp.Stats(), g.udp.Stats(), g.watch.Stats()
	m := map[string]uint64{
		"queue.packets": q.Packets, "queue.decisions": q.Decisions, "queue.absorbed": q.Absorbed, "queue.held": q.Held,
		"queue.dropped": q.Dropped, "queue.requeued": q.Requeued, "queue.late": q.Late, "queue.enobufs": q.NoBuffers,
		"queue.reopened": q.Reopened, "queue.over_held": q.OverHeld, "queue.over_dials": q.OverDials,
		"queue.overload": q.Overload, "queue.malformed": q.Malformed, "queue.lost": q.Lost, "queue.gone": q.Gone,
		"queue.refused": q.Refused, "queue.unsent": q.Unsent, "queue.exhausted": q.Exhausted, "queue.flows": uint64(q.Flows), "queue.dials": uint64(q.Dials),
		"tcp.flows": uint64(t.Flows), "tcp.unknown": t.Unknown, "tcp.expired": t.Expired,
		"tcp.accept_errors": t.AcceptErrors, "tcp.filter_failures": t.FilterFailures,
		"udp.flows": uint64(u.Flows), "udp.sockets": uint64(u.Sockets), "udp.unknown_peer": u.UnknownPeer,
		"udp.no_flow": u.NoFlow, "udp.one_way": u.OneWay, "udp.oversize": u.Oversize, "udp.link_full": u.LinkFull, "udp.send_lost": u.SendLost,
		"udp.refused": u.Refused, "udp.errors_sent": u.ErrorsSent, "udp.errors_limited": u.ErrorsLimited,
		"conntrack.events": w.Events, "conntrack.losses": w.Losses, "conntrack.malformed": w.Malformed,
		"reports.losses": g.reports.Lost(),
	}
	p := g.ports.Stats()
	maps.Copy(m, map[string]uint64{
		"ports.leased": uint64(p.Leased), "ports.resting": uint64(p.Resting), "ports.clients": uint64(p.Holders),
		"ports.blocks": uint64(p.Blocks), "ports.over_quota": p.OverQuota, "ports.exhausted": p.Exhausted,
	})
	mappings := g.engine.Mappings()
	m["mappings.living"], m["mappings.flows"] = uint64(mappings.Living), uint64(mappings.Flows)
	for _, f := range g.filters {
		if s, ok := f.(*pcp.Server); ok {
			c := s.Counters()
			maps.Copy(m, map[string]uint64{
				"pcp.requests": c.Requests, "pcp.lost": c.Lost, "pcp.granted": c.Granted, "pcp.denied": c.Denied, "pcp.over_quota": c.Quota,
				"pcp.exhausted": c.Exhausted, "pcp.failed": c.Failed, "pcp.bad": c.Bad, "pcp.mappings": c.Mappings,
			})
		}
	}
	if s := socksFilter(g.filters); s != nil {
		c := s.Counters()
		maps.Copy(m, map[string]uint64{
			"socks.clients": c.Clients, "socks.requests": c.Requests, "socks.denied": c.Denied, "socks.failed": c.Failed,
			"socks.over_connections": c.Over, "socks.wrong_passwords": c.Password, "socks.bad": c.Bad,
		})
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if c, err := g.Table.Counters(ctx); err == nil { // else what counts the packets is busy, or gone
		maps.Copy(m, map[string]uint64{
			"table.queued": c["queued"], "table.permitted": c["permitted"], "table.refused": c["refused"],
			"table.discarded": c["discarded"], "table.exhausted": c["exhausted"], "table.spoofed": c["spoofed"],
			"table.not_syn": c["not_syn"], "table.cut": c["cut"], "table.unmarked": c["unmarked"],
		})
	}
	for _, d := range q.Queues {
		m[fmt.Sprintf("queue.%d.depth", d.Number)] = uint64(d.Depth)
		m[fmt.Sprintf("queue.%d.full", d.Number)] = d.Full
		m[fmt.Sprintf("queue.%d.missed", d.Number)] = d.Missed
	}
	return m
}
