// Package filterapi is the contract between the gateway and application
// filters: everything that a filter may know and do, and nothing else of the
// gateway.
//
// # How a filter lives
//
//	New ── Init ──┬── AttachToSession ── HandleEvent ... ── Detach     one per client session
//	              │                          │
//	              │                   AttachDataFilter
//	              │                          │
//	              │                        Pump ── nil | ErrReleased | error
//	              └── Shutdown
//
// The gateway makes each filter once and calls Init, which returns the events
// that it wants to hear of. At the first such event of a client's session it
// calls AttachToSession; the SessionFilter that comes back gets the events of
// that session. An event is raised while the first packet of the flow is held:
// nobody else has heard of the flow, and the handler may deny it, put a data
// filter on it, or leave it alone. The rules were asked before; what they
// refuse never reaches a filter.
//
// A data filter carries the bytes itself: Pump gets a socket on each side and
// owns the connection until it returns. Between two filters on one connection
// the sockets are joined; a filter cannot tell that from the network. A flow
// without a data filter stays in the kernel.
//
// # What a filter may permit
//
// Protocols that agree on further connections need two calls of Session.
// AllowFutureConnect lets the client out to one exact target; BindForClient
// lets a peer in, to an external address that stands for the client. Both
// return when the kernel has acknowledged, so the line that announces the
// address may be sent as soon as they return, and not before. What is permitted
// is used once, expires with the Timeout flag, and is void at the latest with
// the session; a filter cancels it earlier, when the protocol says so.
// An address that must be written into a message before the peer has agreed to
// it is reserved with an empty IPFilter, and armed by SetIPFilter.
//
// # Rules of hand
//
//   - Parse from the first byte on. What is not the protocol ends filtering for
//     good; nothing that comes later may open anything.
//   - A message may arrive in any pieces, and several in one piece.
//   - Permit only what the host that owns the connection negotiated, and only
//     towards the two ends of that connection.
//   - Bound what you hold, and do not read from one side what the other does
//     not take.
//   - Hold no lock while calling a Socket, a Session or a Connection.
//   - Before Pump returns ErrReleased, send what you have copied. A goroutine
//     that waits in Recv then is called off; one that has a Buffer sends it on
//     and ends. The rules are at DataFilter.
//
// Package filtertest runs a filter without a gateway. A tutorial is in
// docs/writing-a-filter.md.
//
// # Coming from the ISA Server and Forefront TMG SDK
//
// The object model is that of the SDK; its names map as follows.
//
//	SDK                                   here
//	IFWXFirewall                          Firewall
//	IFWXFilter                            Filter
//	  FilterInit                          Filter.Init
//	  AttachToSession                     Filter.AttachToSession
//	  FilterShutdown                      Filter.Shutdown
//	FwxFilterHookEvents                   Events
//	  fwxAnyProtocol                      Events.AnyProtocol
//	  fwxAssociatedProtocolsAllConnections  Events.Secondary
//	IFWXSession                           Session
//	  GetClientAddress                    Session.ClientAddr
//	  AllowFutureConnect                  Session.AllowFutureConnect, FutureConnect
//	  BindForClient                       Session.BindForClient, Bind
//	IFWXSessionFilter                     SessionFilter
//	  FirewallEventHandler                SessionFilter.HandleEvent
//	  Detach                              SessionFilter.Detach
//	FwxFirewallEvent                      Event
//	  fwx_Connect_Tcp                     ConnectTCP, ConnectEvent
//	  fwx_Udp_Destination                 UDPDestination, UDPDestinationEvent
//	  fwx_Bind_Tcp, fwx_Bind_Udp          BindTCP, BindUDP, BindEvent
//	  fwx_Listen                          Listen, ListenEvent
//	  fwx_AcceptedConnection              Accepted, AcceptEvent
//	  fwx_ConnectionTerminating           Terminating, TerminatingEvent
//	  PerRuleProcessedData                About.Options, OptionsParser
//	  IsSecondary                         About.Secondary
//	IFWXConnection                        Connection
//	  AttachDataFilter                    Connection.AttachDataFilter
//	  Deny, IFWXUdpDestination::Deny      Connection.Deny
//	  GetSession                          Connection.Session
//	  GetExternalSocketName               Connection.ExternalName
//	  GetExternalPeerName                 Connection.ExternalPeer
//	  SetIpFilter, GetIpFilter            Connection.SetIPFilter, Connection.IPFilter
//	  SetBufferSize                       Connection.SetBufferSize
//	  Kill                                Connection.Kill
//	FwxDataFilterPriorityClass            Priority
//	  fwx_dfpc_NAT ... fwx_dfpc_Emulation PriorityNAT ... PriorityEmulation
//	IFWXDataFilter                        DataFilter
//	  SetSockets                          the call of DataFilter.Pump
//	  Detach                              the end of Pump's context
//	IFWXSocket                            Socket
//	  Recv, Send, SendTo                  Socket.Recv, Socket.Send; Buffer.Addr is the address
//	  Shutdown, Close                     Socket.Shutdown, Socket.Close
//	IFWXIOBuffer                          Buffer
//	IFWXIOCompletion                      none: the calls block
//	IFWXFirewallAction                    Action
//	IFWXIpFilter                          IPFilter
//	FWX_FLAG_ALLOW_MULTIPLE               AllowMultiple
//	FWX_FLAG_TIMEOUT                      Timeout, and Expiry
//	FWX_FLAG_NO_KERNEL_MODE               NoKernelMode
//	FWX_FLAG_ALLOW_ADDRESSES_IN_CLASS_C_NETWORK  ToSameNet
//	FWX_FLAG_ALLOW_ADDRESSES_IN_NETWORK   ToSameNetwork
//	FWX_FLAG_ALLOW_ADDRESSES_ALL          ToAll
//	E_INVALIDARG, FWX_E_INVALID_ARG       ErrInvalidArgument
//	ERROR_NOT_FOUND                       ErrNotFound
//	FWX_E_TERMINATING                     ErrTerminating
//	FWX_E_POLICY_RULES_DENIED             ErrPolicyDenied
//	FWX_E_NETWORK_RULES_DENIED            ErrNetworkDenied
//	FWX_E_BAD_CONTEXT                     ErrBadContext
//	FWX_E_ALREADY_EXISTS                  ErrAlreadyExists
//	E_NOTIMPL, FWX_E_NOT_SUPPORTED        ErrNotSupported
//
// And so do its habits:
//
//   - A call with a completion callback is a call that blocks. What ran on a
//     completion thread runs on a goroutine of the filter's, which ends when
//     the socket fails or the context of Pump is cancelled.
//   - A structure with a type field and a union is an interface with one type
//     for each arm: switch on the type of the Event.
//   - An HRESULT is an error; compare with errors.Is. S_OK is nil. An output
//     parameter is a result.
//   - S_FALSE, success with a reservation, is a boolean result beside the
//     error.
//   - E_NOTIMPL from an event handler is ErrNotSupported, and means that the
//     event passes.
//   - A NULL IP filter is nil and lets everybody in; an empty one lets nobody
//     in.
//   - A reference count is the garbage collector's business; but forget a
//     connection at its TerminatingEvent and a session at Detach.
//   - A protocol GUID is the name of the protocol in the configuration.
package filterapi
