package config

import (
	"slices"
	"strings"

	"github.com/goccy/go-yaml/ast"

	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

// Ports is the section ports: what external ports come from, and how many one
// client may have.
type Ports struct {
	// Ranges are kernel, leases and well_known. Own is left zero: it is the
	// kernel's.
	nat.Ranges
	Quota      uint32 // quota: leases of one client, of each protocol
	Quarantine uint32 // quarantine: seconds that a returned port rests
	Block      uint32 // block: leases that one client gets at a time; 0: off
	Sessions   uint32 // sessions: flows of one client at a time; 0: off
}

// FollowsLive says whether a running allocator can follow a change of the
// section: not of what its blocks and quarantines are made of.
func (p Ports) FollowsLive(q Ports) bool {
	same := slices.Equal(p.Leases, q.Leases) && p.Quota == q.Quota
	return p.Quarantine == q.Quarantine && p.Block == q.Block && (p.Block == 0 || same)
}

// split sets the kernel's ports and the leases as they are where the file names neither. A
// connection of the kernel's translation keeps its port for minutes, so that it
// has many of them; where endpoints are mapped, leases serve the flows instead.
func (p *Ports) split(mapped bool) {
	p.Kernel, p.Leases = nat.Range{Lo: 10000, Hi: 32767}, []nat.Range{{Lo: 61000, Hi: 65535}}
	if mapped {
		p.Kernel, p.Leases = nat.Range{Lo: 10000, Hi: 14999}, []nat.Range{{Lo: 15000, Hi: 32767}, {Lo: 61000, Hi: 65535}}
	}
}

func defaultPorts() Ports {
	p := Ports{
		Ranges: nat.Ranges{WellKnown: nat.Range{Lo: 600, Hi: 1023}},
		Quota:  2048, Quarantine: uint32(nat.Quarantine.Seconds()),
	}
	p.split(false)
	return p
}

// splitPorts follows the policy where the file leaves the ranges to the gateway.
func (r *reader) splitPorts(c *Config) {
	if c.Policy == nil || r.splitGiven {
		return
	}
	c.Ports.split(slices.ContainsFunc(c.Policy.NetworkRules(), func(n policy.NetworkRule) bool {
		return n.Mapping == policy.MapEndpointIndependent
	}))
}

// The bounds of ports.
const (
	// firstPort is the lowest that a translation may take: those below are for
	// services.
	firstPort     = 1024
	maxLeases     = 8 // ranges
	maxQuarantine = 86400
	minBlock      = 16
	maxBlock      = 16384
	maxSessions   = 1 << 20
)

func (r *reader) ports(n ast.Node, p *Ports) {
	r.section(n, "ports", map[string]func(ast.Node){
		"kernel": func(n ast.Node) {
			r.splitGiven = true
			if v, ok := r.span(n, "ports.kernel", firstPort, 65535); ok {
				p.Kernel = v
			}
		},
		"leases": func(n ast.Node) {
			r.splitGiven = true
			r.leases(n, p)
		},
		"well_known": func(n ast.Node) {
			if s, ok := n.(*ast.StringNode); ok && s.Value == "off" {
				p.WellKnown = nat.Range{}
			} else if v, ok := r.span(n, "ports.well_known", 1, firstPort-1); ok {
				p.WellKnown = v
			}
		},
		"quota":      func(n ast.Node) { setNumber(r, n, "ports.quota", &p.Quota, 1, 65535) },
		"quarantine": func(n ast.Node) { setNumber(r, n, "ports.quarantine", &p.Quarantine, 0, maxQuarantine) },
		"block":      func(n ast.Node) { r.numberOrOff(n, "ports.block", &p.Block, minBlock, maxBlock) },
		"sessions":   func(n ast.Node) { r.numberOrOff(n, "ports.sessions", &p.Sessions, 1, maxSessions) },
	})
	if err := p.Ranges.Check(); err != nil {
		r.fail(n, "ports: %s", strings.ReplaceAll(err.Error(), "ports.", ""))
	}
	if err := nat.CheckBlocks(p.Leases, int(p.Quota), int(p.Block)); err != nil {
		r.fail(n, "ports: %v", err)
	}
}

// numberOrOff reads a number, or the word for 0.
func (r *reader) numberOrOff(n ast.Node, what string, at *uint32, lo, hi uint64) {
	if s, ok := n.(*ast.StringNode); ok && s.Value == "off" {
		*at = 0
		return
	}
	setNumber(r, n, what, at, lo, hi)
}

// leases reads one range or a list of them.
func (r *reader) leases(n ast.Node, p *Ports) {
	var list []nat.Range
	for _, item := range oneOrMore(n) {
		v, ok := r.span(item, "ports.leases", firstPort, 65535)
		if !ok {
			return
		}
		list = append(list, v)
	}
	if len(list) == 0 || len(list) > maxLeases {
		r.fail(n, "ports.leases: want 1 to %d ranges, got %d", maxLeases, len(list))
		return
	}
	p.Leases = list
}
