package engine

import (
	"net/netip"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// PermissionInfo is a permission that waits or whose flows live, for people.
type PermissionInfo struct {
	nat.Permission
	// By is the filter that asked for it, or what of the configuration.
	By       string
	Session  uint64
	User     string // of a private session
	Owner    netip.Addr
	Rule     string // empty: none has allowed it yet
	Protocol string
	// State is emulated (by a filter: nothing is open), waiting (for the
	// client's address), discarding, reserved, armed or used.
	State string
	// Path is kernel; asked: the first packet of each flow is shown to filters,
	// and the kernel carries on what they do not hold; or user: user space
	// carries the flows.
	Path string
	// Bind: an external address that the gateway holds for the client.
	Bind bool
	// Socket: its end is a socket of the gateway.
	Socket bool
	// AddressBased: every session of the owner's address may use it.
	AddressBased bool
	// Notify: a filter hears of each connection that stands.
	Notify bool
	// Flows are its uses that live; Living are those of them that pass the
	// gateway.
	Flows  int
	Living []flow.Tuple
	// Expires is zero if it does not.
	Expires time.Time
}

// Permissions lists them by age.
func (e *Engine) Permissions() []PermissionInfo {
	living := map[*permission][]flow.Tuple{}
	for _, c := range e.flows.all() {
		if c.perm != nil {
			living[c.perm] = append(living[c.perm], c.tuple)
		}
	}
	all := e.perms.all()
	out := make([]PermissionInfo, 0, len(all))
	for _, p := range all {
		if i, ok := p.info(); ok {
			i.Living = living[p]
			out = append(out, i)
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].ID < out[j].ID })
	return out
}

// Binds lists the external addresses that are held for clients, by age.
func (e *Engine) Binds() []PermissionInfo {
	all := slices.DeleteFunc(e.Permissions(), func(i PermissionInfo) bool { return !i.Bind })
	all = append(all, e.mappedBinds()...)
	sort.Slice(all, func(i, j int) bool { return all[i].ID < all[j].ID })
	return all
}

// info describes a permission; false: it waits no more and has no flow.
func (p *permission) info() (PermissionInfo, bool) {
	filtered := p.filtered()
	p.mu.Lock()
	defer p.mu.Unlock()
	i := PermissionInfo{
		Permission: p.Permission, Session: p.session.id, Owner: p.session.addr, Protocol: p.standing.protocol,
		AddressBased: p.addressBased, Notify: p.notify != nil, Expires: p.expiry, Flows: p.flows, State: "used",
		Path: p.path(filtered), By: p.by, User: p.session.User(), Bind: p.object != nil, Socket: p.Direction == nat.Local,
	}
	if p.mapping != nil && !p.borrows {
		i.Leaves = strings.TrimPrefix(p.by, networkRuleWord)
	}
	if p.standing.rule != nil {
		i.Rule = p.standing.rule.Name
	}
	if p.state != permWaiting {
		return i, p.flows > 0
	}
	switch {
	case p.emulated:
		i.State = "emulated"
	case p.awaiting:
		i.State = "waiting"
	case p.discarding:
		i.State = "discarding"
	case p.inbound() && !p.AnySource && len(p.Sources) == 0:
		i.State = "reserved"
	default:
		i.State = "armed"
	}
	return i, true
}

// path is that of PermissionInfo; filtered: data filters hold all of its flows.
// p.mu is held.
func (p *permission) path(filtered bool) string {
	switch {
	case p.emulated || p.atSocket() || p.forSocketsAlone():
		return "user" // a socket of the gateway is the flow's one end
	case !p.ToUser:
		return "kernel"
	case p.forced || p.OneWay || filtered || p.standing.rule != nil && p.standing.rule.NoKernelMode:
		return "user"
	}
	return "asked"
}

// filtered says whether data filters stand ready for all flows of a permission.
// A factory is asked about each one, and may make none.
func (p *permission) filtered() bool {
	c := p.object
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.links, func(l Link) bool { return !l.peer.IsValid() })
}
