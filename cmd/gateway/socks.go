package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	rtnl "github.com/vishvananda/netlink"
	"go.uber.org/zap"

	"github.com/sluicegw/sluice/config"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filters/socks"
	"github.com/sluicegw/sluice/policy"
)

// socksFilter is the one of the list.
func socksFilter(filters []filterapi.Filter) *socks.Filter {
	for _, f := range filters {
		if s, ok := f.(*socks.Filter); ok {
			return s
		}
	}
	return nil
}

// serveSocks has SOCKS served as the configuration in force says. An address
// that cannot be opened is in the log: the rest is served. g.change is held.
func (g *gateway) serveSocks() {
	f := socksFilter(g.filters)
	if f == nil {
		return
	}
	g.users.Set(g.cfg.Users)
	s, err := g.socksSettings()
	if err == nil {
		err = f.Configure(s)
	}
	switch {
	case err != nil:
		g.log.Error("SOCKS is not served everywhere", zap.Error(err))
	case len(g.cfg.Socks.Networks) > 0 && len(s.Listen) == 0:
		g.log.Warn("SOCKS is served nowhere: the gateway has no address in the networks", zap.Strings("networks", g.cfg.Socks.Networks))
	case len(s.Listen) > 0:
		g.log.Info("SOCKS is served", zap.Stringers("at", s.Listen))
	}
}

func (g *gateway) socksSettings() (socks.Settings, error) {
	c := g.cfg.Socks
	s := socks.Settings{
		Sources: new(filterapi.IPFilter), Serves: g.inNetworks(c.Networks),
		ApproveBinds: c.Approve, Resolvers: c.Resolvers, PerClient: int(c.PerClient),
		Handshake: time.Duration(c.HandshakeTimeout) * time.Second,
		Connect:   time.Duration(c.ConnectTimeout) * time.Second,
		Bind:      time.Duration(c.BindTimeout) * time.Second,
		Has:       g.users.Has,
	}
	if c.Password {
		s.Authenticate = g.users.Check
	}
	var err error
	if s.Listen, err = socksAddresses(c, g.policy); err != nil {
		return s, err
	}
	for _, n := range g.policy.Networks() {
		if !slices.Contains(c.Networks, n.Name) {
			continue
		}
		if len(n.Prefixes) == 0 {
			s.Sources = nil // whoever is reached through its interfaces
		}
		for _, p := range n.Prefixes {
			if s.Sources == nil {
				break
			}
			if err := s.Sources.IncludeRange(p.Addr(), lastOf(p)); err != nil {
				return s, fmt.Errorf("serve network %q: %w", n.Name, err)
			}
		}
	}
	return s, nil
}

// socksAddresses is where SOCKS is served.
func socksAddresses(c config.Socks, p *policy.Policy) (list []netip.AddrPort, err error) {
	for _, n := range p.Networks() {
		if !slices.Contains(c.Networks, n.Name) {
			continue
		}
		addrs, err := ownAddresses(n)
		if err != nil {
			return nil, fmt.Errorf("serve network %q: %w", n.Name, err)
		}
		for _, a := range addrs {
			if at := netip.AddrPortFrom(a, c.Port); !slices.Contains(list, at) {
				list = append(list, at)
			}
		}
	}
	return list, nil
}

// inNetworks says of an address whether it is a host's of some of the networks.
func (g *gateway) inNetworks(names []string) func(netip.Addr) bool {
	return func(a netip.Addr) bool {
		iface, _, local, err := g.routes.Lookup(a)
		if err != nil || local {
			return false
		}
		in := g.engine.Policy().NetworksOf(a, iface)
		return slices.ContainsFunc(names, func(n string) bool { return n != policy.Any && slices.Contains(in, n) })
	}
}

// ownAddresses are the gateway's addresses in a network that others can
// connect to.
func ownAddresses(n policy.Network) ([]netip.Addr, error) {
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, i := range all {
		if len(n.Interfaces) > 0 && !slices.Contains(n.Interfaces, i.Name) || i.Flags&net.FlagLoopback != 0 {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			continue // gone meanwhile
		}
		for _, x := range addrs {
			p, err := netip.ParsePrefix(x.String())
			if err != nil {
				continue
			}
			a := p.Addr().Unmap()
			in := len(n.Prefixes) == 0 || slices.ContainsFunc(n.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
			if in && a.IsGlobalUnicast() {
				out = append(out, a)
			}
		}
	}
	return out, nil
}

// lastOf is the highest address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := range b {
		b[i] |= byte(1<<max(0, min(8, 8*(i+1)-p.Bits())) - 1)
	}
	a, _ := netip.AddrFromSlice(b) // 4 or 16 bytes
	return a
}

// settle is how long addresses are left alone that have just changed: one is
// no good while the kernel looks whether somebody else has it (RFC 4862, 5.4).
const settle = 2 * time.Second

// hearAddresses hears of changes of addresses from now on, until done is closed.
func hearAddresses(done <-chan struct{}) (chan rtnl.AddrUpdate, error) {
	updates := make(chan rtnl.AddrUpdate, 64)
	if err := rtnl.AddrSubscribe(updates, done); err != nil {
		return nil, fmt.Errorf("watch addresses: %w", err)
	}
	return updates, nil
}

func (g *gateway) openAddresses(undo *ladder) error {
	done := make(chan struct{})
	undo.add(func() { close(done) })
	updates, err := hearAddresses(done)
	if err != nil {
		return err
	}
	g.task("addresses", func(ctx context.Context) error { return g.followAddresses(ctx, updates) })
	return nil
}

// followAddresses serves at the addresses that the gateway has now. updates are
// those since before it was first served.
func (g *gateway) followAddresses(ctx context.Context, updates chan rtnl.AddrUpdate) error {
	var later <-chan time.Time
	for {
		select {
		case _, ok := <-updates:
			if !ok {
				updates = nil // some were lost: begin anew, later
			}
			if later == nil {
				later = time.After(settle)
			}
		case <-later:
			later = nil
			if updates == nil {
				var err error
				if updates, err = hearAddresses(ctx.Done()); err != nil {
					return err
				}
			}
			g.change.Lock()
			g.serveSocks()
			g.change.Unlock()
		case <-ctx.Done():
			return nil
		}
	}
}

// warnSecrets says that others on this host can read what only the gateway
// should.
func warnSecrets(file string, c *config.Config) error {
	if len(c.Users) == 0 {
		return nil
	}
	info, err := os.Stat(file)
	if err != nil {
		return nil // it has been read: somebody is about to replace it
	}
	if m := info.Mode().Perm(); m&0o077 != 0 {
		return fmt.Errorf("%s holds hashes of passwords, and others can read it (mode %04o): %w", file, m, errReadable)
	}
	return nil
}

// nobodysRules says which rules are for users, where nobody can prove to be one.
func nobodysRules(c *config.Config) (out []string) {
	if c.Socks.Password && len(c.Socks.Networks) > 0 {
		return nil
	}
	for _, r := range c.Policy.Rules() {
		if len(r.Users) > 0 {
			out = append(out, fmt.Sprintf("rule %q is for users, and nobody can prove to be one without socks.authentication: password", r.Name))
		}
	}
	return out
}

var errReadable = errors.New("want 0600")
