package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"go.uber.org/zap"

	rtnl "github.com/vishvananda/netlink"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// keepAdmin refuses to start when the rules would refuse a new connection like
// the one that the administrator sits on. ssh is SSH_CONNECTION: client
// address and port, gateway address and port. Living connections are never
// cut by a start.
func (g *gateway) keepAdmin(ssh string, force bool) error {
	f := strings.Fields(ssh)
	if len(f) != 4 {
		return nil
	}
	from, err1 := netip.ParseAddr(f[0])
	to, err2 := netip.ParseAddr(f[2])
	port, err3 := strconv.ParseUint(f[3], 10, 16)
	if err1 != nil || err2 != nil || err3 != nil {
		return nil
	}
	iface, _, local, err := g.routes.Lookup(from.Unmap())
	if err != nil || local {
		return nil
	}
	v := g.policy.Judge(policy.Question{
		Tuple: flow.Tuple{
			Proto: flow.TCP,
			Src:   netip.AddrPortFrom(from.Unmap(), 0),
			Dst:   netip.AddrPortFrom(to.Unmap(), uint16(port)),
		},
		InIface: iface, ToGateway: true,
	})
	if v.Class == policy.ClassKernel && !v.Server.IsValid() {
		return nil
	}
	text := fmt.Sprintf("no rule lets %s reach this gateway's port %d, over which you are connected", from, port)
	if force {
		g.log.Warn(text + "; this connection goes on, a new one will be refused")
		return nil
	}
	return fmt.Errorf("%s: you could not come back; add a rule such as {name: admin, action: allow, from: ..., to: gateway, protocols: [ssh]}, or start with --force", text)
}

// followLinks loads the table again when an interface that the flowtable
// should hold has come or gone.
func (g *gateway) followLinks(ctx context.Context) error {
	if !g.facts.flowtable {
		return nil
	}
	updates := make(chan rtnl.LinkUpdate, 64)
	if err := rtnl.LinkSubscribe(updates, ctx.Done()); err != nil {
		return fmt.Errorf("watch links: %w", err)
	}
	g.change.Lock()
	held := presentInterfaces(g.policy)
	g.change.Unlock()
	for {
		select {
		case _, ok := <-updates:
			if !ok && ctx.Err() == nil {
				return fmt.Errorf("watch links: %w", net.ErrClosed)
			}
		case <-ctx.Done():
			return nil
		}
		held = g.refitFlowtable(held)
	}
}

// refitFlowtable gives the interfaces that the flowtable holds now.
func (g *gateway) refitFlowtable(held []string) []string {
	g.change.Lock()
	defer g.change.Unlock()
	now := presentInterfaces(g.policy)
	if slices.Equal(now, held) {
		return held
	}
	if err := g.apply(g.cfg, g.policy); err != nil {
		g.log.Error("refit the flowtable to the interfaces", zap.Error(err))
		return held
	}
	return now
}

// mend puts the table back that somebody else has changed: what did not come
// from the configuration has no place in it.
func (g *gateway) mend() error {
	g.change.Lock()
	defer g.change.Unlock()
	g.log.Warn("somebody else has changed the gateway's table (nft flush ruleset?): it is put back")
	// Nothing is checked: what was in force is so again, whatever else has changed.
	r, err := buildRuleset(g.cfg, g.policy, g.facts)
	if err == nil {
		err = g.Load(r)
	}
	if err != nil {
		return fmt.Errorf("put the gateway's table back: %w", err)
	}
	g.eventsLost() // elements that conntrack's reports had added are gone
	g.log.Info("the gateway's table is there again")
	g.warnForeign()
	return nil
}
