// Package control is how an administrator talks to a running gateway: JSON
// over HTTP on a Unix socket that only root may open.
package control

import (
	"context"
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
)

// Gateway is what the socket's server asks of the running gateway. Safe for
// concurrent use.
type Gateway interface {
	Rules() []Rule
	// SetNoKernelMode moves new flows of a rule between the kernel and user
	// space. ErrNoRule: there is no such rule.
	SetNoKernelMode(ctx context.Context, rule string, on bool) error
	Flows(context.Context) ([]Flow, error)
	Permissions() []Permission
	Binds() []Bind
	Sessions() []Session
	// Disconnect cuts the flows of a session and voids its permissions.
	// ErrNoSession: there is no such session.
	Disconnect(ctx context.Context, session uint64) error
	// Reload reads the configuration file again; on error the running policy
	// stays.
	Reload(context.Context) error
	Counters() map[string]uint64
}

// Rule is a rule as `gateway rules` shows it.
type Rule struct {
	Name         string   `json:"name"`
	Action       string   `json:"action"`
	From         []string `json:"from"`
	To           []string `json:"to"`
	Servers      []string `json:"servers,omitempty"` // of a rule that publishes
	Protocols    []string `json:"protocols"`
	Users        []string `json:"users,omitempty"` // none: everybody
	Filters      []string `json:"filters,omitempty"`
	NoKernelMode bool     `json:"no_kernel_mode"`
	// Decided is "kernel" if no flow of the rule needs user space, else
	// "user space".
	Decided string `json:"decided"`
}

// Flow is a living flow as `gateway flows` shows it.
type Flow struct {
	Path      string `json:"path"`
	Proto     string `json:"proto"`
	Src       string `json:"src"`
	Dst       string `json:"dst"`
	NATSrc    string `json:"nat_src,omitempty"`
	NATDst    string `json:"nat_dst,omitempty"`
	Rule      string `json:"rule,omitempty"`
	Protocol  string `json:"protocol,omitempty"`
	Session   uint64 `json:"session,omitempty"`
	User      string `json:"user,omitempty"` // of a client that asked the gateway
	Secondary bool   `json:"secondary,omitempty"`
	// Permission is the ID of the one that let it in.
	Permission uint64    `json:"permission,omitempty"`
	Offloaded  bool      `json:"offloaded,omitempty"`
	Start      time.Time `json:"start"`
	// The counts are conntrack's; those of a flow in user space come with its
	// end, in the log.
	Counts *flow.Counts `json:"counts,omitempty"`
}

// Permission is a permission as `gateway permissions` shows it.
type Permission struct {
	ID        uint64 `json:"id"`
	State     string `json:"state"`
	Direction string `json:"direction"` // outbound, redirect or inbound
	Proto     string `json:"proto"`
	// Client is empty for a bind that waits for it.
	Client   string   `json:"client"`
	Target   string   `json:"target,omitempty"`
	Via      string   `json:"via,omitempty"`    // of a redirect: where the client goes instead
	Source   string   `json:"source,omitempty"` // the gateway's address that flows leave from, if it was asked for
	External string   `json:"external,omitempty"`
	Sources  []string `json:"sources,omitempty"`
	Multiple bool     `json:"multiple"`
	OneWay   bool     `json:"one_way,omitempty"`
	// AddressBased: it belongs to the client's address, not to the session.
	AddressBased bool `json:"address_based,omitempty"`
	Notify       bool `json:"notify,omitempty"` // a filter hears of established flows
	// Path is who carries the flows: "kernel", "user", or "asked", which is
	// the kernel unless a filter that is shown the first packet wants the flow.
	Path     string `json:"path"`
	Rule     string `json:"rule"`
	Protocol string `json:"protocol,omitempty"`
	Session  uint64 `json:"session"`
	Flows    int    `json:"flows"`
	// Living are the flows that it has let in.
	Living  []Ends     `json:"living,omitempty"`
	Expires *time.Time `json:"expires,omitempty"`
}

// Ends are those of a flow, as its initiator sent it.
type Ends struct {
	Src string `json:"src"`
	Dst string `json:"dst"`
}

// FlowOf turns the engine's view into the one for people.
func FlowOf(i engine.FlowInfo) Flow {
	return Flow{
		Path: i.Path.String(), Proto: i.Proto.String(), Src: i.Src.String(), Dst: i.Dst.String(),
		NATSrc: addr(i.Translation.Src), NATDst: addr(i.Translation.Dst),
		Rule: i.Rule, Protocol: i.Protocol, Session: i.Session, User: i.User, Secondary: i.Secondary, Start: i.Start,
		Permission: i.Permission,
	}
}

// PermissionOf does the same for a permission.
func PermissionOf(i engine.PermissionInfo) Permission {
	p := Permission{
		ID: i.ID, State: i.State, Direction: "outbound", Proto: i.Proto.String(), Client: i.Owner.String(),
		Target: addr(i.Target), Via: addr(i.Via), Source: addr(i.Source), External: addr(i.External),
		Multiple: i.Multiple, OneWay: i.OneWay, AddressBased: i.AddressBased, Notify: i.Notify, Path: i.Path,
		Rule: i.Rule, Protocol: i.Protocol, Session: i.Session, Flows: i.Flows,
	}
	for _, t := range i.Living {
		p.Living = append(p.Living, Ends{t.Src.String(), t.Dst.String()})
	}
	if i.Via.IsValid() {
		p.Direction = "redirect"
	}
	if !i.Target.IsValid() {
		p.Direction, p.Client = "inbound", addr(i.Client)
		for _, s := range i.Sources {
			p.Sources = append(p.Sources, s.String())
		}
		if i.AnySource {
			p.Sources = []string{"any"}
		}
	}
	if !i.Expires.IsZero() {
		t := i.Expires
		p.Expires = &t
	}
	return p
}

func addr(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}
