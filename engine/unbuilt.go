package engine

import (
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// What is not built yet.

func (s *session) RedirectConnections(filterapi.Redirect) (netip.AddrPort, []filterapi.Action, error) {
	return netip.AddrPort{}, nil, filterapi.ErrNotSupported
}
func (s *session) RetroactiveAllowBind(filterapi.AllowBind) (bool, error) {
	return false, filterapi.ErrNotSupported
}
func (s *session) emulateClientBind(filterapi.EmulatedBind) (*connection, error) {
	return nil, filterapi.ErrNotSupported
}

func (c *connection) SetClientAddress(netip.AddrPort) error { return filterapi.ErrNotSupported }

// KernelEstablished takes conntrack's word that a kernel flow is established:
// for TCP the handshake is complete, for UDP the first packet was passed.
func (e *Engine) KernelEstablished(t flow.Tuple) {}
