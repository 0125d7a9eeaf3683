package lab

import (
	"os"
	"path/filepath"
	"strings"
	"time"
)

// keep saves what explains a failure and says where. It never fails the test
// and works with whatever part of the lab is there.
func (l *Lab) keep() {
	base := os.Getenv(envArtifacts)
	if base == "" {
		base = filepath.Join(os.TempDir(), "sluice-failed")
	}
	dir := filepath.Join(base, strings.NewReplacer("/", "-", " ", "_").Replace(l.T.Name())+"-"+l.name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		l.T.Logf("nothing kept: %v", err)
		return
	}
	save := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			l.T.Logf("not kept: %v", err)
		}
	}
	if l.GW != nil {
		for name, command := range map[string][]string{
			"ruleset.nft": {"nft", "-a", "list", "ruleset"}, "conntrack.txt": {"sh", "-c", "conntrack -L -o extended 2>/dev/null"}, "sockets.txt": {"ss", "-nap"},
			"rules.txt": {"ip", "rule"}, "queues.txt": {"cat", "/proc/self/net/netfilter/nfnetlink_queue"},
			"stats.txt": {"conntrack", "-S"},
		} {
			out, _, err := l.GW.Try(5*time.Second, command[0], command[1:]...)
			if err != nil {
				out += "\n" + err.Error()
			}
			save(name, out)
		}
	}
	l.mu.Lock()
	processes, captures := l.processes, l.captures
	l.mu.Unlock()
	for _, p := range processes {
		if long(p) {
			save(p.Name+"-"+itoa(p.PID())+".log", p.Output.String())
		}
	}
	for _, c := range captures {
		if err := c.write(filepath.Join(dir, c.host.Name+"-"+c.iface+".pcap")); err != nil {
			l.T.Logf("not kept: %v", err)
		}
	}
	if text, err := os.ReadFile(filepath.Join(l.dir, "gateway.yaml")); err == nil {
		save("gateway.yaml", string(text))
	}
	for _, g := range l.gateways {
		l.T.Logf("the end of the gateway's log:\n%s", tail(g.Output.String(), 25))
	}
	l.T.Logf("kept in %s", dir)
}

// long leaves out the tools that only asked something and were answered.
func long(p *Process) bool {
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode() != 0
	default:
		return true
	}
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
