package probe

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

type request struct {
	ID   uint64 `json:"id"`
	Op   string `json:"op"`
	Args struct {
		Kind      string   `json:"kind"`
		Do        string   `json:"do"`
		Event     uint64   `json:"event"`
		Chain     string   `json:"chain"`
		Priority  string   `json:"priority"`
		Session   uint64   `json:"session"`
		Conn      uint64   `json:"conn"`
		Action    uint64   `json:"action"`
		Proto     string   `json:"proto"`
		Client    string   `json:"client"`
		Targets   []string `json:"targets"`
		Sources   []string `json:"sources"`
		Flags     []string `json:"flags"`
		TimeoutMS int64    `json:"timeout_ms"`
		On        bool     `json:"on"`
	} `json:"args"`
}

type reply struct {
	ID       uint64    `json:"id"`
	Error    string    `json:"error,omitempty"`
	Addr     string    `json:"addr,omitempty"`
	Conn     uint64    `json:"conn,omitempty"`
	Actions  []uint64  `json:"actions,omitempty"`
	Count    int       `json:"count,omitempty"`
	Sessions []session `json:"sessions,omitempty"`
}

type session struct {
	ID     uint64 `json:"id"`
	Client string `json:"client"`
}

type event struct {
	Event     uint64 `json:"event"`
	Kind      string `json:"kind"`
	Session   uint64 `json:"session,omitempty"`
	Conn      uint64 `json:"conn,omitempty"`
	Secondary bool   `json:"secondary,omitempty"`
	Src       string `json:"src,omitempty"`
	Dst       string `json:"dst,omitempty"`
	FromSide  string `json:"from_side,omitempty"`
	Data      []byte `json:"data,omitempty"`
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
			out := reply{ID: r.ID}
			if err := f.do(r, &out); err != nil {
				out.Error = errorName(err)
			}
			t.send(out)
		}()
	}
}

var errorNames = map[error]string{
	filterapi.ErrInvalidArgument: "InvalidArgument", filterapi.ErrNotFound: "NotFound",
	filterapi.ErrTerminating: "Terminating", filterapi.ErrPolicyDenied: "PolicyDenied",
	filterapi.ErrNetworkDenied: "NetworkDenied", filterapi.ErrBadContext: "BadContext",
	filterapi.ErrAlreadyExists: "AlreadyExists", filterapi.ErrNotSupported: "NotSupported",
	filterapi.ErrNoPorts: "NoPorts", filterapi.ErrQuota: "Quota",
}

func errorName(err error) string {
	for e, name := range errorNames {
		if errors.Is(err, e) {
			return name
		}
	}
	return err.Error()
}

// do carries out one order.
func (f *Filter) do(r request, out *reply) error {
	a := r.Args
	switch r.Op {
	case "on":
		f.mu.Lock()
		f.answers[a.Kind] = answer{a.Do, a.Chain, a.Priority}
		f.mu.Unlock()
		return nil
	case "answer":
		f.mu.Lock()
		w := f.held[a.Event]
		delete(f.held, a.Event)
		f.mu.Unlock()
		if w == nil {
			return filterapi.ErrNotFound
		}
		w <- answer{a.Do, a.Chain, a.Priority}
		return nil
	case "count":
		f.mu.Lock()
		out.Count = f.counts[a.Kind]
		f.mu.Unlock()
		return nil
	case "sessions":
		f.mu.Lock()
		for id, s := range f.sessions {
			out.Sessions = append(out.Sessions, session{id, s.ClientAddr().String()})
		}
		f.mu.Unlock()
		return nil
	case "future":
		return f.future(r, out)
	case "bind":
		return f.bind(r, out)
	case "cancel":
		f.mu.Lock()
		act := f.actions[a.Action]
		f.mu.Unlock()
		if act == nil {
			return filterapi.ErrNotFound
		}
		return act.Cancel()
	}
	return f.doConn(r)
}

// doConn carries out an order about one connection.
func (f *Filter) doConn(r request) error {
	f.mu.Lock()
	c := f.conns[r.Args.Conn]
	f.mu.Unlock()
	if c == nil {
		return fmt.Errorf("op %q: %w", r.Op, filterapi.ErrNotFound)
	}
	switch r.Op {
	case "kill":
		c.Kill()
		return nil
	case "filter":
		x, err := ipFilter(r.Args.Sources)
		if err != nil {
			return err
		}
		return c.SetIPFilter(x)
	case "pause":
		f.mu.Lock()
		defer f.mu.Unlock()
		gate := f.paused[c]
		switch {
		case r.Args.On && gate == nil:
			f.paused[c] = make(chan struct{})
		case !r.Args.On && gate != nil:
			close(gate)
			delete(f.paused, c)
		}
		return nil
	}
	return fmt.Errorf("unknown op %q", r.Op)
}

func ipFilter(sources []string) (*filterapi.IPFilter, error) {
	if sources == nil {
		return nil, nil
	}
	addrs, err := parseAddrs(sources)
	return filterapi.OnlyFrom(addrs...), err
}

var flagNames = map[string]filterapi.Flags{
	"AllowMultiple": filterapi.AllowMultiple, "Timeout": filterapi.Timeout, "NoKernelMode": filterapi.NoKernelMode,
	"ToSameNet":     filterapi.ToSameNet,
	"ToSameNetwork": filterapi.ToSameNetwork, "ToAll": filterapi.ToAll,
}

// call collects what the permission calls have in common. The primary
// connection is the one the order names.
func (f *Filter) call(r request) (s filterapi.Session, primary filterapi.Connection, p flow.Proto, flags filterapi.Flags, err error) {
	f.mu.Lock()
	s, primary = f.sessions[r.Args.Session], f.conns[r.Args.Conn]
	f.mu.Unlock()
	if s == nil || primary == nil {
		return nil, nil, 0, 0, filterapi.ErrNotFound
	}
	switch r.Args.Proto {
	case "tcp":
		p = flow.TCP
	case "udp":
		p = flow.UDP
	}
	for _, n := range r.Args.Flags {
		x, ok := flagNames[n]
		if !ok {
			return nil, nil, 0, 0, fmt.Errorf("unknown flag %q", n)
		}
		flags |= x
	}
	return s, primary, p, flags, nil
}

func (f *Filter) future(r request, out *reply) error {
	s, primary, p, flags, err := f.call(r)
	if err != nil {
		return err
	}
	for _, text := range r.Args.Targets {
		target, err := netip.ParseAddrPort(text)
		if err != nil {
			return err
		}
		act, err := s.AllowFutureConnect(filterapi.FutureConnect{
			Negotiated: filterapi.Negotiated{Primary: primary, Proto: p, Flags: flags, Expiry: time.Duration(r.Args.TimeoutMS) * time.Millisecond},
			Target:     target,
		})
		if err != nil {
			return err
		}
		f.mu.Lock()
		f.lastID++
		f.actions[f.lastID] = act
		out.Actions = append(out.Actions, f.lastID)
		f.mu.Unlock()
	}
	return nil
}

func (f *Filter) bind(r request, out *reply) error {
	s, primary, p, flags, err := f.call(r)
	if err != nil {
		return err
	}
	client, err := netip.ParseAddrPort(r.Args.Client)
	if err != nil {
		return err
	}
	sources, err := ipFilter(r.Args.Sources)
	if err != nil {
		return err
	}
	binds, err := s.BindForClient(filterapi.Bind{
		Negotiated: filterapi.Negotiated{Primary: primary, Proto: p, Flags: flags, Expiry: time.Duration(r.Args.TimeoutMS) * time.Millisecond},
		Clients:    []netip.AddrPort{client}, IPFilter: sources,
	})
	if err != nil {
		return err
	}
	c := binds[0]
	name, err := c.ExternalName()
	if err != nil {
		return err
	}
	f.mu.Lock()
	out.Conn, out.Addr = f.connID(c), name.String()
	f.mu.Unlock()
	return nil
}
