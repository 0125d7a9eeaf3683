package probe

import (
	"errors"
	"fmt"
	"time"

	"github.com/sluicegw/sluice/filterapi"
)

var flagNames = map[string]filterapi.Flags{
	"AllowMultiple": filterapi.AllowMultiple, "Timeout": filterapi.Timeout, "NoKernelMode": filterapi.NoKernelMode,
	"AddressBased": filterapi.AddressBased, "Bidirectional": filterapi.Bidirectional,
	"IncreaseReceiveBuffer": filterapi.IncreaseReceiveBuffer, "EvenPort": filterapi.EvenPort,
	"Discarding": filterapi.Discarding, "ToSameNet": filterapi.ToSameNet,
	"Preferred": filterapi.Preferred, "SameSource": filterapi.SameSource,
	"ToSameNetwork": filterapi.ToSameNetwork, "ToAll": filterapi.ToAll, "Unknown": 1 << 15,
}

func flags(names []string) (out filterapi.Flags, err error) {
	for _, n := range names {
		x, ok := flagNames[n]
		if !ok {
			return 0, fmt.Errorf("unknown flag %q", n)
		}
		out |= x
	}
	return out, nil
}

// negotiated collects what the permission calls have in common. The primary
// connection is the one that the order names, if it does.
func (f *Filter) negotiated(a args) (filterapi.Session, filterapi.Negotiated, error) {
	n := filterapi.Negotiated{Proto: a.proto(), Protocol: a.Protocol, Expiry: time.Duration(a.TimeoutMS) * time.Millisecond}
	s, err := f.session(a)
	if err != nil {
		return nil, n, err
	}
	if n.Flags, err = flags(a.Flags); err != nil {
		return nil, n, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if a.Conn != 0 {
		if n.Primary = f.conns[a.Conn]; n.Primary == nil {
			return nil, n, fmt.Errorf("connection %d: %w", a.Conn, filterapi.ErrNotFound)
		}
	}
	if a.Context != "" {
		n.Context = a.Context
	}
	if a.Notify {
		sf := f.attached[a.Session]
		if sf == nil {
			return nil, n, fmt.Errorf("the probe is not attached to session %d: %w", a.Session, filterapi.ErrNotFound)
		}
		n.Notify = sf
	}
	return s, n, nil
}

// action remembers an action and gives its number.
func (f *Filter) action(a filterapi.Action) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lastID++
	f.actions[f.lastID] = a
	return f.lastID
}

func (f *Filter) redirect(a args, out *reply) error {
	s, n, err := f.negotiated(a)
	if err != nil {
		return err
	}
	targets, err1 := parseAddrPorts(a.Targets)
	external, err2 := addrPort(a.External)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	inside, actions, err := s.RedirectConnections(filterapi.Redirect{Negotiated: n, Targets: targets, External: external})
	if err != nil {
		return err
	}
	out.Addr = inside.String()
	for _, x := range actions {
		out.Actions = append(out.Actions, f.action(x))
	}
	return nil
}

func (f *Filter) future(a args, out *reply) error {
	s, n, err := f.negotiated(a)
	if err != nil {
		return err
	}
	targets, err1 := parseAddrPorts(a.Targets)
	external, err2 := addrPort(a.External)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	for _, target := range targets {
		act, err := s.AllowFutureConnect(filterapi.FutureConnect{Negotiated: n, Target: target, External: external})
		if err != nil {
			return err
		}
		out.Actions = append(out.Actions, f.action(act))
	}
	return nil
}

func (f *Filter) bind(a args, out *reply) error {
	s, n, err := f.negotiated(a)
	if err != nil {
		return err
	}
	clients, err1 := parseAddrPorts(a.Clients)
	external, err2 := addrPort(a.External)
	from, err3 := ipFilter(a.Sources)
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	binds, err := s.BindForClient(filterapi.Bind{Negotiated: n, Clients: clients, External: external, IPFilter: from})
	if err != nil {
		return err
	}
	for _, c := range binds {
		out.Conns = append(out.Conns, f.numbered(c))
		out.Addrs = append(out.Addrs, text(c.ExternalName()))
	}
	out.Conn, out.Addr = out.Conns[0], out.Addrs[0]
	return nil
}

func (f *Filter) allowBind(a args, out *reply) error {
	s, err := f.session(a)
	if err != nil {
		return err
	}
	at, err1 := addrPort(a.External)
	from, err2 := ipFilter(a.Sources)
	fl, err3 := flags(a.Flags)
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	out.Already, err = s.RetroactiveAllowBind(filterapi.AllowBind{
		Proto: a.proto(), Address: at, Protocol: a.Protocol, Flags: fl, IPFilter: from,
	})
	return err
}

func (f *Filter) factory(a args, out *reply) error {
	s, err := f.session(a)
	if err != nil {
		return err
	}
	at, err1 := addrPort(a.External)
	fl, err2 := flags(a.Flags)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	act, err := s.SetDataFilterFactory(filterapi.DataFilterFactory{
		Event: kinds[a.Kind], Address: at, Priority: a.priority(), Flags: fl,
		New: func(c filterapi.Connection) (filterapi.DataFilter, error) {
			f.push(event{Event: f.next(), Kind: "New", Conn: f.numbered(c), Src: c.Tuple().Src.String(), Dst: c.Tuple().Dst.String()})
			switch a.Do {
			case "none":
				return nil, nil
			case "fail":
				return nil, errSaid
			case "panic":
				panic("the test said: panic")
			}
			return f.dataFilter(a.answer), nil
		},
	})
	if err != nil {
		return err
	}
	out.Actions = []uint64{f.action(act)}
	return nil
}

func (f *Filter) emulatedBind(a args, out *reply) error {
	s, err := f.session(a)
	if err != nil {
		return err
	}
	client, err1 := addrPort(a.Local)
	external, err2 := addrPort(a.External)
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	c, err := s.EmulateClientBind(filterapi.EmulatedBind{
		Client: client, External: external, Proto: a.proto(), Protocol: a.Protocol, InternalAddressTranslation: a.On,
	})
	if err != nil {
		return err
	}
	out.Conn, out.Addr = f.numbered(c), text(c.ExternalName())
	if c.Flags()&filterapi.InternalAddressTranslation != 0 {
		out.Flags = []string{"InternalAddressTranslation"}
	}
	return nil
}

func (f *Filter) access(a args, _ *reply) error {
	s, err := f.session(a)
	if err != nil {
		return err
	}
	target, err := addrPort(a.Remote)
	if err != nil {
		return err
	}
	return s.HostAccessCheck(filterapi.HostAccess{Protocol: a.Protocol, Target: target, Proto: a.proto(), Publishing: a.On})
}
