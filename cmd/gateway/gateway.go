package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/config"
	"github.com/sluicegw/sluice/control"
	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/kernelpath"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
	"github.com/sluicegw/sluice/userpath"
	"github.com/sluicegw/sluice/users"
)

// gateway is a running gateway: the rooms, wired. It implements
// control.Gateway and engine.Kernel.
type gateway struct {
	*kernelpath.Table // Install, Remove
	file              string
	filters           []filterapi.Filter
	log               *zap.Logger
	facts             kernelFacts
	bits              flow.Marks // of the configuration that it was started with
	tasks             []task     // that wait to be run

	users *users.Users // of the configuration

	routes  *kernelpath.Routes
	cutter  *kernelpath.Cutter
	watch   *kernelpath.Watch
	reports *kernelpath.Reports
	engine  *engine.Engine
	ports   *nat.Allocator
	queues  *userpath.Queues
	tcp     *userpath.TCP
	udp     *userpath.UDP

	way      kernelpath.Steering
	steering sync.Mutex
	steered  atomic.Bool // packets are led to the sockets of user space

	lost   chan struct{} // reports of conntrack are lost
	change sync.Mutex    // one change of the policy at a time
	cfg    *config.Config
	policy *policy.Policy
}

// Cut implements engine.Kernel.
func (g *gateway) Cut(ctx context.Context, t ...flow.Tuple) error { return g.cutter.Cut(ctx, t...) }

// WatchEstablished implements engine.Kernel.
func (g *gateway) WatchEstablished(on bool) error { return g.watch.Established(on) }

// takeovers joins TCP and UDP for the queues.
type takeovers struct {
	tcp *userpath.TCP
	udp *userpath.UDP
}

func (t takeovers) TCP(x *engine.Takeover, within time.Duration, first userpath.Held) userpath.Dialling {
	return t.tcp.Takeover(x, within, first)
}

func (t takeovers) UDP(ctx context.Context, x *engine.Takeover) flow.Path {
	return t.udp.Takeover(ctx, x)
}

// apply puts a policy in force: first in the kernel, then in the engine. On
// error the running one stays. g.change is held.
func (g *gateway) apply(cfg *config.Config, p *policy.Policy) error {
	r, err := buildRuleset(cfg, p, g.facts)
	if err != nil {
		return err
	}
	if err := checkPublished(cfg, p, g.file); err != nil {
		return err
	}
	if err := checkPorts(cfg); err != nil {
		return err
	}
	maps := mapsEndpoints(p)
	if maps { // before the first of them can begin
		if err := g.watch.Firsts(true); err != nil {
			return err
		}
	}
	if err := g.Load(r); err != nil {
		return err
	}
	g.ports.Reconfigure(cfg.Ports.Leases, cfg.Ports.WellKnown, int(cfg.Ports.Quota))
	g.engine.SetKernelPorts(cfg.Ports.Kernel)
	g.engine.SetPolicy(p)
	g.cfg, g.policy = cfg, p
	g.servePCP(cfg.PCP, p)
	if maps {
		g.eventsLost() // of those that another policy had no use of
		return nil
	}
	// What is left of mappings takes nothing new.
	if err := g.watch.Firsts(false); err != nil {
		g.log.Warn("beginnings of flows are told that nobody counts", zap.Error(err))
	}
	return nil
}

// Reload implements control.Gateway. Once the new policy is in force it judges
// the living flows to the end, whoever asked for it.
func (g *gateway) Reload(ctx context.Context) error {
	g.change.Lock()
	defer g.change.Unlock()
	timeouts := g.cfg.Timeouts
	if err := g.reload(); err != nil {
		g.log.Error("reload refused; the running policy stays", zap.Error(err))
		return err
	}
	g.log.Info("reloaded", zap.Int("rules", len(g.policy.Rules())))
	g.serveSocks()
	g.warnPublished()
	var errs []error
	if g.cfg.Timeouts != timeouts {
		if err := g.prepareHost(); err != nil {
			g.cfg.Timeouts = timeouts // so that the next reload tries it again
			errs = append(errs, fmt.Errorf("its timeouts are not: %w", err))
		}
	}
	if err := g.recheck(context.WithoutCancel(ctx)); err != nil {
		errs = append(errs, fmt.Errorf("judging the living flows by it failed: %w", err))
	}
	if err := errors.Join(errs...); err != nil {
		err = fmt.Errorf("the new policy is in force, but %w", err)
		g.log.Error("reload", zap.Error(err))
		return err
	}
	return nil
}

func (g *gateway) reload() error {
	next, err := loadConfig(g.file, g.filters)
	if err != nil {
		return err
	}
	if what := needsRestart(g.cfg, next); what != "" {
		return fmt.Errorf("%s: %s cannot change while the gateway runs; restart it", g.file, what)
	}
	return g.apply(next, next.Policy)
}

// recheck ends the living flows that the policy in force no longer allows,
// those that only the kernel knows as far as it can name them.
func (g *gateway) recheck(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	flows, err := g.kernelFlows(ctx)
	return errors.Join(err, g.engine.Recheck(ctx, flows))
}

// needsRestart names a section that differs and that only a new process can
// take up.
func needsRestart(a, b *config.Config) string {
	switch {
	case a.Queue.Form != b.Queue.Form || a.Queue.First != b.Queue.First || a.Queue.Number != b.Queue.Number || a.Queue.Length != b.Queue.Length || a.Queue.AnswerMS != b.Queue.AnswerMS:
		return "queue"
	case a.Marks != b.Marks:
		return "marks"
	case !a.Ports.FollowsLive(b.Ports):
		return "ports"
	case a.UDP != b.UDP:
		return "udp"
	case a.Control != b.Control:
		return "control"
	case a.Log != b.Log:
		return "log"
	}
	return ""
}

// SetNoKernelMode implements control.Gateway.
func (g *gateway) SetNoKernelMode(_ context.Context, rule string, on bool) error {
	g.change.Lock()
	defer g.change.Unlock()
	if g.policy.Rule(rule) == nil {
		return fmt.Errorf("%w: %q", control.ErrNoRule, rule)
	}
	next, err := g.policy.With(rule, on)
	if err != nil {
		return err
	}
	if err := g.apply(g.cfg, next); err != nil {
		return err
	}
	g.log.Info("rule switched", zap.String("rule", rule), zap.Bool("no_kernel_mode", on))
	return nil
}

// Rules implements control.Gateway.
func (g *gateway) Rules() []control.Rule {
	rules := g.engine.Policy().Rules()
	out := make([]control.Rule, 0, len(rules))
	for _, r := range rules {
		c := control.Rule{
			Name: r.Name, Action: "deny", From: r.From, To: r.To, Protocols: r.Protocols, Users: r.Users,
			NoKernelMode: r.NoKernelMode, Decided: "kernel",
		}
		switch r.Action {
		case policy.Allow:
			c.Action = "allow"
		case policy.Publish:
			c.Action, c.To = "publish", []string{}
			for _, a := range r.Publication.Servers {
				c.Servers = append(c.Servers, a.String())
			}
		}
		for _, f := range r.Filters {
			c.Filters = append(c.Filters, f.Name)
		}
		if len(r.Users) > 0 || r.Action != policy.Deny && (r.NoKernelMode || len(r.Filters) > 0) {
			c.Decided = "user space"
		}
		out = append(out, c)
	}
	return out
}

// Flows implements control.Gateway.
func (g *gateway) Flows(ctx context.Context) ([]control.Flow, error) {
	living, err := kernelpath.Dump(ctx, g.bits, flow.Kernel)
	if err != nil {
		return nil, fmt.Errorf("list the kernel's flows: %w", err)
	}
	out := make([]control.Flow, 0, len(living))
	for _, f := range living {
		i := g.engine.Describe(f.Tuple, f.Start)
		i.Translation = f.Translation
		c := control.FlowOf(i)
		c.Counts, c.Offloaded = &f.Counts, f.Offloaded()
		out = append(out, c)
	}
	for _, i := range g.engine.Flows() {
		if i.Path == flow.User {
			out = append(out, control.FlowOf(i))
		}
	}
	return out, nil
}

// Permissions implements control.Gateway.
func (g *gateway) Permissions() []control.Permission {
	all := g.engine.Permissions()
	out := make([]control.Permission, 0, len(all))
	for _, p := range all {
		out = append(out, control.PermissionOf(p))
	}
	return out
}

// resync follows a loss of conntrack's reports.
func (g *gateway) resync(ctx context.Context) {
	since := time.Now()
	living, err := kernelpath.Dump(ctx, g.bits, flow.Kernel)
	if err != nil {
		g.log.Error("resync with conntrack failed", zap.Error(err))
		return
	}
	alive := make(map[flow.Tuple]bool, len(living))
	for _, f := range living {
		alive[f.Tuple] = true
	}
	g.engine.Resync(alive, since)
	if err := g.recount(ctx); err != nil {
		g.log.Error("counting the flows of mappings anew failed", zap.Error(err))
	}
}

// recount counts the flows of mappings anew, and takes peers out of the kernel's
// set that it has put there for packets of which no flow came.
func (g *gateway) recount(ctx context.Context) error {
	peers, err := g.ListPeers()
	if err != nil {
		return err
	}
	if err := g.engine.Recount(ctx, g.livingFlows); err != nil {
		return err
	}
	return g.engine.ForgetStrays(ctx, peers)
}

// eventsLost has the flows compared with conntrack soon.
func (g *gateway) eventsLost() {
	select {
	case g.lost <- struct{}{}:
	default:
	}
}

// kernelEnded turns conntrack's report into the end of a flow.
func (g *gateway) kernelEnded(f kernelpath.KernelFlow) {
	end := flow.End{
		Tuple: f.Tuple, Translation: f.Translation, Path: flow.Kernel,
		Start: f.Start, Stop: f.Stop, Counts: f.Counts, Result: flow.Closed,
	}
	if g.bits.IsCut(f.Mark) {
		end.Result = flow.CutByPolicy
	}
	g.engine.KernelEnded(end)
}
