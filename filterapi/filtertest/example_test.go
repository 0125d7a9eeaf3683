package filtertest_test

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// Exec is a filter for rexec (512/tcp), whose client begins with the port that
// the server shall connect back to for the error output: "4321\0".
type Exec struct{}

func (Exec) Name() string { return "rexec" }
func (Exec) Shutdown()    {}
func (Exec) Init(filterapi.Firewall) (filterapi.Events, error) {
	return filterapi.Events{Types: filterapi.ConnectTCP}, nil
}
func (Exec) AttachToSession(s filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	return execSession{s}, filterapi.Events{Types: filterapi.ConnectTCP}, nil
}

type execSession struct{ session filterapi.Session }

func (execSession) Detach() {}
func (s execSession) HandleEvent(_ context.Context, ev filterapi.Event) error {
	connect, ok := ev.(*filterapi.ConnectEvent)
	if !ok {
		return filterapi.ErrNotSupported
	}
	return connect.Connection.AttachDataFilter(s, filterapi.PriorityNAT)
}

// Pump opens the port at the gateway, for the server alone, and says that one.
func (s execSession) Pump(_ context.Context, c filterapi.Connection, internal, external filterapi.Socket) error {
	in, out := filterapi.NewStream(internal), filterapi.NewStream(external)
	text, b := "", []byte{1}
	for b[0] != 0 && len(text) < 6 {
		if _, err := in.Read(b); err != nil {
			return err
		}
		text += string(b)
	}
	port, err := strconv.ParseUint(strings.TrimSuffix(text, "\x00"), 10, 16)
	if err != nil || b[0] != 0 || port != 0 && port < 1024 { // services listen below
		return fmt.Errorf("not a port to connect back to: %q", text)
	}
	if port != 0 {
		binds, err := s.session.BindForClient(filterapi.Bind{
			Negotiated: filterapi.Negotiated{Primary: c, Proto: flow.TCP, Flags: filterapi.Timeout},
			Clients:    []netip.AddrPort{netip.AddrPortFrom(c.Tuple().Src.Addr(), uint16(port))},
			IPFilter:   filterapi.OnlyFrom(c.Tuple().Dst.Addr()),
		})
		if err != nil {
			return err
		}
		name, _ := binds[0].ExternalName() // a bind has one
		port = uint64(name.Port())
	}
	if _, err := fmt.Fprintf(out, "%d\x00", port); err != nil {
		return err
	}
	if rest := in.Take(); rest != nil {
		if err := external.Send(rest); err != nil {
			return err
		}
	}
	return filterapi.ErrReleased // the kernel carries what follows
}
