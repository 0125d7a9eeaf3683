package main

import (
	"slices"
	"time"

	"github.com/sluicegw/sluice/config"
	"github.com/sluicegw/sluice/filters/pcp"
	"github.com/sluicegw/sluice/policy"
)

// servePCP hands the section pcp to the server. No rule names that filter, so
// that what it does is not in a rule's options.
func (g *gateway) servePCP(c config.PCP, p *policy.Policy) {
	for _, f := range g.filters {
		if s, ok := f.(*pcp.Server); ok {
			s.Configure(pcpConfig(c, p))
		}
	}
}

func pcpConfig(c config.PCP, p *policy.Policy) pcp.Config {
	out := pcp.Config{
		NATPMP: c.NATPMP, Approve: c.Approve, Quota: int(c.Quota),
		MinLifetime: time.Duration(c.MinLifetime) * time.Second, MaxLifetime: time.Duration(c.MaxLifetime) * time.Second,
	}
	for _, r := range c.Ports {
		out.Ports = append(out.Ports, [2]uint16{r.Lo, r.Hi})
	}
	for _, n := range p.Networks() {
		if slices.Contains(c.Networks, n.Name) {
			out.Networks = append(out.Networks, pcp.Network{Name: n.Name, Interfaces: n.Interfaces, Prefixes: n.Prefixes})
		}
	}
	return out
}
