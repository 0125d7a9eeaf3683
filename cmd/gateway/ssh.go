package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// sshConnection is the SSH_CONNECTION (sshd(8)) that this process was started
// over: its own, or that of the process it descends from, because sudo and su
// take it out of the environment. Processes of other network namespaces do not
// count: their connection is not this gateway's. proc is /proc.
func sshConnection(proc string, pid int) string {
	netns := func(pid int) string {
		s, err := os.Readlink(filepath.Join(proc, strconv.Itoa(pid), "ns/net"))
		if err != nil {
			return ""
		}
		return s
	}
	own := netns(pid)
	for p := pid; p > 1 && own != "" && netns(p) == own; p = parent(proc, p) {
		env, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(p), "environ"))
		if err != nil {
			return "" // it has gone
		}
		for _, v := range bytes.Split(env, []byte{0}) {
			if s, ok := strings.CutPrefix(string(v), "SSH_CONNECTION="); ok {
				return s
			}
		}
	}
	return ""
}

// parent reads PPid from proc(5)'s status; 0: there is none.
func parent(proc string, pid int) int {
	status, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "status"))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if s, ok := strings.CutPrefix(line, "PPid:"); ok {
			n, err := strconv.Atoi(strings.TrimSpace(s))
			if err != nil {
				return 0
			}
			return n
		}
	}
	return 0
}
