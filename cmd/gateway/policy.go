package main

import (
	"fmt"
	"net"
	"slices"

	"github.com/sluicegw/sluice/config"
	"github.com/sluicegw/sluice/kernelpath"
	"github.com/sluicegw/sluice/policy"
)

// kernelFacts is what a ruleset depends on besides the configuration.
type kernelFacts struct {
	native     bool
	flowtable  bool
	timers     bool
	tproxyPort uint16
}

// buildRuleset makes the table of a policy.
func buildRuleset(c *config.Config, p *policy.Policy, k kernelFacts) (kernelpath.Ruleset, error) {
	compiled, err := p.Compile()
	if err != nil {
		return kernelpath.Ruleset{}, fmt.Errorf("compile the rules: %w", err)
	}
	ports := c.Ports.Ranges
	if ports.Kernel, err = kernelPorts(ports.Kernel, p); err != nil {
		return kernelpath.Ruleset{}, err
	}
	o := kernelpath.Options{
		Marks: c.Marks.Bits, Native: k.native,
		FirstClosed: c.Queue.First, NumClosed: c.Queue.Number,
		FirstOpen: c.Queue.FirstOpen(), NumOpen: c.Queue.Number,
		TProxyPort: k.tproxyPort, Zone: c.Marks.Zone, LogGroup: c.Marks.LogGroup,
		ReversePath: kernelpath.ReversePath(c.ReversePath), Ranges: ports, Sessions: c.Ports.Sessions,
	}
	if k.flowtable && c.Flowtable {
		o.Flowtable = presentInterfaces(p)
	}
	in := kernelpath.Input{Compiled: compiled, Networks: joinedNetworks(p), NetworkRules: p.NetworkRules()}
	if k.timers {
		in.Timers = p.Timers()
	}
	return kernelpath.Build(in, o)
}

// joinedNetworks are the networks that network rules name.
func joinedNetworks(p *policy.Policy) []policy.Network {
	var out []policy.Network
	for _, n := range p.Networks() {
		if slices.ContainsFunc(p.NetworkRules(), func(r policy.NetworkRule) bool { return r.From == n.Name || r.To == n.Name }) {
			out = append(out, n)
		}
	}
	return out
}

// presentInterfaces are the named interfaces that exist now; a flowtable
// cannot hold others.
func presentInterfaces(p *policy.Policy) []string {
	var out []string
	for _, n := range joinedNetworks(p) {
		for _, name := range n.Interfaces {
			if _, err := net.InterfaceByName(name); err == nil && !slices.Contains(out, name) {
				out = append(out, name)
			}
		}
	}
	slices.Sort(out)
	return out
}
