package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/engine"
	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
)

// fakeGateway has one rule with an awkward name and refuses to reload.
type fakeGateway struct {
	mu       sync.Mutex
	switched bool
	hang     chan struct{} // Flows waits for it
}

const awkward = "a/../b ü %2f?"

func (g *fakeGateway) Rules() []Rule {
	g.mu.Lock()
	defer g.mu.Unlock()
	return []Rule{{Name: awkward, Action: "allow", From: []string{"lan"}, To: []string{"wan"}, Protocols: []string{"ftp"}, NoKernelMode: g.switched, Decided: "user space"}}
}

func (g *fakeGateway) SetNoKernelMode(_ context.Context, rule string, on bool) error {
	if rule != awkward {
		return fmt.Errorf("%w: %q", ErrNoRule, rule)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.switched = on
	return nil
}

func (g *fakeGateway) Flows(ctx context.Context) ([]Flow, error) {
	if g.hang != nil {
		select {
		case <-g.hang:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return []Flow{FlowOf(engine.FlowInfo{
		Tuple: flow.Tuple{Proto: flow.TCP, Src: netip.MustParseAddrPort("10.0.0.2:40000"), Dst: netip.MustParseAddrPort("203.0.113.10:21")},
		Path:  flow.User, Rule: "ftp", Start: time.Unix(1700000000, 0).UTC(),
	})}, nil
}

func (g *fakeGateway) Permissions() []Permission {
	return []Permission{PermissionOf(engine.PermissionInfo{
		Permission: nat.Permission{
			ID: 6, Direction: nat.Outbound, Proto: flow.TCP, Client: netip.MustParseAddrPort("10.0.0.2:0"),
			Target: netip.MustParseAddrPort("203.0.113.10:80"), Via: netip.MustParseAddrPort("10.0.0.1:61000"),
			Source: netip.MustParseAddrPort("203.0.113.2:0"), ToUser: true,
		},
		Path:  "asked",
		Owner: netip.MustParseAddr("10.0.0.2"), State: "used", Rule: "ftp", Protocol: "ftp", Session: 3, Flows: 1, Notify: true,
		Living: []flow.Tuple{{Proto: flow.TCP, Src: netip.MustParseAddrPort("10.0.0.2:40000"), Dst: netip.MustParseAddrPort("10.0.0.1:61000")}},
	}), PermissionOf(engine.PermissionInfo{
		Permission: nat.Permission{
			ID: 8, Direction: nat.Inbound, Proto: flow.UDP, External: netip.MustParseAddrPort("203.0.113.1:61002"), OneWay: true,
		},
		State: "waiting", Path: "kernel", Session: 3, AddressBased: true,
	}), PermissionOf(engine.PermissionInfo{
		Permission: nat.Permission{
			ID: 7, Direction: nat.Inbound, Proto: flow.TCP, Client: netip.MustParseAddrPort("10.0.0.2:5000"),
			External: netip.MustParseAddrPort("203.0.113.1:61000"), AnySource: true,
		},
		State: "armed", Path: "user", Rule: "ftp", Session: 3,
	})}
}

func (g *fakeGateway) Binds() []Bind {
	return []Bind{BindOf(engine.PermissionInfo{
		Permission: nat.Permission{
			ID: 7, Direction: nat.Inbound, Proto: flow.UDP, Client: netip.MustParseAddrPort("10.0.0.2:5000"), Leaves: "internet",
			External: netip.MustParseAddrPort("203.0.113.1:61000"), Multiple: true, Sources: []netip.Prefix{netip.MustParsePrefix("203.0.113.10/32")},
		},
		State: "armed", Path: "kernel", Rule: "maps", Protocol: "pcp", Session: 3, By: "pcp", User: "ann",
		Owner: netip.MustParseAddr("10.0.0.2"), Expires: time.Unix(1700000000, 0).UTC(),
	}), BindOf(engine.PermissionInfo{
		Permission: nat.Permission{
			ID: 8, Direction: nat.Local, Proto: flow.TCP, External: netip.MustParseAddrPort("203.0.113.1:61002"), AnySource: true,
		},
		State: "discarding", By: "socks", Socket: true,
	})}
}

func (g *fakeGateway) Sessions() []Session {
	return []Session{SessionOf(engine.SessionInfo{
		ID: 3, Client: netip.MustParseAddr("10.0.0.2"), User: "ann", Private: true, Since: time.Unix(1700000000, 0).UTC(),
		Flows: 2, Permissions: 1, Filters: []string{"ftp"},
	})}
}

func (g *fakeGateway) Disconnect(_ context.Context, id uint64) error {
	if id != 3 {
		return fmt.Errorf("%w: %d", ErrNoSession, id)
	}
	return nil
}

func (g *fakeGateway) Reload(context.Context) error {
	return errors.New("gateway.yaml:3: no such network")
}
func (g *fakeGateway) Counters() map[string]uint64 { return map[string]uint64{"tcp.flows": 1<<63 + 1} }
func (g *fakeGateway) socket(t *testing.T) string {
	return filepath.Join(t.TempDir(), "run", "control.sock")
}
func (g *fakeGateway) serve(t *testing.T) (string, func()) {
	t.Helper()
	path := g.socket(t)
	s, err := Listen(path, g, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(stop)
	return path, stop
}

func TestQuestionsAndAnswers(t *testing.T) {
	g := &fakeGateway{}
	path, _ := g.serve(t)
	ctx := context.Background()
	c := Dial(path)
	if err := c.SetNoKernelMode(ctx, awkward, true); err != nil {
		t.Error(err)
	}
	if r, err := c.Rules(ctx); err != nil || len(r) != 1 || r[0].Name != awkward || !r[0].NoKernelMode {
		t.Errorf("rules %+v, %v", r, err)
	}
	for _, name := range []string{"no-such-rule", "..", "", "a/b"} {
		if err := c.SetNoKernelMode(ctx, name, true); err == nil || err.Error() != fmt.Sprintf("no such rule: %q", name) {
			t.Errorf("unknown rule %q: %v", name, err)
		}
	}
	if err := c.Disconnect(ctx, 3); err != nil {
		t.Error(err)
	}
	if err := c.Disconnect(ctx, 4); err == nil || err.Error() != "no such session: 4" {
		t.Errorf("unknown session: %v", err)
	}
	if err := c.Reload(ctx); err == nil || err.Error() != "gateway.yaml:3: no such network" {
		t.Errorf("reload: %v", err)
	}
	if m, err := c.Counters(ctx); err != nil || m["tcp.flows"] != 1<<63+1 {
		t.Errorf("counters %v, %v", m, err)
	}
	var many sync.WaitGroup
	for range 50 {
		many.Go(func() {
			if f, err := Dial(path).Flows(ctx); err != nil || len(f) != 1 {
				t.Errorf("flows %v, %v", f, err)
			}
		})
	}
	many.Wait()
}

// TestShapes is what scripts that read the JSON rely on.
func TestShapes(t *testing.T) {
	g := &fakeGateway{}
	path, _ := g.serve(t)
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
	for url, want := range map[string]string{
		"/flows": `[{"path":"user","proto":"tcp","src":"10.0.0.2:40000","dst":"203.0.113.10:21","rule":"ftp","start":"2023-11-14T22:13:20Z"}]`,
		"/permissions": `[{"id":6,"state":"used","direction":"redirect","proto":"tcp","client":"10.0.0.2","target":"203.0.113.10:80","via":"10.0.0.1:61000","source":"203.0.113.2:0","multiple":false,"notify":true,"path":"asked","rule":"ftp","protocol":"ftp","session":3,"flows":1,"living":[{"src":"10.0.0.2:40000","dst":"10.0.0.1:61000"}]},` +
			`{"id":8,"state":"waiting","direction":"inbound","proto":"udp","client":"","external":"203.0.113.1:61002","multiple":false,"one_way":true,"address_based":true,"path":"kernel","rule":"","session":3,"flows":0},` +
			`{"id":7,"state":"armed","direction":"inbound","proto":"tcp","client":"10.0.0.2:5000","external":"203.0.113.1:61000","sources":["any"],"multiple":false,"path":"user","rule":"ftp","session":3,"flows":0}]`,
		"/binds": `[{"id":7,"state":"allowed","proto":"udp","external":"203.0.113.1:61000","client":"10.0.0.2:5000","by":"pcp","sources":["203.0.113.10/32"],"multiple":true,"same_source":true,"rule":"maps","protocol":"pcp","session":3,"owner":"10.0.0.2","user":"ann","flows":0,"expires":"2023-11-14T22:13:20Z"},` +
			`{"id":8,"state":"discarding","proto":"tcp","external":"203.0.113.1:61002","by":"socks","sources":["any"],"multiple":false,"socket":true,"flows":0}]`,
		"/sessions": `[{"id":3,"client":"10.0.0.2","user":"ann","kind":"private","since":"2023-11-14T22:13:20Z","flows":2,"permissions":1,"filters":["ftp"]}]`,
	} {
		resp, err := client.Get("http://gateway" + url)
		if err != nil {
			t.Fatal(err)
		}
		var got json.RawMessage
		if err := json.NewDecoder(resp.Body).Decode(&got); err != nil || string(got) != want {
			t.Errorf("%s: %s, %v", url, got, err)
		}
		_ = resp.Body.Close()
	}
	for body, want := range map[string]int{`{"rule":"x","on":true}`: 404, `{"rule":"x"}`: 400, `true`: 400, ``: 400, `{"rule":"` + strings.Repeat("x", 5000) + `","on":true}`: 400} {
		req, err := http.NewRequest("PUT", "http://gateway/no-kernel-mode", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%.30s: status %d, want %d", body, resp.StatusCode, want)
		}
	}
}

func TestTheSocketIsTheGatewaysAlone(t *testing.T) {
	g := &fakeGateway{}
	path, stop := g.serve(t)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket %v, %v", info, err)
	}
	if _, err := Listen(path, g, zap.NewNop()); err == nil || !strings.Contains(err.Error(), "another gateway") {
		t.Errorf("a second one: %v", err)
	}
	stop()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after the end: %v", err)
	}
	if _, err := Dial(path).Rules(context.Background()); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("nobody there: %v", err)
	}
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	_ = left.Close()
	if s, err := Listen(path, g, zap.NewNop()); err != nil {
		t.Errorf("a dead gateway's socket: %v", err)
	} else {
		_ = s.listener.Close()
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, g, zap.NewNop()); err == nil {
		t.Error("a file was taken for a socket")
	}
	if text, err := os.ReadFile(path); err != nil || string(text) != "precious" {
		t.Errorf("the file: %q, %v", text, err)
	}
}

func TestAGatewayThatDoesNotAnswer(t *testing.T) {
	g := &fakeGateway{hang: make(chan struct{})}
	path, stop := g.serve(t)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := Dial(path).Flows(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	asked := make(chan error, 1)
	go func() {
		_, err := Dial(path).Flows(context.Background())
		asked <- err
	}()
	stop() // does not wait for an answer that never comes
	if err := <-asked; err == nil {
		t.Error("an answer from a gateway that has ended")
	}
}
