// Package lab builds small networks out of network namespaces for the black-box
// tests: clients, a gateway and servers, joined by veths and two switches. Every
// lab has names of its own, so any number of them live side by side, and
// everything of it goes when its test ends, however it ends.
//
//	client   10.0.0.2  fd00:a::2 ──┐                    ┌── srv   203.0.113.10  2001:db8:b::10
//	                           eth0│                    │eth0
//	                             [lan]─lan0  gw  wan0─[wan]
//	                           eth0│                    │eth0
//	client2  10.0.0.3  fd00:a::3 ──┘                    └── other 203.0.113.11  2001:db8:b::11
//
//	gw inside: 10.0.0.1, fd00:a::1; outside: 203.0.113.1, 203.0.113.2, 2001:db8:b::1
//
// All prefixes are /24 and /64. The clients' default routes lead to gw. The
// servers know the inside IPv6 prefix by way of gw and have no route to the
// inside IPv4 prefix: IPv4 is meant to be translated, IPv6 to be routed. The
// switches stand in a namespace of their own.
package lab

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// Addresses of the topology.
var (
	Client4   = netip.MustParseAddr("10.0.0.2")
	Client6   = netip.MustParseAddr("fd00:a::2")
	Second4   = netip.MustParseAddr("10.0.0.3")
	Second6   = netip.MustParseAddr("fd00:a::3")
	Inside4   = netip.MustParseAddr("10.0.0.1")
	Inside6   = netip.MustParseAddr("fd00:a::1")
	Outside4  = netip.MustParseAddr("203.0.113.1")
	Outside4b = netip.MustParseAddr("203.0.113.2")
	Outside6  = netip.MustParseAddr("2001:db8:b::1")
	Srv4      = netip.MustParseAddr("203.0.113.10")
	Srv6      = netip.MustParseAddr("2001:db8:b::10")
	Other4    = netip.MustParseAddr("203.0.113.11")
	Other6    = netip.MustParseAddr("2001:db8:b::11")
	// Nobody answers for these: outside prefix, no such host.
	Nobody4 = netip.MustParseAddr("203.0.113.99")
	Nobody6 = netip.MustParseAddr("2001:db8:b::99")
)

// Lab is one network. Its methods fail the test that made it; they are to be
// called on the test's own goroutine unless they return an error.
type Lab struct {
	T                               testing.TB
	Client, Client2, GW, Srv, Other *Host
	name, dir                       string
	switches                        *Host
	hosts                           []*Host
	mu                              sync.Mutex
	processes                       []*Process
	captures                        []*Capture
	gateways                        []*Gateway
	closers                         []func()
	once                            sync.Once
}

// Option changes what New builds.
type Option func(*plan)

type plan struct{ offloads bool }

// WithOffloads leaves checksum and segmentation offload on: packets above the
// MTU and partial checksums, as a host's own traffic has them.
func WithOffloads() Option { return func(p *plan) { p.offloads = true } }

// New builds a lab that is up: every link has its carrier, no address is
// tentative. It is taken down when the test ends.
func New(t testing.TB, options ...Option) *Lab {
	t.Helper()
	var p plan
	for _, o := range options {
		o(&p)
	}
	l := &Lab{T: t, name: newName()}
	dir, err := os.MkdirTemp("", "sluice-lab.")
	if err != nil {
		t.Fatalf("lab: %v", err)
	}
	if err := os.Chmod(dir, 0o755); err != nil { // servers drop their rights
		t.Fatalf("lab: %v", err)
	}
	l.dir = dir
	register(l)
	t.Cleanup(l.close)
	if err := l.build(p); err != nil {
		t.Fatalf("lab %s: %v", l.name, err)
	}
	return l
}

func (l *Lab) build(p plan) error {
	for _, h := range []struct {
		at   **Host
		name string
	}{{&l.switches, "sw"}, {&l.GW, "gw"}, {&l.Client, "client"}, {&l.Client2, "client2"}, {&l.Srv, "srv"}, {&l.Other, "other"}} {
		made, err := newHost(l, h.name)
		if err != nil {
			return err
		}
		*h.at = made
		l.hosts = append(l.hosts, made)
	}
	if err := addSwitch(l.switches, "lan"); err != nil {
		return err
	}
	if err := addSwitch(l.switches, "wan"); err != nil {
		return err
	}
	links := []link{
		{l.GW, "lan0", "lan", []string{"10.0.0.1/24", "fd00:a::1/64"}, nil},
		{l.GW, "wan0", "wan", []string{"203.0.113.1/24", "203.0.113.2/24", "2001:db8:b::1/64"}, nil},
		{l.Client, "eth0", "lan", []string{"10.0.0.2/24", "fd00:a::2/64"}, []string{"0.0.0.0/0 10.0.0.1", "::/0 fd00:a::1"}},
		{l.Client2, "eth0", "lan", []string{"10.0.0.3/24", "fd00:a::3/64"}, []string{"0.0.0.0/0 10.0.0.1", "::/0 fd00:a::1"}},
		{l.Srv, "eth0", "wan", []string{"203.0.113.10/24", "2001:db8:b::10/64"}, []string{"fd00:a::/64 2001:db8:b::1"}},
		{l.Other, "eth0", "wan", []string{"203.0.113.11/24", "2001:db8:b::11/64"}, []string{"fd00:a::/64 2001:db8:b::1"}},
	}
	for _, k := range links {
		if err := k.plug(l.switches, p.offloads); err != nil {
			return fmt.Errorf("%s %s: %w", k.host.Name, k.iface, err)
		}
	}
	for _, h := range l.hosts {
		if err := h.awaitLinks(); err != nil {
			return err
		}
	}
	if err := l.GW.Sysctl("net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	return l.GW.Sysctl("net/ipv6/conf/all/forwarding", "1")
}

// Dir is a folder of the lab's own that everybody may enter; it goes with it.
func (l *Lab) Dir() string { return l.dir }

// File writes a file into the lab's folder and gives its path.
func (l *Lab) File(name, text string) string {
	l.T.Helper()
	path := filepath.Join(l.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		l.T.Fatalf("lab: %v", err)
	}
	return path
}

// OnClose runs f when the lab is taken down, before its namespaces go.
func (l *Lab) OnClose(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closers = append(l.closers, f)
}

// close takes the lab down. After a failure it first keeps what explains it.
func (l *Lab) close() {
	l.once.Do(func() {
		l.mu.Lock()
		closers, processes, captures, gateways := l.closers, l.processes, l.captures, l.gateways
		l.mu.Unlock()
		if l.T.Failed() {
			for _, g := range gateways {
				g.awake() // a stopped one answers nobody
			}
			l.keep()
		}
		for i := len(closers) - 1; i >= 0; i-- {
			closers[i]()
		}
		for _, c := range captures {
			c.Stop()
		}
		for i := len(processes) - 1; i >= 0; i-- {
			processes[i].Kill()
		}
		l.destroy()
		unregister(l)
	})
}

// destroy removes namespaces and folder; it is what Ctrl-C runs too.
func (l *Lab) destroy() {
	for _, h := range l.hosts {
		h.remove()
	}
	_ = os.RemoveAll(l.dir)
}
