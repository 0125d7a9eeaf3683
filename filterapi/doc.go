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
// Package filtertest runs a filter without a gateway. The guide for authors is
// docs/writing-a-filter.md.
//
// # Coming from the ISA Server and Forefront TMG SDK
//
// The object model is that of the SDK. Its names map as follows; what has no
// counterpart stands in the list behind the table, with the reason.
//
//	SDK                                   here
//	IFWXFirewall                          Firewall
//	  GetClientSession                    Firewall.ClientSession
//	  CreatePrivateSession                Firewall.PrivateSession
//	  CreateNetworkSocket                 Firewall's Network: Dial, Listen, ListenPacket
//	  CreateBuffer, CreateConstBuffer     NewBuffer
//	  CreateWindowBuffer                  Buffer.Split
//	  CreateIpFilter                      OnlyFrom, or the zero IPFilter
//	  CreateOverlapped, HookToCompletionPort          absent (1)
//	  StartHeavyBlockingOperation, End...             absent (2)
//	  GetHostByName, GetHostByAddr        absent (3)
//	IFWXFirewall2
//	  CreateRadiusAuthenticator           absent (4)
//	  CreateSSLNetworkSocket              absent (4)
//	IFWXFilter                            Filter
//	  FilterInit                          Filter.Init
//	  AttachToSession                     Filter.AttachToSession
//	  FilterShutdown                      Filter.Shutdown
//	FwxFilterHookEvents                   Events
//	  dwGlobalEvents                      Events.Types, and the fields beside it
//	  fwxAnyProtocol                      Events.AnyProtocol
//	  fwxAssociatedProtocolsAllConnections  Events.Secondary
//	  fwxSourceNAT                        Transparent
//	  fwxSourceWSP                        Explicit
//	  FWX_ALL_SOURCES                     Events.Sources 0
//	IFWXSession                           Session
//	  GetClientAddress                    Session.ClientAddr
//	  GetClientMachineName                absent (5)
//	  GetAuthenticatedUser                Session.User
//	  GetSessionFlags                     Session.Flags
//	    FWX_SESSION_NAT                   SessionNAT
//	    FWX_SESSION_PRIVATE               SessionPrivate
//	    FWX_SESSION_AUTHENTICATED         SessionAuthenticated
//	    FWX_SESSION_TERMINATED            SessionTerminated
//	  HostAccessCheck                     Session.HostAccessCheck, HostAccess
//	    FWX_FLAG_USE_MIME, FWX_FLAG_USE_EXTENTION     absent (6)
//	    FWX_FLAG_CHECK_PUBLISHING         HostAccess.Publishing
//	  none                                Session.ExternalAddr
//	  AttachFilter                        Session.AttachFilter, by name
//	  CreateNetworkSocket                 Session.Network
//	  AllowFutureConnect                  Session.AllowFutureConnect, FutureConnect
//	  BindForClient                       Session.BindForClient, Bind
//	    Backlog                           absent (8)
//	  RedirectConnections                 Session.RedirectConnections, Redirect
//	  RetroactiveAllowBind                Session.RetroactiveAllowBind, AllowBind
//	  SetDataFilterFactory                Session.SetDataFilterFactory, DataFilterFactory
//	  EmulateClientBind                   Session.EmulateClientBind, EmulatedBind
//	none                                  Session.ConnectForClient, Leg
//	none                                  Session.ListenForClient, ClientListener
//	  ProxyExternalAddress, ProxyAddress  Redirect.External, FutureConnect.External, Bind.External
//	  pSessionFilter, punkContext         Negotiated.Notify, Negotiated.Context
//	  pConnection                         Negotiated.Primary
//	  ProtocolGuid                        Negotiated.Protocol, a name
//	FWX_PROTOCOL_TCP, FWX_PROTOCOL_UDP    flow.TCP, flow.UDP
//	FWX_FLAG_ALLOW_MULTIPLE               AllowMultiple
//	FWX_FLAG_TIMEOUT                      Timeout, and Negotiated.Expiry
//	FWX_FLAG_NO_KERNEL_MODE               NoKernelMode
//	FWX_FLAG_ADDRESS_BASED                AddressBased
//	FWX_FLAG_BIDIRECTIONAL                Bidirectional
//	FWX_INCREASE_RECEIVE_BUFFER           IncreaseReceiveBuffer
//	FWX_FLAG_ALLOW_ADDRESSES_IN_CLASS_C_NETWORK  ToSameNet
//	FWX_FLAG_ALLOW_ADDRESSES_IN_NETWORK   ToSameNetwork
//	FWX_FLAG_ALLOW_ADDRESSES_ALL          ToAll
//	DefaultAllowedAddressesIn...          none: without a flag, that very host
//	FWX_FLAG_PROXY_MODE                   none needed (7)
//	none                                  EvenPort, Discarding, Preferred, SameSource
//	IFWXSessionFilter                     SessionFilter
//	  FirewallEventHandler                SessionFilter.HandleEvent
//	  Detach                              SessionFilter.Detach
//	FwxFirewallEvent                      Event, and About in each
//	  EventType, Parameters               the type of the Event, Event.Kind
//	  EventSource                         About.Source
//	  ProtocolGuid                        About.Protocol, a name; empty for GUID_NULL
//	  PerRuleProcessedData                About.Options, OptionsParser
//	  IsSecondary                         About.Secondary
//	  FilterAccess: FWX_DENY              Connection.Deny, Destination.Deny
//	    FWX_EMULATE                       Connection.EmulateForConnect, Connection.EmulateForBind
//	    FWX_PASS                          nothing done, or ErrNotSupported
//	    FWX_ALLOW                         absent (9)
//	  fwx_Connect_Tcp, FwxConnectEvent    ConnectTCP, ConnectEvent
//	  fwx_Udp_Destination, FwxUdpDestination  UDPDestination, UDPDestinationEvent
//	  fwx_Bind_Tcp, fwx_Bind_Udp, FwxBindEvent  BindTCP, BindUDP, BindEvent
//	  fwx_Listen, FwxListenEvent          Listen, ListenEvent
//	  fwx_AcceptedConnection, FwxAcceptEvent  Accepted, AcceptEvent
//	    piConnectionAccepted              About.Connection of an AcceptEvent
//	  fwx_EstablishedConnection, FwxEstablishedConnectionEvent  Established, EstablishedEvent
//	    UserContext                       EstablishedEvent.Context
//	  fwx_ConnectionTerminating, FwxEndConnectionEvent  Terminating, TerminatingEvent
//	  fwx_GetHostByName, fwx_GetHostByAddr  absent (3)
//	IFWXConnection                        Connection
//	  AttachDataFilter                    Connection.AttachDataFilter
//	  AttachDataFilterWithDestination     Connection.AttachDataFilterWithDestination
//	  Deny                                Connection.Deny
//	  EmulateForConnect                   Connection.EmulateForConnect
//	  EmulateForBind                      Connection.EmulateForBind
//	  EmulateConnection                   Connection.EmulateConnection
//	  IncrementBytesSentCounter           Connection.IncrementBytesSent
//	  SetSocketName                       Connection.SetSocketName
//	  GetExternalSocketName               Connection.ExternalName
//	  GetExternalPeerName                 Connection.ExternalPeer
//	  GetSession                          Connection.Session
//	  GetConnectionFlags                  Connection.Flags
//	    FWX_CONNECTION_INTERNAL_ADDRESS_TRANSLATION  InternalAddressTranslation
//	  SetIpFilter, GetIpFilter            Connection.SetIPFilter, Connection.IPFilter
//	  SetClientAddress                    Connection.SetClientAddress
//	  SetBufferSize                       Connection.SetBufferSize (10)
//	  none                                Connection.SetExpiry, Connection.Expiry
//	  Kill                                Connection.Kill
//	  SetProtocol                         absent (11)
//	FwxDataFilterPriorityClass            Priority
//	  fwx_dfpc_NAT                        PriorityNAT
//	  fwx_dfpc_Internal                   PriorityInternal
//	  fwx_dfpc_PostTrust                  PriorityPostTrust
//	  fwx_dfpc_Middle                     PriorityMiddle
//	  fwx_dfpc_PreTrust                   PriorityPreTrust
//	  fwx_dfpc_External                   PriorityExternal
//	  fwx_dfpc_Emulation                  PriorityEmulation
//	IFWXDataFilter                        DataFilter
//	  SetSockets                          the call of DataFilter.Pump
//	  Detach                              the end of Pump's context
//	IFWXSlowDataFilter                    absent (12)
//	  OkToTerminate                       the return of DataFilter.Pump
//	IFWXSocket                            Socket
//	  Recv                                Socket.Recv
//	  Send, SendTo                        Socket.Send; Buffer.Addr is the address
//	  Shutdown, Close                     Socket.Shutdown, Socket.Close
//	none                                  Stream, Pass
//	IFWXIOCompletion                      absent (1)
//	  CompleteAsyncIO                     the return of Recv and Send
//	IFWXIOBuffer                          Buffer
//	  GetBufferAndSize, GetBufferSizes, SetDataSize, Append, ReadAt  the slice Buffer.Data
//	  SendToBuffer                        Buffer.Split
//	IFWXNetworkSocket                     net.Conn, Listener, PacketConn
//	  Connect, Bind, Listen, Accept       Network.Dial, Network.Listen, Network.ListenPacket
//	  GetSockName, GetPeerName            LocalAddr, RemoteAddr
//	  GetSockOpt, SetSockOpt              absent (8)
//	  GetIpFilter, SetIpFilter            Restrictable
//	  SetPacketFilterOptions              absent (11)
//	IFWXAcceptCompletion                  absent (1)
//	IFWXUdpDestination                    Destination
//	  Deny                                Destination.Deny
//	IFWXFirewallAction                    Action
//	  Cancel                              Action.Cancel
//	IFWXIpFilter                          IPFilter, of both address families
//	  IncludeRange, ExcludeRange          IPFilter.IncludeRange, IPFilter.ExcludeRange
//	  IncludeFilter, ExcludeFilter        IPFilter.IncludeFilter, IPFilter.ExcludeFilter
//	  IsIncluded, Compare, Clone          IPFilter.Includes, IPFilter.Equal, IPFilter.Clone
//	S_OK, S_FALSE                         nil; a boolean beside the error
//	E_INVALIDARG, FWX_E_INVALID_ARG       ErrInvalidArgument
//	ERROR_NOT_FOUND, REGDB_E_CLASSNOTREG, FWX_E_FILTER_NOT_REGISTERED  ErrNotFound
//	FWX_E_TERMINATING                     ErrTerminating
//	FWX_E_POLICY_RULES_DENIED, FWX_E_PROTOCOL_RULES_DENIED  ErrPolicyDenied
//	FWX_E_NETWORK_RULES_DENIED            ErrNetworkDenied
//	FWX_E_BAD_CONTEXT                     ErrBadContext
//	FWX_E_ALREADY_EXISTS                  ErrAlreadyExists
//	FWX_E_ALREADY_EMULATED                ErrAlreadyEmulated
//	FWX_E_NOT_EMULATED                    ErrNotEmulated
//	E_NOTIMPL, FWX_E_NOT_SUPPORTED        ErrNotSupported
//	FWX_E_IS_BUSY                         ErrQuota
//	WSAEADDRINUSE of a bind               ErrNoPorts
//	WSAEINVAL of the external names       ErrBadContext
//	E_OUTOFMEMORY, WSAEFAULT, FWX_E_BUFFERFULL  absent (13)
//	FWX_E_ALREADY_IN_BLOCKING_OP, FWX_E_NOT_IN_BLOCKING_OP  absent (2)
//	FWX_E_MIME_NEEDED                     absent (6)
//	FWX_E_NOT_AUTHENTICATED               absent (4)
//	FWX_E_GRACEFUL_SHUTDOWN               flow.Closed, in the log
//	FWX_E_ABORTIVE_SHUTDOWN               flow.Reset, in the log
//	FWX_E_CONNECTION_KILLED               flow.CutByPolicy, in the log
//	FWX_E_..._DROPPED, FWX_E_SEQ_ACK_MISMATCH  absent (14)
//
// What is absent, and why:
//
//  1. Calls block, and goroutines are cheap: there is no completion port.
//  2. A goroutine that blocks keeps no other from running, so nothing has to
//     be announced.
//  3. Only an agent on the client asked the gateway for names. A transparent
//     client has its own resolver, and a filter has package net.
//  4. Who a user is, the filter finds out that asks him; the name of its
//     private session is what rules know. One that wants TLS or RADIUS brings a
//     library, and runs it over the connections of Network.
//  5. Only an agent on the client told it.
//  6. Rules have no content types.
//  7. What a primary connection's InternalAddressTranslation says holds for what
//     is negotiated on it, without a flag.
//  8. The kernel's default serves. What can be set on a socket is set through
//     net.
//  9. The rules are asked before filters are, and no filter allows what they
//     refuse; its permission calls ask them again.
//  10. The defaults differ for streams: DefaultStreamBuffer, for less overhead.
//  11. Later editions of the SDK have dropped it already, with its flag
//     FWX_FLAG_EMULATE_PROTOCOL.
//  12. A connection is over when Pump has returned, and the gateway waits for
//     that; nobody has to ask for more time.
//  13. Go's memory: a slice grows, and there is no buffer of the caller's.
//  14. The kernel drops and counts such packets; no filter hears of them.
//
// Its habits map, too:
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
