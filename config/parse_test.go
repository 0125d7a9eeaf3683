package config

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/nat"
	"github.com/sluicegw/sluice/policy"
)

type ftpOptions struct {
	ReadOnly bool     `yaml:"read_only"`
	Banner   string   `yaml:"banner"`
	Deny     []string `yaml:"deny"`
}

var errBanner = errors.New("the banner is too long")

// known are the filters of these tests: one with options, one without.
var known = OptionParsers{
	"ftp": func(decode func(any) error) (any, error) {
		o := ftpOptions{ReadOnly: true}
		if err := decode(&o); err != nil {
			return nil, err
		}
		if len(o.Banner) > 3 {
			return nil, errBanner
		}
		return o, nil
	},
	"tap": nil,
}

const good = `
log: {level: debug, format: json}
rules:
- name: files and more
  action: allow
  from: internal
  to: [external, dmz]
  protocols: [my-ftp, ftp, telnet]
  filters:
    tap:
    ftp: {read_only: false, deny: [DELE]}
  no_kernel_mode: true
- {name: no, action: deny, from: any, to: any, protocols: any, refuse: reject, log: false, fail: closed}
- {name: "quoted #1", action: allow, from: any, to: gateway, protocols: [ssh, odd], fail: closed}
networks:
  internal: {interfaces: [lan0, lan1.7], prefixes: [10.0.0.0/24, "fd00:a::/64"]}
  external: {interfaces: wan0}
  dmz:
    prefixes:
    - 192.0.2.7
    - 2001:db8::/32
network_rules:
- {name: internet, from: internal, to: external, relation: nat, address: 203.0.113.1}
- {name: dmz, from: internal, to: dmz, relation: route}
protocols:
  my-ftp: {tcp: [2121, 3000-3010], udp: 69, filter: ftp}
  odd: {icmp: [8, 13-14], icmpv6: 128, ip: [47, 132], udp: 9999, timeout: 45}
  telnet: {tcp: 2323, filter: tap}
reverse_path: loose
queue: {form: xt, first: 10, number: 4, length: 1024, answer_ms: 900, fail: open}
marks: {mask: 0x000f0000, table: 7, priority: 8, zone: 9, log_group: 11}
ports: {kernel: 20000-29999, leases: [40000-50000, 51000], well_known: 700-800, quota: 640, quarantine: 30, block: 64, sessions: 99}
flowtable: off
udp: {peer_idle: 30, socket_idle: 90}
users: {alice: "` + aliceHash + `"}
socks: {networks: internal, port: 1081, authentication: password, approve_binds: true, resolvers: 192.0.2.53, connections: 5, handshake_timeout: 6, connect_timeout: 7, bind_timeout: 8}
timeouts: {udp: 100, icmp: 20, tcp_established: 7440, tcp_transitory: 200}
control: {socket: /tmp/x.sock}
`

// aliceHash is one of "secret".
const aliceHash = "$2a$08$9K93h5egfkBtaInYSb5YRuPuZHW63L6QnAZh83f4GbYjwNKlL1Vcy"

func TestParseGood(t *testing.T) {
	c, err := Parse("good.yaml", []byte(good), known)
	if err != nil {
		t.Fatal(err)
	}
	p := c.Policy
	c.Policy = nil
	bits, err := flow.NewMarks(0x000f0000)
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		ReversePath: ReversePathLoose,
		Queue:       Queue{QueueXT, 10, 4, 1024, 900, true},
		Marks:       Marks{bits, 7, 8, 9, 11},
		Ports: Ports{
			Ranges: nat.Ranges{Kernel: nat.Range{Lo: 20000, Hi: 29999}, Leases: []nat.Range{{Lo: 40000, Hi: 50000}, {Lo: 51000, Hi: 51000}}, WellKnown: nat.Range{Lo: 700, Hi: 800}},
			Quota:  640, Quarantine: 30, Block: 64, Sessions: 99,
		},
		UDP:      UDP{30, 90},
		Timeouts: Timeouts{100, 20, 7440, 200},
		PCP:      defaultPCP(),
		Users:    map[string]string{"alice": aliceHash},
		Socks: Socks{
			Networks: []string{"internal"}, Port: 1081, Password: true, Approve: true, Resolvers: []netip.Addr{netip.MustParseAddr("192.0.2.53")},
			PerClient: 5, HandshakeTimeout: 6, ConnectTimeout: 7, BindTimeout: 8,
		},
		Log:     Log{"debug", "json"},
		Control: Control{"/tmp/x.sock"},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
	if a, b := c.Queue.FirstOpen(), c.Queue.FirstHolding(); a != 14 || b != 18 {
		t.Errorf("queues from %d and %d", a, b)
	}
	internal := policy.Network{Name: "internal", Interfaces: []string{"lan0", "lan1.7"}, Prefixes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd00:a::/64")}}
	dmz := policy.Network{Name: "dmz", Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.7/32"), netip.MustParsePrefix("2001:db8::/32")}}
	if n := p.Networks(); !reflect.DeepEqual(n, []policy.Network{internal, {Name: "external", Interfaces: []string{"wan0"}}, dmz}) {
		t.Errorf("networks %+v", n)
	}
	joins := []policy.NetworkRule{
		{Name: "internet", From: "internal", To: "external", Relation: policy.NAT, Address: netip.MustParseAddr("203.0.113.1")},
		{Name: "dmz", From: "internal", To: "dmz", Relation: policy.Route},
	}
	if n := p.NetworkRules(); !reflect.DeepEqual(n, joins) {
		t.Errorf("network rules %+v", n)
	}
	rules := []policy.Rule{
		{Name: "files and more", Action: policy.Allow, From: []string{"internal"}, To: []string{"external", "dmz"}, Protocols: []string{"my-ftp", "ftp", "telnet"},
			Filters: []policy.FilterUse{{Name: "tap"}, {Name: "ftp", Options: ftpOptions{Deny: []string{"DELE"}}}}, NoKernelMode: true, FailOpen: true, Line: 4},
		{Name: "no", From: []string{"any"}, To: []string{"any"}, Protocols: []string{"any"}, Refusal: policy.RefuseReject, NoLog: true, Line: 13},
		{Name: "quoted #1", Action: policy.Allow, From: []string{"any"}, To: []string{"gateway"}, Protocols: []string{"ssh", "odd"}, Line: 14},
	}
	if r := p.Rules(); !reflect.DeepEqual(r, rules) {
		t.Errorf("rules\n got %+v\nwant %+v", r, rules)
	}
	all := policy.PortRange{Lo: 0, Hi: 65535}
	protocols := []policy.Protocol{
		{Name: "my-ftp", Filter: "ftp", Matches: []policy.Match{{Proto: flow.TCP, Ports: policy.PortRange{Lo: 2121, Hi: 2121}}, {Proto: flow.TCP, Ports: policy.PortRange{Lo: 3000, Hi: 3010}}, {Proto: flow.UDP, Ports: policy.PortRange{Lo: 69, Hi: 69}}}},
		{Name: "odd", Matches: []policy.Match{{Proto: flow.ICMP, Ports: policy.PortRange{Lo: 8, Hi: 8}}, {Proto: flow.ICMP, Ports: policy.PortRange{Lo: 13, Hi: 14}}, {Proto: flow.ICMPv6, Ports: policy.PortRange{Lo: 128, Hi: 128}}, {Proto: 47, Ports: all}, {Proto: 132, Ports: all}, {Proto: flow.UDP, Ports: policy.PortRange{Lo: 9999, Hi: 9999}}}, Timeout: 45},
		{Name: "telnet", Filter: "tap", Matches: []policy.Match{{Proto: flow.TCP, Ports: policy.PortRange{Lo: 2323, Hi: 2323}}}},
	}
	if d := p.Protocols(); !reflect.DeepEqual(d[:3], protocols) || len(d) != 2+len(policy.Builtin()) {
		t.Errorf("%d protocols, first %+v", len(d), d[:3])
	}
}

func TestParseNothing(t *testing.T) {
	for _, text := range []string{"", "\n", "# only a comment\n", "---\n", "---\n...\n", "rules:\nnetworks:\nqueue:\nprotocols: {}\n", "rules: []"} {
		c, err := Parse("empty.yaml", []byte(text), nil)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if len(c.Policy.Rules()) != 0 || len(c.Policy.Protocols()) != len(policy.Builtin()) {
			t.Errorf("%q: %+v", text, c.Policy)
		}
		c.Policy = nil
		if !reflect.DeepEqual(c, Default()) {
			t.Errorf("%q: %+v", text, c)
		}
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sluice.yaml")
	if _, err := Load(path, known); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(path, []byte("\nquue: {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var e *Error
	if _, err := Load(path, known); !errors.As(err, &e) || e.File != path || e.Line != 2 {
		t.Errorf("a bad file: %v", err)
	}
}

// The manual's example is a good file, and the manual names every key, every
// default that is a number or a word, and every built-in protocol.
func TestManual(t *testing.T) {
	raw, err := os.ReadFile("../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	manual := string(raw)
	_, rest, found := strings.Cut(manual, "```yaml\n")
	example, _, closed := strings.Cut(rest, "```")
	if !found || !closed {
		t.Fatal("there is no example")
	}
	c, err := Parse("configuration.md", []byte(example), known)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Policy.Rules()) != 5 {
		t.Errorf("%d rules", len(c.Policy.Rules()))
	}
	for _, d := range policy.Builtin() {
		if !strings.Contains(manual, "`"+d.Name+"`") {
			t.Errorf("the protocol %s is not there", d.Name)
		}
	}
	d := Default()
	for _, row := range []struct {
		section, key string
		value        any
	}{
		{"queue", "form", d.Queue.Form}, {"queue", "first", d.Queue.First}, {"queue", "number", d.Queue.Number}, {"queue", "length", d.Queue.Length}, {"queue", "answer_ms", d.Queue.AnswerMS}, {"queue", "fail", "closed"},
		{"marks", "mask", fmt.Sprintf("0x%08x", d.Marks.Bits.Mask())}, {"marks", "table", d.Marks.Table}, {"marks", "priority", d.Marks.Priority}, {"marks", "zone", d.Marks.Zone}, {"marks", "log_group", d.Marks.LogGroup},
		{"ports", "kernel", d.Ports.Kernel}, {"ports", "leases", strings.ReplaceAll(fmt.Sprint(d.Ports.Leases), " ", ", ")}, {"ports", "well_known", d.Ports.WellKnown},
		{"ports", "quota", d.Ports.Quota}, {"ports", "quarantine", d.Ports.Quarantine}, {"ports", "block", "off"}, {"ports", "sessions", "off"},
		{"timeouts", "udp", d.Timeouts.UDP}, {"timeouts", "icmp", d.Timeouts.ICMP}, {"timeouts", "tcp_established", d.Timeouts.TCPEstablished}, {"timeouts", "tcp_transitory", d.Timeouts.TCPTransitory},
		{"protocols", "timeout", "timeouts.udp"}, {"udp", "peer_idle", d.UDP.PeerIdle}, {"udp", "socket_idle", d.UDP.SocketIdle},
		{"log", "level", d.Log.Level}, {"log", "format", d.Log.Format}, {"control", "socket", d.Control.Socket},
		{"rules", "no_kernel_mode", false}, {"rules", "fail", "queue.fail"}, {"rules", "refuse", "auto"}, {"rules", "log", true},
		{"rules", "filters", nil}, {"rules", "name", nil}, {"rules", "action", nil}, {"rules", "from", nil}, {"rules", "to", nil}, {"rules", "protocols", nil},
		{"networks", "interfaces", nil}, {"networks", "prefixes", nil}, {"network_rules", "name", nil}, {"network_rules", "from", nil}, {"network_rules", "relation", nil}, {"network_rules", "address", nil},
		{"network_rules", "mapping", "address-and-port-dependent"}, {"network_rules", "filtering", "address-and-port-dependent"}, {"network_rules", "refresh_inbound", true}, {"network_rules", "mss", nil},
		{"protocols", "tcp", nil}, {"protocols", "udp", nil}, {"protocols", "icmp", nil}, {"protocols", "icmpv6", nil}, {"protocols", "ip", nil}, {"protocols", "filter", nil},
	} {
		_, page, _ := strings.Cut(manual, "\n## "+row.section+"\n")
		page, _, _ = strings.Cut(page, "\n## ")
		lines := strings.Split(page, "\n")
		i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "| `"+row.key+"`") })
		if i < 0 {
			t.Errorf("%s.%s has no line", row.section, row.key)
		} else if want := fmt.Sprintf("| `%v` |", row.value); row.value != nil && !strings.HasSuffix(lines[i], want) {
			t.Errorf("%s.%s: want the default %v in %q", row.section, row.key, row.value, lines[i])
		}
	}
	for section, want := range map[string]string{"reverse_path": "Default: `strict`", "flowtable": "Default: `auto`"} {
		_, page, _ := strings.Cut(manual, "\n## "+section+"\n")
		page, _, _ = strings.Cut(page, "\n## ")
		if !strings.Contains(page, want) {
			t.Errorf("%s does not say %q", section, want)
		}
	}
	if d.ReversePath != ReversePathStrict || !d.Flowtable {
		t.Error("other defaults than the manual says")
	}
}

// tenThousand is a file with as many networks, protocols and rules.
func tenThousand() []byte { return large(10_000) }

func large(n int) []byte {
	var b strings.Builder
	b.WriteString("network_rules:\n- {name: j, from: lan, to: wan, relation: nat}\nnetworks:\n  lan: {interfaces: [lan0]}\n  wan: {interfaces: [wan0]}\n")
	for i := range n {
		fmt.Fprintf(&b, "  host%d: {prefixes: [10.1.%d.%d]}\n", i, i/250, i%250)
	}
	b.WriteString("protocols:\n")
	for i := range n {
		fmt.Fprintf(&b, "  service%d: {tcp: [%d, %d-%d], udp: %d}\n", i, 1000+i, 20000+2*i, 20001+2*i, i+1)
	}
	b.WriteString("rules:\n")
	for i := range n {
		fmt.Fprintf(&b, "- name: rule %d\n  action: allow\n  from: host%d\n  to: [wan]\n  protocols: [service%d, https]\n  log: false\n", i, i, i)
	}
	return []byte(b.String())
}

// Ten thousand rules take less than three seconds; on a machine that is busy
// or slow, at least not much more than ten times what a tenth of them takes.
func TestParse10000Rules(t *testing.T) {
	c, err := Parse("large.yaml", tenThousand(), known)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Policy.Rules()) != 10_000 {
		t.Errorf("%d rules", len(c.Policy.Rules()))
	}
}

// A tenth of the rules takes a tenth of the time.
func BenchmarkParse(b *testing.B) {
	for name, text := range map[string][]byte{"1000": large(1000), "10000": tenThousand()} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := Parse("large.yaml", text, known); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(good))
	for _, x := range bad {
		f.Add([]byte(x.text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := Parse("fuzz", text, known)
		if (c == nil) == (err == nil) {
			t.Fatalf("%v and %v", c, err)
		}
		if err != nil {
			list, ok := err.(interface{ Unwrap() []error })
			if !ok || len(list.Unwrap()) == 0 {
				t.Fatalf("%T", err)
			}
			for _, one := range list.Unwrap() {
				var e *Error
				if !errors.As(one, &e) || e.Line < 1 || e.Line > 2+strings.Count(string(text), "\n")+strings.Count(string(text), "\r") || e.Reason == "" {
					t.Fatalf("%#v", one)
				}
			}
			return
		}
		if _, err := c.Policy.Compile(); err != nil {
			t.Log(err)
		}
	})
}

// A rule that publishes.
func TestParsePublish(t *testing.T) {
	c, err := Parse("p.yaml", []byte(frame+`
- name: www
  action: publish
  from: [out, in]
  address: [203.0.113.1, 203.0.113.2]
  protocols: http
  server: 10.0.0.5
  server_port: 8080
  source: gateway
- {name: files, action: publish, from: out, protocols: my-ftp, server: [10.0.0.6, "fd00::6"], filters: {ftp: {}}, fail: open}
`), known)
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddr
	want := []policy.Rule{
		{Name: "www", Action: policy.Publish, From: []string{"out", "in"}, Protocols: []string{"http"}, Line: 7, Publication: &policy.Publication{
			Addresses: []netip.Addr{addr("203.0.113.1"), addr("203.0.113.2")}, Servers: []netip.Addr{addr("10.0.0.5")}, ServerPort: 8080, FromGateway: true}},
		{Name: "files", Action: policy.Publish, From: []string{"out"}, Protocols: []string{"my-ftp"}, FailOpen: true, Line: 15, Publication: &policy.Publication{
			Servers: []netip.Addr{addr("10.0.0.6"), addr("fd00::6")}}, Filters: []policy.FilterUse{{Name: "ftp", Options: ftpOptions{ReadOnly: true}}}},
	}
	if got := c.Policy.Rules(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// Where endpoints are mapped and the file does not say otherwise, mappings have
// most of the ports.
func TestParsePortsFollowMapping(t *testing.T) {
	rule := "networks: {lan: {interfaces: [lan0]}}\nnetwork_rules:\n- {name: out, from: lan, to: any, relation: nat"
	for text, want := range map[string]string{
		rule + "}\n": "10000-32767 [61000-65535]",
		rule + ", mapping: endpoint-independent}\n":                                    "10000-14999 [15000-32767 61000-65535]",
		rule + ", mapping: endpoint-independent}\nports: {quota: 7}\n":                 "10000-14999 [15000-32767 61000-65535]",
		rule + ", mapping: endpoint-independent}\nports: {leases: 62000-62999}\n":      "10000-32767 [62000-62999]",
		rule + ", mapping: endpoint-independent}\nports: {kernel: 20000-29999}\n":      "20000-29999 [61000-65535]",
		"ports: {kernel: 20000-29999}\n" + rule + ", mapping: endpoint-independent}\n": "20000-29999 [61000-65535]",
	} {
		c, err := Parse("split.yaml", []byte(text), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(c.Ports.Kernel, c.Ports.Leases); got != want {
			t.Errorf("%s: got %s, want %s", text, got, want)
		}
	}
}

// Mappings may leave from several addresses.
func TestParseAddressList(t *testing.T) {
	text := "networks: {lan: {interfaces: [lan0]}}\nnetwork_rules:\n- {name: out, from: lan, to: any, relation: nat, mapping: endpoint-independent, address: [192.0.2.1, 192.0.2.2]}\n"
	c, err := Parse("list.yaml", []byte(text), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(c.Policy.NetworkRules()[0].Addresses()); got != "[192.0.2.1 192.0.2.2]" {
		t.Errorf("addresses %s", got)
	}
}
