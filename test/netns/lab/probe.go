package lab

import "encoding/json"

// Two application filters do what a test says. They are built into the gateway
// by the build tag "probe" and are named "probe" and "probe2" in rules. The
// first listens on the Unix socket that SLUICE_PROBE_SOCKET names, the second
// beside it. The two sides send JSON values, one a line:
//
//	test -> probe    ProbeRequest
//	probe -> test    ProbeReply for each request, in any order, by ID
//	probe -> test    ProbeEvent whenever the gateway calls the filter
//
// A handler answers at once with what op "on" has set for its kind of event
// (pass, when nothing is set), unless that says hold: then it waits for the
// op "answer" with the event's number. More than one test connection may be
// open; each gets every event from its own beginning on.
//
// What an event can get, in "do"; several steps stand with commas between:
//
//	pass, fail, not-supported, panic, kill
//	deny, deny-peer     Connection.Deny, Destination.Deny
//	attach              AttachDataFilter: see below
//	attach-peer         AttachDataFilterWithDestination: and peer
//	buffer              SetBufferSize: buffer
//	emulate             EmulateForConnect: as attach
//	emulate-bind        EmulateForBind
//	socket-name         SetSocketName: name
//
// A data filter has a chain (what it puts in front of each direction's first
// bytes), a priority, and a mode: upper changes letters to capitals, echo sends
// the client's own back, quiet reports no bytes, through tells nothing at all.
//
// Ops, and the fields of Args that they read. Those that ask a session have
// session; those that permit also conn (the primary; 0: none), proto, protocol,
// flags, timeout_ms, notify (whether an Established event is wanted), context:
//
//	on              kind, do ...            answer   event, do ...
//	count           kind -> count           sessions -> sessions
//	client-session, private-session         local, user -> session
//	close-session   session
//	attach-filter   session, filter_name
//	access          session, protocol, proto, remote, on (Publishing): HostAccessCheck
//	redirect        targets, external -> addr, actions
//	future          targets, external -> actions
//	bind            clients, external, sources -> conns, addrs; conn and addr are the first
//	many            kind (future, redirect, bind), local (the first client), remote (the first target), bytes
//	                (how many) -> heap (bytes for each), p50, p99 (of a call, in µs): for the bench
//	allow-bind      external, sources -> already
//	factory         kind, external, do, chain, mode, priority, flags -> actions; do: none, fail, panic
//	emulated-bind   local, external, on: InternalAddressTranslation -> conn, addr, flags
//	cancel          action
//	dial            session (0: the firewall's own), proto, local, remote, text -> addr, text
//	listen          session (0: the firewall's own), proto, local, sources -> addr, socket: it echoes
//	close-socket    socket                  restrict socket, sources
//
// and about a connection, conn:
//
//	deny            kill    on: twice
//	filter          sources: SetIPFilter
//	scribble        changes the copy that IPFilter gives -> prefixes, before
//	names           -> addr: ExternalName, text: ExternalPeer
//	client-address  local                   increment   bytes
//	socket-name     name
//	emulate-connection  remote, local, chain, mode -> conn
//	pause           on: the attached data filters stop reading
//	release         the attached data filters give the flow back
//	close, shutdown side: internal or external, on: abortive
//	send            side, text, peer
type ProbeRequest struct {
	ID   uint64    `json:"id"`
	Op   string    `json:"op"`
	Args ProbeArgs `json:"args"`
}

// ProbeArgs are the arguments of all ops together.
type ProbeArgs struct {
	Do         string   `json:"do,omitempty"`
	Chain      string   `json:"chain,omitempty"`
	Priority   string   `json:"priority,omitempty"`
	Mode       string   `json:"mode,omitempty"`
	Buffer     int      `json:"buffer,omitempty"`
	Peer       string   `json:"peer,omitempty"`
	Name       string   `json:"name,omitempty"`
	Kind       string   `json:"kind,omitempty"`
	Event      uint64   `json:"event,omitempty"`
	Session    uint64   `json:"session,omitempty"`
	Conn       uint64   `json:"conn,omitempty"`
	Action     uint64   `json:"action,omitempty"`
	Socket     uint64   `json:"socket,omitempty"`
	Proto      string   `json:"proto,omitempty"`
	Protocol   string   `json:"protocol,omitempty"`
	Clients    []string `json:"clients,omitempty"`
	Targets    []string `json:"targets,omitempty"`
	External   string   `json:"external,omitempty"`
	Remote     string   `json:"remote,omitempty"`
	Local      string   `json:"local,omitempty"`
	Sources    []string `json:"sources"` // null: everybody; "LO-HI" is a range, "!" takes away
	Flags      []string `json:"flags,omitempty"`
	TimeoutMS  int64    `json:"timeout_ms,omitempty"`
	Notify     bool     `json:"notify,omitempty"`
	Context    string   `json:"context,omitempty"`
	On         bool     `json:"on,omitempty"`
	Side       string   `json:"side,omitempty"`
	Text       string   `json:"text,omitempty"`
	User       string   `json:"user,omitempty"`
	FilterName string   `json:"filter_name,omitempty"`
	Bytes      uint64   `json:"bytes,omitempty"`
}

// ProbeReply answers a request. Error is the sentinel's name in filterapi
// without "Err" (PolicyDenied, NoPorts ...), or a sentence.
type ProbeReply struct {
	ID       uint64         `json:"id"`
	Error    string         `json:"error,omitempty"`
	Addr     string         `json:"addr,omitempty"`
	Addrs    []string       `json:"addrs,omitempty"`
	Conn     uint64         `json:"conn,omitempty"`
	Conns    []uint64       `json:"conns,omitempty"`
	Session  uint64         `json:"session,omitempty"`
	Socket   uint64         `json:"socket,omitempty"`
	Actions  []uint64       `json:"actions,omitempty"`
	Count    int            `json:"count,omitempty"`
	Already  bool           `json:"already,omitempty"`
	Text     string         `json:"text,omitempty"`
	Flags    []string       `json:"flags,omitempty"`
	Prefixes []string       `json:"prefixes,omitempty"`
	Sessions []ProbeSession `json:"sessions,omitempty"`
}

// ProbeSession is a session as the filter sees it. Flags are NAT, Private,
// Authenticated, Terminated.
type ProbeSession struct {
	ID     uint64   `json:"id"`
	Client string   `json:"client"`
	User   string   `json:"user"`
	Flags  []string `json:"flags"`
}

// ProbeEvent is one call of the filter. Kind is the event's type in filterapi:
// ConnectTCP, UDPDestination, BindTCP, BindUDP, Listen, Accepted, Established,
// Terminating; or Attach and Detach of a session; Did, for what became of an
// answer other than pass; New, for a factory's call; Pump and PumpEnd, and
// Bytes, for what passed the attached data filter.
type ProbeEvent struct {
	Event     uint64 `json:"event"` // numbers from 1; how a line is told from a reply
	Kind      string `json:"kind"`
	Of        uint64 `json:"of"` // of Did: the event
	Session   uint64 `json:"session"`
	Conn      uint64 `json:"conn"`
	Listener  uint64 `json:"listener"` // of Accepted: the bind
	Secondary bool   `json:"secondary"`
	Proto     string `json:"proto"`
	Src       string `json:"src"`
	Dst       string `json:"dst"`
	Remote    string `json:"remote"` // of Accepted: the peer; of Bytes: a datagram's far address
	Protocol  string `json:"protocol"`
	Rule      string `json:"rule"`
	Options   string `json:"options"`
	Source    string `json:"source"`
	Flags     uint8  `json:"flags"`
	Name      string `json:"name"` // ExternalName and ExternalPeer, or their error
	Peer      string `json:"peer"`
	Context   string `json:"context"` // of Established
	Client    string `json:"client"`  // by the connection's session
	Error     string `json:"error"`
	FromSide  string `json:"from_side"` // of Bytes: internal or external
	Data      []byte `json:"data"`
}

// ProbeSetup is how a probe begins. Without one the first hears of everything in
// the protocols and rules that name it, the second of nothing.
type ProbeSetup struct {
	Init      ProbeEvents `json:"init"`    // what Init registers for
	Session   ProbeEvents `json:"session"` // what AttachToSession replaces it by
	InitError string      `json:"init_error,omitempty"`
	InitPanic bool        `json:"init_panic,omitempty"`
	FailOpen  bool        `json:"fail_open,omitempty"`
}

// ProbeEvents is a registration: kinds of events, and whether it is for flows of
// any protocol and for secondary connections. Sources: Transparent, Explicit.
type ProbeEvents struct {
	Types     []string `json:"types"`
	Any       bool     `json:"any"`
	Secondary bool     `json:"secondary"`
	Sources   []string `json:"sources,omitempty"`
}

// AllEvents are the kinds that a probe can be registered for.
func AllEvents() []string {
	return []string{"ConnectTCP", "UDPDestination", "BindTCP", "BindUDP", "Listen", "Accepted", "Terminating"}
}

// SetupProbe says how a probe is to begin; call it before the gateway starts.
// name is probe or probe2.
func (l *Lab) SetupProbe(name string, s ProbeSetup) {
	l.T.Helper()
	text, err := json.Marshal(s)
	if err != nil {
		l.T.Fatalf("lab: %v", err)
	}
	l.File(name+".json", string(text))
}
