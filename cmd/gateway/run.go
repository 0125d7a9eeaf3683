package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/control"
	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/kernelpath"
	"github.com/sluicegw/sluice/userpath"
	"github.com/sluicegw/sluice/users"
)

func runCommand() *cobra.Command {
	var file string
	var force bool
	c := &cobra.Command{
		Use:   "run",
		Short: "run the gateway until it is interrupted; SIGHUP reloads",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			filters := builtin()
			cfg, err := loadConfig(file, filters)
			if err != nil {
				return err
			}
			log, err := newLogger(cfg.Log)
			if err != nil {
				return err
			}
			defer func() { _ = log.Sync() }() // stderr cannot be synced everywhere
			g := &gateway{file: file, filters: filters, log: log, cfg: cfg, policy: cfg.Policy, bits: cfg.Marks.Bits, users: users.New(time.Now)}
			return g.run(cmd.Context(), force)
		},
	}
	c.Flags().StringVarP(&file, "config", "c", defaultConfig, "configuration file")
	c.Flags().BoolVar(&force, "force", false, "start even if the rules cut the connection that this was started over")
	return c
}

// run climbs the ladder: claim the network namespace, probe, look at the
// host, open what waits for flows, load the table, make the host forward, and
// then the tasks. Each rung leaves its way down: in undo, or as a task whose
// Run closes it. What the kernel carries goes on when the gateway has stopped;
// `gateway down` ends that.
func (g *gateway) run(ctx context.Context, force bool) error {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, unix.SIGHUP) // before it is ready a hangup must not end it
	defer signal.Stop(hangup)
	var undo ladder
	defer undo.down()
	release, err := claim()
	if err != nil {
		return err
	}
	undo.add(release)
	features, err := kernelpath.Probe()
	if err != nil {
		return err
	}
	if err := g.choose(features); err != nil {
		return err
	}
	if g.routes, err = kernelpath.NewRoutes(); err != nil {
		return err
	}
	undo.add(func() { _ = g.routes.Close() })
	if err := checkPorts(g.cfg); err != nil {
		return err
	}
	if err := g.keepAdmin(sshConnection("/proc", os.Getpid()), force); err != nil {
		return err
	}
	defer g.closeTasks()
	if err := g.open(&undo); err != nil {
		return err
	}
	server, err := control.Listen(g.cfg.Control.Socket, g, g.log)
	if err != nil {
		return err
	}
	g.task("control", server.Run)
	if err := g.begin(ctx); err != nil {
		return err
	}
	g.task("hangup", func(ctx context.Context) error { return g.reloadOn(ctx, hangup) })
	g.log.Info("ready", zap.String("config", g.file), zap.Int("rules", len(g.policy.Rules())),
		zap.Bool("queue_native", g.facts.native), zap.Bool("flowtable", g.facts.flowtable && g.cfg.Flowtable))
	return g.runTasks(ctx)
}

// begin has the kernel go by the configuration: what an earlier run has left is
// taken over or goes, the table is loaded, and then the host forwards.
func (g *gateway) begin(ctx context.Context) error {
	if err := g.adoptMappings(ctx); err != nil {
		return err
	}
	if err := g.FlushPermissions(); err != nil {
		return fmt.Errorf("void the permissions of an earlier run: %w", err)
	}
	g.change.Lock()
	err := g.apply(g.cfg, g.policy)
	if err == nil {
		g.serveSocks()
	}
	g.change.Unlock()
	if err != nil {
		return err
	}
	g.engine.InstallAdopted()
	if err := g.prepareHost(); err != nil {
		return err
	}
	g.warnHost()
	g.warnPublished()
	if err := warnSecrets(g.file, g.cfg); err != nil {
		g.log.Warn("secrets", zap.Error(err))
	}
	return nil
}

// ladder is what has been opened, and how to close it, last first.
type ladder []func()

func (l *ladder) add(f func()) { *l = append(*l, f) }

func (l *ladder) down() {
	for i := len(*l) - 1; i >= 0; i-- {
		(*l)[i]()
	}
}

// open opens everything that flows can come to; nothing comes before the table
// is loaded.
func (g *gateway) open(undo *ladder) (err error) {
	m := g.cfg.Marks
	g.way = steering(g.bits, m)
	if g.tcp, err = userpath.NewTCP(userpath.TCPConfig{Marks: m.Bits, Log: g.log.Named("tcp"), Steer: g.steer}); err != nil {
		return err
	}
	g.task("tcp", g.tcp.Run)
	g.facts.tproxyPort = g.tcp.Port()
	if g.udp, err = userpath.NewUDP(userpath.UDPConfig{
		Marks: m.Bits, Log: g.log.Named("udp"), Port: g.tcp.Port(), Steer: g.steer,
		PeerIdle: time.Duration(g.cfg.UDP.PeerIdle) * time.Second, SocketIdle: time.Duration(g.cfg.UDP.SocketIdle) * time.Second,
		Decide: func(ctx context.Context, p flow.Packet) engine.Decision { return g.engine.Decide(ctx, p) },
	}); err != nil {
		return err
	}
	g.task("udp", g.udp.Run)
	user := userpath.NewUser(g.tcp, g.udp, m.Bits)
	g.task("own sockets", user.Run)
	if g.Table, err = kernelpath.Open(0, g.log.Named("table")); err != nil {
		return err
	}
	undo.add(func() { _ = g.Table.Close() })
	g.task("guard", func(ctx context.Context) error { return g.Guard(ctx, g.mend) })
	if g.cutter, err = kernelpath.NewCutter(kernelpath.CutConfig{Marks: m.Bits, Unoffload: g.Unoffload, Logger: g.log.Named("cut")}); err != nil {
		return err
	}
	undo.add(func() { _ = g.cutter.Close() })
	g.task("cut", g.cutter.Run)
	g.ports = g.allocator()
	g.task("ports", g.sweepPorts)
	if g.engine, err = engine.New(engine.Config{
		Policy: g.policy, Filters: g.filters, Kernel: g, User: user, Routes: g.routes, Ports: g.ports, KernelPorts: g.cfg.Ports.Kernel, Log: g.log,
		Answer: g.cfg.Queue.Answer(), PeerIdle: time.Duration(g.cfg.UDP.PeerIdle) * time.Second,
	}); err != nil {
		return err
	}
	undo.add(g.engine.Stop)
	g.lost = make(chan struct{}, 1)
	g.task("routes", g.routes.Run)
	g.task("resync", func(ctx context.Context) error { return g.resyncing(ctx, g.lost) })
	g.task("quiet mappings", g.endQuiet)
	g.task("links", g.followLinks)
	if err := g.openAddresses(undo); err != nil {
		return err
	}
	if g.watch, err = kernelpath.NewWatch(m.Bits, g.kernelEnded, g.eventsLost); err != nil {
		return err
	}
	g.watch.OnEstablished(g.engine.KernelEstablished)
	g.watch.OnFirst(func(f kernelpath.KernelFlow) { g.engine.KernelBegan(f.Tuple, f.Translation) })
	g.task("conntrack", g.watch.Run)
	if g.reports, err = kernelpath.NewReports(m.LogGroup, g.ifaceName, kernelpath.Heard{
		Used: g.engine.KernelUsed, Denied: g.engine.KernelDenied, Unreachable: g.tcp.Unreachable,
	}); err != nil {
		return err
	}
	g.task("reports", g.reports.Run)
	if g.queues, err = userpath.OpenQueues(g.queueConfig()); err != nil {
		return err
	}
	g.task("queues", g.queues.Run)
	return nil
}

func (g *gateway) queueConfig() userpath.QueueConfig {
	q := g.cfg.Queue
	return userpath.QueueConfig{
		First: q.First, Number: int(q.Number),
		FirstOpen: q.FirstOpen(), NumberOpen: int(q.Number),
		FirstHolding: q.FirstHolding(), NumberHolding: int(q.Number),
		Marks: g.bits, Logger: g.log.Named("queue"), Length: q.Length, DecideWithin: q.Answer(),
		Decide: g.engine.Decide, DecideNow: g.engine.DecideNow, DecideLater: g.engine.DecideLater, Takeovers: takeovers{g.tcp, g.udp}, IfaceName: g.ifaceName,
	}
}

func (g *gateway) ifaceName(index int) string {
	name, err := g.routes.InterfaceName(index)
	if err != nil {
		return "" // gone meanwhile: the flow is judged by its source's route
	}
	return name
}

// task is a long piece of work. Its run returns nil when ctx ends, and closes
// what was opened for it.
type task struct {
	name string
	run  func(ctx context.Context) error
}

func (g *gateway) task(name string, run func(context.Context) error) {
	g.tasks = append(g.tasks, task{name, run})
}

// runTasks runs what was opened until ctx ends or one of them fails.
func (g *gateway) runTasks(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, t := range g.tasks {
		group.Go(func() error {
			if err := t.run(ctx); err != nil && !errors.Is(err, context.Canceled) {
				g.log.Error("task failed", zap.String("task", t.name), zap.Error(err))
				return fmt.Errorf("%s: %w", t.name, err)
			}
			return nil
		})
	}
	g.tasks = nil
	err := group.Wait()
	g.log.Info("stopped; what the kernel carries goes on until `gateway down`")
	return err
}

// closeTasks closes what was opened for tasks that did not begin: a run whose
// time is over does nothing else.
func (g *gateway) closeTasks() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for _, t := range g.tasks {
		_ = t.run(ctx) // the start has failed for a better reason
	}
	g.tasks = nil
}

func (g *gateway) reloadOn(ctx context.Context, hangup <-chan os.Signal) error {
	for {
		select {
		case <-hangup:
			_ = g.Reload(ctx) // it logs
		case <-ctx.Done():
			return nil
		}
	}
}

// resyncEvery is how long the engine may hold a kernel flow whose end was
// never told, though no report was lost: its first packet did not get through.
const resyncEvery = 5 * time.Minute

func (g *gateway) resyncing(ctx context.Context, lost <-chan struct{}) error {
	slow := time.NewTicker(resyncEvery)
	defer slow.Stop()
	for {
		select {
		case <-lost:
			g.resync(ctx)
		case now := <-slow.C:
			if g.engine.HoldsKernelFlows(now.Add(-resyncEvery)) || g.engine.HoldsMappings() {
				g.resync(ctx)
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// The gateway is what its rooms ask for.
var (
	_ engine.Kernel   = (*gateway)(nil)
	_ control.Gateway = (*gateway)(nil)
)
