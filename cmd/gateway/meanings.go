package main

import "strings"

// meanings says what the counters count, for the table of `gateway counters`.
var meanings = map[string]string{
	"conntrack.events":    "ends of kernel flows that conntrack reported",
	"conntrack.losses":    "times that conntrack's reports were lost, and the flows looked through anew",
	"conntrack.malformed": "reports of conntrack that could not be read",

	"mappings.living": "endpoint-independent mappings now",
	"mappings.flows":  "their flows now",

	"queue.packets":    "first packets that the kernel has shown",
	"queue.decisions":  "questions that the engine has answered",
	"queue.absorbed":   "repeated SYNs dropped while their flow was judged",
	"queue.held":       "further packets held until their flow was judged",
	"queue.dropped":    "packets dropped, for whatever reason",
	"queue.requeued":   "packets moved to a queue for slow answers",
	"queue.late":       "flows whose answer came too late",
	"queue.enobufs":    "times that a queue's socket overflowed",
	"queue.reopened":   "queues that were lost and taken again",
	"queue.over_held":  "packets dropped: their flow held too many",
	"queue.over_dials": "flows dropped: too many connects were pending",
	"queue.overload":   "flows not judged: too many at once",
	"queue.malformed":  "packets that could not be read, or TCP other than SYN",
	"queue.lost":       "flows whose packet did not reach its queue for slow answers",
	"queue.gone":       "answers for packets that had gone",
	"queue.refused":    "answers that the kernel refused",
	"queue.unsent":     "answers that could not be sent",
	"queue.exhausted":  "first packets for whose flow there was no external port, or no room",
	"queue.flows":      "flows under judgement now",
	"queue.dials":      "connects pending now",

	"tcp.flows":           "TCP flows in user space now",
	"tcp.unknown":         "connections that nothing was waiting for, reset",
	"tcp.expired":         "upstream connections whose initiator never came",
	"tcp.accept_errors":   "connections that could not be accepted",
	"tcp.filter_failures": "data filters that failed",

	"udp.flows":          "UDP flows in user space now",
	"udp.sockets":        "their sockets now",
	"udp.unknown_peer":   "datagrams from peers that nobody asked for",
	"udp.no_flow":        "datagrams without a flow",
	"udp.one_way":        "dropped datagrams of clients that may not answer",
	"udp.oversize":       "datagrams too large for their data filters",
	"udp.link_full":      "datagrams lost: a data filter did not keep up",
	"udp.send_lost":      "datagrams that the kernel did not take",
	"udp.refused":        "flows that could not be carried",
	"udp.errors_sent":    "ICMP errors passed on",
	"udp.errors_limited": "ICMP errors held back by the rate limit",

	"ports.leased":     "external ports at lease now",
	"ports.resting":    "external ports in quarantine now",
	"ports.clients":    "who has them, the gateway itself among them",
	"ports.blocks":     "blocks of ports that clients have now",
	"ports.over_quota": "requests for a port refused: the client had all that one may have",
	"ports.exhausted":  "requests for a port refused: none was left",

	"pcp.requests":   "datagrams of hosts that are served by PCP and NAT-PMP",
	"pcp.lost":       "of these, dropped: too many waited",
	"pcp.granted":    "mappings made, renewed or given back",
	"pcp.denied":     "requests denied by the rules, by a filter, or for another's mapping",
	"pcp.over_quota": "requests refused: the host had all that one may have",
	"pcp.exhausted":  "requests refused: no port was left, or not the one that was insisted on",
	"pcp.failed":     "requests that failed: the kernel has refused, or nothing tells the external address",
	"pcp.bad":        "requests that could not be read, or ask for what nobody can give",
	"pcp.mappings":   "mappings now",

	"socks.clients":          "connections of clients of SOCKS now",
	"socks.requests":         "requests of theirs",
	"socks.denied":           "requests denied by the rules or a filter, or for what is no target",
	"socks.failed":           "requests that failed: no port was left, or the client had all that one may have",
	"socks.over_connections": "connections refused: the client had all that one may have",
	"socks.wrong_passwords":  "connections that ended with a wrong password",
	"socks.bad":              "connections without a request: not SOCKS, too slow, or no password where one is wanted",

	"table.queued":    "first packets for user space",
	"table.permitted": "first packets that a permission let in",
	"table.refused":   "packets refused with an answer",
	"table.discarded": "packets dropped silently",
	"table.exhausted": "first packets for which there was no port, or whose client had all its sessions",
	"table.spoofed":   "packets whose source cannot be where they came from",
	"table.not_syn":   "TCP that belongs to no known connection",
	"table.cut":       "packets of flows that were ended",
	"table.unmarked":  "packets that would have been forwarded without a decision",

	"reports.losses": "times that reports of denials and permissions were lost",
}

// meaning of a counter; the queues have their number in the name.
func meaning(counter string) string {
	if s, ok := meanings[counter]; ok {
		return s
	}
	switch {
	case !strings.HasPrefix(counter, "queue."):
		return ""
	case strings.HasSuffix(counter, ".depth"):
		return "packets that wait now"
	case strings.HasSuffix(counter, ".full"):
		return "packets dropped: the queue was full"
	case strings.HasSuffix(counter, ".missed"):
		return "packets dropped: its socket was full"
	}
	return ""
}
