package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Gateway is a running gateway on gw.
type Gateway struct {
	*Process
	lab    *Lab
	config string
	socket string
}

// Record is one line of the gateway's log.
type Record map[string]any

// Text gives a field of a record as text; absent: empty.
func (r Record) Text(field string) string {
	s, _ := r[field].(string)
	return s
}

// Gateway starts the gateway with a configuration and waits until it says that
// it is ready. It is undone with the lab.
func (l *Lab) Gateway(c Config) *Gateway {
	l.T.Helper()
	g := l.StartGateway(l.Text(c))
	ctx, cancel := context.WithTimeout(context.Background(), Patience(15*time.Second))
	defer cancel()
	go func() { // one that dies is never ready
		select {
		case <-g.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	if err := g.Output.Await(ctx, func(string) bool { return len(g.Records("ready")) > 0 }); err != nil {
		l.T.Fatalf("the gateway is not ready: %v\n%s\nconfiguration:\n%s", err, g.Output, l.Text(c))
	}
	return g
}

// StartGateway starts the gateway with a whole configuration text and does not
// wait.
func (l *Lab) StartGateway(text string) *Gateway {
	l.T.Helper()
	path, err := Binary()
	if err != nil {
		l.T.Fatal(err)
	}
	g := &Gateway{lab: l, config: filepath.Join(l.dir, "gateway.yaml"), socket: filepath.Join(l.dir, "control")}
	l.File("gateway.yaml", text)
	p, err := l.GW.Start([]string{"SLUICE_PROBE_SOCKET=" + filepath.Join(l.dir, "probe")}, path, "run", "-c", g.config)
	if err != nil {
		l.T.Fatal(err)
	}
	g.Process = p
	l.mu.Lock()
	l.gateways = append(l.gateways, g)
	l.mu.Unlock()
	return g
}

// Records are the log's lines so far that have this message.
func (g *Gateway) Records(msg string) []Record {
	var found []Record
	for line := range bytes.Lines([]byte(g.Output.String())) {
		var r Record
		if json.Unmarshal(line, &r) == nil && r.Text("msg") == msg {
			found = append(found, r)
		}
	}
	return found
}

// AwaitRecord waits until a line with this message satisfies ok and gives it.
func (g *Gateway) AwaitRecord(msg string, d time.Duration, ok func(Record) bool) Record {
	g.lab.T.Helper()
	var found Record
	ctx, cancel := context.WithTimeout(context.Background(), Patience(d))
	defer cancel()
	err := g.Output.Await(ctx, func(string) bool {
		for _, r := range g.Records(msg) {
			if ok(r) {
				found = r
				return true
			}
		}
		return false
	})
	if err != nil {
		g.lab.T.Fatalf("no such %q record in the log within %v", msg, d)
	}
	return found
}

// Rewrite changes the configuration file and reloads; it gives what the reload
// command said, and its status.
func (g *Gateway) Rewrite(text string) (string, int) {
	g.lab.T.Helper()
	g.lab.File("gateway.yaml", text)
	return g.Command("reload")
}

// Reload changes the policy and fails the test if it is refused.
func (g *Gateway) Reload(c Config) {
	g.lab.T.Helper()
	if out, status := g.Rewrite(g.lab.Text(c)); status != 0 {
		g.lab.T.Fatalf("reload: status %d\n%s", status, out)
	}
}

// Command runs the gateway's command line against this gateway.
func (g *Gateway) Command(args ...string) (string, int) {
	g.lab.T.Helper()
	return g.lab.Command(append(args, "--socket", g.socket)...)
}

// Command runs the gateway's command line on gw.
func (l *Lab) Command(args ...string) (string, int) {
	l.T.Helper()
	path, err := Binary()
	if err != nil {
		l.T.Fatal(err)
	}
	out, status, err := l.GW.Try(20*time.Second, path, args...)
	if err != nil {
		l.T.Fatalf("gateway %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out, status
}

// JSON runs a command that lists things and decodes its --json answer.
func (g *Gateway) JSON(into any, args ...string) {
	g.lab.T.Helper()
	out, status := g.Command(append(args, "--json")...)
	if status != 0 {
		g.lab.T.Fatalf("gateway %s: status %d\n%s", strings.Join(args, " "), status, out)
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		g.lab.T.Fatalf("gateway %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// Freeze stops the daemon as SIGSTOP does, and waits until it stands.
func (g *Gateway) Freeze() {
	g.lab.T.Helper()
	if err := g.Signal(syscall.SIGSTOP); err != nil {
		g.lab.T.Fatalf("SIGSTOP: %v", err)
	}
	Eventually(g.lab.T, 5*time.Second, "the daemon stops", func() bool { return g.state() == "T" })
}

// Thaw lets it go on.
func (g *Gateway) Thaw() {
	g.lab.T.Helper()
	if err := g.Signal(syscall.SIGCONT); err != nil {
		g.lab.T.Fatalf("SIGCONT: %v", err)
	}
}

// awake is Thaw for a gateway in any state.
func (g *Gateway) awake() { _ = g.Signal(syscall.SIGCONT) }

func (g *Gateway) state() string {
	stat, err := os.ReadFile(filepath.Join("/proc", itoa(g.PID()), "stat"))
	if err != nil {
		return ""
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	return after[:1]
}

// Stop ends the daemon with SIGTERM and gives its exit status.
func (g *Gateway) Stop() int {
	g.lab.T.Helper()
	if err := g.Signal(syscall.SIGTERM); err != nil {
		g.lab.T.Fatalf("SIGTERM: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), Patience(15*time.Second))
	defer cancel()
	status, err := g.Wait(ctx)
	if err != nil {
		g.lab.T.Fatalf("the gateway does not stop: %v\n%s", err, g.Output)
	}
	return status
}

// Down runs `gateway down`, which undoes everything.
func (g *Gateway) Down() {
	g.lab.T.Helper()
	if out, status := g.lab.Command("down"); status != 0 {
		g.lab.T.Fatalf("gateway down: status %d\n%s", status, out)
	}
}

// Carries counts the sockets of the daemon that have a peer with this port: a
// flow that it carries has two.
func (g *Gateway) Carries(proto string, port int) int {
	g.lab.T.Helper()
	n := 0
	for _, s := range g.lab.GW.Sockets(proto) {
		if s.Peer.Port() == uint16(port) || s.Local.Port() == uint16(port) {
			n++
		}
	}
	return n
}
