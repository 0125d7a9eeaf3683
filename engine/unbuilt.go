package engine

import (
	"context"
	"net"
	"net/netip"

	"github.com/sluicegw/sluice/filterapi"
	"github.com/sluicegw/sluice/flow"
)

// What is not built yet.

func (s *session) User() string                               { return "" }
func (s *session) Flags() filterapi.SessionFlags              { return filterapi.SessionNAT }
func (s *session) AttachFilter(string) error                  { return filterapi.ErrNotSupported }
func (s *session) HostAccessCheck(filterapi.HostAccess) error { return filterapi.ErrNotSupported }
func (s *session) Network() filterapi.Network                 { return network{} }
func (s *session) Close()                                     {}
func (s *session) RedirectConnections(filterapi.Redirect) (netip.AddrPort, []filterapi.Action, error) {
	return netip.AddrPort{}, nil, filterapi.ErrNotSupported
}
func (s *session) RetroactiveAllowBind(filterapi.AllowBind) (bool, error) {
	return false, filterapi.ErrNotSupported
}
func (s *session) setDataFilterFactory(*registered, filterapi.DataFilterFactory) (filterapi.Action, error) {
	return nil, filterapi.ErrNotSupported
}
func (s *session) emulateClientBind(filterapi.EmulatedBind) (*connection, error) {
	return nil, filterapi.ErrNotSupported
}

func (c *connection) SetClientAddress(netip.AddrPort) error { return filterapi.ErrNotSupported }

type network struct{}

func (network) Dial(context.Context, flow.Proto, netip.AddrPort, netip.AddrPort) (net.Conn, error) {
	return nil, filterapi.ErrNotSupported
}
func (network) Listen(netip.AddrPort, *filterapi.IPFilter) (filterapi.Listener, error) {
	return nil, filterapi.ErrNotSupported
}
func (network) ListenPacket(netip.AddrPort, *filterapi.IPFilter) (filterapi.PacketConn, error) {
	return nil, filterapi.ErrNotSupported
}

func (f firewall) ClientSession(netip.Addr) (filterapi.Session, error) {
	return nil, filterapi.ErrNotSupported
}
func (f firewall) PrivateSession(netip.Addr, string) (filterapi.Session, error) {
	return nil, filterapi.ErrNotSupported
}

// KernelEstablished takes conntrack's word that a kernel flow is established:
// for TCP the handshake is complete, for UDP the first packet was passed.
func (e *Engine) KernelEstablished(t flow.Tuple) {}
