package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a daemon in a namespace. It dies with the bench.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

// start runs a program in a namespace; what it says goes to a file in dir.
func start(ns, dir string, env []string, args ...string) (*process, error) {
	p := &process{log: filepath.Join(dir, filepath.Base(args[0])+"-"+ns+".log"), done: make(chan struct{})}
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("log of %s: %w", args[0], err)
	}
	defer out.Close()
	p.cmd = exec.Command("ip", append([]string{"netns", "exec", ns}, args...)...)
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", args[0], err)
	}
	go func() {
		_ = p.cmd.Wait() // its log says why
		close(p.done)
	}()
	return p, nil
}

// await waits until ready holds, and gives the log in the error if it never
// does.
func (p *process) await(ctx context.Context, ready func(log []byte) bool) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		text, err := os.ReadFile(p.log)
		if err != nil {
			return fmt.Errorf("read the daemon's log: %w", err)
		}
		if ready(text) {
			return nil
		}
		select {
		case <-tick.C:
		case <-p.done:
			return fmt.Errorf("the daemon ended: %s", tail(p.log))
		case <-ctx.Done():
			return fmt.Errorf("the daemon is not ready: %w: %s", ctx.Err(), tail(p.log))
		}
	}
}

// settle waits until the daemon uses no processor time for a while, and then
// cuts its log.
func (p *process) settle() error {
	const patience = 15 * time.Second
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	begun := time.Now()
	last, err := p.cpu()
	for quiet := 0; quiet < 2; {
		if err != nil {
			return err
		}
		if time.Since(begun) > patience {
			return fmt.Errorf("the daemon is still busy after %v: %s", patience, tail(p.log))
		}
		<-tick.C
		var now time.Duration
		if now, err = p.cpu(); now-last <= 10*time.Millisecond {
			quiet++
		} else {
			quiet = 0
		}
		last = now
	}
	return os.Truncate(p.log, 0)
}

// cpu is the processor time that the daemon and its children have used so far,
// in steps of 10 ms.
func (p *process) cpu() (sum time.Duration, err error) {
	pid := strconv.Itoa(p.cmd.Process.Pid)
	children, err := os.ReadFile(filepath.Join("/proc", pid, "task", pid, "children"))
	if err != nil {
		return 0, fmt.Errorf("the daemon has gone: %w: %s", err, tail(p.log))
	}
	for _, pid := range append(strings.Fields(string(children)), pid) {
		stat, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
		if err != nil {
			return 0, fmt.Errorf("the daemon has gone: %w: %s", err, tail(p.log))
		}
		used, err := cpuOf(stat)
		if err != nil {
			return 0, err
		}
		sum += used
	}
	return sum, nil
}

// cpuOf reads utime and stime, proc(5): fields 14 and 15, counted behind the
// name, which may hold anything.
func cpuOf(stat []byte) (time.Duration, error) {
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 13 {
		return 0, fmt.Errorf("read processor time: %d fields", len(fields))
	}
	user, err := strconv.Atoi(string(fields[11]))
	if err != nil {
		return 0, fmt.Errorf("read processor time: %w", err)
	}
	system, err := strconv.Atoi(string(fields[12]))
	if err != nil {
		return 0, fmt.Errorf("read processor time: %w", err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond, nil
}

func (p *process) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-p.done:
	case <-time.After(3 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

func tail(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-2000):])
}
