package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/config"
	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/kernelpath"
	"github.com/sluicegw/sluice/policy"
)

// mapsEndpoints says whether a network rule maps endpoints: then conntrack must
// tell when flows begin that user space, or a mapping's filtering, lets pass.
func mapsEndpoints(p *policy.Policy) bool {
	return slices.ContainsFunc(p.NetworkRules(), func(r policy.NetworkRule) bool { return r.Mapping == policy.MapEndpointIndependent })
}

// livingFlows lists the kernel's flows.
func (g *gateway) livingFlows(ctx context.Context) ([]engine.LivingFlow, error) {
	var out []engine.LivingFlow
	err := g.Living(ctx, func(f engine.LivingFlow) { out = append(out, f) })
	return out, err
}

// Living implements engine.Kernel.
func (g *gateway) Living(ctx context.Context, take func(engine.LivingFlow)) error {
	return kernelpath.Each(ctx, g.bits, func(f *kernelpath.KernelFlow) {
		take(engine.LivingFlow{Tuple: f.Tuple, Translation: f.Translation, Counts: f.Counts})
	}, flow.Kernel)
}

// adoptMappings takes over what an earlier run has left in the kernel: the
// mappings of living flows go on, and nobody else gets their ports.
func (g *gateway) adoptMappings(ctx context.Context) error {
	living, err := g.livingFlows(ctx)
	if err != nil {
		return fmt.Errorf("list the kernel's flows: %w", err)
	}
	var held []engine.Held
	for _, r := range g.policy.NetworkRules() {
		if r.Mapping != policy.MapEndpointIndependent {
			continue
		}
		all, err := g.Leaving(r.Name)
		if err != nil {
			return fmt.Errorf("list the mappings of network rule %q: %w", r.Name, err)
		}
		for _, p := range all {
			held = append(held, engine.Held{NetworkRule: r.Name, Proto: p.Proto, Inside: p.To, External: p.Becomes})
		}
	}
	g.engine.Adopt(held, living)
	return nil
}

// idle is how long a flow of a protocol may carry nothing.
func idle(t config.Timeouts, p flow.Proto) time.Duration {
	seconds := t.UDP
	switch p {
	case flow.TCP:
		seconds = t.TCPEstablished
	case flow.ICMP:
		seconds = t.ICMP
	}
	return time.Duration(seconds) * time.Second
}

// quietLooks is how often conntrack's counters are looked at while a mapping may
// be idle, where what comes in does not keep it alive; and the longest pause.
const (
	quietLooks = 10
	quietPause = 30 * time.Second
)

// endQuiet ends the mappings that only the outside uses, where a network rule
// wants that. Else it looks at nothing.
func (g *gateway) endQuiet(ctx context.Context) error {
	for {
		g.change.Lock()
		timeouts, rules := g.cfg.Timeouts, g.policy.NetworkRules()
		g.change.Unlock()
		if slices.ContainsFunc(rules, func(r policy.NetworkRule) bool { return r.IgnoreInbound }) {
			living, err := g.livingFlows(ctx)
			if err == nil {
				err = g.engine.QuietMappings(ctx, living, func(p flow.Proto) time.Duration { return idle(timeouts, p) })
			}
			if err != nil && ctx.Err() == nil {
				g.log.Error("ending mappings that only the outside uses failed", zap.Error(err))
			}
		}
		shortest := min(idle(timeouts, flow.UDP), idle(timeouts, flow.ICMP), idle(timeouts, flow.TCP))
		select {
		case <-time.After(min(quietPause, max(shortest/quietLooks, 100*time.Millisecond))):
		case <-ctx.Done():
			return nil
		}
	}
}
