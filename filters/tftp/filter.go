// Package tftp is the application filter for TFTP (RFC 1350, 2347, 2348, 2349,
// 7440). It reads every request of a client to the server's well-known port and
// lets that server answer from another port of its own, once, to the very
// address and port that the request left from. The transfer itself never meets
// the filter.
package tftp

import (
	"context"
	"fmt"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// Name is what rules call the filter.
const Name = "tftp"

// New makes the filter.
func New() filterapi.Filter { return &filter{} }

type filter struct{ log *zap.Logger }

func (f *filter) Name() string { return Name }

// OutboundOnly implements filterapi.OutboundOnly.
func (f *filter) OutboundOnly() string { return "it reads the requests of clients of the inside" }

func (f *filter) Init(fw filterapi.Firewall) (filterapi.Events, error) {
	f.log = fw.Logger()
	return filterapi.Events{Types: filterapi.UDPDestination}, nil
}

func (f *filter) AttachToSession(s filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	return &session{log: f.log, session: s}, filterapi.Events{Types: filterapi.UDPDestination}, nil
}

// Shutdown has nobody to wait for: all goroutines end within Pump.
func (f *filter) Shutdown() {}

// session is the filter's part in one client's session. It keeps nothing: what
// was permitted and not used ends with the Pump that asked for it.
type session struct {
	log     *zap.Logger
	session filterapi.Session
}

func (s *session) HandleEvent(_ context.Context, ev filterapi.Event) error {
	to, ok := ev.(*filterapi.UDPDestinationEvent)
	if !ok || to.Secondary {
		return filterapi.ErrNotSupported
	}
	opts, ok := to.Options.(*options)
	if !ok {
		opts = &options{}
	}
	r := &requests{log: s.log, session: s.session, opts: opts}
	if err := to.Connection.AttachDataFilter(r, filterapi.PriorityNAT); err != nil {
		return fmt.Errorf("attach to requests: %w", err)
	}
	return nil
}

func (s *session) Detach() {}

// options are those of one rule. The zero value has the defaults.
type options struct{ readOnly bool }

// ParseOptions reads the options of a rule:
//
//	read_only: false      true: write requests get error 2
func (f *filter) ParseOptions(decode func(into any) error) (any, error) {
	var text struct {
		ReadOnly bool `yaml:"read_only"`
	}
	if err := decode(&text); err != nil {
		return nil, err
	}
	return &options{readOnly: text.ReadOnly}, nil
}
