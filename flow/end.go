package flow

import (
	"net/netip"
	"time"
)

// Counts are what a flow carried. Out is from its initiator, In towards it.
// Bytes are IP packets with their headers for a kernel flow (conntrack's own
// count) and payload for a user flow.
type Counts struct {
	OutBytes   uint64 `json:"out_bytes"`
	InBytes    uint64 `json:"in_bytes"`
	OutPackets uint64 `json:"out_packets"`
	InPackets  uint64 `json:"in_packets"`
}

// Translation is what NAT made of a flow: the addresses that the far end
// sees. An invalid AddrPort means that this side was not translated.
type Translation struct {
	// Src replaces the initiator's address and port.
	Src netip.AddrPort
	// Dst replaces the address and port that the initiator asked for.
	Dst netip.AddrPort
}

// Result says how a flow ended, for the log.
type Result string

// The results.
const (
	Closed      Result = "closed"      // both ends were done, or conntrack's timer ran out
	Reset       Result = "reset"       // one end reset it
	CutByPolicy Result = "cut"         // the gateway ended it: reload, Kill, session end
	Denied      Result = "denied"      // refused by rule, filter or default
	Refused     Result = "refused"     // the far end refused; the client was told so
	Unreachable Result = "unreachable" // the far end could not be reached; the client was told so
	TimedOut    Result = "timeout"     // the far end stayed silent
	Failed      Result = "failed"      // the gateway could not carry it
)

// End is the one report that every flow gives once when it is over, or when
// it was refused.
type End struct {
	Tuple
	Translation Translation
	Path        Path
	Start, Stop time.Time
	Counts      Counts
	Result      Result
	// Reason says more about Result: a filter's name, an error. May be empty.
	Reason string
}
