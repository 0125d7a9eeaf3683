package policy

import (
	"errors"
	"fmt"
	"slices"
)

// ErrUnknownRule is what With wraps when no rule has the name.
var ErrUnknownRule = errors.New("no such rule")

// Policy is a checked set of networks, network rules, protocol definitions and
// access rules. It never changes and is safe for concurrent use.
type Policy struct {
	networks  []Network
	netRules  []NetworkRule
	protocols []Protocol
	rules     []Rule
	// ix does not depend on NoKernelMode, so the copies that With makes share it.
	ix     *index
	timers []Timer
}

// New checks everything and builds a Policy. It keeps copies of the slices,
// not of the filters' Options. The order of netRules and of rules is the order
// in which they are tried; the order of protocols decides which definition
// names a flow that no rule matched. An error joins one *Problem for each
// thing that is wrong.
func New(networks []Network, netRules []NetworkRule, protocols []Protocol, rules []Rule) (*Policy, error) {
	p := &Policy{
		networks:  slices.Clone(networks),
		netRules:  slices.Clone(netRules),
		protocols: slices.Clone(protocols),
		rules:     slices.Clone(rules),
	}
	for i := range p.networks {
		n := &p.networks[i]
		n.Interfaces, n.Prefixes = slices.Clone(n.Interfaces), slices.Clone(n.Prefixes)
	}
	for i := range p.netRules {
		p.netRules[i].More = slices.Clone(p.netRules[i].More)
	}
	for i := range p.protocols {
		p.protocols[i].Matches = slices.Clone(p.protocols[i].Matches)
	}
	for i := range p.rules {
		r := &p.rules[i]
		r.From, r.To = slices.Clone(r.From), slices.Clone(r.To)
		if r.Publication != nil {
			own := *r.Publication
			own.Addresses, own.Servers = slices.Clone(own.Addresses), slices.Clone(own.Servers)
			r.Publication = &own
		}
		r.Protocols, r.Filters, r.Users = slices.Clone(r.Protocols), slices.Clone(r.Filters), slices.Clone(r.Users)
	}
	if err := check(p); err != nil {
		return nil, err
	}
	p.ix, p.timers = newIndex(p), timersOf(p.protocols)
	return p, nil
}

// Networks are the defined networks, without the built-in ones. The slices
// inside belong to the Policy, here and in the other accessors.
func (p *Policy) Networks() []Network { return slices.Clone(p.networks) }

// NetworkRules are in the order in which they are tried.
func (p *Policy) NetworkRules() []NetworkRule { return slices.Clone(p.netRules) }

// Protocols are all definitions.
func (p *Policy) Protocols() []Protocol { return slices.Clone(p.protocols) }

// Rules are in the order in which they are tried.
func (p *Policy) Rules() []Rule { return slices.Clone(p.rules) }

// Rule finds a rule by its name; nil: there is none. It must not be changed.
func (p *Policy) Rule(name string) *Rule {
	i := slices.IndexFunc(p.rules, func(r Rule) bool { return r.Name == name })
	if i < 0 {
		return nil
	}
	return &p.rules[i]
}

// With is a copy in which one rule has another NoKernelMode: the live switch.
// The error wraps ErrUnknownRule, or is a *Problem if the rule cannot be taken
// over in user space.
func (p *Policy) With(ruleName string, noKernelMode bool) (*Policy, error) {
	i := slices.IndexFunc(p.rules, func(r Rule) bool { return r.Name == ruleName })
	if i < 0 {
		return nil, fmt.Errorf("switch kernel mode of rule %q: %w", ruleName, ErrUnknownRule)
	}
	changed := *p
	changed.rules = slices.Clone(p.rules)
	changed.rules[i].NoKernelMode = noKernelMode
	c := checker{section: SectionRules, index: i, name: ruleName}
	c.userSpace(&changed.rules[i])
	if err := errors.Join(c.problems...); err != nil {
		return nil, fmt.Errorf("switch kernel mode: %w", err)
	}
	return &changed, nil
}
