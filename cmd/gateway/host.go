package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/sluicegw/sluice/config"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/kernelpath"
	"github.com/sluicegw/sluice/policy"
)

// checkPorts compares the ranges of the configuration with the kernel's own.
func checkPorts(cfg *config.Config) error {
	own, err := kernelpath.LocalPorts()
	if err != nil {
		return err
	}
	r := cfg.Ports.Ranges
	r.Own = own
	return r.Check()
}

// prepareHost sets the sysctls and the routes of the policy routing. It comes after the
// table, or a host that did not forward would forward unfiltered meanwhile.
func (g *gateway) prepareHost() error {
	t := g.cfg.Timeouts
	p, err := kernelpath.Prepare("", g.way, kernelpath.Idle{
		UDP: t.UDP, ICMP: t.ICMP, TCPEstablished: t.TCPEstablished, TCPTransitory: t.TCPTransitory,
	})
	if err != nil {
		return err
	}
	for _, w := range p.Warnings {
		g.log.Warn(w)
	}
	if len(p.Changed) > 0 {
		g.log.Info("sysctls set; `gateway down` restores them", zap.Strings("changed", p.Changed))
	}
	if len(p.Missing) > 0 {
		g.log.Warn("sysctls that this kernel does not have", zap.Strings("missing", p.Missing))
	}
	return nil
}

// steer leads the packets of user space's flows to it, from the first such flow
// on: until then no other flow pays for that.
func (g *gateway) steer() error {
	if g.steered.Load() {
		return nil
	}
	g.steering.Lock()
	defer g.steering.Unlock()
	if g.steered.Load() {
		return nil
	}
	if err := g.TakeOver(); err != nil {
		return fmt.Errorf("steer flows to user space: %w", err)
	}
	if _, err := g.way.Install(); err != nil {
		return fmt.Errorf("steer flows to user space: %w", err)
	}
	g.steered.Store(true)
	g.log.Info("the first flow of user space: packets are steered to the gateway's sockets from now on")
	return nil
}

func steering(bits flow.Marks, m config.Marks) kernelpath.Steering {
	return kernelpath.NewSteering(bits, int(m.Table), int(m.Priority))
}

// warnHost names what can overrule the gateway, and what of its configuration
// the host does not have.
func (g *gateway) warnHost() {
	for _, text := range slices.Concat(missingInterfaces(g.policy), nobodysRules(g.cfg)) {
		g.log.Warn(text)
	}
	if !g.facts.timers && len(g.policy.Timers()) > 0 {
		g.log.Warn("this kernel has no conntrack timeouts of their own for protocols: their flows have `timeouts.udp`")
	}
	g.warnForeign()
}

// warnForeign warns of other tables that may drop what the gateway lets pass.
func (g *gateway) warnForeign() {
	chains, err := kernelpath.ForeignChains()
	if err != nil {
		g.log.Warn("looking for other tables on the same hooks failed", zap.Error(err))
	}
	for _, c := range chains {
		g.log.Warn("another firewall is on the same hooks: " + c.String())
	}
}

// missingInterfaces says which interfaces of the networks are not there. They
// may come later: the rules go by name.
func missingInterfaces(p *policy.Policy) []string {
	var out []string
	for _, n := range p.Networks() {
		for _, name := range n.Interfaces {
			if _, err := net.InterfaceByName(name); err != nil {
				out = append(out, fmt.Sprintf("network %q: there is no interface %q on this machine now", n.Name, name))
			}
		}
	}
	return out
}

func downCommand() *cobra.Command {
	var file string
	var force bool
	c := &cobra.Command{
		Use:   "down",
		Short: "undo everything that a gateway changed on this machine; stop it first",
		Long: `Undo everything that a gateway changed on this machine: sysctls go back to
their former values, then its policy routing and its table go, and with them
every connection that the kernel still carries. It needs the configuration
only for marks that were moved.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(file, builtin())
			switch {
			case err != nil && cmd.Flags().Changed("config"):
				return err
			case err != nil:
				cfg = config.Default()
			}
			if release, err := claim(); err == nil {
				defer release()
			} else if !errors.Is(err, errRuns) {
				return err
			} else if !force {
				return fmt.Errorf("%w, or undo under its feet with --force", err)
			}
			m := cfg.Marks
			did, err := kernelpath.Down(cmd.Context(), "", steering(m.Bits, m))
			for _, line := range did {
				fmt.Println(line)
			}
			if err == nil && len(did) == 0 {
				fmt.Println("nothing to undo")
			}
			return err
		},
	}
	c.Flags().StringVarP(&file, "config", "c", defaultConfig, "configuration file, for marks that were moved")
	c.Flags().BoolVar(&force, "force", false, "undo even while the gateway runs")
	return c
}

// choose picks the forms of things that kernels have in different ways.
func (g *gateway) choose(f kernelpath.Features) error {
	if err := f.Missing(); err != nil {
		return err
	}
	form := g.cfg.Queue.Form
	g.facts.native = form == config.QueueNative || form == config.QueueAuto && f.Has(kernelpath.FeatureQueueNative)
	need := kernelpath.FeatureQueueXT
	if g.facts.native {
		need = kernelpath.FeatureQueueNative
	}
	for _, x := range f {
		if x.Name == need && !x.Present {
			return fmt.Errorf("queue.form: %s: this kernel lacks %s (%s): %s", form, x.Name, x.Option, x.Problem)
		}
	}
	if g.cfg.Ports.Sessions > 0 && !f.Has(kernelpath.FeatureConnlimit) {
		return fmt.Errorf("ports.sessions: this kernel lacks %s (CONFIG_NFT_CONNLIMIT)", kernelpath.FeatureConnlimit)
	}
	g.facts.flowtable, g.facts.timers = f.Has(kernelpath.FeatureFlowtable), f.Has(kernelpath.FeatureCtTimeout)
	return nil
}

func probeCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "probe",
		Short: "try every kernel feature and say what is there; fails if something needed is missing",
		Args:  noArguments,
		RunE: func(*cobra.Command, []string) error {
			f, err := kernelpath.Probe()
			if err != nil {
				return err
			}
			text := []byte(f.String())
			if asJSON {
				if text, err = f.JSON(); err != nil {
					return err
				}
				text = append(text, '\n')
			}
			if _, err := os.Stdout.Write(text); err != nil {
				return err
			}
			return f.Missing()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}
