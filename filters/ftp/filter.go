// Package ftp is the application filter for the control connection of FTP
// (RFC 959, 1123, 2228, 2389, 2428, 2640, 3659, 4217, 7151). It reads every
// command and every reply from the first byte on, opens exactly the data
// connection that the client and its own server agreed on, and closes it again
// at the next negotiation or with the control connection.
package ftp

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"go.uber.org/zap"

	"github.com/sluicegw/sluice/filterapi"
)

// Name is what rules call the filter.
const Name = "ftp"

// New makes the filter.
func New() filterapi.Filter { return &filter{} }

type filter struct {
	log     *zap.Logger
	running sync.WaitGroup // goroutines of control connections
}

func (f *filter) Name() string { return Name }

func (f *filter) Init(fw filterapi.Firewall) (filterapi.Events, error) {
	f.log = fw.Logger()
	return filterapi.Events{Types: controls}, nil
}

// controls are the events of control connections: of clients of the inside, and
// of those of its servers that are published.
const controls = filterapi.ConnectTCP | filterapi.Accepted

func (f *filter) AttachToSession(s filterapi.Session) (filterapi.SessionFilter, filterapi.Events, error) {
	return &session{log: f.log, session: s, running: &f.running}, filterapi.Events{Types: controls}, nil
}

// Shutdown waits for readers that were called off when Pump gave their
// connection back. All others have ended within Pump.
func (f *filter) Shutdown() { f.running.Wait() }

// session is the filter's part in one client's session. It keeps nothing: what
// a control connection negotiated ends with its Pump.
type session struct {
	log     *zap.Logger
	session filterapi.Session
	running *sync.WaitGroup
}

func (s *session) HandleEvent(_ context.Context, ev filterapi.Event) error {
	var about *filterapi.About
	published := false
	switch ev := ev.(type) {
	case *filterapi.ConnectEvent:
		about = &ev.About
	case *filterapi.AcceptEvent:
		about, published = &ev.About, true
	default:
		return filterapi.ErrNotSupported
	}
	if about.Secondary {
		return filterapi.ErrNotSupported
	}
	opts, ok := about.Options.(*options)
	if !ok {
		opts = &options{}
	}
	c := newControl(s.log, s.session, opts, s.running)
	c.protocol, c.published = about.Protocol, published
	if err := about.Connection.AttachDataFilter(c, filterapi.PriorityNAT); err != nil {
		return fmt.Errorf("attach to control connection: %w", err)
	}
	return nil
}

func (s *session) Detach() {}

// options are those of one rule. The zero value has the defaults.
type options struct {
	readOnly      bool
	passAuth      bool
	passMalformed bool
	extra         map[string]bool
}

// ParseOptions reads the options of a rule:
//
//	read_only: false      true: commands that change something get 550
//	auth_tls: refuse      refuse: AUTH gets 534; pass: what follows it is not filtered
//	malformed: cut        cut: what is not FTP is reset; pass: it is not filtered
//	commands: []          more verbs that are FTP here
func (f *filter) ParseOptions(decode func(into any) error) (any, error) {
	var text struct {
		ReadOnly  bool     `yaml:"read_only"`
		AuthTLS   string   `yaml:"auth_tls"`
		Malformed string   `yaml:"malformed"`
		Commands  []string `yaml:"commands"`
	}
	if err := decode(&text); err != nil {
		return nil, err
	}
	o := &options{readOnly: text.ReadOnly, extra: map[string]bool{}}
	var err error
	if o.passAuth, err = isPass("auth_tls", text.AuthTLS, "refuse"); err != nil {
		return nil, err
	}
	if o.passMalformed, err = isPass("malformed", text.Malformed, "cut"); err != nil {
		return nil, err
	}
	if o.readOnly && o.passAuth {
		return nil, errors.New("auth_tls: pass hides the commands that read_only has to see")
	}
	if o.readOnly && o.passMalformed {
		return nil, errors.New("malformed: pass ends the filtering that read_only relies on")
	}
	for _, verb := range text.Commands {
		up := strings.ToUpper(verb)
		switch {
		case !isVerb(up):
			return nil, fmt.Errorf("commands: %q is not a verb: want a letter, then at most %d letters and digits", verb, maxVerb-1)
		case verbs[up] != unknown:
			return nil, fmt.Errorf("commands: %q is known already", verb)
		}
		o.extra[up] = true
	}
	return o, nil
}

func isPass(key, value, other string) (bool, error) {
	switch value {
	case "pass":
		return true, nil
	case "", other:
		return false, nil
	}
	return false, fmt.Errorf("%s: %q: want %q or %q", key, value, other, "pass")
}
