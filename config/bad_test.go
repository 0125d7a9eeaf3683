package config

import (
	"errors"
	"strings"
	"testing"
)

// frame is a policy that the bad rules below stand in; they begin in line 6.
const frame = `networks: {in: {interfaces: [lan0]}, out: {interfaces: [wan0]}}
network_rules:
- {name: j, from: in, to: out, relation: nat}
protocols: {my-ftp: {tcp: 2121, filter: ftp}, p: {tcp: 1}, t: {tcp: 9, filter: tap}}
rules:
`

// bad files, and what is said about them, each line without "f:".
var bad = []struct {
	text string
	want []string
}{
	// The text.
	{"a: b: c\n", []string{"1: mapping value is not allowed in this context"}},
	{"rules: [\n", []string{"1: sequence end token ']' not found"}},
	{"rules:\n\t- a\n", []string{"2: found character '\t' that cannot start any token"}},
	{"- a\n", []string{"1: the file: want a mapping, got a list"}},
	{"nonsense\n", []string{"1: the file: want a mapping, got text"}},
	{"log: {}\n---\nlog: {}\n", []string{"3: a second YAML document"}},
	{"log: {}\n\xff\n", []string{"2: the text is not UTF-8"}},
	{"\n\nrules: " + strings.Repeat("[", 100), []string{"3: nested too deeply"}},
	{"rules:\n" + strings.Repeat(" ", 300) + "- a\n", []string{"2: nested too deeply"}},
	{"rules: " + strings.Repeat("- ", 100), []string{"1: nested too deeply"}},
	{"log: &a {}\ncontrol: *a\n", []string{"1: anchors and aliases are not supported", "1: log: want a mapping, got something else", "2: anchors and aliases are not supported", "2: control: want a mapping, got something else"}},
	{"log: !!map {}\n", []string{"1: tags and directives are not supported", "1: log: want a mapping, got something else"}},
	{"1: 2\n", []string{"1: the key 1 is no text", `1: the file: unknown key ""; the keys are control, flowtable, log, marks, network_rules, networks, pcp, ports, protocols, queue, reverse_path, rules, socks, timeouts, udp, users`}},
	// Duplicate and unknown keys.
	{"log: {}\n\nlog:\n  level: info\n  level: warn\n", []string{`3: the key "log" stands there twice, first in line 1`, `5: the key "level" stands there twice, first in line 4`}},
	{"log:\n  levle: info\n", []string{`2: log: unknown key "levle"; the keys are format, level`}},
	{"networks:\n  a:\n    interfaces: x\n  a:\n    interfaces: y\n", []string{`4: the key "a" stands there twice, first in line 2`, `4: network "a": name: is defined twice`}},
	// Types and ranges.
	{"log: 7\n", []string{"1: log: want a mapping, got a number"}},
	{"log:\n- level\n", []string{"2: log: want a mapping, got a list"}},
	{"log: {level: 7}\n", []string{"1: log.level: want one of debug, info, warn, error, got a number"}},
	{"log:\n  level: loud\n  format: [json]\n", []string{`2: log.level: "loud" is none of debug, info, warn, error`, "3: log.format: want one of auto, console, json, got a list"}},
	{"reverse_path: false\n", []string{"1: reverse_path: want one of strict, loose, off, got true or false"}},
	{"flowtable: on\n", []string{`1: flowtable: "on" is none of auto, off`}},
	{"flowtable:\n", []string{"1: flowtable: want one of auto, off, got nothing"}},
	{"queue:\n  form: nft\n  first: -1\n  number: 17\n  length: 10\n  fail: maybe\n  answer_ms: 1\n", []string{
		`2: queue.form: "nft" is none of auto, native, xt`, "3: queue.first: -1 is not a number from 0 to 65535", "4: queue.number: 17 is not a number from 1 to 16",
		"5: queue.length: 10 is not a number from 64 to 262144", `6: queue.fail: "maybe" is none of closed, open`, "7: queue.answer_ms: 1 is not a number from 50 to 30000"}},
	{"queue: {number: 2.5}\n", []string{"1: queue.number: want a number from 1 to 16, got a number"}},
	{"queue: {number: 010}\n", []string{"1: queue.number: 010 is not a number from 1 to 16"}},
	{"queue: {number: \"2\"}\n", []string{"1: queue.number: want a number from 1 to 16, got text"}},
	{"queue:\n  first: 65533\n", []string{"2: queue: 2 queues of three sorts each from 65533 on end at 65538, beyond 65535"}},
	{"marks:\n  mask: 0x50\n  table: 254\n  priority: 32766\n  zone: 0\n  log_group: 70000\n", []string{
		"2: marks.mask: mark mask 0x00000050: want exactly 4 adjacent bits", "3: marks.table: the tables 253 to 255 are the kernel's own",
		"4: marks.priority: 32766 is not a number from 1 to 32765", "5: marks.zone: 0 is not a number from 1 to 65535", "6: marks.log_group: 70000 is not a number from 1 to 65535"}},
	{"marks: {mask: 0x1ffffffff}\n", []string{"1: marks.mask: 0x1ffffffff is not a number from 1 to 4294967295"}},
	{"ports:\n  kernel: 80-90\n  leases: 9000-8000\n", []string{`2: ports.kernel: "80-90" is no number or range from 1024 to 65535`, `3: ports.leases: "9000-8000" is no number or range from 1024 to 65535`}},
	{"\nports: {kernel: 20000-62000}\n", []string{"2: ports: kernel (20000-62000) and leases (61000-65535) overlap"}},
	{"ports:\n  leases: []\n  well_known: 1024\n  quota: 0\n  block: 8\n  sessions: none\n", []string{
		"2: ports.leases: want 1 to 8 ranges, got 0", "3: ports.well_known: 1024 is not a number from 1 to 1023",
		"4: ports.quota: 0 is not a number from 1 to 65535", "5: ports.block: 8 is not a number from 16 to 16384", "6: ports.sessions: want a number from 1 to 1048576, got text"}},
	{"\nports: {quota: 1000, block: 64}\n", []string{"2: ports: a quota of 1000 ports is not a multiple of a block of 64"}},
	{"\nports: {kernel: 10000-19999, leases: 20000-20100, block: 128}\n", []string{"2: ports: a block of 128 ports is larger than every range of leases"}},
	{"pcp:\n  natpmp: 1\n  quota: 65\n  min_lifetime: 600\n  max_lifetime: 300\n  ports: 0-7\n", []string{
		"2: pcp.natpmp: want true or false, got a number", "2: pcp: min_lifetime 600 is more than max_lifetime 300",
		"3: pcp.quota: 65 is not a number from 1 to 64", `6: pcp.ports: "0-7" is no number or range from 1 to 65535`}},
	{frame + "pcp:\n  networks: [in, out, any, mars]\n", []string{
		`7: pcp.networks: "out" is in the from of no network rule: only hosts inside are served`,
		`7: pcp.networks: "any" is no network that is defined here`, `7: pcp.networks: "mars" is no network that is defined here`}},
	{"networks: {in: {interfaces: [lan0]}, out: {interfaces: [wan0]}, too: {interfaces: [wan0], prefixes: 192.0.2.0/24}, bare: {prefixes: 10.0.0.0/8}}\n" +
		"network_rules: [{name: a, from: in, to: out, relation: nat}, {name: b, from: too, to: in, relation: route}, {name: c, from: bare, to: in, relation: route}]\n" +
		"reverse_path: loose\npcp: {networks: [in, too, bare]}\n", []string{
		"4: pcp: needs reverse_path: strict, or hosts outside could ask in the name of others",
		`4: pcp.networks: "too" is outside: network rule "a" hides others from hosts there`,
		`4: pcp.networks: "bare" names no interfaces, so that nothing says where it is served`}},
	{"udp: {peer_idle: 0, socket_idle: 90000}\n", []string{"1: udp.peer_idle: 0 is not a number from 1 to 86400", "1: udp.socket_idle: 90000 is not a number from 1 to 86400"}},
	{"control: {socket: run/x}\n", []string{`1: control.socket: "run/x" is no clean absolute path of at most 107 bytes`}},
	// Users, and who asks the gateway.
	{"users: {alice: secret, any: x, \" b\": x}\n", []string{"1: user \"alice\": no bcrypt hash: `gateway passwd` makes one", `1: user "any": the name stands for every user`, `1: user " b": " b" is no name: want 1 to 64 printable characters, no quotes, no blanks around`}},
	{"socks: {}\n", []string{"1: socks is empty"}},
	{"socks: {port: 0, authentication: maybe, resolvers: x, connections: 0, connect_timeout: 3601}\n", []string{"1: socks.port: 0 is not a number from 1 to 65535",
		`1: socks.authentication: "maybe" is none of none, password`, `1: socks.resolvers: "x" is no address`, "1: socks.connections: 0 is not a number from 1 to 65536", "1: socks.connect_timeout: 3601 is not a number from 1 to 3600", `1: socks: "networks" is missing`}},
	{frame + "socks:\n  authentication: password\n  networks:\n  - in\n  - out\n  - any\n  - nix\n", []string{
		"7: socks: authentication by password, and no users", `10: socks.networks: network "out" is outside: a network rule hides others from it`, `11: socks.networks: "any" is no network of clients`, `12: socks.networks: unknown network "nix"`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: p\n  users: [any, any]\n", []string{`11: rule "r": users: user "any" stands there twice`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: p\n  users: [any, alice]\n", []string{`11: rule "r": users: unknown user "alice"`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: p\n  users: []\n", []string{`11: rule "r": users: names nobody`}},
	// Rules that publish.
	{frame + "- {name: r, action: publish, from: out, protocols: p}\n- {name: s, action: publish, from: out, to: in, protocols: [p, any], server: 10.0.0.5, refuse: drop}\n", []string{
		`6: rule "r": "server" is missing`, `7: rule "s": to: a rule that publishes has a server instead`, `7: rule "s": protocols: what is published must be named`, `7: rule "s": refuse: only a rule that denies refuses`}},
	{frame + "- name: r\n  action: publish\n  from: out\n  protocols: [ping]\n  server: [10.0.0.5, 10.0.0.6]\n  address: [203.0.113.1, 203.0.113.1, 10.0.0.5, \"::1\"]\n  source: nobody\n", []string{
		`12: rule "r": source: "nobody" is none of client, gateway`}},
	{frame + "- name: r\n  action: publish\n  from: out\n  protocols: [ping]\n  server: [10.0.0.5, 10.0.0.6]\n  address: [203.0.113.1, 203.0.113.1, 10.0.0.5, \"::1\"]\n", []string{
		`9: rule "r": protocols: "ping" has ICMP, which cannot be published`, `10: rule "r": server: a rule has one server of a family at the most`,
		`11: rule "r": address: 203.0.113.1 stands there twice`, `11: rule "r": address: 10.0.0.5 is the server's own; what needs no translation, a rule that allows lets pass`, `11: rule "r": address: ::1 is no IPv4 address of a host`}},
	{frame + "- {name: r, action: publish, from: out, protocols: [p, t], server: 10.0.0.5, server_port: 80}\n- {name: s, action: publish, from: out, protocols: [p], server: [10.0.0.5, \"fd00::5\"], server_port: 80}\n- {name: t, action: publish, from: out, protocols: [traceroute], server: 10.0.0.5, server_port: 65500}\n", []string{
		`6: rule "r": server_port: the rule's protocols have more than one range of ports`, `7: rule "s": server_port: IPv6 is not translated: the port at the server is the published one`,
		`8: rule "t": server_port: 101 ports do not fit from 65500 on`}},
	{frame + "- {name: r, action: publish, from: out, protocols: gre, server: 10.0.0.5, source: gateway}\n- {name: s, action: publish, from: out, protocols: p, server: \"fd00::5\", address: 203.0.113.1}\n", []string{
		`6: rule "r": protocols: only TCP and UDP can show the server the gateway's address`, `7: rule "s": address: an IPv6 server is reached at its own address`}},
	{frame + "- {name: r, action: allow, from: in, to: out, protocols: p, server: 10.0.0.5, server_port: 0}\n", []string{
		`6: rule "r": server_port: 0 is not a number from 1 to 65535`, `6: rule "r": server: only a rule with the action publish has it`, `6: rule "r": server_port: only a rule with the action publish has it`}},
	// Networks.
	{"networks: [a]\n", []string{"1: networks: want a mapping, got a list"}},
	{"networks:\n  a:\n", []string{`2: network "a": has neither interfaces nor prefixes`}},
	{"networks:\n  any: {interfaces: x}\n  gateway: {interfaces: x}\n", []string{`2: network "any": name: is built in and cannot be defined`, `3: network "gateway": name: is built in and cannot be defined`}},
	{"networks:\n  a:\n    interfaces: [lan0, averylonginterface, lan/1, 7, lan0]\n", []string{
		`3: network "a": interfaces: "averylonginterface" is no interface name`, `3: network "a": interfaces: "lan/1" is no interface name`, `3: network "a": interfaces: want text, got a number`}},
	{"networks:\n  a:\n    interfaces:\n    - lan0\n    - lan0\n", []string{`5: network "a": interfaces: "lan0" stands there twice`}},
	{"networks:\n  a:\n    prefixes:\n    - 10.0.0.0/24\n    - 10.0.0.1/24\n    - ::ffff:10.0.0.0/104\n", []string{
		`5: network "a": prefixes: 10.0.0.1/24 has host bits set; the network is 10.0.0.0/24`, `6: network "a": prefixes: ::ffff:10.0.0.0/104: IPv4 is written as IPv4`}},
	{"networks:\n  a: {prefixes: [10.0.0.0/33, \"fe80::1%lan0\", 10.0.0.256, fe80::1]}\n", []string{
		`2: network "a": prefixes: "10.0.0.0/33" is neither a prefix nor an address`, `2: network "a": prefixes: "fe80::1%lan0" is neither a prefix nor an address`, `2: network "a": prefixes: "10.0.0.256" is neither a prefix nor an address`, `2: network "a": prefixes: want a prefix, got a mapping; in brackets IPv6 needs quotes`}},
	{"networks:\n  \" a\": {interfaces: x}\n", []string{`2: network " a": " a" is no name: want 1 to 64 printable characters, no quotes, no blanks around`}},
	// Network rules.
	{"network_rules: {a: b}\n", []string{"1: network_rules: want a list, got a mapping"}},
	{"network_rules:\n- name: x\n  from: nix\n  to: gateway\n  relation: route\n  address: 1.2.3.4\n", []string{
		`3: network rule "x": from: unknown network "nix"`, `4: network rule "x": to: the gateway itself needs no network rule`, `6: network rule "x": address: only a nat rule hides addresses`}},
	{"network_rules:\n- from: any\n  relation: masq\n", []string{`2: network rule 1: "name" is missing`, `2: network rule 1: "to" is missing`, `3: network rule 1: relation: "masq" is none of route, nat`}},
	{"network_rules:\n- {name: x, from: any, to: any, relation: nat}\n- {name: x, from: any, to: any, relation: nat, address: 1.2.3}\n- {name: x, from: any, to: any, relation: nat}\n", []string{
		`3: network rule "x": address: "1.2.3" is no address`, `4: network rule "x": name: is defined twice`}},
	{"networks:\n  in: {interfaces: in0}\nnetwork_rules:\n- {name: x, from: in, to: any, relation: route, mapping: endpoint-independent}\n- {name: y, from: any, to: in, relation: nat, mapping: endpoint-independent}\n- {name: z, from: in, to: any, relation: nat, mapping: cone}\n- name: w\n  from: in\n  to: any\n  relation: nat\n  filtering: endpoint-independent\n  refresh_inbound: false\n", []string{
		`4: network rule "x": mapping: only a nat rule maps endpoints`, `5: network rule "y": mapping: endpoint-independent needs a network as from, to tell the inside from the outside`,
		`6: network rule "z": mapping: "cone" is none of address-and-port-dependent, endpoint-independent`,
		`11: network rule "w": filtering: needs mapping: endpoint-independent`, `12: network rule "w": refresh_inbound: needs mapping: endpoint-independent`}},
	{"networks:\n  dmz: {prefixes: 192.0.2.0/24}\nnetwork_rules:\n- {name: x, from: dmz, to: any, relation: route, mss: clamp}\n- {name: y, from: any, to: any, relation: route, mss: 1400}\n", []string{
		`4: network rule "x": mss: clamp needs the interfaces of network "dmz"`, `5: network rule "y": mss: want one of clamp, got a number`}},
	{"network_rules:\n-\n- {}\n", []string{"2: network rule 1 is empty", "3: network rule 2 is empty"}},
	// Protocols.
	{"protocols:\n  a: {}\n  any: {tcp: 1}\n  b:\n    filter: tap\n    icmp: 8\n", []string{
		`2: protocol "a": matches nothing`, `3: protocol "any": name: is built in and cannot be defined`, `5: protocol "b": filter: a filter sees TCP and UDP only, and the protocol has neither`}},
	{"protocols:\n  a:\n    tcp: [0, 65536, 5-4, a-b, 1-70000]\n    icmp: 256\n    ip: [6, 256]\n    filter: nix\n", []string{
		`3: protocol "a": tcp: 0 is not a number from 1 to 65535`, `3: protocol "a": tcp: 65536 is not a number from 1 to 65535`, `3: protocol "a": tcp: "5-4" is no number or range from 1 to 65535`,
		`3: protocol "a": tcp: "a-b" is no number or range from 1 to 65535`, `3: protocol "a": tcp: "1-70000" is no number or range from 1 to 65535`, `4: protocol "a": icmp: 256 is not a number from 0 to 255`,
		`5: protocol "a": ip: protocol 6 has the key "tcp"`, `5: protocol "a": ip: 256 is not a number from 0 to 255`, `6: protocol "a": filter: unknown filter "nix"`}},
	// Rules.
	{"rules: allow\n", []string{"1: rules: want a list, got text"}},
	{frame + "- allow\n", []string{"6: rule 1: want a mapping, got text"}},
	{frame + "- name: r\n  action: permit\n  from: in\n", []string{`6: rule "r": "to" is missing`, `6: rule "r": "protocols" is missing`, `7: rule "r": action: "permit" is none of allow, deny, publish`}},
	{frame + "- name: r\n  action: allow\n  from:\n  to: []\n  protocols: [p, nix]\n", []string{`8: rule "r": from: names no network`, `9: rule "r": to: names no network`, `10: rule "r": protocols: unknown protocol "nix"`}},
	{frame + "- name: r\n  action: allow\n  from: [in, gateway]\n  to:\n  - out\n  - nix\n  protocols: p\n", []string{`8: rule "r": from: what the gateway itself sends is not subject to rules`, `11: rule "r": to: unknown network "nix"`}},
	{frame + "- {name: r, action: allow, from: in, to: out, protocols: p}\n- {name: r, action: allow, from: in, to: out, protocols: p}\n", []string{`7: rule "r": name: is defined twice`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: gateway\n  protocols: p\n  no_kernel_mode: true\n", []string{`11: rule "r": no_kernel_mode: what reaches the gateway itself is never taken over; use a rule of its own for it`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: p\n  no_kernel_mode: yes\n  log: 1\n  refuse: drop\n", []string{`11: rule "r": no_kernel_mode: want true or false, got text`, `12: rule "r": log: want true or false, got a number`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: p\n  refuse: drop\n", []string{`11: rule "r": refuse: only a rule that denies refuses`}},
	{frame + "- name: r\n  action: deny\n  from: in\n  to: out\n  protocols: p\n  fail: open\n", []string{`11: rule "r": fail: a rule that denies has no way to fail open`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: my-ftp\n  filters:\n    ftp:\n    tap:\n", []string{`13: rule "r": filters: filter "tap" fits none of the rule's protocols`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: my-ftp\n  filters: {ftp: {}, nix: {}}\n", []string{`11: rule "r": filters: unknown filter "nix"`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: my-ftp\n  filters: [ftp]\n", []string{`11: rule "r": filters: want a mapping, got a list`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: t\n  filters:\n    tap:\n      x: y\n", []string{`13: rule "r": filters: tap: the filter takes no options`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: my-ftp\n  filters:\n    ftp:\n      read_only: true\n      reed_only: true\n", []string{`14: rule "r": filters: ftp: unknown option "reed_only"; the options are banner, deny, read_only`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: my-ftp\n  filters:\n    ftp:\n      read_only: true\n      read_only: true\n", []string{`14: the key "read_only" stands there twice, first in line 13`, `14: rule "r": filters: ftp: duplicate key "read_only"`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: my-ftp\n  filters:\n    ftp:\n      read_only: 7\n", []string{`13: rule "r": filters: ftp: read_only: want true or false`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: my-ftp\n  filters:\n    ftp:\n      banner: hi\n      deny: STOR\n", []string{`14: rule "r": filters: ftp: deny: want a list`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: my-ftp\n  filters: {ftp: [read_only]}\n", []string{`11: rule "r": filters: ftp: want a mapping`}},
	{frame + "- name: r\n  action: allow\n  from: in\n  to: out\n  protocols: my-ftp\n  filters:\n    ftp:\n      read_only: true\n      banner: long\n", []string{`12: rule "r": filters: ftp: the banner is too long`}},
}

func TestParseBad(t *testing.T) {
	for _, x := range bad {
		_, err := Parse("f", []byte(x.text), known)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if want := "f:" + strings.Join(x.want, "\nf:"); got != want {
			t.Errorf("%q\n got %s\nwant %s", x.text, got, want)
		}
	}
}

// A filter's own error can still be told by errors.As from its text: every
// error has file and line.
func TestErrorParts(t *testing.T) {
	_, err := Parse("f", []byte("log: {level: x}\nqueue: {form: x}\n"), known)
	var e *Error
	if !errors.As(err, &e) || e.File != "f" || e.Line != 1 {
		t.Errorf("%v", err)
	}
	if n := len(err.(interface{ Unwrap() []error }).Unwrap()); n != 2 {
		t.Errorf("%d errors", n)
	}
}

// Hostile texts are refused, and not only when the test's time is over.
func TestHostile(t *testing.T) {
	for _, text := range []string{
		strings.Repeat("[", 1<<20), strings.Repeat("{a: ", 1<<18), strings.Repeat("- ", 1<<19), strings.Repeat("? ", 1<<19),
		strings.Repeat("a:\n", 1<<13), strings.Repeat("x", maxSize+1), strings.Repeat("!a ", 1<<18), strings.Repeat("&a ", 1<<18),
	} {
		if _, err := Parse("f", []byte(text), known); err == nil {
			t.Errorf("%.10q... was taken", text)
		}
	}
}
