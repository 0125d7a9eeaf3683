package filterapi

import (
	"context"
	"net/netip"

	"go.uber.org/zap"
)

// Filter is one application filter. The gateway makes it once from its list of
// built-in filters, whether or not a rule uses it. (IFWXFilter)
type Filter interface {
	// Name is what rules call the filter: lower case, no spaces, constant.
	Name() string
	// Init is called once before any event, on the start-up goroutine. It
	// does all preparation and returns the events that the filter wants to
	// hear of in new sessions. After an error the gateway runs without this
	// filter and its protocols are handled by the rules alone. (FilterInit)
	Init(Firewall) (Events, error)
	// AttachToSession is called at the first event of a session that the
	// filter registered for. The returned Events replace, for this session,
	// those of Init. A nil SessionFilter means "not interested in this
	// session" and is final for it. The events that wait for a slow answer go
	// by the FailMode; the answer counts for those that come later.
	AttachToSession(Session) (SessionFilter, Events, error)
	// Shutdown is called once when the gateway stops. It returns when the
	// filter's own goroutines have ended. Detach of a session filter may come
	// before or after it. (FilterShutdown)
	Shutdown()
}

// OptionsParser is implemented by a filter that takes options in a rule.
type OptionsParser interface {
	// ParseOptions turns the options of one rule into the filter's own value,
	// which every event of that rule carries in its Options. decode fills a
	// struct from the text, strictly: an unknown key is an error. It is called
	// by `gateway check` as well, without Init, and must not have effects.
	// (The SDK's per-rule data.)
	ParseOptions(decode func(into any) error) (any, error)
}

// FailMode says what becomes of a flow whose filter failed.
type FailMode uint8

const (
	// FailClosed refuses the flow. It is the default.
	FailClosed FailMode = iota
	// FailOpen lets the flow go on without the filter.
	FailOpen
)

// FailModer is implemented by a filter that does not want FailClosed when its
// handler returns an error, panics or misses its deadline.
type FailModer interface{ FailMode() FailMode }

// OutboundOnly is implemented by a filter that understands its protocol only
// where the client is inside: it returns why. A rule that publishes and names the
// filter is then an error of the configuration.
type OutboundOnly interface{ OutboundOnly() string }

// SessionFilter is a filter's part in one session. (IFWXSessionFilter)
type SessionFilter interface {
	// HandleEvent is called for each event of the session that the filter is
	// registered for, on a goroutine of the gateway's and for several events
	// of one session at the same time. The flow waits; ctx carries the
	// deadline. nil and ErrNotSupported let the flow go on with whatever the
	// handler did to the connection; any other error, a panic and a missed
	// deadline are handled by the filter's FailMode. The filters of one event
	// share the deadline. A handler that missed it may still run when the
	// connection's TerminatingEvent comes. (FirewallEventHandler)
	HandleEvent(ctx context.Context, ev Event) error
	// Detach is called once, after the last event of the session: forget the
	// session and everything that came from it.
	Detach()
}

// Firewall is the gateway as a filter sees it; one for all sessions, safe for
// concurrent use. (IFWXFirewall)
type Firewall interface {
	// Logger has the filter's name in every record.
	Logger() *zap.Logger
	// ClientSession finds or makes the session of a client whose packets pass
	// through the gateway. The caller closes it.
	// ErrInvalidArgument: no unicast address, or one of the gateway's own.
	ClientSession(client netip.Addr) (Session, error)
	// PrivateSession makes a session of the filter's own for a client that
	// asked the filter itself, for instance at a listening socket. Flows of
	// the client never belong to it unless a permission of it lets them in.
	// user may be empty. The caller closes it. ErrInvalidArgument.
	PrivateSession(client netip.Addr, user string) (Session, error)
	// Network's sockets belong to nobody: the access rules are not asked.
	Network
}
