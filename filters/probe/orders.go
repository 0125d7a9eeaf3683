package probe

import (
	"fmt"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
)

// order carries out one op of a test.
type order func(*Filter, args, *reply) error

// orders are the ops about the probe itself and about sessions.
var orders = map[string]order{
	"on": func(f *Filter, a args, _ *reply) error {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.answers[a.Kind] = a.answer
		return nil
	},
	"answer": func(f *Filter, a args, _ *reply) error {
		f.mu.Lock()
		w := f.held[a.Event]
		delete(f.held, a.Event)
		f.mu.Unlock()
		if w == nil {
			return filterapi.ErrNotFound
		}
		w <- a.answer
		return nil
	},
	"count": func(f *Filter, a args, out *reply) error {
		f.mu.Lock()
		defer f.mu.Unlock()
		out.Count = f.counts[a.Kind]
		return nil
	},
	"sessions":        (*Filter).listSessions,
	"client-session":  (*Filter).clientSession,
	"private-session": (*Filter).privateSession,
	"close-session": func(f *Filter, a args, _ *reply) error {
		s, err := f.session(a)
		if err == nil {
			s.Close()
		}
		return err
	},
	"attach-filter": func(f *Filter, a args, _ *reply) error {
		s, err := f.session(a)
		if err != nil {
			return err
		}
		return s.AttachFilter(a.FilterName)
	},
	"access":        (*Filter).access,
	"redirect":      (*Filter).redirect,
	"future":        (*Filter).future,
	"bind":          (*Filter).bind,
	"many":          (*Filter).makeMany,
	"allow-bind":    (*Filter).allowBind,
	"factory":       (*Filter).factory,
	"emulated-bind": (*Filter).emulatedBind,
	"cancel": func(f *Filter, a args, _ *reply) error {
		f.mu.Lock()
		act := f.actions[a.Action]
		f.mu.Unlock()
		if act == nil {
			return filterapi.ErrNotFound
		}
		return act.Cancel()
	},
	"dial":         (*Filter).dial,
	"listen":       (*Filter).listen,
	"close-socket": (*Filter).closeSocket,
	"restrict":     (*Filter).restrict,
}

// onConns are the ops about one connection.
var onConns = map[string]func(*Filter, filterapi.Connection, args, *reply) error{
	"kill": func(_ *Filter, c filterapi.Connection, a args, _ *reply) error {
		c.Kill()
		if a.On {
			c.Kill()
		}
		return nil
	},
	"deny": func(_ *Filter, c filterapi.Connection, _ args, _ *reply) error { return c.Deny() },
	"filter": func(_ *Filter, c filterapi.Connection, a args, _ *reply) error {
		x, err := ipFilter(a.Sources)
		if err != nil {
			return err
		}
		return c.SetIPFilter(x)
	},
	"scribble": scribble,
	"names": func(_ *Filter, c filterapi.Connection, _ args, out *reply) error {
		name, err := c.ExternalName()
		if err != nil {
			return err
		}
		out.Addr = name.String()
		out.Text = text(c.ExternalPeer())
		return nil
	},
	"client-address": func(_ *Filter, c filterapi.Connection, a args, _ *reply) error {
		at, err := addrPort(a.Local)
		if err != nil {
			return err
		}
		return c.SetClientAddress(at)
	},
	"emulate-connection": emulateConnection,
	"increment":          func(_ *Filter, c filterapi.Connection, a args, _ *reply) error { return c.IncrementBytesSent(a.Bytes) },
	"socket-name": func(_ *Filter, c filterapi.Connection, a args, _ *reply) error {
		name, err := addrPort(a.Name)
		if err != nil {
			return err
		}
		return c.SetSocketName(name)
	},
	"pause": func(f *Filter, c filterapi.Connection, a args, _ *reply) error {
		f.controlOf(c).pause(a.On)
		return nil
	},
	"release": func(f *Filter, c filterapi.Connection, _ args, _ *reply) error {
		f.controlOf(c).letGo()
		return nil
	},
	"close": func(f *Filter, c filterapi.Connection, a args, _ *reply) error {
		k := f.controlOf(c)
		s, err := k.socket(a.Side)
		if err != nil {
			return err
		}
		k.ending(a.On)
		return s.Close(a.On)
	},
	"shutdown": func(f *Filter, c filterapi.Connection, a args, _ *reply) error {
		s, err := f.controlOf(c).socket(a.Side)
		if err != nil {
			return err
		}
		return s.Shutdown(a.On)
	},
	"send": func(f *Filter, c filterapi.Connection, a args, _ *reply) error {
		s, err := f.controlOf(c).socket(a.Side)
		if err != nil {
			return err
		}
		peer, err := addrPort(a.Peer)
		if err != nil {
			return err
		}
		b := filterapi.NewBuffer([]byte(a.Text), nil)
		b.Addr = peer
		return s.Send(b)
	},
}

// obey carries out a request.
func (f *Filter) obey(r request, out *reply) error {
	if o, ok := orders[r.Op]; ok {
		return o(f, r.Args, out)
	}
	o, ok := onConns[r.Op]
	if !ok {
		return fmt.Errorf("unknown op %q", r.Op)
	}
	f.mu.Lock()
	c := f.conns[r.Args.Conn]
	f.mu.Unlock()
	if c == nil {
		return fmt.Errorf("connection %d: %w", r.Args.Conn, filterapi.ErrNotFound)
	}
	return o(f, c, r.Args, out)
}

// scribble changes the copy of an IP filter that the connection gives, and
// tells what it says then.
func scribble(_ *Filter, c filterapi.Connection, _ args, out *reply) error {
	mine := c.IPFilter()
	for _, p := range mine.Prefixes() {
		out.Prefixes = append(out.Prefixes, p.String())
	}
	if mine == nil {
		return nil
	}
	for _, all := range []string{"0.0.0.0-255.255.255.255", "::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"} {
		lo, hi, err := addressRange(all)
		if err == nil {
			err = mine.IncludeRange(lo, hi)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func emulateConnection(f *Filter, c filterapi.Connection, a args, out *reply) error {
	remote, err := addrPort(a.Remote)
	if err != nil {
		return err
	}
	local, err := addrPort(a.Local)
	if err != nil {
		return err
	}
	made, err := c.EmulateConnection(f.dataFilter(a.answer), remote, local)
	if err == nil {
		out.Conn = f.numbered(made)
	}
	return err
}

func (f *Filter) session(a args) (filterapi.Session, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.sessions[a.Session]
	if s == nil {
		return nil, fmt.Errorf("session %d: %w", a.Session, filterapi.ErrNotFound)
	}
	return s, nil
}

var sessionFlags = map[string]filterapi.SessionFlags{
	"NAT": filterapi.SessionNAT, "Private": filterapi.SessionPrivate,
	"Authenticated": filterapi.SessionAuthenticated, "Terminated": filterapi.SessionTerminated,
}

func (f *Filter) listSessions(_ args, out *reply) error {
	f.mu.Lock()
	all := make([]filterapi.Session, 0, len(f.sessions))
	for _, s := range f.sessions {
		all = append(all, s)
	}
	f.mu.Unlock()
	for _, s := range all {
		x := session{ID: s.ID(), Client: s.ClientAddr().String(), User: s.User(), Flags: []string{}}
		for name, bit := range sessionFlags {
			if s.Flags()&bit != 0 {
				x.Flags = append(x.Flags, name)
			}
		}
		out.Sessions = append(out.Sessions, x)
	}
	return nil
}

func (f *Filter) clientSession(a args, out *reply) error {
	client, err := netip.ParseAddr(a.Local)
	if err != nil {
		return err
	}
	s, err := f.fw.ClientSession(client)
	return f.keep(s, err, out)
}

func (f *Filter) privateSession(a args, out *reply) error {
	client, err := netip.ParseAddr(a.Local)
	if err != nil {
		return err
	}
	s, err := f.fw.PrivateSession(client, a.User)
	return f.keep(s, err, out)
}

// keep remembers a session that the probe has asked for.
func (f *Filter) keep(s filterapi.Session, err error, out *reply) error {
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.sessions[s.ID()] == nil {
		f.sessions[s.ID()] = s
	}
	out.Session = s.ID()
	return nil
}
