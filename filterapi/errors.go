package filterapi

import "errors"

// The errors of the API. Compare with errors.Is; the text may carry more.
var (
	// ErrInvalidArgument: a flag that does not fit the protocol, port 0 where
	// a port is needed, an unknown protocol.
	ErrInvalidArgument = errors.New("invalid argument")
	// ErrNotFound: no such object.
	ErrNotFound = errors.New("not found")
	// ErrTerminating: the object is ending or has ended; for an Action also
	// that it was used up, has expired or was cancelled before.
	ErrTerminating = errors.New("terminating")
	// ErrPolicyDenied: the access rules refuse it.
	ErrPolicyDenied = errors.New("denied by the access rules")
	// ErrNetworkDenied: no network rule joins the two networks.
	ErrNetworkDenied = errors.New("no network rule")
	// ErrBadContext: the call is not allowed at this moment, for instance
	// Deny outside the handler of the event.
	ErrBadContext = errors.New("not allowed in this context")
	// ErrAlreadyExists: the thing was set before and can be set once only, or
	// another permission stands in its way.
	ErrAlreadyExists = errors.New("already exists")
	// ErrAlreadyEmulated: the connection is emulated already, by another
	// filter or by an earlier call.
	ErrAlreadyEmulated = errors.New("already emulated")
	// ErrNotEmulated: the call is for emulated connections only.
	ErrNotEmulated = errors.New("not emulated")
	// ErrNotSupported, returned by a handler, means "not for me": the event
	// passes as if the filter had not been asked.
	ErrNotSupported = errors.New("not supported")
	// ErrNoPorts: no free run of external ports of the wanted length.
	ErrNoPorts = errors.New("no free external ports")
	// ErrQuota: the client holds as many permissions, or ports, as it may.
	ErrQuota = errors.New("quota of the client is used up")
	// ErrReleased, returned by DataFilter.Pump, gives the flow back, by the
	// rules that stand there. Returned by a Socket it says that the filter has
	// done so: nothing was received or sent.
	ErrReleased = errors.New("released")
)
