package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
)

// Names of namespaces are slc-PID-TIME-NUMBER-HOST: they tell who made them and
// when, so that the leftovers of a killed run can be told from a living one.
const (
	prefix    = "slc"
	namedDir  = "/run/netns"
	staleness = time.Hour
)

var (
	counter atomic.Uint64
	living  = struct {
		sync.Mutex
		labs map[*Lab]struct{}
	}{labs: map[*Lab]struct{}{}}
)

func newName() string {
	return fmt.Sprintf("%s-%d-%d-%d", prefix, os.Getpid(), time.Now().Unix(), counter.Add(1))
}

func register(l *Lab) {
	living.Lock()
	defer living.Unlock()
	living.labs[l] = struct{}{}
}

func unregister(l *Lab) {
	living.Lock()
	defer living.Unlock()
	delete(living.labs, l)
}

// destroyAll is for a run that is being interrupted: no test code runs any more.
func destroyAll() {
	living.Lock()
	defer living.Unlock()
	for l := range living.labs {
		l.destroy()
	}
}

// Sweep removes the namespaces that processes which are dead left more than an
// hour ago.
func Sweep(now time.Time) {
	entries, err := os.ReadDir(namedDir)
	if err != nil {
		return // no namespace was ever named here
	}
	for _, e := range entries {
		if stale(e.Name(), now, alive) {
			killInside(filepath.Join(namedDir, e.Name()))
			_ = netns.DeleteNamed(e.Name())
		}
	}
}

func stale(name string, now time.Time, alive func(pid int) bool) bool {
	parts := strings.Split(name, "-")
	if len(parts) != 5 || parts[0] != prefix {
		return false
	}
	pid, err1 := strconv.Atoi(parts[1])
	made, err2 := strconv.ParseInt(parts[2], 10, 64)
	if err1 != nil || err2 != nil {
		return false
	}
	return now.Sub(time.Unix(made, 0)) > staleness && !alive(pid)
}

func alive(pid int) bool {
	return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH)
}

// killInside ends every process that lives in a namespace of a lab: servers
// fork, and their children may have left the process group.
func killInside(path string) {
	var ns, ours syscall.Stat_t
	if syscall.Stat(path, &ns) != nil || syscall.Stat("/proc/self/ns/net", &ours) != nil || ns.Ino == ours.Ino {
		return
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return
	}
	for _, p := range procs {
		var in syscall.Stat_t
		pid, err := strconv.Atoi(filepath.Base(p))
		if err == nil && pid != os.Getpid() && syscall.Stat(p+"/ns/net", &in) == nil && in.Ino == ns.Ino && in.Dev == ns.Dev {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}
