package main

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/config"
	"github.com/sluicegw/sluice/control"
	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/filters/pcp"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
	"github.com/sluicegw/sluice/userpath"
)

// loadConfig reads a configuration file for these filters. A filter that cannot
// serve a rule which publishes is an error of the file.
func loadConfig(file string, filters []filterapi.Filter) (*config.Config, error) {
	cfg, err := config.Load(file, parsers(filters))
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, r := range cfg.Policy.Rules() {
		for _, use := range r.Filters {
			i := slices.IndexFunc(filters, func(f filterapi.Filter) bool { return f.Name() == use.Name })
			if i < 0 || r.Action != policy.Publish {
				continue
			}
			if x, ok := filters[i].(filterapi.OutboundOnly); ok {
				errs = append(errs, &config.Error{File: file, Line: r.Line, Reason: fmt.Sprintf(
					"rule %q: filters: %s cannot serve a rule that publishes: %s", r.Name, use.Name, x.OutboundOnly())})
			}
		}
	}
	return cfg, errors.Join(errs...)
}

// portTaken says whether a port is not to be leased: the gateway's own host uses
// it, or a server is published there.
func (g *gateway) portTaken(e nat.Endpoint) bool {
	return g.engine != nil && g.engine.Policy().PublishedAt(e.Proto, e.Addr) != nil || userpath.PortBusy(e.Proto, e.Addr)
}

// kernelPorts is the largest part of the kernel's own range of ports in which
// nothing is published at an address of the gateway: a port that the kernel gives
// to a hidden flow must be nobody else's.
func kernelPorts(all nat.Range, p *policy.Policy) (nat.Range, error) {
	if all == (nat.Range{}) {
		return all, nil
	}
	var taken []policy.PortRange
	for _, x := range p.Published() {
		if x.Proto.HasPorts() && x.Server.Addr().Is4() {
			taken = append(taken, x.Ports)
		}
	}
	slices.SortFunc(taken, func(a, b policy.PortRange) int { return int(a.Lo) - int(b.Lo) })
	var best nat.Range
	size, lo := 0, int(all.Lo)
	for _, x := range append(taken, policy.PortRange{Lo: 65535, Hi: 65535}) {
		hi := int(all.Hi)
		if x.Lo < 65535 {
			hi = min(hi, int(x.Lo)-1)
		}
		if hi-lo+1 > size {
			size, best = hi-lo+1, nat.Range{Lo: uint16(lo), Hi: uint16(hi)}
		}
		lo = max(lo, int(x.Hi)+1)
	}
	if size == 0 {
		return best, fmt.Errorf("ports.kernel (%v): what is published leaves none of them", all)
	}
	return best, nil
}

// checkPublished refuses what is published at a port at which the gateway itself
// listens: other programs do, or the configuration has clients served there.
func checkPublished(cfg *config.Config, p *policy.Policy, file string) error {
	listening, err := listeners("/proc")
	if err != nil {
		return fmt.Errorf("look at the gateway's own ports: %w", err)
	}
	served, err := servedAt(cfg, p)
	if err != nil {
		return err
	}
	listening = append(listening, served...)
	var errs []error
	for _, x := range p.Published() {
		for _, l := range listening {
			port := l.Addr.Port()
			if l.Proto != x.Proto || !x.Server.Addr().Is4() || port < x.Ports.Lo || port > x.Ports.Hi {
				continue
			}
			at := l.Addr.Addr()
			if at.IsUnspecified() || at == x.At || !x.At.IsValid() && at.Is4() && !at.IsLoopback() {
				errs = append(errs, &config.Error{File: file, Line: x.Rule.Line, Reason: fmt.Sprintf(
					"rule %q: the gateway itself listens on %s port %d (%s)", x.Rule.Name, x.Proto, port, at)})
			}
		}
	}
	return errors.Join(errs...)
}

// servedAt is where the configuration has clients of the inside served.
func servedAt(cfg *config.Config, p *policy.Policy) ([]nat.Endpoint, error) {
	at, err := socksAddresses(cfg.Socks, p)
	if err != nil {
		return nil, err
	}
	var out []nat.Endpoint
	for _, a := range at {
		out = append(out, nat.Endpoint{Proto: flow.TCP, Addr: a})
	}
	for _, n := range p.Networks() {
		if !slices.Contains(cfg.PCP.Networks, n.Name) {
			continue
		}
		addrs, err := ownAddresses(n)
		if err != nil {
			return nil, fmt.Errorf("serve network %q: %w", n.Name, err)
		}
		for _, a := range addrs {
			out = append(out, nat.Endpoint{Proto: flow.UDP, Addr: netip.AddrPortFrom(a, pcp.Port)})
		}
	}
	return out, nil
}

// listeners are the sockets of this machine that wait for anybody: TCP that
// listens, UDP without a peer. The gateway's own are not among them: they speak
// for flows and give way to what is published, or servedAt names them.
func listeners(proc string) ([]nat.Endpoint, error) {
	own, err := ownSockets(proc)
	if err != nil {
		return nil, err
	}
	var out []nat.Endpoint
	for _, t := range []struct {
		file  string
		proto flow.Proto
		state string // linux/net/tcp_states.h: TCP_LISTEN, and TCP_CLOSE for UDP without a peer
	}{{"tcp", flow.TCP, "0A"}, {"tcp6", flow.TCP, "0A"}, {"udp", flow.UDP, "07"}, {"udp6", flow.UDP, "07"}} {
		f, err := os.Open(filepath.Join(proc, "self/net", t.file))
		if errors.Is(err, os.ErrNotExist) {
			continue // no IPv6
		}
		if err != nil {
			return nil, err
		}
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			w := strings.Fields(lines.Text())
			if len(w) < 10 || w[3] != t.state || own[w[9]] {
				continue
			}
			if at, ok := procAddr(w[1]); ok {
				out = append(out, nat.Endpoint{Proto: t.proto, Addr: at})
			}
		}
		err = errors.Join(lines.Err(), f.Close())
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// ownSockets are the inodes of this process's sockets.
func ownSockets(proc string) (map[string]bool, error) {
	fds, err := os.ReadDir(filepath.Join(proc, "self/fd"))
	if err != nil {
		return nil, err
	}
	own := map[string]bool{}
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join(proc, "self/fd", fd.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		if inode, ok := strings.CutPrefix(to, "socket:["); ok {
			own[strings.TrimSuffix(inode, "]")] = true
		}
	}
	return own, nil
}

// procAddr reads 0100007F:0016: 32-bit words of the address in the byte order of
// the machine, and the port.
func procAddr(s string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(s, ":")
	raw, err := hex.DecodeString(host)
	if !ok || err != nil || len(raw)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(raw); i += 4 {
		slices.Reverse(raw[i : i+4])
	}
	a, ok := netip.AddrFromSlice(raw)
	n, err := strconv.ParseUint(port, 16, 16)
	return netip.AddrPortFrom(a.Unmap(), uint16(n)), ok && err == nil
}

// warnPublished names the addresses at which something is published and that are
// not the gateway's now. They may come later.
func (g *gateway) warnPublished() {
	for _, x := range g.policy.Published() {
		if !x.At.Is4() {
			continue
		}
		if _, _, local, err := g.routes.Lookup(x.At); err != nil || !local {
			g.log.Warn("a server is published at an address that is not the gateway's now",
				zap.String("rule", x.Rule.Name), zap.Stringer("address", x.At))
		}
	}
}

// publishedBinds are the binds that rules make.
func (g *gateway) publishedBinds() []control.Bind {
	flows := g.engine.PublishedFlows()
	var out []control.Bind
	for _, x := range g.engine.Policy().Published() {
		b := control.Bind{
			State: "allowed", Proto: x.Proto.String(), By: "publish " + x.Rule.Name, Rule: x.Rule.Name,
			Sources: x.Rule.From, Multiple: true, Owner: x.Server.Addr().String(),
			External: portsAt(x.At, x.Ports, x.Ports.Lo), Client: portsAt(x.Server.Addr(), x.Ports, x.Server.Port()),
		}
		for _, t := range flows[x.Rule.Name] {
			port := t.Dst.Port()
			if t.Proto == x.Proto && t.Is4() == x.Server.Addr().Is4() && (t.Dst.Addr() == x.At || !x.At.IsValid()) && x.Ports.Lo <= port && port <= x.Ports.Hi {
				b.Flows++
			}
		}
		out = append(out, b)
	}
	return out
}

// portsAt is an address with a range of ports that begins at first.
func portsAt(a netip.Addr, ports policy.PortRange, first uint16) string {
	host := "*"
	switch {
	case a.Is6():
		host = "[" + a.String() + "]"
	case a.IsValid():
		host = a.String()
	}
	switch {
	case ports == policy.PortRange{Lo: 0, Hi: 65535} && first == 0:
		return strings.Trim(host, "[]")
	case ports.Lo == ports.Hi:
		return fmt.Sprintf("%s:%d", host, first)
	}
	return fmt.Sprintf("%s:%d-%d", host, first, int(first)+int(ports.Hi-ports.Lo))
}
