package probe

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/sluicegw/sluice/filterapi"
)

type sessionFilter struct {
	f *Filter
	s filterapi.Session
}

// Detach implements filterapi.SessionFilter.
func (s *sessionFilter) Detach() {
	s.f.mu.Lock()
	if s.f.attached[s.s.ID()] == s {
		delete(s.f.sessions, s.s.ID())
		delete(s.f.attached, s.s.ID())
	}
	s.f.mu.Unlock()
	s.f.push(event{Event: s.f.next(), Kind: "Detach", Session: s.s.ID(), Src: s.s.ClientAddr().String()})
}

// HandleEvent implements filterapi.SessionFilter.
func (s *sessionFilter) HandleEvent(ctx context.Context, ev filterapi.Event) error {
	f := s.f
	out, conn := f.describe(ev)
	out.Session = s.s.ID()
	f.mu.Lock()
	f.counts[out.Kind]++
	f.lastID++
	out.Event = f.lastID
	a := f.answers[out.Kind]
	if out.pass && out.Kind == "ConnectTCP" && a.Do == "" {
		a = answer{Do: "attach", Mode: "through"}
	}
	var wait chan answer
	if a.Do == "hold" {
		wait = make(chan answer, 1)
		f.held[out.Event] = wait
	}
	f.mu.Unlock()
	if out.Kind == "Terminating" {
		f.forget(conn)
	}
	f.push(out)
	if wait != nil {
		select {
		case a = <-wait:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if a.Do == "" {
		return nil
	}
	err := f.act(a, ev, conn)
	f.push(event{Event: f.next(), Kind: "Did", Of: out.Event, Conn: out.Conn, Dst: out.Dst, Error: errorName(err)})
	if errors.Is(err, errSaid) || errors.Is(err, filterapi.ErrNotSupported) {
		return err
	}
	return nil // a call that was refused is what the test asked for
}

// errSaid is the failure that a test wants.
var errSaid = errors.New("the test said: fail")

// act does to a connection what the test has set for its event: one step, or
// several with commas between.
func (f *Filter) act(a answer, ev filterapi.Event, conn filterapi.Connection) error {
	for step := range strings.SplitSeq(a.Do, ",") {
		if err := f.step(step, a, ev, conn); err != nil {
			return err
		}
	}
	return nil
}

func (f *Filter) step(step string, a answer, ev filterapi.Event, conn filterapi.Connection) error {
	switch step {
	case "pass":
		return nil
	case "deny":
		return conn.Deny()
	case "deny-peer":
		e, ok := ev.(*filterapi.UDPDestinationEvent)
		if !ok {
			return filterapi.ErrBadContext
		}
		return e.Destination.Deny()
	case "attach":
		var df filterapi.DataFilter = f.dataFilter(a)
		if a.Mode == "through" {
			df = through{}
		}
		return conn.AttachDataFilter(df, a.priority())
	case "attach-peer":
		peer, err := addrPort(a.Peer)
		if err != nil {
			return err
		}
		return conn.AttachDataFilterWithDestination(f.dataFilter(a), a.priority(), peer)
	case "buffer":
		return conn.SetBufferSize(a.Buffer)
	case "emulate":
		return conn.EmulateForConnect(f.dataFilter(a))
	case "emulate-bind":
		return conn.EmulateForBind()
	case "socket-name":
		name, err := addrPort(a.Name)
		if err != nil {
			return err
		}
		return conn.SetSocketName(name)
	case "kill":
		conn.Kill()
		return nil
	case "fail":
		return errSaid
	case "not-supported":
		return filterapi.ErrNotSupported
	case "panic":
		panic("the test said: panic")
	}
	return fmt.Errorf("unknown answer %q", step)
}

var priorities = map[string]filterapi.Priority{
	"NAT": filterapi.PriorityNAT, "Internal": filterapi.PriorityInternal, "PostTrust": filterapi.PriorityPostTrust,
	"Middle": filterapi.PriorityMiddle, "PreTrust": filterapi.PriorityPreTrust,
	"External": filterapi.PriorityExternal, "Emulation": filterapi.PriorityEmulation,
}

func (a answer) priority() filterapi.Priority {
	if p, ok := priorities[a.Priority]; ok {
		return p
	}
	return filterapi.PriorityMiddle
}

// describe puts an event into words.
func (f *Filter) describe(ev filterapi.Event) (event, filterapi.Connection) {
	var out event
	var conn filterapi.Connection
	about := func(kind string, a filterapi.About) {
		conn = a.Connection
		out.Kind, out.Protocol, out.Rule, out.Secondary = kind, a.Protocol, a.Rule, a.Secondary
		for name, bit := range sources {
			if a.Source == bit {
				out.Source = name
			}
		}
		if o, ok := a.Options.(options); ok {
			out.Options, out.pass = o.Text, o.Pass
		}
	}
	switch e := ev.(type) {
	case *filterapi.ConnectEvent:
		about("ConnectTCP", e.About)
		out.Dst = e.Target.String()
	case *filterapi.UDPDestinationEvent:
		about("UDPDestination", e.About)
		out.Dst = e.Peer.String()
	case *filterapi.BindEvent:
		about(map[bool]string{true: "BindTCP", false: "BindUDP"}[e.TCP], e.About)
		out.Dst = e.External.String()
	case *filterapi.ListenEvent:
		about("Listen", e.About)
		out.Dst = e.External.String()
	case *filterapi.AcceptEvent:
		about("Accepted", e.About)
		out.Dst, out.Remote = e.Local.String(), e.Remote.String()
		out.Listener = f.numbered(e.Listener)
	case *filterapi.EstablishedEvent:
		conn, out.Kind = e.Connection, "Established"
		out.Context, _ = e.Context.(string)
		out.Dst = conn.Tuple().Dst.String()
	case *filterapi.TerminatingEvent:
		conn, out.Kind = e.Connection, "Terminating"
		out.Dst = conn.Tuple().Dst.String()
	default:
		panic(fmt.Sprintf("unknown event %T", ev))
	}
	out.Conn, out.Flags = f.numbered(conn), uint8(conn.Flags())
	out.Proto, out.Src = conn.Tuple().Proto.String(), conn.Tuple().Src.String()
	out.Name, out.Peer = text(conn.ExternalName()), text(conn.ExternalPeer())
	out.Client = conn.Session().ClientAddr().String()
	return out, conn
}
