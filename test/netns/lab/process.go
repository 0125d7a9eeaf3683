package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Process is a program that runs on a host. It dies with the test process.
type Process struct {
	Name   string
	Output *Log // standard output and error together
	cmd    *exec.Cmd
	done   chan struct{}
	err    error
}

// Log collects what a program says and wakes those who wait for a word of it.
// Safe for concurrent use.
type Log struct {
	mu      sync.Mutex
	text    bytes.Buffer
	changed chan struct{}
}

func newLog() *Log { return &Log{changed: make(chan struct{})} }

// Write never fails.
func (l *Log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(b)
	close(l.changed)
	l.changed = make(chan struct{})
	return len(b), nil
}

func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// Await waits until what was said satisfies ok.
func (l *Log) Await(ctx context.Context, ok func(text string) bool) error {
	for {
		l.mu.Lock()
		text, changed := l.text.String(), l.changed
		l.mu.Unlock()
		if ok(text) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Start starts a program on this host; it is killed with the lab.
func (h *Host) Start(env []string, name string, args ...string) (*Process, error) {
	p := &Process{Name: filepath.Base(name), Output: newLog(), done: make(chan struct{})}
	p.cmd = exec.Command(name, args...)
	p.cmd.Dir = h.lab.dir
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = p.Output, p.Output
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	p.cmd.WaitDelay = 2 * time.Second // a grandchild may keep the pipe
	if err := h.Do(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("%s: start %s: %w", h.Name, name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	h.lab.mu.Lock()
	h.lab.processes = append(h.lab.processes, p)
	h.lab.mu.Unlock()
	return p, nil
}

// Wait waits for the end and gives the exit status; -1: a signal ended it.
func (p *Process) Wait(ctx context.Context) (int, error) {
	select {
	case <-p.done:
	case <-ctx.Done():
		return -1, fmt.Errorf("%s still runs: %w", p.Name, ctx.Err())
	}
	var exit *exec.ExitError
	if p.err != nil && !errors.As(p.err, &exit) && !errors.Is(p.err, exec.ErrWaitDelay) {
		return -1, fmt.Errorf("%s: %w", p.Name, p.err)
	}
	return p.cmd.ProcessState.ExitCode(), nil
}

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// PID of the program.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Signal sends a signal to the program alone.
func (p *Process) Signal(s syscall.Signal) error { return p.cmd.Process.Signal(s) }

// Kill ends the program and its group at once and waits for it.
func (p *Process) Kill() {
	select {
	case <-p.done:
	default:
		_ = syscall.Kill(-p.PID(), syscall.SIGKILL)
		<-p.done
	}
}

// RSS is the resident memory of the program in bytes.
func (p *Process) RSS() (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		return 0, fmt.Errorf("memory of %s: %w", p.Name, err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			return kb * 1024, err
		}
	}
	return 0, fmt.Errorf("memory of %s: no VmRSS", p.Name)
}

// Try runs a program on this host to its end, within d. A status other than
// zero is not an error.
func (h *Host) Try(d time.Duration, name string, args ...string) (output string, status int, err error) {
	p, err := h.Start(nil, name, args...)
	if err != nil {
		return "", -1, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), Patience(d))
	defer cancel()
	status, err = p.Wait(ctx)
	if err != nil {
		p.Kill()
	}
	return p.Output.String(), status, err
}

// Run runs a program on this host to its end, within ten seconds, and fails the
// test unless it succeeds.
func (h *Host) Run(name string, args ...string) string {
	h.lab.T.Helper()
	out, status, err := h.Try(10*time.Second, name, args...)
	if err != nil || status != 0 {
		h.lab.T.Fatalf("%s: %s %s: status %d, %v\n%s", h.Name, name, strings.Join(args, " "), status, err, out)
	}
	return out
}
