package probe

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

type request struct {
	ID   uint64 `json:"id"`
	Op   string `json:"op"`
	Args args   `json:"args"`
}

// answer is what an event gets.
type answer struct {
	Do       string `json:"do"`
	Chain    string `json:"chain"`
	Priority string `json:"priority"`
	Mode     string `json:"mode"`
	Buffer   int    `json:"buffer"`
	Peer     string `json:"peer"`
	Name     string `json:"name"`
}

type args struct {
	answer
	Kind       string   `json:"kind"`
	Event      uint64   `json:"event"`
	Session    uint64   `json:"session"`
	Conn       uint64   `json:"conn"`
	Action     uint64   `json:"action"`
	Socket     uint64   `json:"socket"`
	Proto      string   `json:"proto"`
	Protocol   string   `json:"protocol"`
	Clients    []string `json:"clients"`
	Targets    []string `json:"targets"`
	External   string   `json:"external"`
	Remote     string   `json:"remote"`
	Local      string   `json:"local"`
	Sources    []string `json:"sources"`
	Flags      []string `json:"flags"`
	TimeoutMS  int64    `json:"timeout_ms"`
	Notify     bool     `json:"notify"`
	Context    string   `json:"context"`
	On         bool     `json:"on"`
	Side       string   `json:"side"`
	Text       string   `json:"text"`
	User       string   `json:"user"`
	FilterName string   `json:"filter_name"`
	Bytes      uint64   `json:"bytes"`
}

// proto is the protocol of an order; anything else is none.
func (a args) proto() flow.Proto {
	return map[string]flow.Proto{"tcp": flow.TCP, "udp": flow.UDP, "icmp": flow.ICMP}[a.Proto]
}

type reply struct {
	ID       uint64    `json:"id"`
	Error    string    `json:"error,omitempty"`
	Addr     string    `json:"addr,omitempty"`
	Addrs    []string  `json:"addrs,omitempty"`
	Conn     uint64    `json:"conn,omitempty"`
	Conns    []uint64  `json:"conns,omitempty"`
	Session  uint64    `json:"session,omitempty"`
	Socket   uint64    `json:"socket,omitempty"`
	Actions  []uint64  `json:"actions,omitempty"`
	Count    int       `json:"count,omitempty"`
	Already  bool      `json:"already,omitempty"`
	Text     string    `json:"text,omitempty"`
	Flags    []string  `json:"flags,omitempty"`
	Prefixes []string  `json:"prefixes,omitempty"`
	Sessions []session `json:"sessions,omitempty"`
	// What each of very many permissions takes, in bytes, and how long the last
	// calls took, in microseconds.
	Heap float64 `json:"heap,omitempty"`
	P50  int64   `json:"p50,omitempty"`
	P99  int64   `json:"p99,omitempty"`
}

type session struct {
	ID     uint64   `json:"id"`
	Client string   `json:"client"`
	User   string   `json:"user,omitempty"`
	Flags  []string `json:"flags"`
}

type event struct {
	Event     uint64 `json:"event"`
	Kind      string `json:"kind"`
	Of        uint64 `json:"of,omitempty"`
	Session   uint64 `json:"session,omitempty"`
	Conn      uint64 `json:"conn,omitempty"`
	Listener  uint64 `json:"listener,omitempty"`
	Secondary bool   `json:"secondary,omitempty"`
	Proto     string `json:"proto,omitempty"`
	Src       string `json:"src,omitempty"`
	Dst       string `json:"dst,omitempty"`
	Remote    string `json:"remote,omitempty"`
	Protocol  string `json:"protocol,omitempty"`
	Rule      string `json:"rule,omitempty"`
	Options   string `json:"options,omitempty"`
	pass      bool   // the rule says so
	Source    string `json:"source,omitempty"`
	Flags     uint8  `json:"flags,omitempty"`
	Name      string `json:"name,omitempty"`
	Peer      string `json:"peer,omitempty"`
	Context   string `json:"context,omitempty"`
	Client    string `json:"client,omitempty"`
	Error     string `json:"error,omitempty"`
	FromSide  string `json:"from_side,omitempty"`
	Data      []byte `json:"data,omitempty"`
}

// test is one connection of a test.
type test struct {
	mu   sync.Mutex
	json *json.Encoder
}

func (t *test) send(v any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_ = t.json.Encode(v) // the test has gone
}

func (f *Filter) serve() {
	for {
		c, err := f.listener.Accept()
		if err != nil {
			return // closed by Shutdown
		}
		go f.talk(c)
	}
}

func (f *Filter) talk(c net.Conn) {
	defer func() { _ = c.Close() }()
	t := &test{json: json.NewEncoder(c)}
	f.mu.Lock()
	f.tests[t] = true
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.tests, t)
		f.mu.Unlock()
	}()
	in := json.NewDecoder(c)
	for {
		var r request
		if in.Decode(&r) != nil {
			return
		}
		go func() {
			out := reply{}
			if err := f.obey(r, &out); err != nil {
				out.Error = errorName(err)
			}
			out.ID = r.ID
			t.send(out)
		}()
	}
}

// push sends an event to all tests.
func (f *Filter) push(e event) {
	f.mu.Lock()
	tests := make([]*test, 0, len(f.tests))
	for t := range f.tests {
		tests = append(tests, t)
	}
	f.mu.Unlock()
	for _, t := range tests {
		t.send(e)
	}
}

var errorNames = map[error]string{
	filterapi.ErrInvalidArgument: "InvalidArgument", filterapi.ErrNotFound: "NotFound",
	filterapi.ErrTerminating: "Terminating", filterapi.ErrPolicyDenied: "PolicyDenied",
	filterapi.ErrNetworkDenied: "NetworkDenied", filterapi.ErrBadContext: "BadContext",
	filterapi.ErrAlreadyExists: "AlreadyExists", filterapi.ErrAlreadyEmulated: "AlreadyEmulated",
	filterapi.ErrNotEmulated: "NotEmulated", filterapi.ErrNotSupported: "NotSupported",
	filterapi.ErrNoPorts: "NoPorts", filterapi.ErrQuota: "Quota", filterapi.ErrReleased: "Released", syscall.ECONNREFUSED: "ConnectionRefused",
}

func errorName(err error) string {
	if err == nil {
		return ""
	}
	for e, name := range errorNames {
		if errors.Is(err, e) {
			return name
		}
	}
	return err.Error()
}

// text shows an address; an invalid one, or an error, as that.
func text(a netip.AddrPort, err error) string {
	if err != nil {
		return errorName(err)
	}
	return fmt.Sprint(a)
}
