// Package config turns the text of the configuration file into checked
// values. It is strict: what it does not understand is an error with file and
// line, and no value is used that was not checked for its range.
package config

import (
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/sluicegw/sluice/flow"
	"github.com/sluicegw/sluice/policy"
)

// Config is a checked configuration. Default has the values of all keys that
// a file leaves out.
type Config struct {
	// Policy is made of networks, network_rules, protocols (on top of
	// policy.Builtin) and rules.
	Policy *policy.Policy
	// ReversePath is reverse_path.
	ReversePath ReversePath
	// Queue is queue.
	Queue Queue
	// Marks is marks.
	Marks Marks
	// Ports is ports.
	Ports Ports
	// Flowtable is flowtable: true for auto, false for off.
	Flowtable bool
	// UDP is udp.
	UDP UDP
	// PCP is pcp.
	PCP PCP
	// Users is users: names and the hashes of their passwords.
	Users map[string]string
	// Socks is socks.
	Socks Socks
	// Timeouts is timeouts.
	Timeouts Timeouts
	// Log is log.
	Log Log
	// Control is control.
	Control Control
}

// ReversePath is how packets with a source that is not routed back are met.
type ReversePath string

// The values of reverse_path.
const (
	ReversePathStrict ReversePath = "strict" // back through the same interface
	ReversePathLoose  ReversePath = "loose"  // back through any interface
	ReversePathOff    ReversePath = "off"
)

// QueueForm is the kernel feature that takes packets to user space.
type QueueForm string

// The values of queue.form.
const (
	QueueAuto   QueueForm = "auto" // native where the kernel has it, else xt
	QueueNative QueueForm = "native"
	QueueXT     QueueForm = "xt"
)

// Queue is the section queue. The queues are numbered on end, Number of each
// sort: those that fail closed, those that fail open, and those in which
// packets wait for slow answers.
type Queue struct {
	Form   QueueForm // form
	First  uint16    // first: the lowest queue number
	Number uint16    // number: queues of each sort
	Length uint32    // length: packets that may wait in each queue
	// AnswerMS is answer_ms: how long a first packet waits for the filters.
	AnswerMS uint32
	// FailOpen is fail: true for open. It has been applied to the rules that
	// do not say themselves.
	FailOpen bool
}

// Answer is how long a first packet waits for the filters.
func (q Queue) Answer() time.Duration { return time.Duration(q.AnswerMS) * time.Millisecond }

// FirstOpen is the lowest number of the queues that fail open.
func (q Queue) FirstOpen() uint16 { return q.First + q.Number }

// FirstHolding is the lowest number of the holding queues.
func (q Queue) FirstHolding() uint16 { return q.First + 2*q.Number }

// Marks is the section marks: numbers that the whole machine shares.
type Marks struct {
	Bits     flow.Marks // mask
	Table    uint32     // table: the routing table
	Priority uint16     // priority: of the routing rule that leads there
	Zone     uint16     // zone: the conntrack zone of upstream legs
	LogGroup uint16     // log_group: the NFLOG group
}

// UDP is the section udp: how long flows that user space carries may be idle,
// in seconds.
type UDP struct {
	PeerIdle   uint32 // peer_idle: until a peer of a client's socket is forgotten
	SocketIdle uint32 // socket_idle: until the external port is given back
}

// Socks is the section socks: where clients may ask the gateway by SOCKS.
// Without networks nobody may.
type Socks struct {
	Networks  []string     // networks
	Port      uint16       // port
	Password  bool         // authentication: true for password, false for none
	Approve   bool         // approve_binds
	Resolvers []netip.Addr // resolvers: of names; none: those of the system
	// PerClient is connections: how many one client may have.
	PerClient uint32
	// handshake_timeout, connect_timeout and bind_timeout, in seconds.
	HandshakeTimeout, ConnectTimeout, BindTimeout uint32
}

// Timeouts is the section timeouts: how long flows in the kernel may carry
// nothing, in seconds.
type Timeouts struct {
	UDP            uint32 // udp
	ICMP           uint32 // icmp: queries and their answers
	TCPEstablished uint32 // tcp_established
	TCPTransitory  uint32 // tcp_transitory: connections that open or close
}

// Log is the section log.
type Log struct {
	Level  string // level: debug, info, warn or error
	Format string // format: auto, console or json
}

// Control is the section control.
type Control struct {
	Socket string // socket: an absolute path
}

// Default is what holds where a file says nothing: a policy that lets nothing
// pass, and these numbers.
func Default() *Config {
	bits, err := flow.NewMarks(flow.DefaultMask)
	if err != nil {
		panic(err) // the default mask is a constant
	}
	return &Config{
		ReversePath: ReversePathStrict,
		Queue:       Queue{Form: QueueAuto, First: 4100, Number: 2, Length: 4096, AnswerMS: 800},
		Marks:       Marks{Bits: bits, Table: 4100, Priority: 4100, Zone: 4100, LogGroup: 4100},
		Ports:       defaultPorts(),
		Flowtable:   true,
		UDP:         UDP{PeerIdle: 120, SocketIdle: 300},
		PCP:         defaultPCP(),
		Socks:       Socks{Port: 1080, PerClient: 256, HandshakeTimeout: 10, ConnectTimeout: 30, BindTimeout: 120},
		Timeouts:    Timeouts{UDP: 300, ICMP: 60, TCPEstablished: 432000, TCPTransitory: 240},
		Log:         Log{Level: "info", Format: "auto"},
		Control:     Control{Socket: "/run/sluice/control.sock"},
	}
}

// OptionParsers has the known application filters by name, with the method
// that turns a rule's options into the filter's own value; nil: the filter
// takes no options.
type OptionParsers map[string]func(decode func(into any) error) (any, error)

// Load reads and checks a file. Its errors are those of Parse, or say that
// the file cannot be read.
func Load(path string, parsers OptionParsers) (*Config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the configuration: %w", err)
	}
	return Parse(path, text, parsers)
}

// Error is one thing that is wrong with a file.
type Error struct {
	File   string
	Line   int // from 1
	Reason string
}

func (e *Error) Error() string { return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Reason) }
