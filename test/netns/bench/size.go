package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// sizeRow is what one thing costs the daemon when there are many.
type sizeRow struct {
	what   string
	figure float64
	unit   string
	most   float64 // what it may be; 0: for information
}

// sizes measures what the daemon's memory and its speed are when much is going
// on: in a table of its own, because it has no baseline. many: ten times as
// much of everything.
func sizes(ctx context.Context, o options) (met bool, err error) {
	connections, flows := 5000, 100_000
	if o.many {
		connections, flows = 50_000, 1_000_000
	}
	files, err := allowFiles(2*connections + sparedFiles)
	if err != nil {
		return false, err
	}
	connections = min(connections, (files-sparedFiles)/2)
	preferUs()
	sweep()
	s, err := newStand(ctx, o)
	defer s.close()
	if err != nil {
		return false, err
	}
	for _, l := range []*lane{s.bare, s.sluice} {
		if err := l.up(); err != nil {
			return false, err
		}
	}
	var rows []sizeRow
	for _, part := range []struct {
		name    string
		measure func() ([]sizeRow, error)
	}{
		{"idle connections", func() ([]sizeRow, error) { return idleConnections(s.sluice, connections) }},
		{"held connections", func() ([]sizeRow, error) { return s.heldConnections(ctx, o, connections) }},
		{"permissions", func() ([]sizeRow, error) { return s.heldPermissions(ctx, o) }},
		{"rules", func() ([]sizeRow, error) { return growingRules(ctx, s, o) }},
		{"flows of the kernel", func() ([]sizeRow, error) { return kernelFlows(s.bare, s.sluice, flows) }},
	} {
		if !strings.Contains(part.name, o.only) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return false, fmt.Errorf("interrupted: %w", err)
		}
		more, err := part.measure()
		if err != nil {
			return false, fmt.Errorf("%s: %w; the daemon's last words: %s", part.name, err, tail(s.sluice.daemon.log))
		}
		rows = append(rows, more...)
	}
	return printSizes(os.Stdout, rows), nil
}

// printSizes prints Markdown and says whether every row is met.
func printSizes(w io.Writer, rows []sizeRow) bool {
	met := true
	fmt.Fprint(w, "| when there is much | | expected |\n|---|---|---|\n")
	for _, r := range rows {
		expect := "-"
		if r.most != 0 {
			ok := r.figure <= r.most
			met = met && ok
			expect = fmt.Sprintf("<= %s, %s", figure(r.most), verdict(ok))
		}
		fmt.Fprintf(w, "| %s | %s %s | %s |\n", r.what, figure(r.figure), r.unit, expect)
	}
	return met
}

// sparedFiles are for what is no connection; a connection has two, in the bench
// as in the daemon.
const sparedFiles = 1500

// allowFiles asks for n open files for the bench and for the daemon, which
// inherits the limit, and says how many they may have.
func allowFiles(n int) (int, error) {
	l := unix.Rlimit{Cur: uint64(n), Max: uint64(n)}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &l) == nil {
		return n, nil
	}
	// A container may have root without CAP_SYS_RESOURCE.
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 0, fmt.Errorf("read the limit of open files: %w", err)
	}
	l.Cur = l.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 0, fmt.Errorf("raise the limit of open files: %w", err)
	}
	return int(l.Max), nil
}

// memory is what the daemon has of the machine's memory, in bytes: VmRSS of
// proc_pid_status(5).
func (p *process) memory() (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, fmt.Errorf("the daemon has gone: %w", err)
	}
	return memoryOf(string(text))
}

func memoryOf(status string) (float64, error) {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")))
			if err != nil {
				return 0, fmt.Errorf("read the daemon's memory: %w", err)
			}
			return float64(kib) * 1024, nil
		}
	}
	return 0, errors.New("the daemon's status says nothing of its memory")
}

// idleConnections has n connections carried in user space, which say nothing.
// The memory comes first: what a load leaves of the daemon's heap would hide
// it.
func idleConnections(l *lane, n int) ([]sizeRow, error) {
	before, err := l.daemon.memory()
	if err != nil {
		return nil, err
	}
	release, err := l.hold(carried, idle, n)
	defer func() { release() }()
	if err != nil {
		return nil, err
	}
	if err := l.daemon.settle(); err != nil {
		return nil, err
	}
	after, err := l.daemon.memory()
	if err != nil {
		return nil, err
	}
	memory := sizeRow{fmt.Sprintf("memory of the daemon for each of %d idle connections in user space", n), (after - before) / float64(n) / 1024, "KiB", 20}
	fmt.Fprintf(os.Stderr, "%s: %s %s\n", memory.what, figure(memory.figure), memory.unit)
	var with, without amount
	if with, err = connect(l, carried, greet, 2*time.Second); err != nil {
		return nil, err
	}
	release()
	release = func() {}
	if err := l.forget(); err != nil {
		return nil, err
	}
	if without, err = connect(l, carried, greet, 2*time.Second); err != nil {
		return nil, err
	}
	return []sizeRow{
		memory,
		{"new connections a second in user space, beside none", without.rate() * each, "1000/s", 0},
		{fmt.Sprintf("the same beside those %d: times slower", n), without.rate() / with.rate(), "", 0},
	}, nil
}

// kernelFlows makes n flows that the kernel decides and carries, in the bare
// lane and in that of the gateway.
func kernelFlows(bare, l *lane, n int) ([]sizeRow, error) {
	restore, err := roomForFlows(n)
	defer restore()
	if err != nil {
		return nil, err
	}
	than, err := growth(bare, n)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(bare.forget(), l.forget()); err != nil {
		return nil, err
	}
	before, err := l.daemon.memory()
	if err != nil {
		return nil, err
	}
	cpu, err := l.cpu()
	if err != nil {
		return nil, err
	}
	of, err := growth(l, n)
	if err != nil {
		return nil, err
	}
	after, err := l.daemon.memory()
	if err != nil {
		return nil, err
	}
	used, err := l.cpu()
	if err != nil {
		return nil, err
	}
	rows := []sizeRow{
		{fmt.Sprintf("memory of the daemon for each of %d flows of the kernel", n), math.Max(0, after-before) / float64(n), "B", 1},
		{"its processor time for each", float64((used - cpu).Microseconds()) / float64(n), "µs", 0.1},
	}
	for i, share := range shares {
		rows = append(rows, sizeRow{fmt.Sprintf("new flows a second in the kernel, beside %d; the bare ruleset: %s", n/share, figure(than[i]*each)),
			of[i] * each, "1000/s", 0})
	}
	return rows, nil
}

// shares of all flows beside which the making of new ones is timed.
var shares = []int{100, 10, 1}

// growth makes n flows and gives the rates at which new ones came on the way.
func growth(l *lane, n int) (rates []float64, err error) {
	// The flows have one datagram each and shall all live at the end.
	if err := command("ip", "netns", "exec", l.gw, "sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=600"); err != nil {
		return nil, err
	}
	made := 0
	for _, share := range shares {
		timed := min(n/share/5, 20_000)
		if _, err := datagrams(l, decided, n/share-made-timed, smallPacket, time.Minute, newFlows); err != nil {
			return nil, err
		}
		a, err := datagrams(l, decided, timed, smallPacket, time.Minute, newFlows)
		if err != nil {
			return nil, err
		}
		made = n / share
		rates = append(rates, a.rate())
	}
	return rates, nil
}

// roomForFlows lets the machine have n flows beside those that it has, for a
// while, and undoes that: the bound of the first namespace is that of all.
func roomForFlows(n int) (restore func(), err error) {
	const bound = "/proc/sys/net/netfilter/nf_conntrack_max"
	restore = func() {}
	text, err := os.ReadFile(bound)
	if err != nil {
		return restore, fmt.Errorf("read the bound of flows: %w", err)
	}
	old, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return restore, fmt.Errorf("read the bound of flows: %w", err)
	}
	if want := n + n/4 + 100_000; want > old {
		if err := os.WriteFile(bound, []byte(strconv.Itoa(want)), 0); err != nil {
			return restore, fmt.Errorf("raise the bound of flows: %w", err)
		}
		restore = func() {
			if err := os.WriteFile(bound, text, 0); err != nil {
				fmt.Fprintf(os.Stderr, "bench: put %s back to %d: %v\n", bound, old, err)
			}
		}
	}
	return restore, nil
}
