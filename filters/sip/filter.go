// Package sip is the application filter for SIP (RFC 3261, 3262, 3264, 3311,
// 3581, 4028, 8866) over UDP and TCP. It reads every message from the first
// byte on, writes the gateway's addresses where the client named its own, opens
// exactly the media streams that the client and the far end of its signalling
// agreed on, keeps the client reachable for as long as it is registered, and
// closes everything again when the call or the registration ends.
package sip

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// Name is what rules call the filter.
const Name = "sip"

// New makes the filter.
func New() filterapi.Filter { return &filter{stop: make(chan struct{})} }

type filter struct {
	log     *zap.Logger
	gateway filterapi.Firewall
	running sync.WaitGroup // all goroutines of the filter
	stop    chan struct{}  // closed by Shutdown
	once    sync.Once
}

func (f *filter) Name() string { return Name }

// OutboundOnly implements filterapi.OutboundOnly.
func (f *filter) OutboundOnly() string { return "its calls begin at telephones of the inside" }

// events is what the filter wants to hear of. Secondary: calls that come in at
// a registered address, and the media streams, which are cut when their call
// ends.
var events = filterapi.Events{
	Types:     filterapi.ConnectTCP | filterapi.UDPDestination | filterapi.Accepted | filterapi.Terminating,
	Secondary: true,
}

func (f *filter) Init(fw filterapi.Firewall) (filterapi.Events, error) {
	f.log, f.gateway = fw.Logger(), fw
	return events, nil
}

func (f *filter) AttachToSession(s filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	out := newSession(f, s)
	f.running.Go(out.run)
	return out, events, nil
}

// Shutdown waits for every session's goroutine, and for readers that were
// called off when a connection was given back.
func (f *filter) Shutdown() {
	f.once.Do(func() { close(f.stop) })
	f.running.Wait()
}

// HandleEvent attaches to connections of the protocol, and to those that come
// in at an address which stands for a contact of the client's.
func (s *session) HandleEvent(_ context.Context, ev filterapi.Event) error {
	switch ev := ev.(type) {
	case *filterapi.ConnectEvent:
		return s.begin(&ev.About, netip.AddrPort{})
	case *filterapi.UDPDestinationEvent:
		return s.begin(&ev.About, ev.Peer)
	case *filterapi.AcceptEvent:
		return s.begin(&ev.About, ev.Remote)
	case *filterapi.TerminatingEvent:
		s.open.forget(ev.Connection)
		return nil
	}
	return filterapi.ErrNotSupported
}

func (s *session) begin(about *filterapi.About, peer netip.AddrPort) error {
	t := about.Connection.Tuple()
	opts, ok := about.Options.(*options)
	if !ok {
		opts = defaults()
	}
	client := t.Src
	if about.Secondary {
		owner, allowed := s.open.meet(about.Connection, t, peer)
		switch {
		case !allowed:
			return about.Connection.Deny()
		case owner == nil:
			return filterapi.ErrNotSupported
		}
		client = owner.client
	}
	ch := newChannel(s, opts, client, t.Proto == flow.TCP)
	if !ch.stream {
		if err := about.Connection.SetBufferSize(maxMessage); err != nil {
			return fmt.Errorf("buffer of %d bytes: %w", maxMessage, err)
		}
	}
	if err := about.Connection.AttachDataFilter(ch, filterapi.PriorityNAT); err != nil {
		return fmt.Errorf("attach to signalling: %w", err)
	}
	return nil
}

// Detach forgets the session. Its permissions are void by then.
func (s *session) Detach() { s.once.Do(func() { close(s.over) }) }

// options are those of one rule.
type options struct {
	passMalformed bool
	media         []netip.Prefix
	calls         int
	registrations int
}

const (
	defaultCalls         = 10
	defaultRegistrations = 16
	mostOfAny            = 1000
)

func defaults() *options { return &options{calls: defaultCalls, registrations: defaultRegistrations} }

// ParseOptions reads the options of a rule:
//
//	malformed: cut       cut: what is not SIP is reset or lost; pass: it is not filtered
//	media: []            hosts other than the far end of the signalling that media may go to
//	calls: 10            of one client, at a time
//	registrations: 16    of one client, at a time
func (f *filter) ParseOptions(decode func(into any) error) (any, error) {
	text := struct {
		Malformed     string   `yaml:"malformed"`
		Media         []string `yaml:"media"`
		Calls         int      `yaml:"calls"`
		Registrations int      `yaml:"registrations"`
	}{Calls: defaultCalls, Registrations: defaultRegistrations}
	if err := decode(&text); err != nil {
		return nil, err
	}
	o := &options{calls: text.Calls, registrations: text.Registrations}
	switch text.Malformed {
	case "pass":
		o.passMalformed = true
	case "", "cut":
	default:
		return nil, fmt.Errorf("malformed: %q: want %q or %q", text.Malformed, "cut", "pass")
	}
	if o.calls < 1 || o.calls > mostOfAny {
		return nil, fmt.Errorf("calls: %d: want 1 to %d", o.calls, mostOfAny)
	}
	if o.registrations < 1 || o.registrations > mostOfAny {
		return nil, fmt.Errorf("registrations: %d: want 1 to %d", o.registrations, mostOfAny)
	}
	for _, s := range text.Media {
		p, err := parsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("media: %w", err)
		}
		o.media = append(o.media, p)
	}
	return o, nil
}

// parsePrefix reads a prefix, or an address that stands for one host.
func parsePrefix(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" && !a.Is4In6() {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return netip.Prefix{}, fmt.Errorf("%q is neither an address nor a prefix", s)
	case p != p.Masked() || p.Addr().Is4In6():
		return netip.Prefix{}, fmt.Errorf("%q has host bits", s)
	case p.Bits() == 0:
		return netip.Prefix{}, errors.New("a prefix of length 0 is everybody: name the media servers")
	}
	return p, nil
}

// mayCarry says whether media may go to a host: the far end of the signalling,
// or one that the administrator names.
func (o *options) mayCarry(a, peer netip.Addr) bool {
	return a == peer || slices.ContainsFunc(o.media, func(p netip.Prefix) bool { return p.Contains(a) })
}
