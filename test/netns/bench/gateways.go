package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// stand is everything that is measured, in lanes that stand side by side.
type stand struct {
	dir   string
	lanes []*lane

	sluice, bare, proxy *lane
	relay               *lane // passes datagrams in user space
	mapped              *lane // Sluice with endpoint-independent mapping
	many                *lane // Sluice with very many rules
	c, callback         *lane // what accepts each first packet
	loop, everyC        *lane // what reads and releases every packet: the gateway's loop, the same in C
	batches             *lane // what accepts first packets many at a time
	files, helper       *lane // Sluice with its FTP filter, and the kernel's helper
	// other* take Sluice's place in a self-check.
	otherBare, otherProxy *lane
}

// newStand declares the lanes; each is built when a case needs it first. close
// is for the caller, also after an error.
func newStand(ctx context.Context, o options) (*stand, error) {
	s := &stand{}
	var err error
	if s.dir, err = os.MkdirTemp("", "sluice-bench-"); err != nil {
		return s, fmt.Errorf("make a folder: %w", err)
	}
	s.bare = s.lane("bare", s.startBare)
	haproxy := func(l *lane) error { return s.startHAProxy(ctx, l) }
	s.proxy = s.lane("haproxy", haproxy)
	if o.selfCheck {
		s.otherBare = s.lane("bare again", s.startBare)
		s.otherProxy = s.lane("haproxy again", haproxy)
		return s, nil
	}
	s.relay = s.lane("relay", func(l *lane) error { return s.startRelay(ctx, l) })
	sluice := func(name, config string) *lane {
		return s.lane(name, func(l *lane) error { return s.startSluice(ctx, l, o.gateway, config) })
	}
	s.sluice = sluice("sluice", gatewayConfig)
	s.many = sluice("sluice, 10,000 rules", manyRules(gatewayConfig, 100))
	// The kernel words an event of conntrack when anybody listens to its group,
	// in whatever namespace (netlink_has_listeners in net/netlink/af_netlink.c).
	// This daemon listens for new flows, which costs all other lanes whose
	// conntrack has events about 1 µs each: its cases come last.
	s.mapped = sluice("sluice, mapping endpoints", mappedConfig)
	s.batches = s.queueLane("libnetfilter_queue, in batches", firstRules, s.startC(ctx, o.accept, "32"))
	s.c = s.queueLane("libnetfilter_queue", firstRules, s.startC(ctx, o.accept))
	s.callback = s.queueLane("go-nfqueue", firstRules, s.startRole(ctx, roleCallback))
	s.everyC = s.queueLane("libnetfilter_queue, every packet", everyRules, s.startC(ctx, o.accept))
	s.loop = s.queueLane("queue loop", everyRules, s.startRole(ctx, roleLoop))
	s.declareFTP(ctx, o.gateway)
	return s, nil
}

// lane declares one.
func (s *stand) lane(name string, start func(*lane) error) *lane {
	l := &lane{name: name, start: start}
	s.lanes = append(s.lanes, l)
	return l
}

func (s *stand) close() {
	for _, l := range s.lanes {
		l.close()
	}
	if s.dir != "" {
		_ = os.RemoveAll(s.dir)
	}
}

// bareRules is all that a masquerading router needs.
const bareRules = `
table ip nat {
	chain postrouting {
		type nat hook postrouting priority srcnat
		oifname "wan0" masquerade
	}
}
`

func (s *stand) startBare(l *lane) error {
	return commandInput(bareRules, "ip", "netns", "exec", l.gw, "nft", "-f", "-")
}

// proxyRules hand a client's connections to HAProxy. Without NAT rules the
// baseline has no connection tracking at all.
const proxyRules = `
table ip proxy {
	chain prerouting {
		type filter hook prerouting priority mangle
		iifname "lan0" meta l4proto tcp socket transparent 1 meta mark set 1 accept
		iifname "lan0" meta l4proto tcp tproxy to 127.0.0.1:3129 meta mark set 1 accept
	}
}
`

const proxyConfig = `
global
	nbthread 2
	maxconn 7000
defaults
	mode tcp
	option splice-auto
	timeout connect 5s
	timeout client 30s
	timeout server 30s
frontend clients
	bind 127.0.0.1:3129 transparent backlog 4096
	default_backend destination
backend destination
	source 0.0.0.0
	server original 0.0.0.0:0
`

// divert has packets with the mark 1 reach this host.
func divert(l *lane) error {
	if err := command("ip", "-n", l.gw, "rule", "add", "fwmark", "1", "lookup", "100"); err != nil {
		return err
	}
	return command("ip", "-n", l.gw, "route", "add", "local", "default", "dev", "lo", "table", "100")
}

func (s *stand) startHAProxy(ctx context.Context, l *lane) error {
	if err := commandInput(proxyRules, "ip", "netns", "exec", l.gw, "nft", "-f", "-"); err != nil {
		return err
	}
	if err := divert(l); err != nil {
		return err
	}
	path := filepath.Join(s.dir, "haproxy-"+l.gw+".cfg")
	if err := os.WriteFile(path, []byte(proxyConfig), 0o600); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	var err error
	if l.daemon, err = start(l.gw, s.dir, nil, "haproxy", "-db", "-f", path); err != nil {
		return err
	}
	return l.daemon.await(ctx, func([]byte) bool { return listens(l.gw, "127.0.0.1:3129") })
}

// gatewayConfig has one rule for each way that a flow can take. What is judged
// has a filter bound that wants no event of its kind: the rules decide, in user
// space.
const gatewayConfig = `
networks:
  lan: {interfaces: [lan0]}
  wan: {interfaces: [wan0]}
network_rules:
  - {name: internet, from: lan, to: wan, relation: nat}
protocols:
  decided: {tcp: 5000-5099, udp: 5000-5099}
  judged_tcp: {tcp: 5100-5199, filter: tftp}
  judged_udp: {udp: 5100-5199, filter: ftp}
  carried: {tcp: 5200-5299, udp: 5200-5299}
  heard: {tcp: 5300-5399, udp: 5300-5399, filter: probe}
  filtered: {tcp: 5400-5499, filter: probe}
rules:
  - {name: kernel, action: allow, from: lan, to: wan, protocols: decided}
  - {name: queued-tcp, action: allow, from: lan, to: wan, protocols: judged_tcp, filters: {tftp: {}}}
  - {name: queued-udp, action: allow, from: lan, to: wan, protocols: judged_udp, filters: {ftp: {}}}
  - {name: heard, action: allow, from: lan, to: wan, protocols: heard, filters: {probe: {}}}
  - {name: user, action: allow, from: lan, to: wan, protocols: carried, no_kernel_mode: true}
  - {name: filtered, action: allow, from: lan, to: wan, protocols: filtered, filters: {probe: {pass: true}}}
log: {format: json}
control: {socket: %s}
`

// mappedConfig has ports for very many endpoints, which do not rest.
const mappedConfig = `
networks:
  lan: {interfaces: [lan0]}
  wan: {interfaces: [wan0]}
network_rules:
  - {name: internet, from: lan, to: wan, relation: nat, mapping: endpoint-independent}
protocols:
  decided: {udp: 5000-5099}
rules:
  - {name: kernel, action: allow, from: lan, to: wan, protocols: decided}
ports: {kernel: 1024-2047, leases: 2048-32767, quota: 65535, quarantine: 0}
log: {format: json}
control: {socket: %s}
`

// manyRules adds rules before those of the bench, n of each of n networks: none
// of them matches a flow of the bench.
func manyRules(config string, n int) string {
	var networks, protocols, rules strings.Builder
	for i := range n {
		fmt.Fprintf(&networks, "  h%d: {prefixes: [10.%d.%d.0/24]}\n", i, 128+i/256, i%256)
		fmt.Fprintf(&protocols, "  p%d: {tcp: %d, udp: %d}\n", i, 20000+i, 20000+i)
		for j := range n {
			fmt.Fprintf(&rules, "  - {name: r%d-%d, action: allow, from: h%d, to: wan, protocols: p%d}\n", i, j, i, j)
		}
	}
	for section, more := range map[string]string{"networks": networks.String(), "protocols": protocols.String(), "rules": rules.String()} {
		config = strings.Replace(config, "\n"+section+":\n", "\n"+section+":\n"+more, 1)
	}
	return config
}

func (s *stand) startSluice(ctx context.Context, l *lane, program, config string) error {
	path := filepath.Join(s.dir, l.gw+".yaml")
	text := fmt.Sprintf(config, filepath.Join(s.dir, l.gw+".control"))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	// The probe filter judges the queued flows; no test tells it anything, so
	// it leaves them to the kernel.
	env := []string{"SLUICE_PROBE_SOCKET=" + filepath.Join(s.dir, l.gw+".probe")}
	var err error
	if l.daemon, err = start(l.gw, s.dir, env, program, "run", "-c", path); err != nil {
		return err
	}
	return l.daemon.await(ctx, func(log []byte) bool { return bytes.Contains(log, []byte(`"msg":"ready"`)) })
}
