package config

import (
	"github.com/goccy/go-yaml/ast"

	"github.com/sluicegw/sluice/flow"
)

// Parse checks the text of a file; name is what errors call it. All errors
// are reported together, each an *Error, in the order of the lines.
func Parse(name string, text []byte, parsers OptionParsers) (*Config, error) {
	r := &reader{file: name, parsers: parsers}
	root := r.tree(text)
	if err := r.result(); err != nil && root == nil {
		return nil, err
	}
	c := Default()
	p := policyText{}
	// Later sections look at earlier ones (rules at queue.fail), whatever
	// their order in the file: the nodes are collected first.
	var nodes sectionNodes
	r.section(root, "the file", nodes.keys())
	nodes.read(r, c, &p)
	r.policy(c, &p)
	r.splitPorts(c)
	r.pcpNetworks(c, &p)
	r.socksNetworks(nodes.socks, c)
	if err := r.result(); err != nil {
		return nil, err
	}
	return c, nil
}

// sectionNodes are the values of the top-level keys; nil: absent.
type sectionNodes struct {
	networks, networkRules, protocols, rules  ast.Node
	reversePath, queue, marks, ports, offload ast.Node
	log, control, udp, pcp                    ast.Node
	users, socks, timeouts                    ast.Node
}

func (s *sectionNodes) keys() map[string]func(ast.Node) {
	keep := func(at *ast.Node) func(ast.Node) { return func(n ast.Node) { *at = n } }
	return map[string]func(ast.Node){
		"networks":      keep(&s.networks),
		"network_rules": keep(&s.networkRules),
		"protocols":     keep(&s.protocols),
		"rules":         keep(&s.rules),
		"reverse_path":  keep(&s.reversePath),
		"queue":         keep(&s.queue),
		"marks":         keep(&s.marks),
		"ports":         keep(&s.ports),
		"flowtable":     keep(&s.offload),
		"udp":           keep(&s.udp),
		"pcp":           keep(&s.pcp),
		"users":         keep(&s.users),
		"socks":         keep(&s.socks),
		"timeouts":      keep(&s.timeouts),
		"log":           keep(&s.log),
		"control":       keep(&s.control),
	}
}

func (s *sectionNodes) read(r *reader, c *Config, p *policyText) {
	if s.reversePath != nil {
		if v, ok := r.choice(s.reversePath, "reverse_path", string(ReversePathStrict), string(ReversePathLoose), string(ReversePathOff)); ok {
			c.ReversePath = ReversePath(v)
		}
	}
	if s.offload != nil {
		if v, ok := r.choice(s.offload, "flowtable", "auto", "off"); ok {
			c.Flowtable = v == "auto"
		}
	}
	r.queue(s.queue, &c.Queue)
	r.marks(s.marks, &c.Marks)
	r.ports(s.ports, &c.Ports)
	r.udp(s.udp, &c.UDP)
	r.pcp(s.pcp, &c.PCP, &p.pcp)
	r.users(s.users, c)
	r.socks(s.socks, &c.Socks)
	r.timeouts(s.timeouts, &c.Timeouts)
	r.log(s.log, &c.Log)
	r.section(s.control, "control", map[string]func(ast.Node){
		"socket": func(n ast.Node) {
			if v, ok := r.socketPath(n, "control.socket"); ok {
				c.Control.Socket = v
			}
		},
	})
	r.networks(s.networks, p)
	r.networkRules(s.networkRules, p)
	r.protocols(s.protocols, p)
	r.known = userNames(s.users)
	r.rules(s.rules, p, c.Queue.FailOpen)
}

// The bounds of queue. The longest queue is a few hundred MiB of the kernel's
// memory.
const (
	maxQueues      = 16
	minQueueLength = 64
	maxQueueLength = 1 << 18
	minAnswerMS    = 50
	maxAnswerMS    = 30_000
	queueSorts     = 3 // closed, open, holding
)

func (r *reader) queue(n ast.Node, q *Queue) {
	r.section(n, "queue", map[string]func(ast.Node){
		"form": func(n ast.Node) {
			if v, ok := r.choice(n, "queue.form", string(QueueAuto), string(QueueNative), string(QueueXT)); ok {
				q.Form = QueueForm(v)
			}
		},
		"first":     func(n ast.Node) { setNumber(r, n, "queue.first", &q.First, 0, 65535) },
		"number":    func(n ast.Node) { setNumber(r, n, "queue.number", &q.Number, 1, maxQueues) },
		"length":    func(n ast.Node) { setNumber(r, n, "queue.length", &q.Length, minQueueLength, maxQueueLength) },
		"answer_ms": func(n ast.Node) { setNumber(r, n, "queue.answer_ms", &q.AnswerMS, minAnswerMS, maxAnswerMS) },
		"fail": func(n ast.Node) {
			if v, ok := r.choice(n, "queue.fail", "closed", "open"); ok {
				q.FailOpen = v == "open"
			}
		},
	})
	if last := int(q.First) + queueSorts*int(q.Number) - 1; last > 65535 {
		r.fail(n, "queue: %d queues of three sorts each from %d on end at %d, beyond 65535", q.Number, q.First, last)
	}
}

// Routing table numbers and rule priorities that belong to the kernel.
const (
	tableDefault = 253 // then main and local, 254 and 255
	tableLocal   = 255
	mainPriority = 32766 // a rule behind it is never reached
)

func (r *reader) marks(n ast.Node, m *Marks) {
	r.section(n, "marks", map[string]func(ast.Node){
		"mask": func(n ast.Node) {
			v, ok := r.number(n, "marks.mask", 1, 1<<32-1)
			if !ok {
				return
			}
			bits, err := flow.NewMarks(uint32(v))
			if err != nil {
				r.fail(n, "marks.mask: %v", err)
				return
			}
			m.Bits = bits
		},
		"table": func(n ast.Node) {
			setNumber(r, n, "marks.table", &m.Table, 1, 1<<32-1)
			if m.Table >= tableDefault && m.Table <= tableLocal {
				r.fail(n, "marks.table: the tables %d to %d are the kernel's own", tableDefault, tableLocal)
			}
		},
		"priority":  func(n ast.Node) { setNumber(r, n, "marks.priority", &m.Priority, 1, mainPriority-1) },
		"zone":      func(n ast.Node) { setNumber(r, n, "marks.zone", &m.Zone, 1, 65535) },
		"log_group": func(n ast.Node) { setNumber(r, n, "marks.log_group", &m.LogGroup, 1, 65535) },
	})
}

// maxIdle bounds how long a UDP flow may be idle, in seconds: a day.
const maxIdle = 86400

func (r *reader) udp(n ast.Node, u *UDP) {
	r.section(n, "udp", map[string]func(ast.Node){
		"peer_idle":   func(n ast.Node) { setNumber(r, n, "udp.peer_idle", &u.PeerIdle, 1, maxIdle) },
		"socket_idle": func(n ast.Node) { setNumber(r, n, "udp.socket_idle", &u.SocketIdle, 1, maxIdle) },
	})
}

// maxEstablished bounds how long a TCP connection may be idle, in seconds: ten
// days.
const maxEstablished = 864000

func (r *reader) timeouts(n ast.Node, t *Timeouts) {
	r.section(n, "timeouts", map[string]func(ast.Node){
		"udp":             func(n ast.Node) { setNumber(r, n, "timeouts.udp", &t.UDP, 1, maxIdle) },
		"icmp":            func(n ast.Node) { setNumber(r, n, "timeouts.icmp", &t.ICMP, 1, maxIdle) },
		"tcp_established": func(n ast.Node) { setNumber(r, n, "timeouts.tcp_established", &t.TCPEstablished, 1, maxEstablished) },
		"tcp_transitory":  func(n ast.Node) { setNumber(r, n, "timeouts.tcp_transitory", &t.TCPTransitory, 1, maxIdle) },
	})
}

func (r *reader) log(n ast.Node, l *Log) {
	r.section(n, "log", map[string]func(ast.Node){
		"level": func(n ast.Node) {
			if v, ok := r.choice(n, "log.level", "debug", "info", "warn", "error"); ok {
				l.Level = v
			}
		},
		"format": func(n ast.Node) {
			if v, ok := r.choice(n, "log.format", "auto", "console", "json"); ok {
				l.Format = v
			}
		},
	})
}

// setNumber sets a field if the value is in its range.
func setNumber[T uint16 | uint32](r *reader, n ast.Node, what string, at *T, lo, hi uint64) {
	if v, ok := r.number(n, what, lo, hi); ok {
		*at = T(v)
	}
}
