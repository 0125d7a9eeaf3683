// Command bench measures what the gateway costs, as ratios between it and a
// baseline that does the same work: a bare nft masquerade ruleset for flows of
// the kernel; for those whose first packet is queued also a C program on
// libnetfilter_queue (accept/accept.c) and go-nfqueue's own callback API, which accept
// each packet with a mark and decide nothing; HAProxy in transparent TCP mode
// for flows of user space.
//
// Every gateway stands in a lane of its own, three network namespaces in a row:
//
//	client 10.0.0.2 ------ lan0 gw wan0 ------ srv 203.0.113.10
//	10.64.0.0/16    10.0.0.1 |  | 203.0.113.1    198.18.0.0/16
//
// The rounds of a pair follow each other at once and swap their order each
// time, so that a machine that is busy elsewhere disturbs both alike; what
// counts is the median of the rounds' own ratios.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

type options struct {
	gateway   string
	accept    string
	role      string
	rounds    int
	length    time.Duration
	only      string
	json      bool
	strict    bool
	selfCheck bool
	size      bool
	many      bool
}

func main() {
	var o options
	flag.StringVar(&o.gateway, "gateway", "", "the gateway's program, built with -tags probe")
	flag.StringVar(&o.accept, "accept", "", "the program made of accept/accept.c")
	flag.StringVar(&o.role, "role", "", "for the bench's own use")
	flag.IntVar(&o.rounds, "rounds", 7, "rounds of each case, at least 5")
	flag.DurationVar(&o.length, "length", time.Second, "length of one round of one lane")
	flag.StringVar(&o.only, "only", "", "only the cases whose name contains this")
	flag.BoolVar(&o.json, "json", false, "print JSON instead of a table")
	flag.BoolVar(&o.strict, "strict", false, "exit status 1 if an expectation is missed")
	flag.BoolVar(&o.selfCheck, "self-check", false, "measure the baselines against themselves: every ratio must be near 1")
	flag.BoolVar(&o.size, "size", false, "measure only what the daemon's memory and speed are when there is much")
	flag.BoolVar(&o.many, "many", false, "with -size: ten times as much, which takes a minute and 2 GiB of memory")
	asRelay := flag.Bool("relay", false, "for the bench's own use")
	flag.Parse()
	if *asRelay {
		fmt.Fprintln(os.Stderr, "bench: "+relay().Error())
		os.Exit(2)
	}
	if o.role != "" {
		if err := play(o.role); err != nil {
			fmt.Fprintln(os.Stderr, "bench: "+err.Error())
			os.Exit(2)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	// Who reads the output may leave early; that must not keep us from cleaning up.
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
	met, err := run(ctx, o)
	stop()
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench: "+err.Error())
		os.Exit(2)
	case !met && (o.strict || o.selfCheck):
		os.Exit(1)
	}
}

// run measures all cases and prints them. met says whether every expectation
// holds.
func run(ctx context.Context, o options) (met bool, err error) {
	switch {
	case flag.NArg() > 0:
		return false, fmt.Errorf("unknown argument %q", flag.Arg(0))
	case o.rounds < 5:
		return false, errors.New("a median wants at least 5 rounds")
	case o.length < 100*time.Millisecond || o.length > 5*time.Second:
		return false, errors.New("the length of a round is 100ms to 5s")
	case os.Geteuid() != 0:
		return false, errors.New("needs root, for network namespaces")
	case o.gateway == "" && !o.selfCheck:
		return false, errors.New("-gateway is missing: start it as scripts/bench")
	case o.accept == "" && !o.selfCheck && !o.size:
		return false, errors.New("-accept is missing: start it as scripts/bench")
	}
	if o.size {
		return sizes(ctx, o)
	}
	if err := raiseFileLimit(); err != nil {
		return false, err
	}
	preferUs()
	sweep()
	s, err := newStand(ctx, o)
	defer s.close()
	if err != nil {
		return false, err
	}
	report := newReport(o)
	for _, c := range s.cases(o.length) {
		if !strings.Contains(c.name, o.only) {
			continue
		}
		r, err := measure(ctx, c, o)
		if why := notHere(""); errors.As(err, &why) {
			fmt.Fprintln(os.Stderr, report.skip(c, why).brief())
			continue
		}
		if err != nil {
			return false, fmt.Errorf("%s: %w", c.name, err)
		}
		fmt.Fprintln(os.Stderr, report.add(c, r).brief())
	}
	return report.met(), report.print(os.Stdout, o.json)
}

// preferUs lets what else the machine does wait a little. Where the scheduler
// shares the processors between sessions, sched(7) "The autogroup feature",
// nice(1) counts within one only: so this is a session of its own, with a nice
// value of its own. Without the feature nothing is lost.
func preferUs() {
	_, _ = unix.Setsid() // fails if it is one already
	_ = os.WriteFile("/proc/self/autogroup", []byte("-10"), 0)
}

// raiseFileLimit is for the proxies, which inherit it: two sockets and a pipe
// for each connection.
func raiseFileLimit() error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	l.Cur = l.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("raise the limit of open files: %w", err)
	}
	return nil
}
