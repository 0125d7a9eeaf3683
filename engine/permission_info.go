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
		Permission: p.form(), Session: p.session.id, Owner: p.session.addr, Protocol: p.judgement().protocol,
		AddressBased: p.addressBased, Notify: p.notify != nil, Flows: p.living(), State: "used",
		Path: p.path(filtered), By: p.by, User: p.session.User(), Bind: p.object() != nil, Socket: p.atSocket(),
	}
	i.Expires, _ = p.expires()
	if p.mapping() != nil && !p.borrows() {
		i.Leaves = strings.TrimPrefix(p.by, networkRuleWord)
	}
	if r := p.judgement().rule; r != nil {
		i.Rule = r.Name
	}
	if p.state != permWaiting {
		return i, p.living() > 0
	}
	i.State = "armed"
	if p.bind != nil {
		i.State = p.bind.stateName()
	}
	return i, true
}

// stateName is that of PermissionInfo while the bind waits. p.mu is held.
func (b *bind) stateName() string {
	switch {
	case b.emulated:
		return "emulated"
	case b.awaiting:
		return "waiting"
	case b.discarding:
		return "discarding"
	case !b.anySource && len(b.sources) == 0:
		return "reserved"
	}
	return "armed"
}

// path is that of PermissionInfo; filtered: data filters hold all of its flows.
// p.mu is held.
func (p *permission) path(filtered bool) string {
	switch {
	case p.isEmulated() || p.atSocket() || p.forSocketsAlone():
		return "user" // a socket of the gateway is the flow's one end
	case !p.is.has(toUser):
		return "kernel"
	case p.is.has(forced) || p.oneWay() || filtered || p.judgement().noKernelMode():
		return "user"
	}
	return "asked"
}

// filtered says whether data filters stand ready for all flows of a permission.
// A factory is asked about each one, and may make none.
func (p *permission) filtered() bool {
	c := p.object()
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.ContainsFunc(c.links, func(l Link) bool { return !l.peer.IsValid() })
}
