package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"github.com/sluicegw/sluice/config"
	"github.com/sluicegw/sluice/control"
)

// A console line says what the record says, in one line whatever a far end
// has sent.
func TestConsole(t *testing.T) {
	var out strings.Builder
	at := time.Date(2025, 1, 2, 3, 4, 5, 6e6, time.UTC)
	log := zap.New(&console{LevelEnabler: zapcore.InfoLevel, out: zapcore.AddSync(&out)},
		zap.WithClock(fixedClock(at))).Named("ftp").With(zap.String("flow", "tcp a > b"))
	log.With(zap.Int("other", 1)).Debug("not this")
	log.Warn("command refused", zap.String("command", "X\n03:04:05.006 INFO  forged"), zap.Duration("took", 1500*time.Millisecond),
		zap.Time("start", at), zap.Strings("changed", []string{"a/b", "c d"}), zap.Error(errors.New("no")), zap.Bool("on", true), zap.String("empty", ""))
	want := `03:04:05.006 WARN  ftp: command refused flow="tcp a > b" command="X\n03:04:05.006 INFO  forged" took=1.5s start=03:04:05.006 changed=a/b,"c d" error=no on=true empty=""` + "\n"
	if out.String() != want {
		t.Errorf("got  %swant %s", out.String(), want)
	}
}

type fixedClock time.Time

func (c fixedClock) Now() time.Time                       { return time.Time(c) }
func (fixedClock) NewTicker(d time.Duration) *time.Ticker { return time.NewTicker(d) }

// What is said of an error, and the exit status.
func TestComplaint(t *testing.T) {
	file := errors.Join(&config.Error{File: "a.yaml", Line: 3, Reason: "no"}, &config.Error{File: "a.yaml", Line: 5, Reason: "nor this"})
	for _, x := range []struct {
		err    error
		uid    int
		want   string
		status int
	}{
		{errors.New("no"), 0, "gateway: no", 1},
		{file, 0, "a.yaml:3: no\na.yaml:5: nor this", 1},
		{fmt.Errorf("reload: %w", file), 0, "gateway: reload: a.yaml:3: no\na.yaml:5: nor this", 1},
		{fmt.Errorf("list tables: %w", unix.EPERM), 0, "gateway: list tables: operation not permitted", 1},
		{fmt.Errorf("list tables: %w", unix.EPERM), 1000, "gateway: list tables: operation not permitted; root may do it", 1},
	} {
		if got, status := complaint(x.err, x.uid); got != x.want || status != x.status {
			t.Errorf("%v: %q, status %d", x.err, got, status)
		}
	}
}

// A wrong command line says how it is right, with a status of its own.
func TestUsage(t *testing.T) {
	for line, want := range map[string]string{
		"frobnicate":                       `gateway has no command "frobnicate"`,
		"flow":                             "did you mean flows?",
		"run x":                            `gateway run takes no argument, got "x"`,
		"rules set":                        "gateway rules set wants one NAME, got 0",
		"rules set r":                      "--no-kernel-mode=: want on or off",
		"rules set r --no-kernel-mode=aye": "--no-kernel-mode=aye: want on or off",
		"rules sett":                       `gateway rules has no command "sett"`,
		"check":                            "gateway check wants one FILE, got 0",
		"run --bogus":                      "unknown flag: --bogus",
	} {
		root := rootCommand()
		root.SetArgs(strings.Fields(line))
		text, status := complaint(root.ExecuteContext(t.Context()), 0)
		if status != statusUsage || !strings.Contains(text, want) || !strings.Contains(text, "usage: gateway") {
			t.Errorf("gateway %s: status %d\n%s", line, status, text)
		}
	}
}

// Every counter that a gateway has is explained.
func TestMeanings(t *testing.T) {
	source, err := os.ReadFile("counters.go")
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for _, part := range strings.Split(string(source), `"`) {
		part = strings.Replace(part, "%d", "4100", 1)
		room, name, ok := strings.Cut(part, ".")
		if !ok || strings.ContainsAny(part, " (\t\n/") || room == "" || name == "" {
			continue
		}
		named++
		if meaning(part) == "" {
			t.Errorf("%q is not explained", part)
		}
	}
	if named < len(meanings) {
		t.Errorf("%d counters, %d explanations", named, len(meanings))
	}
}

func TestEnds(t *testing.T) {
	for _, x := range []struct{ proto, src, dst, want string }{
		{"tcp", "10.0.0.2:5", "[2001:db8::1]:80", "10.0.0.2:5 > [2001:db8::1]:80"},
		{"icmp", "10.0.0.2:4945", "203.0.113.10:8", "10.0.0.2 id 4945 > 203.0.113.10 type 8"},
		{"icmpv6", "[fd00::2]:7", "[fd00::1]:128", "fd00::2 id 7 > fd00::1 type 128"},
		{"47", "10.0.0.2:0", "203.0.113.10:0", "10.0.0.2 > 203.0.113.10"},
	} {
		f := control.Flow{Proto: x.proto, Src: x.src, Dst: x.dst}
		if got := source(f) + " > " + destination(f); got != x.want {
			t.Errorf("%s: %s, want %s", x.proto, got, x.want)
		}
	}
}

// The connection is found behind sudo, but not across network namespaces.
func TestSSHConnection(t *testing.T) {
	proc := t.TempDir()
	process := func(pid, parent int, netns, environ string) {
		dir := filepath.Join(proc, fmt.Sprint(pid))
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, "ns"), 0o700), os.Symlink(netns, filepath.Join(dir, "ns/net")),
			os.WriteFile(filepath.Join(dir, "environ"), []byte(environ), 0o600),
			os.WriteFile(filepath.Join(dir, "status"), fmt.Appendf(nil, "Name:\tx\nPPid:\t%d\n", parent), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	process(1, 0, "net:[1]", "SSH_CONNECTION=of init\x00")
	process(10, 1, "net:[1]", "A=b\x00SSH_CONNECTION=198.51.100.7 5000 10.0.0.1 22\x00")
	process(11, 10, "net:[1]", "SUDO_USER=me\x00")
	process(12, 11, "net:[1]", "A=b\x00")
	process(13, 11, "net:[2]", "A=b\x00")
	process(14, 1, "net:[1]", "A=b\x00")
	for pid, want := range map[int]string{10: "198.51.100.7 5000 10.0.0.1 22", 12: "198.51.100.7 5000 10.0.0.1 22", 13: "", 14: "", 99: ""} {
		if got := sshConnection(proc, pid); got != want {
			t.Errorf("%d: %q", pid, got)
		}
	}
}
