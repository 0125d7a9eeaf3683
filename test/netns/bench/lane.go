package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const namedDir = "/run/netns"

// Addresses, the same in every lane. Clients and servers are many: the client
// and srv namespaces take every address of their prefix for their own.
var (
	clientPrefix = [4]byte{10, 64, 0, 0}
	serverPrefix = [4]byte{198, 18, 0, 0}
)

var laneNumber atomic.Uint32

// lane is one gateway between a client and a server namespace.
type lane struct {
	name            string
	start           func(*lane) error // the gateway, once the namespaces are there
	client, gw, srv string            // namespaces; empty: not built yet
	servers         *servers
	ftp             *ftpServer // nil: none
	daemon          *process   // nil: the kernel alone
	serial          uint32     // of flows: no two of a round share a tuple
}

// up builds the lane if nobody has yet. close removes what there is, also after
// an error.
func (l *lane) up() error {
	if l.client != "" {
		return nil
	}
	err := l.build()
	if err == nil {
		err = l.start(l)
	}
	if err == nil {
		err = l.forget()
	}
	if err != nil {
		return fmt.Errorf("lane %q: %w", l.name, err)
	}
	return nil
}

// build makes the three namespaces and what is the same in every lane.
func (l *lane) build() error {
	tag := fmt.Sprintf("slc-%d-%d-%d-bench", os.Getpid(), time.Now().Unix(), laneNumber.Add(1))
	l.client, l.gw, l.srv = tag+"c", tag+"g", tag+"s"
	for _, ns := range []string{l.client, l.gw, l.srv} {
		if err := command("ip", "netns", "add", ns); err != nil {
			return err
		}
	}
	// Neighbours stand still: no round waits for ARP. The sysctls come before the
	// interfaces that take them over.
	steps := strings.NewReplacer("CLIENT", l.client, "GW", l.gw, "SRV", l.srv).Replace(`
		ip netns exec GW sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0
		ip -n CLIENT link set lo up
		ip -n GW link set lo up
		ip -n SRV link set lo up
		ip -n GW link add lan0 address 02:00:00:00:00:01 type veth peer name eth0 address 02:00:00:00:00:02 netns CLIENT
		ip -n GW link add wan0 address 02:00:00:00:01:01 type veth peer name eth0 address 02:00:00:00:01:02 netns SRV
		ip netns exec SRV sysctl -qw net.core.somaxconn=65535
		ip -n CLIENT addr add 10.0.0.2/24 dev eth0
		ip -n GW addr add 10.0.0.1/24 dev lan0
		ip -n GW addr add 203.0.113.1/24 dev wan0
		ip -n SRV addr add 203.0.113.10/24 dev eth0
		ip -n CLIENT link set eth0 up
		ip -n SRV link set eth0 up
		ip -n GW link set lan0 up
		ip -n GW link set wan0 up
		ip -n CLIENT neigh add 10.0.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent
		ip -n GW neigh add 10.0.0.2 lladdr 02:00:00:00:00:02 dev lan0 nud permanent
		ip -n GW neigh add 203.0.113.10 lladdr 02:00:00:00:01:02 dev wan0 nud permanent
		ip -n SRV neigh add 203.0.113.1 lladdr 02:00:00:00:01:01 dev eth0 nud permanent
		ip -n CLIENT route add default via 10.0.0.1
		ip -n CLIENT route add local 10.64.0.0/16 dev lo
		ip -n GW route add 10.64.0.0/16 via 10.0.0.2
		ip -n GW route add 198.18.0.0/16 via 203.0.113.10
		ip -n SRV route add local 198.18.0.0/16 dev lo
	`)
	for line := range strings.Lines(strings.TrimSpace(steps)) {
		if err := command(strings.Fields(line)...); err != nil {
			return err
		}
	}
	var err error
	l.servers, err = startServers(l)
	return err
}

func (l *lane) close() {
	if l.client == "" {
		return
	}
	if l.daemon != nil {
		l.daemon.stop()
	}
	if l.ftp != nil {
		l.ftp.close()
	}
	if l.servers != nil {
		l.servers.close()
	}
	for _, ns := range []string{l.client, l.gw, l.srv} {
		_ = exec.Command("ip", "netns", "del", ns).Run() // absent after an error
	}
}

// forget empties the gateway's conntrack table and waits until a daemon that
// heard of it has come to rest: no round pays for the one before.
func (l *lane) forget() error {
	if err := command("ip", "netns", "exec", l.gw, "conntrack", "-F"); err != nil {
		return err
	}
	if l.daemon == nil {
		return nil
	}
	return l.daemon.settle()
}

// cpu is the processor time that the lane's daemon has used so far.
func (l *lane) cpu() (time.Duration, error) {
	if l.daemon == nil {
		return 0, nil
	}
	return l.daemon.cpu()
}

// next reserves n serial numbers of flows.
func (l *lane) next(n int) uint32 {
	first := l.serial
	l.serial += uint32(n)
	return first
}

// inside runs f on a thread in a namespace that runs nothing else meanwhile.
// Sockets that f makes stay in the namespace.
func inside(ns string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- fmt.Errorf("own namespace: %w", err)
			return
		}
		defer home.Close()
		there, err := os.Open(filepath.Join(namedDir, ns))
		if err != nil {
			done <- fmt.Errorf("namespace: %w", err)
			return
		}
		defer there.Close()
		if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter %s: %w", ns, err)
			return
		}
		err = f()
		// A thread that ended here would take the children that it started
		// along with it.
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
			panic("bench: a thread is stuck in " + ns + ": " + back.Error())
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

// command runs a program to its end.
func command(args ...string) error {
	return commandInput("", args...)
}

func commandInput(input string, args ...string) error {
	c := exec.Command(args[0], args[1:]...)
	c.Stdin = strings.NewReader(input)
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

func commandOutputHas(text string, args ...string) bool {
	out, err := exec.Command(args[0], args[1:]...).Output()
	return err == nil && strings.Contains(string(out), text)
}

// sweep removes what runs that were killed have left.
func sweep() {
	entries, err := os.ReadDir(namedDir)
	if err != nil {
		return // no namespace was ever named here
	}
	for _, e := range entries {
		if leftover(e.Name(), func(pid int) bool { return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }) {
			_ = exec.Command("ip", "netns", "del", e.Name()).Run()
		}
	}
}

// leftover says whether a namespace is one of a bench that no longer lives.
func leftover(name string, alive func(pid int) bool) bool {
	parts := strings.Split(name, "-")
	if len(parts) != 5 || parts[0] != "slc" || !strings.HasPrefix(parts[4], "bench") {
		return false
	}
	pid, err := strconv.Atoi(parts[1])
	return err == nil && !alive(pid)
}
